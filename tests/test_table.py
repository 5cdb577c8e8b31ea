"""The evaluation's numbers and what is drawn of them: intervals, table, curves and sheets."""

import csv
import io
import json
import re
import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, call, refused, settings_of, stage
from PIL import Image

from lib import sheets
from lib.eval import compare, paper, table, words
from lib.eval.curves import curves
from lib.intervals import bootstrap, resamples, wilson
from lib.run import UserError, write_json
from lib.settings import PRESETS, Settings, build_parser

PAPERS_TABLE1 = ROOT.parent / "shared/data/paper_table1.csv"
STEPS = ["base", "Iter0", "Iter1"]


def example(n: int = 60) -> pd.DataFrame:
    """Scores of base, Iter0, Iter1 and of a rival that lacks ten prompts; two pictures a prompt."""
    rng = np.random.default_rng(1)
    skill = rng.normal(size=n)
    lines = []
    for model, shift in (("base", 0.), ("Iter0", .3), ("Iter1", .5), ("DiffusionDPO", .4)):
        prompts = n - 10 if model == "DiffusionDPO" else n
        for i in range(prompts):
            for seed in (0, 1):
                pickscore = 20 + skill[i] + shift + .5 * rng.normal()
                lines.append((model, "pickapic", "", i, f"prompt {i}", seed, "x.png", pickscore,
                              rng.normal()))
    return pd.DataFrame(lines, columns=[*table.KEYS, "pickscore", "imagereward"])


def summary_of(scores: pd.DataFrame, *names: str) -> pd.DataFrame:
    return table.summarise(scores, list(names), "base", "Iter0")


# ---- intervals ----

def test_wilsons_interval_is_the_set_of_shares_not_rejected():
    """Its ends are the shares p at which the score test of p is just significant."""
    for successes, n in ((0, 10), (3, 7), (50, 100), (128, 128)):
        for p in wilson(successes, n):
            distance = successes / n - p
            assert distance ** 2 == pytest.approx(1.96 ** 2 * p * (1 - p) / n, abs=1e-12)


def test_resamples_are_means_over_n_draws_and_always_the_same():
    weights = resamples(7)
    assert weights.shape == (4000, 7)
    assert np.allclose(weights.sum(1), 1)
    resamples.cache_clear()
    assert np.array_equal(resamples(7), weights)


def test_columns_of_a_bootstrap_share_their_resamples():
    """The interval of a constant difference has no width, whatever the columns are."""
    values = np.random.default_rng(0).normal(size=(40, 2))
    low, high = bootstrap(values)
    shifted_low, shifted_high = bootstrap(values + 3)
    assert low.shape == (2,)
    assert np.allclose(shifted_low, low + 3)
    assert np.allclose(shifted_high, high + 3)


# ---- the numbers of the table ----

@pytest.mark.parametrize("model,prompts", [("Iter1", 60), ("DiffusionDPO", 50)])
def test_intervals_are_those_of_a_paired_bootstrap(model, prompts):
    """Against resampling written out, with other random numbers."""
    scores = example()
    row = summary_of(scores, "pickscore").set_index("model").loc[model]
    mean = scores.groupby(["model", "prompt_id"]).pickscore.mean()
    values, base, iter0 = (mean[name].to_numpy()[:prompts] for name in (model, "base", "Iter0"))

    rng = np.random.default_rng(7)
    low_of = {"mean": "low", "gain": "gain_low", "over_iter0": "over_iter0_low"}
    for key, x in (("mean", values), ("gain", values - base), ("over_iter0", values - iter0)):
        means = [x[rng.integers(0, prompts, prompts)].mean() for _ in range(4000)]
        interval = [row[low_of[key]], row[low_of[key].replace("low", "high")]]
        assert row[key] == pytest.approx(x.mean())
        assert np.allclose(interval, np.quantile(means, [.025, .975]), atol=.2 * np.std(means))

    assert row.win_rate == pytest.approx(np.mean(values > base))
    assert row.prompts == prompts


def test_pairing_takes_the_prompts_part_out():
    row = summary_of(example(), "pickscore").set_index("model").loc["Iter1"]
    assert row.high - row.low > 1.5 * (row.gain_high - row.gain_low)


