"""Stage 05: each kind of row is what it says, scores belong to nothing else, and the table's numbers are right."""

import gc
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, stage
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from lib import models, oracle, paper, report, rows, scoring
from lib.run import UserError, seed_of
from lib.settings import PRESETS, Settings

SMALL = ["--preset=tiny", "--eval-count", "4", "--eval-seeds", "1", "--sample-steps", "2", "--device", "cpu"]
TABLE1 = ROOT.parent / "shared/data/paper_table1.csv"


def changed(seed: int) -> UNet2DConditionModel:
    """The base's UNet with noise on its weights."""
    unet = UNet2DConditionModel.from_pretrained(ROOT / "lib/tiny", subfolder="unet")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(.1 * p.std(correction=0) * torch.randn(p.shape, generator=generator))
    return unet


def evaluate(run: Path, *more) -> pd.DataFrame:
    """Stage 05's scores of a run folder."""
    stage("05").main(["--run", str(run), *SMALL, *map(str, more)])
    return pd.read_parquet(run / "eval/scores.parquet")


def refuses(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module", autouse=True)
def few_to_collect():
    """What is imported by now is left out when the stage frees a model's memory: half the time of a small evaluation."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models of a run, iter0 and iter3, and one from outside: a UNet's folder, and a pipeline with it."""
    folder = tmp_path_factory.mktemp("made")
    for k in (0, 3):
        changed(k).save_pretrained(folder / f"iter{k}/unet")
    changed(9).save_pretrained(folder / "outside/unet")
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A run folder with Iter0 and Iter3, for stage 05 alone."""
    for k in (0, 3):
        shutil.copytree(made / f"iter{k}", tmp_path / f"run/iter{k}")
    return tmp_path / "run"


@pytest.fixture
def s(run):
    return Settings(run=str(run), device="cpu")


@torch.no_grad()
def predicts(unet, generator=torch.Generator()) -> torch.Tensor:
    """A UNet's answer (2, 12, 8, 8) to one fixed question."""
    generator.manual_seed(5)
    noisy, text = torch.randn(2, 12, 8, 8, generator=generator), torch.randn(2, 16, 64, generator=generator)
    return models.predict(unet, noisy, torch.tensor([300, 700]), {"embeds": text})


# ---- models ----

def hub_cache(monkeypatch, folder: Path, repo: str, files: Path) -> None:
    """A hub of one model: this machine's cache has it, and nothing else answers."""
    from huggingface_hub import constants
    commit, home = "c0ffee" * 6 + "c0ff", folder / f"models--{repo.replace('/', '--')}"
    shutil.copytree(files, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs/main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("kind", ["folder with unet/", "UNet folder", "UNet beside other files", "only half precision",
                                  "hub id, unet/", "hub id, root"])
def test_a_unet_is_found_wherever_it_lies(made, s, kind, tmp_path, monkeypatch):
    where, inner = made / "outside", made / "outside/unet"
    if kind == "UNet folder":
        where = inner
    elif kind == "UNet beside other files":
        where = shutil.copytree(inner, tmp_path / "repository")
        (where / "README.md").write_text("a model")
        save_file({"x": torch.zeros(1)}, where / "other.safetensors")
    elif kind == "only half precision":
        where = tmp_path / "half"
        UNet2DConditionModel.from_pretrained(inner).half().save_pretrained(where / "unet", variant="fp16")
    elif kind.startswith("hub"):
        hub_cache(monkeypatch, tmp_path, "me/mine", inner if kind.endswith("root") else where)
        where = "me/mine"
        assert rows.identity(s, where) == "me/mine@" + "c0ffee" * 6 + "c0ff"
    unet = rows.load_row(s, str(where))
    expected = predicts(UNet2DConditionModel.from_pretrained(inner).eval())
    assert torch.allclose(predicts(unet), expected, atol=5e-3 if "half" in kind else 0)
    assert not unet.training and not any(p.requires_grad for p in unet.parameters())


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """One adapter of rank 4 in diffusers' form and in kohya's, there with alpha 2."""
    from peft import LoraConfig, get_peft_model_state_dict
    folder, unet = tmp_path_factory.mktemp("adapters"), changed(0)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    StableDiffusionPipeline.save_lora_weights(folder / "folder", get_peft_model_state_dict(unet))
    state = load_file(folder / "folder" / rows.ADAPTER)
    kohya = {}
    for key, weight in state.items():
        module, end = key.removeprefix("unet.").split(".lora_")                     # end: A.weight or B.weight
        name, part = "lora_unet_" + module.replace(".", "_"), "lora_down" if end[0] == "A" else "lora_up"
        kohya |= {f"{name}.{part}.weight": weight, f"{name}.alpha": torch.tensor(2.)}
    save_file(kohya, folder / "kohya.safetensors")
    shutil.copy(folder / "folder" / rows.ADAPTER, folder / "mine.safetensors")
    return folder


@pytest.mark.parametrize("name", ["folder", "mine.safetensors", "kohya.safetensors", "hub id", "hub file"])
def test_an_adapter_in_the_weights_equals_diffusers_own(adapters, s, name, tmp_path, monkeypatch):
    where = adapters / {"hub id": "folder", "hub file": "kohya.safetensors"}.get(name, name)
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "lib/tiny", dtype=torch.float32)
    base = predicts(pipe.unet)
    if where.is_file():
        pipe.load_lora_weights(where.parent, weight_name=where.name)
    else:
        pipe.load_lora_weights(where)
    if name.startswith("hub"):
        hub_cache(monkeypatch, tmp_path, "me/adapter", adapters / "folder" if name == "hub id" else adapters)
        where = "me/adapter" if name == "hub id" else "me/adapter/kohya.safetensors"
    ours, theirs = predicts(rows.load_row(s, str(where))), predicts(pipe.unet)
    assert (theirs - base).abs().max() > .05
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_extrapolation_is_a_line_through_base_and_iter0(s):
    base, iter0 = (dict(models.load_unet(s, k).named_parameters()) for k in (-1, 0))
    for gamma in (0, 1, 2.5):
        made = dict(rows.load_row(s, f"extrapolate:Iter0:{gamma}").named_parameters())
        for key, p in base.items():
            if gamma in (0, 1):
                assert torch.equal(made[key], iter0[key] if gamma else p), key
            assert torch.allclose(made[key].double(), p.double() + gamma * (iter0[key].double() - p.double()), atol=1e-6)


def test_guidance_adds_the_difference_of_two_predictions(s, monkeypatch):
    base, iter3 = predicts(models.load_unet(s, -1)).double(), predicts(models.load_unet(s, 3)).double()
    assert torch.equal(predicts(rows.load_row(s, "guide:Iter3:0")), iter3.float())
    for w in (1.5, -.5):
        found = predicts(rows.load_row(s, f"guide:Iter3:{w}")).double()
        assert torch.allclose(found, (1 + w) * iter3 - w * base, atol=1e-5)


def bad_models(made, adapters, folder: Path) -> dict[str, tuple]:
    """where: words of the refusal."""
    other = json.loads((made / "outside/unet/config.json").read_text())
    changes = {"sd": {"cross_attention_dim": 768}, "clip": {"_class_name": "CLIPTextModel"}, "weightless": {}}
    for name, change in changes.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(other | change))
    (folder / "weightless/diffusion_pytorch_model.safetensors").write_bytes(b"<html>")
    (folder / "empty").mkdir()
    (folder / "broken.safetensors").write_bytes(b"<html>")
    both = load_file(adapters / "mine.safetensors")
    text = {key.replace("unet.", "text_encoder.", 1): weight.clone() for key, weight in both.items()}
    save_file(both | text, folder / "both.safetensors")
    save_file({"unrelated.weight": torch.zeros(2)}, folder / "nothing.safetensors")
    return {"sd": ("cross_attention_dim 768", "same architecture"), "clip": ("CLIPTextModel", "UNet2DConditionModel"),
            "empty": ("no unet/config.json", "adapter"), "nowhere": ("no such file or folder",),
            "broken.safetensors": ("no adapter that diffusers reads",), "both.safetensors": ("text_encoder", "--model"),
            "nothing.safetensors": ("nothing.safetensors",), "nowhere/x.safetensors": ("no such file or folder",)}


