"""The evaluation's numbers and what is drawn of them: intervals, table, curves and sheets."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, stage
from PIL import Image

from lib import sheets
from lib.eval import paper, table
from lib.eval.curves import curves
from lib.intervals import bootstrap, resamples, wilson
from lib.run import UserError
from lib.settings import PRESETS, Settings

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
    shown = table.readable(summary_of(example(), "imagereward", "pickscore"),
                           ["imagereward", "pickscore"], facts)
    assert shown.columns.tolist() == [                # no empty minutes, no single benchmark
        "model", "human pairs", "prompts", "imagereward", "pickscore",
        "imagereward: gain over base", "pickscore: gain over base", "pickscore: over Iter0",
        "imagereward: wins over base", "pickscore: wins over base"]
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


@pytest.fixture
def run(tmp_path):
    """A run folder with Iter0 and Iter3 (the base's weights, which will do here), for stage 05."""
    for k in (0, 3):
        shutil.copytree(ROOT / "lib/world/base/unet", tmp_path / f"run/iter{k}/unet")
    return tmp_path / "run"


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


def test_a_picture_that_is_gone_is_told_by_its_row_from_1(tmp_path):
    names = make_pictures(tmp_path, 4)
    (tmp_path / "3.png").unlink()
    with pytest.raises(UserError, match="row 4: cannot read the image .*3.png"):
        sheets.read_pictures(tmp_path, names)

    pairs = pd.DataFrame({"prompt": "a star", "win": names[0::2], "lose": names[1::2]})
    with pytest.raises(UserError, match="row 2: cannot read the image .*3.png"):
        sheets.pair_sheet(tmp_path, pairs, tmp_path / "sheet.png", ("winner", "loser"))