def test_base_has_no_gain_and_iter0_none_over_itself():
    summary = summary_of(example(), "pickscore").set_index("model")
    assert summary.loc["base", ["gain", "win_rate", "over_iter0"]].isna().all()
    assert not np.isnan(summary.loc["Iter0", "gain"])
    assert np.isnan(summary.loc["Iter0", "over_iter0"])


def test_ties_are_half_a_win():
    scores = example(4).query("model in ('base', 'Iter0')").copy()
    scores["pickscore"] = np.where(scores.model == "base", 1., 1. + (scores.prompt_id == 3))
    summary = summary_of(scores, "pickscore").set_index("model")
    assert summary.win_rate["Iter0"] == .25 + .5 * .75


def test_each_style_has_rows_beside_the_whole():
    scores = example()
    scores["style"] = np.where(scores.prompt_id % 2, "photo", "anime")
    summary = summary_of(scores, "pickscore").query("model == 'Iter1'").set_index("style")
    assert summary.index.tolist() == ["", "anime", "photo"]
    assert summary.prompts.tolist() == [60, 30, 30]
    photos = scores.query("model == 'Iter1' and style == 'photo'").pickscore
    assert summary.loc["photo", "mean"] == pytest.approx(photos.mean())


# ---- the table that people read ----

@pytest.mark.parametrize("gain,low,high,text,sign", [
    (.1, .01, .3, "+0.100 [+0.010, +0.300]", 1),
    (-.1, -.2, -.01, "-0.100 [-0.200, -0.010]", -1),
    (-.1, -.3, .1, "-0.100 [-0.300, +0.100]", 0),
    (.1, .0004, .2, "+0.100 [+0.000, +0.200]", 0),
    (.1, -.0004, .2, "+0.100 [-0.000, +0.200]", 0),
    (-.1, -.2, -.0004, "-0.100 [-0.200, -0.000]", 0),
])
def test_a_gain_is_clear_if_its_interval_as_printed_excludes_zero(gain, low, high, text, sign):
    result = {"gain": gain, "gain_low": low, "gain_high": high}
    assert table._gain(result, "gain") == table.Cell(text, sign)


def test_the_readable_table_has_a_row_per_model_and_signs_for_gains_only():
    facts = {"base": {"human pairs": "0", "minutes": ""}, "Iter1": {"human pairs": "50"}}
    shown = table.readable(summary_of(example(), "pickscore", "imagereward"),
                           ["pickscore", "imagereward"], facts)
    assert shown.columns.tolist() == [                # no empty minutes, no single benchmark
        "model", "human pairs", "prompts",
        "pickscore", "pickscore: gain over base", "pickscore: over Iter0",
        "pickscore: wins over base",
        "imagereward", "imagereward: gain over base", "imagereward: wins over base"]
    assert shown["model"].tolist() == ["base", "Iter0", "Iter1", "DiffusionDPO"]
    assert shown["human pairs"].tolist() == ["0", "", "50", ""]
    assert shown["prompts"].tolist() == ["60", "60", "60", "50"]
    assert [cell.sign for cell in shown["pickscore: gain over base"]] == [0, 1, 1, 1]
    assert shown["pickscore: gain over base"][0].text == ""
    for column in ("pickscore", "pickscore: wins over base"):
        assert all(isinstance(cell, str) for cell in shown[column])


def test_markdown_is_one_line_a_row_whatever_the_text():
    frame = pd.DataFrame({"a|b": ["two\nlines", table.Cell("+1", 1)], "<c>": [1, "x & y"]})
    assert table.markdown(frame) == ("| a\\|b | &lt;c&gt; |\n"
                                     "| --- | --- |\n"
                                     "| two lines | 1 |\n"
                                     "| +1 | x &amp; y |\n")


# Texts that come from data, each of which something takes for more than text.
HOSTILE = ["=2+2", "+1|x", "-1", "@SUM(A1)", "\t=1", "\r=1", "a\\|b", "<img src=x>", "`code|`", "*",
           "![a](http://example.org/a.png)", "[a](http://example.org)", "[a][b]", "[a]: http://x"]