def test_a_row_that_cannot_work_is_refused_before_any_is_drawn(made, adapters, run, s, tmp_path, monkeypatch):
    def nobody(*_, **__):
        raise ConnectionError("no name\nresolution")

    monkeypatch.setattr("huggingface_hub.list_repo_files", nobody)
    bad = {str(tmp_path / name): words for name, words in bad_models(made, adapters, tmp_path).items()}
    bad |= {"me/typing-error": ("ConnectionError", "local copy"), "run/typing-error": ("no such file or folder",),
            "extrapolate:Iter7:2": ("iter7/unet does not exist", "--iter 7"), "guide:Iter0": ("guide:IterK:W",),
            "images:nowhere": ("images:nowhere: no such file or folder",)}
    monkeypatch.chdir(tmp_path)
    for where, words in bad.items():
        message = refuses(evaluate, run, "--row", f"mine={where}")
        assert where.removeprefix("images:") in message and all(word in message for word in words), message
    assert not (run / "eval").exists()
    assert "download it again" in refuses(rows.load_row, s, str(tmp_path / "weightless"))


# ---- which rows there are ----

@pytest.mark.parametrize("only", ["", "Iter3, base", "Iter3", "Iter0,Iter3"])
def test_only_these_models_are_drawn_scored_and_shown(run, only):
    names = [m for m in ("base", "Iter0", "Iter3") if m in (only or "base Iter0 Iter3")]
    scores = evaluate(run, *(["--only", only] if only else []))
    assert list(scores.model.unique()) == names and len(scores) == 4 * len(names)
    assert sorted(p.name.rsplit("-", 1)[0] for p in (run / "eval/images").iterdir()) == sorted(names)
    table = pd.read_csv(run / "eval/table.csv")
    assert list(table.model.unique()) == names
    assert ("gain" in table) == ("base" in names) and ("over_iter0" in table) == ("Iter0" in names)