def cells_of(line: str) -> list[str]:
    """The cells of a line of a Markdown table, with what a backslash stands before as it is."""
    cells, escaped = [""], False
    for letter in line.strip():
        if letter == "|" and not escaped:
            cells.append("")
        elif letter == "\\" and not escaped:
            escaped = True
            continue
        else:
            cells[-1] += letter
        escaped = False
    return [cell.strip() for cell in cells[1:-1]]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_data_is_text_in_markdown_and_in_spreadsheets(text):
    line = " ".join(text.split())
    written = table.markdown(pd.DataFrame({"model": [text], "n": [1]})).splitlines()[-1]
    assert cells_of(written) == [line.replace("<", "&lt;").replace(">", "&gt;"), "1"]
    assert not re.search(r"\][(\[:]|<|(?<!\\)[`*]", written)

    scores = example(4).assign(style=text).replace({"model": {"Iter1": text}})
    frame = table.for_programs(summary_of(scores, "pickscore"), {text: {"human pairs": text}}, {},
                               [text])
    lines = list(csv.reader(io.StringIO(table.as_csv(frame), newline="")))
    cells = [cell for line in lines[1:] for cell in line if not re.fullmatch(r"-?[\d.e-]+", cell)]
    assert not [cell for cell in cells if re.match(r"\s*[=+\-@]", cell)]
    assert text.replace("\t", " ").replace("\r", " ") in [cell.removeprefix("'") for cell in cells]


def test_the_screens_table_has_the_main_columns_and_fits():
    scores = example().assign(aesthetics=5., hpsv2=27.).replace(
        {"model": {"DiffusionDPO": "a name \x1b[31mthat is long enough for two lines"}})
    scores = pd.concat([scores, scores.assign(benchmark="parti")])
    names = ["pickscore", "imagereward", "aesthetics", "hpsv2"]
    facts = {"Iter1": {"human pairs": "50000 + the start's"}}
    summary = summary_of(scores, *names)
    text = table.for_terminal(summary, names, facts)
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) == 1 + 2 * 4
    assert "\x1b" not in text

    short = table.for_terminal(summary[summary.benchmark == "parti"], names[:2], {})
    head, *_, line, _ = short.splitlines()
    gain = table._gain(summary[summary.model == "Iter1"].iloc[0], "gain")
    assert head.split() == ["model", "pickscore", "over", "base", "over", "Iter0", "wins",
                            "imagereward"]
    assert str(gain) in line


@pytest.mark.parametrize("begun_at, told", [
    ("abc", "code abc, "),
    ("def", "code def (the run), abc (this evaluation), "),
])
def test_the_notes_tell_the_code_of_the_run_and_that_of_its_evaluation(begun_at, told):
    made = {"commit": "abc", "versions": {}, "hardware": {"cpu": "fast"}}
    *_, last = table.notes(Settings(), made, begun_at, example(2), [], {})
    assert last == f"{told}cpu fast"


@pytest.mark.parametrize("gain, low, high, told", [
    (.523, .501, .546, "Iter3 beats base by 0.523 utility [0.501, 0.546] on 240 unseen prompts"),
    (-.1, -.2, -.01, "Iter3 does not beat base: -0.100 utility [-0.200, -0.010] on 240"),
    (.01, -.02, .04, "Iter3 cannot be told from base: +0.010 utility [-0.020, +0.040] on 240"),
])
def test_what_was_learned_is_told_in_a_sentence(gain, low, high, told):
    row = {"model": "Iter3", "benchmark": "world", "style": "", "score": "utility", "prompts": 240,
           "gain": gain, "gain_low": low, "gain_high": high}
    summary = pd.DataFrame([row, row | {"model": "base", "gain": np.nan}])
    sentence, = words.learned(summary, "utility", "Iter3", "128")
    assert sentence.startswith(told)
    assert sentence.endswith("with 128 human pairs")

    loss = "What Iter3 has lost: utility falls by 0.100 [0.010, 0.200]"
    assert words.lost(summary, "Iter3") == (loss if high < 0 else "")


@pytest.fixture
def run(tmp_path):
    """A run folder with Iter0 and Iter3 (the base's weights, which will do here), for stage 05."""
    for k in (0, 3):
        shutil.copytree(ROOT / "lib/world/base/unet", tmp_path / f"run/iter{k}/unet")
    return tmp_path / "run"


SMALL = ["--preset=tiny", "--eval-count=4", "--eval-seeds=1", "--sample-steps=2", "--device=cpu"]