@pytest.mark.parametrize("more, words", [
    (["--only", "base,Iter7"], ["--only base,Iter7", "'Iter7'", "base, Iter0, Iter3"]), (["--only", ","], ["''"]),
    (["--row", "base=x/y"], ["'base'", "taken"]), (["--only", "base", "--row", "Iter0=x/y"], ["'Iter0'", "taken"]),
    (["--row", "x/y"], ["--row x/y", "NAME=WHERE"]), (["--row", "m=x/y", "--row", "m=x/z"], ["'m'", "taken"]),
    (["--images", "x", "--only", "base"], ["--images", "--row NAME=images:PATH"])])
def test_rows_that_cannot_be_named_so(run, more, words):
    message = refuses(evaluate, run, *more)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("preset", ["sd15", "sdxl"])
def test_rivals_are_rows_and_one_that_is_gone_costs_only_itself(preset, monkeypatch, capsys):
    def check(s, where):
        if where.startswith("mhdang/"):
            raise UserError(f"{where}: gone")

    monkeypatch.setattr(rows, "check", check)
    own = SimpleNamespace(images="", row=[], only="", rivals=True)
    found = stage("05").rows_of(Settings(**PRESETS[preset] | {"run": "none"}), own)
    assert {name for name, where in found.items() if isinstance(where, str)} == {
        "sd15": {"DiffusionSPO"}, "sdxl": {"DiffusionSPO", "MaPO"}}[preset]
    assert "row DiffusionDPO is left out: mhdang/dpo-sd" in capsys.readouterr().out


# ---- pictures that exist ----

@pytest.fixture
def pictures(run, tmp_path):
    """Pictures of base and their prompts: a folder with captions, and the same as tables."""
    scores = evaluate(run, "--only", "base")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, row in enumerate(scores.itertuples()):
        shutil.copy(run / row.image, folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(row.prompt + "\n")
    table = pd.DataFrame({"file_name": [f"{i}.png" for i in range(4)], "caption": scores.prompt, "style": scores["style"]})
    table.to_csv(folder / "own.csv", index=False)
    table.to_parquet(folder / "own.parquet", index=False)
    table.to_json(folder / "own.jsonl", orient="records", lines=True)
    return scores, folder


@pytest.mark.parametrize("name", ["", "own.csv", "own.parquet", "own.jsonl"])
def test_pictures_alone_are_scored_without_a_model(pictures, tmp_path, name, monkeypatch):
    expected, folder = pictures
    monkeypatch.setattr(models, "load_unet", None)
    found = evaluate(tmp_path / "alone", "--images", folder / name)
    assert found.prompt.tolist() == expected.prompt.tolist() and set(found.model) == {"images"}
    assert found["style"].tolist() == (expected["style"].tolist() if name else [""] * 4)
    assert found[scoring.WORLD].equals(expected[scoring.WORLD])
    direct = oracle.score(expected.prompt.tolist(), report.read_pictures(folder, [f"{i}.png" for i in range(4)]))
    np.testing.assert_allclose(found.utility, direct["utility"], rtol=1e-5)
    assert (tmp_path / "alone/eval/index.html").exists()


def test_pictures_beside_models_are_compared_on_the_prompts_they_have(pictures, run):
    expected, folder = pictures
    (folder / "3.txt").write_text("a prompt of nobody's\n")
    both = evaluate(run, "--only", "base", "--row", f"copies=images:{folder}")
    copies = both[both.model == "copies"]
    assert copies.prompt_id.tolist() == expected.prompt_id.tolist()[:3]
    assert np.array_equal(copies[scoring.WORLD], expected[scoring.WORLD][:3])
    table = pd.read_csv(run / "eval/table.csv").query("model == 'copies' and style.isna()")
    assert (table.prompts == 3).all() and (table.gain == 0).all() and (table.win_rate == .5).all()
    text = (run / "eval/table.md").read_text()
    assert "| base | 0 | 4 |" in text and "| copies |  | 3 |" in text
    message = refuses(evaluate, run, "--row", f"none=images:{other_prompts(folder)}")
    assert "none of its prompts" in message and "--images" in message


def other_prompts(folder: Path) -> Path:
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"unknown {i}")
    return folder


def test_the_same_pictures_under_other_prompts_are_scored_again(pictures, tmp_path):
    _, folder = pictures
    first = evaluate(tmp_path / "alone", "--images", folder / "own.csv")
    table = pd.read_csv(folder / "own.csv")
    table.assign(caption=table.caption[::-1].tolist()).to_csv(folder / "own.csv", index=False)
    second = evaluate(tmp_path / "alone", "--images", folder / "own.csv")
    direct = oracle.score(second.prompt.tolist(), report.read_pictures(folder, [f"{i}.png" for i in range(4)]))
    np.testing.assert_allclose(second.utility, direct["utility"], rtol=1e-5)
    assert not np.allclose(first.utility, second.utility)


@pytest.mark.parametrize("columns, words", [
    ({"file": ["0.png"], "prompt": ["a"]}, ["own.csv", "no column 'image'"]),
    ({"image": ["0.png", "gone.png"], "prompt": ["a", "b"]}, ["own.csv, row 1", "gone.png", "drop the row"]),
    ({"image": ["../run/config.json"], "prompt": ["a"]}, ["own.csv, row 0", "leaves"]),
    ({"image": ["0.png", "0.txt"], "prompt": ["a", "b"]}, ["own.csv, row 1", "cannot read the image", "0.txt"])])
def test_bad_tables_of_pictures_are_told_by_file_and_row(pictures, tmp_path, columns, words):
    _, folder = pictures
    pd.DataFrame(columns).to_csv(folder / "own.csv", index=False)
    message = refuses(evaluate, tmp_path / "alone", "--images", folder / "own.csv")
    assert all(word in message for word in words), message
    for caption, size, words in (("a prompt", (32, 32), "'a prompt' is no caption"), (None, (64, 48), "64 x 48 pixels")):
        Image.new("RGB", size).save(folder / "other.png")
        caption = caption or pd.read_parquet(folder / "own.parquet").caption[0]
        pd.DataFrame({"image": ["other.png"], "prompt": [caption]}).to_csv(folder / "other.csv", index=False)
        message = refuses(evaluate, tmp_path / "alone", "--images", folder / "other.csv")
        assert words in message and "--preset sd15" in message
    (folder / "1.txt").unlink()
    assert "no caption 1.txt" in refuses(rows.read_images, str(folder))


# ---- what is kept, and for whom ----