def evaluate(run: Path, *more: str) -> pd.DataFrame:
    """Stage 05 on a run folder -> the scores of all pictures."""
    assert call("05", run, *SMALL, *more) is None
    return pd.read_parquet(run / "eval/scores.parquet")


@pytest.fixture(scope="module")
def two_models(tmp_path_factory) -> Path:
    """A folder of base and Iter0, evaluated, to be read only."""
    run = tmp_path_factory.mktemp("two") / "run"
    shutil.copytree(ROOT / "lib/world/base/unet", run / "iter0/unet")
    evaluate(run)
    return run


@pytest.fixture
def evaluated(two_models, tmp_path) -> Path:
    """The same to change or break."""
    return shutil.copytree(two_models, tmp_path / "evaluated")


def models_in(run: Path) -> list[str]:
    """The models that the written table has."""
    lines = (run / "eval/table.md").read_text().splitlines()
    return [cells_of(line)[0] for line in lines if line.startswith("|")][2:]


def test_a_row_stays_in_the_table_until_it_is_dropped(evaluated, capsys, monkeypatch):
    moving = evaluated.parent / "moving"
    shutil.copytree(evaluated / "iter0/unet", moving)
    monkeypatch.chdir(evaluated.parent)
    evaluate(evaluated, "--row", "further=extrapolate:Iter0:2", "--row", "moved=moving",
             "--row", "gone=" + str(shutil.copytree(moving, evaluated.parent / "gone")))

    # From another working folder. One that is gone costs only itself; how to forget it is told.
    monkeypatch.chdir(ROOT)
    shutil.rmtree(evaluated.parent / "gone")
    capsys.readouterr()
    evaluate(evaluated, "--drop", "further")
    assert models_in(evaluated) == ["base", "Iter0", "moved"]
    out = capsys.readouterr().out
    assert out.count("is left out: ") == 1
    assert "row gone is left out: " in out
    assert "(--drop gone forgets it)" in out
    evaluate(evaluated, "--drop", "gone", "--drop", "moved")
    assert models_in(evaluated) == ["base", "Iter0"]
    refused(call("05", evaluated, "--drop", "moved"), "--drop moved", "no such row")


@pytest.mark.parametrize("name", ["x" * 300, "a\nb", "\udcff"])
def test_a_row_with_a_name_that_no_table_can_show_is_refused(run, name):
    message = call("05", run, *SMALL, "--row", f"{name}=extrapolate:Iter0:2")
    refused(message, "--row", "at most 60 characters")
    message.encode()


# What may have happened to a file that this stage has made, or reads: how it is broken, and what
# must be said when the stage runs again.
def garbage(path: Path) -> None:
    path.write_bytes(b"garbage")


def texts(path: Path) -> None:
    pd.read_parquet(path).assign(utility="high").to_parquet(path)


def left_chunks(path: Path) -> None:
    path.with_suffix("").mkdir()
    shutil.copy(path, path.with_suffix("") / "000000.parquet")


# What befell at once; a round's judge.json is the door of three kinds.
CRASHES = [
    [
        ("eval/scores/base-*/*.parquet", garbage, ""),
        ("eval/scores/Iter0-*/*.parquet", texts, ""),
        ("eval/rows.json", garbage, "rows.json cannot be read and is begun anew"),
        ("iter1/judge.json", garbage, "iter1/judge.json cannot be read and is left out; delete"),
        ("iter2/judge.json", lambda path: path.write_text('{"pairs": [1], "low": "x"}'),
         "iter2/judge.json cannot be read"),
        ("iter3/judge.json", lambda path: path.write_text("[" * 100_000),
         "iter3/judge.json cannot be read"),
        ("seed/people.json", lambda path: path.write_text("3"), ""),
        ("seed/holdout.parquet", garbage, ""),
        ("iter0/train_log.parquet", garbage, ""),
    ],
    [
        ("eval/scores/base-*/*.parquet", left_chunks, ""),
        ("eval/scores/Iter0-*/*.parquet", lambda path: path.unlink(), ""),
        ("eval/images/Iter0-*/*_0.png", lambda path: path.write_bytes(b""), ""),
    ],
]