def test_noise_belongs_to_a_prompt_and_not_to_a_model(run):
    scores = evaluate(run, "--row", "same=extrapolate:Iter0:1", "--eval-seeds", 2)
    wide = scores.pivot(index=["prompt_id", "seed"], columns="model", values="image")
    assert wide.notna().all(axis=None) and len(wide) == 8 == scores.seed.nunique()
    assert set(scores.seed) == {seed_of("eval", p, n) for p in set(scores.prompt) for n in (0, 1)}
    for row in wide.itertuples():
        assert (run / row.same).read_bytes() == (run / row.Iter0).read_bytes() != (run / row.base).read_bytes()


def test_another_model_under_a_used_name_never_gets_the_old_scores(made, run, tmp_path):
    mine = shutil.copytree(made / "iter3/unet", tmp_path / "mine")
    of = lambda scores, name: scores[scores.model == name][scoring.WORLD].to_numpy()
    first = evaluate(run, "--row", f"mine={mine}")
    assert np.array_equal(of(first, "mine"), of(first, "Iter3"))
    shutil.copy(made / "iter0/unet/diffusion_pytorch_model.safetensors", mine)               # in place
    second = evaluate(run, "--row", f"mine={mine}")
    assert np.array_equal(of(second, "mine"), of(first, "Iter0"))
    assert not np.array_equal(of(first, "Iter0"), of(first, "Iter3"))
    third = evaluate(run, "--row", "mine=extrapolate:Iter3:1")                               # in another place
    assert np.array_equal(of(third, "mine"), of(first, "Iter3"))


def test_an_interrupted_evaluation_continues_and_scores_nothing_twice(run, tmp_path, monkeypatch):
    whole = evaluate(run, "--only", "base,Iter0")
    again, scored, painted = tmp_path / "again", [], []
    shutil.copytree(run / "iter0", again / "iter0", copy_function=shutil.copy2)
    monkeypatch.setattr(scoring, "CHUNK", 2)
    score, sample = oracle.score, models.sample

    def scoring_stops(prompts, images):
        if len(scored) == 6:
            scored.append("stopped")
            raise KeyboardInterrupt
        scored.extend(prompts)
        return score(prompts, images)

    def painting_stops(*given):
        if len(painted) == 3:
            painted.append("stopped")
            raise KeyboardInterrupt
        painted.append(len(given[2]))
        return sample(*given)

    monkeypatch.setattr(oracle, "score", scoring_stops)
    monkeypatch.setattr(models, "sample", painting_stops)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(again, "--only", "base,Iter0", "--sample-batch", 2)
    assert painted == [2, 2, 2, "stopped", 2] and len(scored) == 7 and not (again / "eval/scores.parquet").exists()
    table = evaluate(again, "--only", "base,Iter0", "--sample-batch", 2)
    assert len(painted) == 5 and len(scored) == 7 + 2                      # two chunks of base, two of Iter0
    pd.testing.assert_frame_equal(table.drop(columns="image"), whole.drop(columns="image"), rtol=1e-3)
    evaluate(again, "--only", "base,Iter0", "--sample-batch", 2)
    assert len(painted) == 5 and len(scored) == 9


def test_two_processes_share_the_scoring(run, monkeypatch):
    """Two threads stand for the processes; they meet where the processes would."""
    whole = evaluate(run, "--only", "base")
    shutil.rmtree(run / "eval/scores")
    jobs = {name: whole[whole.model == "base"][["prompt_id", "prompt", "seed", "image"]].reset_index(drop=True)
            for name in ("base", "again")}
    here, meet, by, results, score = threading.local(), threading.Barrier(2), {0: [], 1: []}, {}, oracle.score
    monkeypatch.setattr(scoring, "CHUNK", 1)
    monkeypatch.setattr(scoring, "PartialState", lambda: here.state)
    monkeypatch.setattr(oracle, "score", lambda prompts, images: by[here.state.process_index].extend(prompts)
                        or score(prompts, images))

    def process(index: int) -> None:
        here.state = SimpleNamespace(process_index=index, num_processes=2, is_main_process=index == 0,
                                     is_local_main_process=False, wait_for_everyone=lambda: meet.wait(60))
        results[index] = scoring.score_rows(Settings(run=str(run), device="cpu"), {"base": jobs["base"]})[0]["base"]

    threads = [threading.Thread(target=process, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(by[0] + by[1]) == sorted(jobs["base"].prompt) and len(by[0]) == len(by[1]) == 2
    for index in (0, 1):
        assert np.array_equal(results[index][scoring.WORLD], whole[scoring.WORLD])


# ---- the table ----

def example(n: int = 60) -> pd.DataFrame:
    """Scores of base, Iter0, Iter1 and of a rival that lacks ten prompts; two pictures a prompt."""
    rng = np.random.default_rng(1)
    skill = rng.normal(size=n)
    lines = [(model, "pickapic", "", i, f"prompt {i}", seed, "x.png", 20 + skill[i] + shift + .5 * rng.normal(),
              rng.normal()) for model, shift in (("base", 0.), ("Iter0", .3), ("Iter1", .5), ("DiffusionDPO", .4))
             for i in range(n if model != "DiffusionDPO" else n - 10) for seed in (0, 1)]
    return pd.DataFrame(lines, columns=[*report.KEYS, "pickscore", "imagereward"])


def test_intervals_are_those_of_a_paired_bootstrap(monkeypatch):
    """Against resampling written out, with other random numbers."""
    scores = example()
    summary = report.summarise(scores, ["pickscore"], "base", "Iter0").set_index("model")
    rng, mean = np.random.default_rng(7), scores.groupby(["model", "prompt_id"]).pickscore.mean()
    for name, n in (("Iter1", 60), ("DiffusionDPO", 50)):
        values, base, iter0 = (mean[m].to_numpy()[:n] for m in (name, "base", "Iter0"))
        row = summary.loc[name]
        for key, x in (("mean", values), ("gain", values - base), ("over_iter0", values - iter0)):
            assert row[key] == pytest.approx(x.mean())
            drawn = [np.mean([x[i] for i in rng.integers(0, n, n)]) for _ in range(4000)]
            low, high = (row["low"], row["high"]) if key == "mean" else (row[f"{key}_low"], row[f"{key}_high"])
            assert np.allclose([low, high], np.quantile(drawn, [.025, .975]), atol=.2 * np.std(drawn))
        assert row.win_rate == pytest.approx(np.mean(values > base)) and row.prompts == n
    assert row.high - row.low > 1.5 * (row.gain_high - row.gain_low)            # pairing takes the prompts' part out


def test_the_papers_numbers_are_those_of_its_table():
    if not TABLE1.exists():
        pytest.skip(f"{TABLE1.name} is not in ../shared/data")
    table = pd.read_csv(TABLE1)
    for preset, base_model in (("sd15", "SD1.5"), ("sdxl", "SDXL")):
        part = table[table.base_model == base_model]
        theirs = {row[1].removeprefix("SAIL (").removesuffix(")"): tuple(row[3:]) for row in part.itertuples(index=False)}
        assert theirs == paper.TABLE[preset] and list(theirs) == list(paper.TABLE[preset])
        for row in part.itertuples():
            name = row.method.removeprefix("SAIL (").removesuffix(")")
            million = row.human_pairs_million
            assert paper.PAIRS.get(name, "0.05M") == ("" if np.isnan(million) else f"{million}M")


def test_the_papers_number_stands_beside_ours():
    scores = example().assign(aesthetics=5.)
    summary = report.summarise(scores, ["pickscore", "imagereward"], "base", "Iter0")
    table = paper.table("sd15", summary, {"base": "0", "Iter0": "50000", "Iter1": "50000"}).set_index("model")
    assert list(table.columns) == ["human pairs", "PickScore", "ImageReward"]            # the paper's order; measured only
    assert list(table.index) == ["base", "SAIL (Iter0)", "SAIL (Iter1)", "DiffusionDPO"]
    assert table["human pairs"].tolist() == ["0", "50000 (0.05M)", "50000 (0.05M)", " (0.8M)"]
    for model, theirs in {"base": 20.62, "SAIL (Iter1)": 20.89}.items():
        name = model.removeprefix("SAIL (").removesuffix(")")
        ours = scores[scores.model == name].pickscore.mean()
        low, high = summary.query("model == @name and score == 'pickscore'")[["low", "high"]].iloc[0]
        assert table.PickScore[model] == f"{ours:.2f} [{low:.2f}, {high:.2f}] ({theirs:.2f}, {ours - theirs:+.2f})"
    csv = report.for_programs(summary, {"Iter0": {"human pairs": "50000"}}, paper.numbers("sd15"),
                              ["pickscore v", "imagereward w"])
    row = csv[(csv.model == "Iter1") & (csv.score == "imagereward")].iloc[0]
    assert row.paper == .1137 and row.over_paper == pytest.approx(row["mean"] - .1137) and row.scorer == "imagereward w"
    assert csv[csv.model == "Iter0"].human_pairs.eq("50000").all()
    assert paper.table("tiny", summary, {}).empty
    exact = Settings(**PRESETS["sd15"] | {"run": "none"})
    assert paper.departures(exact) == "" == paper.departures(Settings(run="none"))
    assert "sample_steps 20 (50)" in paper.departures(Settings(**PRESETS["sd15"] | {"run": "none", "sample_steps": 20}))


def test_the_table_tells_data_cost_gains_and_versions(run):
    evaluate(run, "--row", "further=extrapolate:Iter0:2", "--row", "a <b>|c=guide:Iter3:1")
    ledger = pd.read_parquet(run / "ledger.parquet")
    lines = [("01_seed", None, 60.), ("04_train_dpo", 0, 120.), ("04_train_dpo", 3, 240.)]
    cost = pd.DataFrame([{"stage": a, "iter": b, "seconds": c} for a, b, c in lines]).astype({"iter": "Int64"})
    pd.concat([ledger, cost]).to_parquet(run / "ledger.parquet")
    evaluate(run, "--row", "further=extrapolate:Iter0:2", "--row", "a <b>|c=guide:Iter3:1")
    text, csv = (run / "eval/table.md").read_text(), pd.read_csv(run / "eval/table.csv")
    head = next(line for line in text.splitlines() if line.startswith("| model"))
    assert all(part in head for part in ("human pairs", "minutes", "utility: gain over base", "utility: wins over base",
                                         "utility: over Iter0"))
    for line in ("| base | 0 |  |", "| Iter0 | 128 | 3.0 |", "| Iter3 | 128 | 7.0 |", "| further | 128 | 3.0 |"):
        assert line in text, line
    assert "a &lt;b&gt;\\|c" in text and "<b>" not in text
    assert "row further: extrapolate:Iter0:2" in text and "2 steps, guidance 2.0, 32 pixels, torch.float32" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text and "oracle.py@" in text
    assert csv[csv.model == "Iter3"].minutes.eq(7).all() and csv.scorer.str.contains("oracle.py@").all()


def test_curves_have_bands_and_other_rows_are_dashed(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    summary, figures = report.summarise(example(), ["pickscore", "imagereward"], "base", "Iter0"), []
    monkeypatch.setattr(plt, "close", figures.append)
    summary = summary.replace({"model": {"DiffusionDPO": "cost $5, not $6"}})
    report.curves(summary, ["pickscore", "imagereward"], ["base", "Iter0", "Iter1"], [], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    axes = figures[0].axes
    assert len(axes) == 2 and [a.get_title() for a in axes] == ["pickscore", "imagereward"]
    own = summary[summary.score == "pickscore"].set_index("model")
    solid, dashed = axes[0].lines
    assert solid.get_ydata().tolist() == own["mean"][:3].tolist() and solid.get_linestyle() == "-"
    assert dashed.get_linestyle() == "--" and dashed.get_ydata()[0] == own["mean"]["cost $5, not $6"]
    band = axes[0].collections[0].get_paths()[0].vertices
    for x, model in enumerate(("base", "Iter0", "Iter1")):
        assert sorted({y for a, y in band if a == x})[::len(band)] == [own.low[model]]
        assert max(y for a, y in band if a == x) == own.high[model]


def test_hostile_prompts_do_no_harm_to_sheets(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    scores = example(4).assign(prompt="two\nlines <script> \u202e 猫 $x$", image="x.png")
    report.sample_sheet(tmp_path, scores, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size[0] > 300