def test_damaged_files_are_made_again_or_named(evaluated, capsys):
    whole = pd.read_parquet(evaluated / "eval/scores.parquet")
    for faults in CRASHES:
        for pattern, damage, _ in faults:
            for path in sorted(evaluated.glob(pattern)) or [evaluated / pattern]:
                path.parent.mkdir(exist_ok=True)
                damage(path)

        capsys.readouterr()
        pd.testing.assert_frame_equal(evaluate(evaluated), whole)
        out = capsys.readouterr().out
        for _, _, told in faults:
            assert told in out
        left = [path for path in (evaluated / "eval/scores").glob("*/*") if path.is_dir()]
        assert left == []


def test_a_file_in_the_place_of_the_results_is_refused(run):
    (run / "eval").write_text("mine")
    refused(call("05", run, *SMALL), "eval", "is a file", "move it away")


def test_without_scores_pictures_and_page_are_made_all_the_same(mini_copy, capsys, monkeypatch):
    """None is asked for, or one cannot be had: then the remedy is told."""
    from lib.eval import scorers

    def not_there(source: str, file: str):
        raise UserError(f"{file} cannot be downloaded: give its folder")

    monkeypatch.setattr(scorers, "fetch", not_there)
    folder = mini_copy / "eval"
    before = pd.read_parquet(folder / "scores.parquet")
    for wanted, said in (("none", ""), ("pickscore,aesthetics", "cannot be downloaded")):
        for name in ("index.html", "samples.png", "table.md", "walk.md"):
            (folder / name).unlink()
        capsys.readouterr()
        assert call("05", mini_copy, "--scores", wanted) is None
        out = capsys.readouterr().out
        assert out.count("is left out: ") == len(wanted.split(",")) - (wanted == "none")
        assert said in out

        after = pd.read_parquet(folder / "scores.parquet")
        assert after.columns.tolist() == table.KEYS
        assert after["image"].tolist() == before["image"].tolist()
        assert not (folder / "curves.png").exists()
        assert 'src="walk/iter1.png"' in (folder / "walk.md").read_text()
        assert "walk/iter1.png" in (folder / "index.html").read_text()
        assert "| Iter2 | 8 |" in (folder / "table.md").read_text()

    # Scores belong to the evaluation: they may be asked for again at any time.
    assert call("05", mini_copy, "--scores", "world") is None
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "scores.parquet"), before)


def test_the_last_lines_tell_what_was_learned_and_a_command_that_works(mini, capsys, tmp_path):
    shutil.copytree(mini, tmp_path / "a run")
    assert call("05", tmp_path / "a run") is None
    *_, learned, judge, last = [line for line in capsys.readouterr().out.splitlines()
                                if not line.startswith("What")]
    assert re.match(r"Iter2 .* utility \[.*\] on 8 unseen prompts, with 8 human pairs$", learned)
    assert "of 6 held-out pairs" in judge

    opening, command = last.split("; try ")
    page, = shlex.split(opening.removeprefix("next: open "))
    assert Path(page) == tmp_path / "a run/eval/index.html"
    program, preset, *given = shlex.split(command)
    assert program == "./run_sail.sh"
    s = settings_of(mini)
    other = PRESETS[preset] | vars(build_parser("").parse_args(given))
    differ = {name for name, value in asdict(s).items() if other[name] != value}
    assert differ - {"run", "micro_batch", "checkpoint_every"} == {"alpha"}

    # Where that run is there already, the two are to be compared; from no mixup one goes back.
    Path(other["run"]).mkdir()
    assert words.next_command(replace(s, run=str(tmp_path / "a run"))).split()[1] == "compare"
    without = replace(s, alpha=1., run=other["run"])
    program, word, *runs = shlex.split(words.next_command(without))
    assert [word, *map(Path, runs)] == ["compare", Path(other["run"]), tmp_path / "a run"]
    back = words.next_command(replace(s, alpha=1.))
    assert "mini-mixup " in back
    assert "--alpha" not in back


# ---- two runs compared ----

def test_two_runs_are_compared_prompt_by_prompt(mini, tmp_path, capsys):
    other = shutil.copytree(mini, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["settings"] |= {"alpha": 1., "device": "cpu"}
    write_json(config, other / "config.json")
    (other / "code/03_rank.py").write_text("# edited\n")
    scores = pd.read_parquet(other / "eval/scores.parquet")
    noise = np.random.default_rng(0).normal(size=len(scores))
    scores["utility"] += .1 + .01 * noise
    scores["prompt_id"] += 1000                                    # numbers do not matter
    scores[scores["prompt_id"] != scores["prompt_id"].iloc[0]].to_parquet(
        other / "eval/scores.parquet")

    compare.main([str(mini), str(other), "--out", str(tmp_path / "page.html")])
    out = capsys.readouterr().out
    place = ["prompt", "seed"]
    mean = {}
    for name, run in (("mini", mini), ("other", other)):
        pictures = pd.read_parquet(run / "eval/scores.parquet").query("model == 'Iter2'")
        mean[name] = pictures.set_index(place).utility
    gains = (mean["other"] - mean["mini"]).dropna().groupby("prompt").mean()
    assert len(gains) == 7
    assert f"utility on 7 prompts of world: {gains.mean():+.3f} [" in out
    assert re.search(r"alpha +0.25 +1.0", out)
    assert "device" not in out
    assert "03_rank.py" in out
    assert "one run seed each" in out

    text = (tmp_path / "page.html").read_text()
    data = json.loads(re.search('type="application/json">(.*?)</script>', text).group(1))
    assert data["models"] == ["mini", "other"]
    assert data["scores"][0] == "utility"
    assert len(data["rows"]) == 7 * 2
    for row in data["rows"]:
        for address, *_ in row[-1]:
            assert (tmp_path / address).exists()


@pytest.mark.parametrize("change, fault", [
    (lambda run: (run / "config.json").unlink(), "no config.json"),
    (lambda run: (run / "eval/scores.parquet").unlink(), "run 05_eval.py"),
    (lambda run: replace_prompts(run), "no evaluation prompt in common"),
    (lambda run: only_base(run), "without --only"),
])
def test_runs_that_cannot_be_compared_are_told_so(mini, tmp_path, change, fault):
    other = tmp_path / "other"
    (other / "eval").mkdir(parents=True)
    for name in ("config.json", "eval/scores.parquet"):
        shutil.copy(mini / name, other / name)
    change(other)
    with pytest.raises(UserError, match=fault) as caught:
        compare.main([str(mini), str(other)])
    assert "\n" not in str(caught.value)


def replace_prompts(run: Path) -> None:
    path = run / "eval/scores.parquet"
    pd.read_parquet(path).assign(prompt="another").to_parquet(path)


def only_base(run: Path) -> None:
    path = run / "eval/scores.parquet"
    pd.read_parquet(path).query("model == 'base'").to_parquet(path)


def test_the_table_tells_data_cost_gains_and_versions(run):
    # The ledger as if the stages before had run.
    costs = pd.DataFrame({"stage": ["01_seed", "04_train_dpo", "04_train_dpo"],
                          "iter": pd.array([None, 0, 3], dtype="Int64"),
                          "seconds": [60., 120., 240.]})
    costs.to_parquet(run / "ledger.parquet")
    stage("05").main(["--preset=tiny", "--run", str(run), "--eval-count", "4", "--eval-seeds", "1",
                      "--sample-steps", "2", "--device", "cpu",
                      "--row", "further=extrapolate:Iter0:2", "--row", "a <b>|c=guide:Iter3:1"])

    text = (run / "eval/table.md").read_text()
    head = next(line for line in text.splitlines() if line.startswith("| model"))
    for column in ("human pairs", "minutes", "utility: gain over base", "utility: wins over base",
                   "utility: over Iter0"):
        assert column in head
    for line in ("| base | 0 |  |", "| Iter0 | 128 | 3.0 |", "| Iter3 | 128 | 7.0 |",
                 "| further | 128 | 3.0 |"):
        assert line in text
    assert "a &lt;b&gt;\\|c" in text
    assert "<b>" not in text
    assert "row further: extrapolate:Iter0:2" in text
    assert "2 steps, guidance 2.0, 32 pixels, torch.float32" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text

    csv = pd.read_csv(run / "eval/table.csv")
    assert csv[csv.model == "Iter3"].minutes.eq(7).all()
    scorers = csv.scorer.unique()
    assert len(scorers) == 1
    assert "oracle" in scorers[0] and "@" in scorers[0]        # which code has judged
    assert f"scorer {scorers[0]}" in text


# ---- the paper's number beside ours ----

@pytest.mark.skipif(not PAPERS_TABLE1.exists(), reason=f"{PAPERS_TABLE1} is not there")
@pytest.mark.parametrize("preset,base_model", [("sd15", "SD1.5"), ("sdxl", "SDXL")])
def test_the_papers_numbers_are_those_of_its_table(preset, base_model):
    published = pd.read_csv(PAPERS_TABLE1)
    published = published[published.base_model == base_model]
    names = published.method.str.removeprefix("SAIL (").str.removesuffix(")").tolist()
    rows = [tuple(row[3:]) for row in published.itertuples(index=False)]
    assert dict(zip(names, rows)) == paper.TABLE[preset]
    assert names == list(paper.TABLE[preset])

    for name, million in zip(names, published.human_pairs_million):
        expected = "" if np.isnan(million) else f"{million}M"
        assert paper.HUMAN_PAIRS.get(name, paper.SAIL_HUMAN_PAIRS) == expected


def test_the_papers_number_stands_beside_ours():
    scores = example().assign(aesthetics=5.)
    summary = summary_of(scores, "pickscore", "imagereward")
    pairs = {"base": "0", "Iter0": "50000", "Iter1": "50000"}
    beside = paper.table("sd15", summary, pairs).set_index("model")
    assert list(beside.columns) == ["human pairs", "PickScore", "ImageReward"]   # those measured
    assert list(beside.index) == ["base", "SAIL (Iter0)", "SAIL (Iter1)", "DiffusionDPO"]
    assert beside["human pairs"].tolist() == ["0", "50000 (0.05M)", "50000 (0.05M)", " (0.8M)"]

    for model, name, theirs in (("base", "base", 20.62), ("Iter1", "SAIL (Iter1)", 20.89)):
        ours = scores[scores.model == model].pickscore.mean()
        row = summary[(summary.model == model) & (summary["score"] == "pickscore")].iloc[0]
        expected = (f"{ours:.2f} [{row.low:.2f}, {row.high:.2f}] "
                    f"({theirs:.2f}, {ours - theirs:+.2f})")
        assert beside.PickScore[name] == expected
    assert paper.table("tiny", summary, {}).empty


def test_the_table_for_programs_has_facts_the_papers_number_and_the_scorer():
    summary = summary_of(example(), "pickscore", "imagereward")
    csv = table.for_programs(summary, {"Iter0": {"human pairs": "50000"}}, paper.numbers("sd15"),
                             ["pickscore v", "imagereward w"])
    row = csv[(csv.model == "Iter1") & (csv.score == "imagereward")].iloc[0]
    assert row.paper == .1137
    assert row.over_paper == pytest.approx(row["mean"] - .1137)
    assert row.scorer == "imagereward w"
    assert csv[csv.model == "Iter0"].human_pairs.eq("50000").all()
    assert csv[csv.model == "Iter1"].human_pairs.eq("").all()


def test_departures_from_the_papers_evaluation_are_named():
    exact = PRESETS["sd15"] | {"run": "none"}
    assert paper.departures(Settings(**exact)) == ""
    assert paper.departures(Settings(run="none")) == ""        # the paper has no such world
    shorter = Settings(**exact | {"sample_steps": 20})
    assert "sample_steps 20 (50)" in paper.departures(shorter)


# ---- curves ----

@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that are drawn, as matplotlib has them when they are done."""
    import matplotlib.pyplot as plt

    done = []
    monkeypatch.setattr(plt, "close", done.append)
    return done


def test_curves_have_bands_and_other_rows_are_dashed(tmp_path, figures):
    summary = summary_of(example(), "pickscore", "imagereward")
    summary = summary.replace({"model": {"DiffusionDPO": "cost $5, not $6"}})
    curves(summary, ["pickscore", "imagereward"], STEPS, [], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000

    axes = figures[0].axes
    assert [axis.get_title() for axis in axes] == ["pickscore", "imagereward"]
    results = summary[summary.score == "pickscore"].set_index("model")
    solid, dashed = axes[0].lines
    assert solid.get_linestyle() == "-"
    assert solid.get_ydata().tolist() == results["mean"][STEPS].tolist()
    assert dashed.get_linestyle() == "--"
    assert dashed.get_ydata()[0] == results["mean"]["cost $5, not $6"]

    band = axes[0].collections[0].get_paths()[0].vertices
    for x, model in enumerate(STEPS):
        heights = [y for place, y in band if place == x]
        assert min(heights) == results.low[model]
        assert max(heights) == results.high[model]


def test_the_judges_accuracy_stands_beside_the_curves(tmp_path, figures):
    judges = [{"model": 0, "accuracy": .7, "low": .6, "high": .75},
              {"model": 1, "accuracy": .6, "low": .5, "high": .7}]
    curves(summary_of(example(), "pickscore"), ["pickscore"], STEPS, judges, tmp_path / "c.png")
    last = figures[0].axes[-1]
    assert last.get_title() == "self-judge on held-out human pairs"
    assert [label.get_text() for label in last.get_xticklabels()] == ["Iter0", "Iter1"]
    bars = last.collections[0].get_segments()
    assert np.allclose([bar[:, 1] for bar in bars], [[.6, .75], [.5, .7]])


# ---- sheets ----

def make_pictures(folder: Path, count: int) -> list[str]:
    """Pictures of one colour each: 0.png, 1.png, ..."""
    names = []
    for i in range(count):
        names.append(f"{i}.png")
        Image.new("RGB", (32, 32), (10 * i, 100, 200)).save(folder / names[-1])
    return names


def colours(path: Path, places: list[tuple[int, int]]) -> list[int]:
    """Which of make_pictures' pictures stand at these columns and rows of a sheet."""
    picture = Image.open(path)
    step_x = sheets.SIDE + sheets.GAP
    step_y = sheets.SIDE + sheets.LINE + sheets.GAP
    found = []
    for column, row in places:
        red, _, _ = picture.getpixel((50 + column * step_x, 80 + row * step_y))
        found.append(red // 10)
    return found


def test_pictures_are_read_as_tensors(tmp_path):
    names = make_pictures(tmp_path, 3)
    pictures = sheets.read_pictures(tmp_path, names)
    assert pictures.shape == (3, 3, 32, 32)
    assert pictures[2, :, 5, 5].tolist() == pytest.approx([20 / 255, 100 / 255, 200 / 255])


def test_winners_stand_beside_losers(tmp_path):
    names = make_pictures(tmp_path, 10)
    pairs = pd.DataFrame({"prompt": "a star", "win": names[0::2], "lose": names[1::2]})
    sheets.pair_sheet(tmp_path, pairs, tmp_path / "sheet.png", ("winner", "loser"))
    places = [(0, 0), (1, 0), (6, 0), (7, 0), (0, 1), (1, 1)]
    assert colours(tmp_path / "sheet.png", places) == [0, 1, 6, 7, 8, 9]


def test_the_sheet_of_samples_has_prompts_of_every_style_that_all_models_have_drawn(tmp_path):
    names = make_pictures(tmp_path, 24)
    lines = []
    for m, model in enumerate(["base", "Iter0"]):
        for i in range(12):
            lines.append((model, "b", "xyz"[i // 4], i, f"prompt {i}", 0, names[12 * m + i]))
    scores = pd.DataFrame(lines, columns=table.KEYS).drop(index=0)      # base lacks prompt 0
    sheets.sample_sheet(tmp_path, scores, tmp_path / "sheet.png", count=6)
    drawn = colours(tmp_path / "sheet.png", [(0, row) for row in range(6)])
    assert drawn == [1, 2, 4, 5, 8, 9]
    assert colours(tmp_path / "sheet.png", [(1, 0), (1, 5)]) == [13, 21]


def test_hostile_prompts_do_no_harm_to_sheets(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    scores = example(12).assign(prompt="two\nlines <script> \u202e 猫 $x$", image="x.png")
    sheets.sample_sheet(tmp_path, scores, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size[0] > 300


def test_a_picture_that_is_gone_is_told_by_its_name(tmp_path):
    names = make_pictures(tmp_path, 4)
    (tmp_path / "3.png").unlink()
    with pytest.raises(UserError, match="3.png: cannot read the image .*delete it"):
        sheets.read_pictures(tmp_path, names)

    pairs = pd.DataFrame({"prompt": "a star", "win": names[0::2], "lose": names[1::2]})
    with pytest.raises(UserError, match="3.png: cannot read the image .*delete it"):
        sheets.pair_sheet(tmp_path, pairs, tmp_path / "sheet.png", ("winner", "loser"))
