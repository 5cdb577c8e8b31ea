"""Stage 05: each kind of row is what it says, and a score belongs to nothing but its pictures."""

import dataclasses
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

import lib.run
from lib import hub, models, sampler, sheets
from lib.diffusion import predict
from lib.eval import rows, scores
from lib.models import BASE
from lib.rivals import controls, online_dpo
from lib.rivals.given_start import load_start
from lib.run import UserError, seed_of
from lib.settings import PRESETS, Settings
from lib.world import captions, people

WORLD_BASE = ROOT / "lib/world/base"
SMALL = ["--preset=tiny", "--eval-count", "4", "--eval-seeds", "1", "--sample-steps", "2",
         "--device", "cpu"]
COMMIT = "c0ffee" * 6 + "c0ff"


def changed(seed: int) -> UNet2DConditionModel:
    """The base's UNet with noise on its weights."""
    unet = UNet2DConditionModel.from_pretrained(WORLD_BASE, subfolder="unet")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in unet.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(.1 * weight.std(correction=0) * noise)
    return unet


def evaluate(run: Path, *more) -> pd.DataFrame:
    """Stage 05's scores of a run folder, without tables and figures."""
    return report(run, *more, "--scores-only")


def report(run: Path, *more) -> pd.DataFrame:
    """Stage 05's scores of a run folder, and all that it makes of them."""
    stage("05").main(["--run", str(run), *SMALL, *map(str, more)])
    return pd.read_parquet(run / "eval/scores.parquet")


def scores_of(table: pd.DataFrame, model: str) -> np.ndarray:
    return table[table.model == model][scores.WORLD].to_numpy()


def refuses(call, *arguments) -> str:
    """The message of the UserError that a call raises, in one line."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Models of a run, iter0 and iter3, and a pipeline's folder from outside, with its UNet."""
    folder = tmp_path_factory.mktemp("made")
    for k in (0, 3):
        changed(k).save_pretrained(folder / f"iter{k}/unet")
    changed(9).save_pretrained(folder / "outside/unet")
    return folder


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A run folder with Iter0 and Iter3, for stage 05 alone."""
    for k in (0, 3):
        shutil.copytree(made / f"iter{k}", tmp_path / f"run/iter{k}")
    return tmp_path / "run"


@pytest.fixture
def s(run) -> Settings:
    return Settings(run=str(run), device="cpu")


@torch.no_grad()
def answer(unet) -> torch.Tensor:
    """A UNet's answer (2, 12, 8, 8) to one fixed question."""
    generator = torch.Generator().manual_seed(5)
    x_t = torch.randn(2, 12, 8, 8, generator=generator)
    text = torch.randn(2, 16, 64, generator=generator)
    return predict(unet, x_t, torch.tensor([300, 700]), {"embeds": text})


# ---- models from elsewhere ----

def hub_cache(monkeypatch, folder: Path, repo: str, files: Path) -> None:
    """A hub of one model: this machine's cache has it, and nothing else answers."""
    from huggingface_hub import constants

    home = folder / f"models--{repo.replace('/', '--')}"
    shutil.copytree(files, home / "snapshots" / COMMIT)
    (home / "refs").mkdir()
    (home / "refs/main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.hub_names.cache_clear()


@pytest.fixture
def outside(made, tmp_path, monkeypatch):
    """The model from outside, laid out in any of the ways in which models are published."""
    pipeline = made / "outside"
    unet = made / "outside/unet"

    def lay_out(layout: str) -> str:
        if layout == "folder with unet/":
            return str(pipeline)
        if layout == "UNet folder":
            return str(unet)
        if layout == "UNet beside other files":
            shutil.copytree(unet, tmp_path / "repository")
            (tmp_path / "repository/README.md").write_text("a model")
            save_file({"x": torch.zeros(1)}, tmp_path / "repository/other.safetensors")
            return str(tmp_path / "repository")
        if layout == "hub id, unet/":
            hub_cache(monkeypatch, tmp_path, "me/mine", pipeline)
            return "me/mine"
        hub_cache(monkeypatch, tmp_path, "me/mine", unet)
        return "me/mine"

    return lay_out


LAYOUTS = ["folder with unet/", "UNet folder", "UNet beside other files", "hub id, unet/",
           "hub id, root"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_unet_is_found_wherever_it_lies(made, s, outside, layout):
    unet = rows.load_row(s, outside(layout))
    expected = UNet2DConditionModel.from_pretrained(made / "outside/unet").eval()
    assert torch.equal(answer(unet), answer(expected))
    assert not unet.training
    assert not any(weight.requires_grad for weight in unet.parameters())


def test_a_unet_published_in_half_precision_only_is_found(made, s, tmp_path):
    half = UNet2DConditionModel.from_pretrained(made / "outside/unet").half()
    half.save_pretrained(tmp_path / "half/unet", variant="fp16")
    unet = rows.load_row(s, str(tmp_path / "half"))
    expected = UNet2DConditionModel.from_pretrained(made / "outside/unet").eval()
    assert torch.allclose(answer(unet), answer(expected), atol=5e-3)


@pytest.mark.parametrize("layout", ["hub id, unet/", "hub id, root"])
def test_a_hub_model_is_told_by_its_commit(s, outside, layout):
    assert rows.identity(s, outside(layout)) == f"me/mine@{COMMIT}"


# Options of adapters whose scale is not 1: alpha is not the rank, or not everywhere.
SCALES = {
    "alpha": {"r": 4, "lora_alpha": 16},
    "rslora": {"r": 4, "lora_alpha": 4, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 4,
                 "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_v": 9}},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
}


def add_adapter(unet: UNet2DConditionModel, **options) -> dict[str, torch.Tensor]:
    """Give a UNet an adapter of random numbers; returns its weights."""
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(0)
    config = LoraConfig(**options, init_lora_weights=False, target_modules=["to_q", "to_v"])
    unet.add_adapter(config)
    return get_peft_model_state_dict(unet)


def as_kohya(weights: dict, alpha_of) -> dict[str, torch.Tensor]:
    """An adapter under kohya's names, with an alpha for each layer."""
    kohya = {}
    for key, weight in weights.items():
        module, end = key.removeprefix("unet.").split(".lora_")     # end: A.weight or B.weight
        name = "lora_unet_" + module.replace(".", "_")
        part = "lora_down" if end.startswith("A") else "lora_up"
        kohya[f"{name}.{part}.weight"] = weight
        kohya[f"{name}.alpha"] = torch.tensor(alpha_of(module))
    return kohya


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    """Adapters in diffusers' form, without and with a scale, and in kohya's."""
    folder = tmp_path_factory.mktemp("adapters")
    weights = add_adapter(changed(0), r=4, lora_alpha=4)
    StableDiffusionPipeline.save_lora_weights(folder / "folder", weights)
    shutil.copy(folder / "folder" / rows.ADAPTER, folder / "mine.safetensors")
    save_file(as_kohya(weights, lambda module: 2.), folder / "kohya.safetensors")

    for name, options in SCALES.items():
        unet = changed(0)
        weights = add_adapter(unet, **options)
        scale = unet.peft_config["default"].to_dict()
        StableDiffusionPipeline.save_lora_weights(folder / name, weights,
                                                  unet_lora_adapter_metadata=scale)

    # Ranks of each layer's own, and alphas, which diffusers does not know.
    weights = add_adapter(changed(0), **SCALES["patterns"])
    save_file(as_kohya(weights, lambda module: 3.), folder / "kohya-ranks.safetensors")
    mixed = as_kohya(weights, lambda module: 3. if module.endswith("to_q") else 8.)
    save_file(mixed, folder / "kohya-alphas.safetensors")
    return folder


def diffusers_with_adapter(folder: Path, file: str) -> UNet2DConditionModel:
    """The base's UNet with an adapter as diffusers adds it."""
    pipe = StableDiffusionPipeline.from_pretrained(WORLD_BASE, dtype=torch.float32)
    base = answer(pipe.unet)
    pipe.load_lora_weights(folder, weight_name=file)
    assert (answer(pipe.unet) - base).abs().max() > .05
    return pipe.unet


@pytest.mark.parametrize("where, file", [
    ("folder", f"folder/{rows.ADAPTER}"),
    ("mine.safetensors", "mine.safetensors"),
    ("kohya.safetensors", "kohya.safetensors"),
    ("kohya-ranks.safetensors", "kohya-ranks.safetensors"),
    *[(name, f"{name}/{rows.ADAPTER}") for name in SCALES],
])
def test_an_adapter_in_the_weights_equals_diffusers_own(adapters, s, where, file):
    ours = answer(rows.load_row(s, str(adapters / where)))
    theirs = answer(diffusers_with_adapter(adapters, file))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_run_starts_from_an_adapter_at_its_scale(adapters, s):
    start = load_start(dataclasses.replace(s, start=str(adapters / "alpha"), dtype="bfloat16"))
    theirs = diffusers_with_adapter(adapters, f"alpha/{rows.ADAPTER}")
    assert torch.allclose(answer(start), answer(theirs), atol=1e-4)


@pytest.mark.parametrize("name", ["alpha", "patterns"])
def test_an_adapter_of_pefts_own_is_what_peft_makes_of_it(s, tmp_path, name):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(**SCALES[name], init_lora_weights=False, target_modules=["to_q", "to_v"])
    theirs = get_peft_model(models.load_unet(s, BASE), config).eval()
    theirs.save_pretrained(tmp_path / "peft")
    ours = rows.load_row(s, str(tmp_path / "peft"))
    assert torch.allclose(answer(ours), answer(theirs), atol=1e-4)


@pytest.mark.parametrize("published, where, file", [
    ("folder", "me/adapter", f"folder/{rows.ADAPTER}"),
    (".", "me/adapter/kohya.safetensors", "kohya.safetensors"),
])
def test_an_adapter_comes_from_the_hub_too(adapters, s, published, where, file, tmp_path,
                                           monkeypatch):
    theirs = answer(diffusers_with_adapter(adapters, file))
    hub_cache(monkeypatch, tmp_path, "me/adapter", adapters / published)
    assert torch.allclose(answer(rows.load_row(s, where)), theirs, atol=1e-4)


# ---- checkpoints of one file ----

# diffusers' names of a UNet's layers, and those of the original Stable Diffusion code.
ORIGINAL = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    # Two blocks down of one layer each, and two up of two layers each: the base's.
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
}
ORIGINAL_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def as_checkpoint(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The weights of a UNet like the base's under the original code's names."""
    weights = {}
    for key, weight in unet.state_dict().items():
        layer = next(name for name in ORIGINAL if key.startswith(name + "."))
        rest = key.removeprefix(layer + ".")
        if "resnets" in layer:
            part = rest.split(".")[0]
            rest = rest.replace(part, ORIGINAL_RESNET[part])
        weights[f"model.diffusion_model.{ORIGINAL[layer]}.{rest}"] = weight
    return weights


@pytest.mark.parametrize("save, other", [
    (as_checkpoint, {"first_stage_model.x": torch.zeros(1)}),
    (UNet2DConditionModel.state_dict, {}),
])
def test_the_unet_of_a_checkpoint_of_one_file_is_found(made, s, tmp_path, save, other):
    expected = UNet2DConditionModel.from_pretrained(made / "outside/unet").eval()
    weights = save(expected)
    save_file(weights | other, tmp_path / "civitai.safetensors")
    unet = rows.load_row(s, str(tmp_path / "civitai.safetensors"))
    assert torch.equal(answer(unet), answer(expected))

    # With a weight missing it is none.
    weights.pop(next(key for key in weights if "bias" in key))
    save_file(weights | other, tmp_path / "part.safetensors")
    message = refuses(rows.load_row, s, str(tmp_path / "part.safetensors"))
    assert "part.safetensors" in message
    assert "lacks weights" in message


# ---- the two controls ----

@pytest.mark.parametrize("text, control", [
    ("extrapolate:Iter0:2", ("extrapolate", 0, 2.)),
    ("guide:Iter12:-1.5", ("guide", 12, -1.5)),
    ("extrapolate:Iter3:.5", ("extrapolate", 3, .5)),
    ("me/extrapolate", None),
    ("guide", None),
])
def test_the_text_of_a_control_is_read(text, control):
    assert controls.parse_control(text) == control


@pytest.mark.parametrize("text", ["extrapolate:Iter0", "guide:base:2", "guide:Iter0:two", "guide:"])
def test_a_control_that_is_not_whole_is_refused(text):
    message = refuses(controls.parse_control, text)
    assert f"--row {text}:" in message
    assert "extrapolate:Iter0:2" in message


@pytest.mark.parametrize("gamma, k", [(0, BASE), (1, 0)])
def test_extrapolation_by_0_is_the_base_and_by_1_the_model(s, gamma, k):
    extrapolated = rows.load_row(s, f"extrapolate:Iter0:{gamma}").state_dict()
    for key, weight in models.load_unet(s, k).state_dict().items():
        assert torch.equal(extrapolated[key], weight)


def test_extrapolation_is_a_line_through_base_and_iter0(s):
    base = models.load_unet(s, BASE).double().state_dict()
    iter0 = models.load_unet(s, 0).double().state_dict()
    extrapolated = rows.load_row(s, "extrapolate:Iter0:2.5").double().state_dict()
    for key, weight in base.items():
        expected = weight + 2.5 * (iter0[key] - weight)
        assert torch.allclose(extrapolated[key], expected, atol=1e-6)


def test_guidance_by_0_is_the_model(s):
    assert torch.equal(answer(rows.load_row(s, "guide:Iter3:0")), answer(models.load_unet(s, 3)))


@pytest.mark.parametrize("w", [1.5, -0.5])
def test_guidance_adds_the_difference_of_two_predictions(s, w):
    base = answer(models.load_unet(s, BASE)).double()
    iter3 = answer(models.load_unet(s, 3)).double()
    guided = answer(rows.load_row(s, f"guide:Iter3:{w}")).double()
    assert torch.allclose(guided, (1 + w) * iter3 - w * base, atol=1e-5)


def test_a_control_is_another_one_when_either_of_its_models_is(run, s, tmp_path):
    control = "guide:Iter0:1"
    first = rows.identity(s, control)
    other_base = shutil.copytree(WORLD_BASE, tmp_path / "base")
    (other_base / "unet/config.json").touch()
    second = rows.identity(Settings(run=str(run), model=str(other_base), device="cpu"), control)
    (run / "iter0/unet/config.json").touch()
    third = rows.identity(s, control)
    assert len({first, second, third}) == 3


# ---- rows that cannot work ----

@pytest.fixture
def bad_models(made, adapters, tmp_path, monkeypatch) -> Path:
    """A folder of models that cannot be rows, without a hub."""
    config = json.loads((made / "outside/unet/config.json").read_text())
    changes = {
        "wide": {"cross_attention_dim": 768},
        "clip": {"_class_name": "CLIPTextModel"},
        "weightless": {},
        "timed": {"time_cond_proj_dim": 8},
    }
    for name, change in changes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
    weights = tmp_path / "weightless/diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"<html>")

    # Pipelines of the base's architecture, whose other parts are of another kind.
    parts = {
        "velocity": ("scheduler", {"prediction_type": "v_prediction"}),
        "edm": ("scheduler", {"_class_name": "EDMEulerScheduler", "beta_schedule": None}),
        "betas": ("scheduler", {"beta_end": .02}),
        "latents": ("vae", {"latents_mean": [0.] * 12, "latents_std": [1.] * 12}),
        "scaled": ("vae", {"scaling_factor": .5}),
    }
    for name, (part, change) in parts.items():
        folder = shutil.copytree(made / "outside", tmp_path / name)
        shutil.copytree(WORLD_BASE / part, folder / part)
        file = next((folder / part).glob("*.json"))
        file.write_text(json.dumps({key: value for key, value in
                                    (json.loads(file.read_text()) | change).items()
                                    if value is not None}))

    shutil.copy(adapters / "kohya-alphas.safetensors", tmp_path / "alphas.safetensors")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/pytorch_lora_weights.bin").write_bytes(b"x")
    scaled = load_file(adapters / "kohya.safetensors")
    some = next(key for key in scaled if key.endswith("lora_up.weight"))
    scaled[some.replace("lora_up.weight", "dora_scale")] = torch.ones(4)
    save_file(scaled, tmp_path / "dora.safetensors")
    elsewhere = load_file(adapters / "mine.safetensors")
    elsewhere = {key.replace("down_blocks.1", "down_blocks.0"): w for key, w in elsewhere.items()}
    save_file(elsewhere, tmp_path / "elsewhere.safetensors")

    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"<html>")
    both = load_file(adapters / "mine.safetensors")
    for key, weight in list(both.items()):
        both[key.replace("unet.", "text_encoder.", 1)] = weight.clone()
    save_file(both, tmp_path / "both.safetensors")
    save_file({"unrelated.weight": torch.zeros(2)}, tmp_path / "nothing.safetensors")

    def no_hub(*_, **__):
        raise ConnectionError("no name\nresolution")

    monkeypatch.setattr("huggingface_hub.list_repo_files", no_hub)
    hub.hub_names.cache_clear()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("where, words", [
    ("./wide", ["cross_attention_dim 768", "same architecture"]),
    ("./clip", ["CLIPTextModel", "UNet2DConditionModel"]),
    ("./empty", ["no unet/config.json", "adapter"]),
    ("./nowhere", ["no such file or folder"]),
    ("./timed", ["time_cond_proj_dim 8"]),
    ("./velocity", ["prediction_type v_prediction", "--model"]),
    ("./edm", ["EDMEulerScheduler"]),
    ("./betas", ["other betas", "--model"]),
    ("./latents", ["latents_mean", "--model"]),
    ("./scaled", ["scaling_factor 0.5", "--model"]),
    ("./pickled", ["pytorch_lora_weights.bin", ".safetensors"]),
    ("./dora.safetensors", ["dora_scale"]),
    ("./alphas.safetensors", ["alphas of their own", "merge it"]),
    ("./broken.safetensors", ["no whole safetensors file"]),
    ("./both.safetensors", ["text_encoder", "--model"]),
    ("./nothing.safetensors", ["nothing.safetensors"]),
    ("./nowhere/x.safetensors", ["no such file or folder"]),
    ("me/typing-error", ["out of reach", "local copy"]),
    ("me/" + "x" * 300, ["out of reach", "local copy"]),
    ("x" * 300, ["no such file or folder"]),
    ("run/typing-error", ["no such file or folder"]),
    ("extrapolate:Iter7:2", ["iter7/unet does not exist", "--iter 7"]),
    ("guide:Iter0", ["guide:IterK:W"]),
    ("images:nowhere", ["images:nowhere: no such file or folder"]),
])
def test_a_row_that_cannot_work_is_refused_before_any_is_drawn(bad_models, run, where, words):
    where = where.replace("./", f"{bad_models}/")
    message = refuses(evaluate, run, "--row", f"mine={where}")
    for word in [where.removeprefix("images:"), *words]:
        assert word in message
    assert not (run / "eval").exists()


def test_a_unet_without_readable_weights_is_refused(bad_models, s):
    assert "download it again" in refuses(rows.load_row, s, str(bad_models / "weightless"))


@pytest.mark.parametrize("content, words", [
    ("not finite", "its weights are not finite (conv_in.bias)"),
    ("", "missing or damaged"),
    (None, "missing or damaged"),
])
def test_a_trained_model_that_is_damaged_is_told_how_to_be_made_again(run, content, words):
    file = run / "iter3/unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file) | {"conv_in.bias": torch.full((48,), torch.inf)}
    file.unlink()
    if content == "not finite":
        save_file(weights, file)
    elif content is not None:
        file.write_text(content)
    message = refuses(evaluate, run, "--only", "Iter3")
    assert f"{run}/iter3/unet: " in message
    assert words in message
    assert f"delete {run}/iter3/unet and run 04_train_dpo.py --run {run} --iter 3" in message


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, words", [
    ("elsewhere.safetensors", "give an adapter of this model"),
    ("biased.safetensors", "cannot be merged"),
    ("halved.safetensors", "a whole one"),
])
def test_an_adapter_that_does_not_fit_is_refused(bad_models, adapters, s, name, words):
    biased = add_adapter(changed(0), r=4, lora_alpha=4, lora_bias=True)
    save_file({f"unet.{key}": weight for key, weight in biased.items()},
              bad_models / "biased.safetensors")
    halved = load_file(adapters / "mine.safetensors")
    del halved[min(halved)]
    save_file(halved, bad_models / "halved.safetensors")

    message = refuses(rows.load_row, s, str(bad_models / name))
    assert name in message
    assert words in message


# ---- which rows there are ----

@pytest.mark.parametrize("only, names", [
    ("", ["base", "Iter0", "Iter3"]),
    ("Iter3, base", ["base", "Iter3"]),
    ("Iter3", ["Iter3"]),
    ("Iter0,Iter3", ["Iter0", "Iter3"]),
])
def test_only_these_models_are_drawn_scored_and_shown(run, only, names):
    more = ["--only", only] if only else []
    drawn = report(run, *more)
    assert list(drawn.model.unique()) == names
    assert len(drawn) == 4 * len(names)

    folders = [path.name.rsplit("-", 1)[0] for path in (run / "eval/images").iterdir()]
    assert sorted(folders) == sorted(names)
    table = pd.read_csv(run / "eval/table.csv")
    assert list(table.model.unique()) == names
    assert ("gain" in table) == ("base" in names)
    assert ("over_iter0" in table) == ("Iter0" in names)


@pytest.mark.parametrize("more, words", [
    (["--only", "base,Iter7"], ["--only base,Iter7", "'Iter7'", "base, Iter0, Iter3"]),
    (["--only", ","], ["''"]),
    (["--row", "base=x/y"], ["'base'", "taken"]),
    (["--only", "base", "--row", "Iter0=x/y"], ["'Iter0'", "taken"]),
    (["--row", "x/y"], ["--row x/y", "NAME=WHERE"]),
    (["--row", " =x/y"], ["NAME=WHERE"]),
    (["--row", "m=x/y", "--row", "m=x/z"], ["'m'", "taken"]),
    (["--images", "x", "--only", "base"], ["--images", "--row NAME=images:PATH"]),
])
def test_rows_that_cannot_be_named_so(run, more, words):
    message = refuses(evaluate, run, *more)
    for word in words:
        assert word in message


@pytest.mark.parametrize("preset, names", [
    ("sd15", {"DiffusionSPO"}),
    ("sdxl", {"DiffusionSPO", "MaPO"}),
])
def test_rivals_are_rows_and_one_that_is_gone_costs_only_itself(preset, names, monkeypatch,
                                                                capsys):
    def check(s, where):
        if where.startswith("mhdang/"):
            raise UserError(f"{where}: gone")

    monkeypatch.setattr(rows, "check", check)
    s = Settings(**PRESETS[preset] | {"run": "none"})
    arguments = SimpleNamespace(images="", row=[], only="", rivals=True, drop=[],
                                scores_only=True)
    compared = stage("05").rows_of_table(s, arguments)
    assert {name for name, where in compared.items() if isinstance(where, str)} == names
    assert "row DiffusionDPO is left out: mhdang/dpo-sd" in capsys.readouterr().out


# ---- pictures that exist ----

@pytest.fixture
def pictures(run, tmp_path):
    """Pictures of base and their prompts: a folder with captions, and the same as tables."""
    of_base = evaluate(run, "--only", "base")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, row in enumerate(of_base.itertuples()):
        shutil.copy(run / row.image, folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(row.prompt + "\n")

    names = [f"{i}.png" for i in range(4)]
    table = pd.DataFrame({"file_name": names, "caption": of_base.prompt, "style": of_base["style"]})
    table.to_csv(folder / "mine.csv", index=False)
    table.to_parquet(folder / "mine.parquet", index=False)
    table.to_json(folder / "mine.jsonl", orient="records", lines=True)
    return of_base, folder


def utility_of(folder: Path, prompts: pd.Series) -> torch.Tensor:
    """The oracle's utility of the folder's four pictures under these prompts."""
    tensors = sheets.read_pictures(folder, [f"{i}.png" for i in range(4)])
    return people.score(prompts.tolist(), tensors)["utility"]


@pytest.mark.parametrize("name", ["", "mine.csv", "mine.parquet", "mine.jsonl"])
def test_pictures_alone_are_scored_without_a_model(pictures, tmp_path, name, monkeypatch):
    expected, folder = pictures
    monkeypatch.setattr(models, "load_unet", None)
    scored = report(tmp_path / "alone", "--images", folder / name)
    assert set(scored.model) == {"images"}
    assert scored.prompt.tolist() == expected.prompt.tolist()
    assert scored[scores.WORLD].equals(expected[scores.WORLD])
    np.testing.assert_allclose(scored.utility, utility_of(folder, expected.prompt), rtol=1e-5)
    assert (tmp_path / "alone/eval/index.html").exists()

    styles = expected["style"].tolist() if name else [""] * 4        # captions have no style
    assert scored["style"].tolist() == styles


def test_pictures_beside_models_are_compared_on_the_prompts_they_have(pictures, run):
    expected, folder = pictures
    (folder / "3.txt").write_text("a prompt of nobody's\n")
    both = report(run, "--only", "base", "--row", f"copies=images:{folder}")
    copies = both[both.model == "copies"]
    assert copies.prompt_id.tolist() == expected.prompt_id.tolist()[:3]
    assert np.array_equal(copies[scores.WORLD], expected[scores.WORLD][:3])

    table = pd.read_csv(run / "eval/table.csv").query("model == 'copies' and style.isna()")
    assert (table.prompts == 3).all()
    assert (table.gain == 0).all()
    assert (table.win_rate == .5).all()
    text = (run / "eval/table.md").read_text()
    assert "| base | 0 | 4 |" in text
    assert "| copies |  | 3 |" in text


def test_pictures_of_other_prompts_cannot_stand_beside_models(pictures, run):
    _, folder = pictures
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"unknown {i}")
    message = refuses(evaluate, run, "--row", f"none=images:{folder}")
    assert "none of its prompts" in message
    assert "--images" in message


def test_the_same_pictures_under_other_prompts_are_scored_again(pictures, tmp_path):
    _, folder = pictures
    first = evaluate(tmp_path / "alone", "--images", folder / "mine.csv")
    table = pd.read_csv(folder / "mine.csv")
    table.assign(caption=table.caption[::-1].tolist()).to_csv(folder / "mine.csv", index=False)
    second = evaluate(tmp_path / "alone", "--images", folder / "mine.csv")
    np.testing.assert_allclose(second.utility, utility_of(folder, second.prompt), rtol=1e-5)
    assert not np.allclose(first.utility, second.utility)


@pytest.fixture
def two_pictures(tmp_path) -> Path:
    """Two pictures of the world's size with captions, no table, and a text that is no picture."""
    folder = tmp_path / "two"
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (32, 32)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(captions.CAPTIONS[0])
    (tmp_path / "secret.png").write_bytes(b"")
    return folder


def refuses_images(folder: Path, columns: dict, run: Path) -> str:
    pd.DataFrame(columns).to_csv(folder / "mine.csv", index=False)
    return refuses(evaluate, run, "--images", folder / "mine.csv")


@pytest.mark.parametrize("columns, words", [
    ({"file": ["0.png"], "prompt": ["a"]}, ["mine.csv", "no column 'image'"]),
    ({"image": ["0.png", "gone.png"], "prompt": ["a", "b"]},
     ["mine.csv, row 2", "gone.png", "drop the row"]),
    ({"image": ["../secret.png"], "prompt": ["a"]}, ["mine.csv, row 1", "leaves"]),
    ({"image": ["0.png", "0.txt"], "prompt": ["a", "b"]},
     ["mine.csv, row 2", "cannot read the image", "0.txt"]),
])
def test_bad_tables_of_pictures_are_told_by_file_and_row(two_pictures, tmp_path, columns, words):
    message = refuses_images(two_pictures, columns, tmp_path / "alone")
    for word in words:
        assert word in message


def test_a_prompt_that_is_no_caption_of_the_world_is_refused(two_pictures, tmp_path):
    columns = {"image": ["0.png"], "prompt": ["a prompt"]}
    message = refuses_images(two_pictures, columns, tmp_path / "alone")
    assert "'a prompt' is no caption" in message
    assert "--preset sd15" in message


def test_a_picture_of_another_size_than_the_worlds_is_refused(two_pictures, tmp_path):
    Image.new("RGB", (64, 48)).save(two_pictures / "wide.png")
    columns = {"image": ["wide.png"], "prompt": [captions.CAPTIONS[0]]}
    message = refuses_images(two_pictures, columns, tmp_path / "alone")
    assert "64 x 48 pixels" in message
    assert "--preset sd15" in message


def test_a_picture_without_a_caption_is_refused(two_pictures):
    (two_pictures / "1.txt").unlink()
    assert "no caption 1.txt" in refuses(rows.read_images, str(two_pictures))


@pytest.mark.parametrize("as_cell", [
    lambda content: content,
    lambda content: {"bytes": content, "path": "0.png"},
])
def test_pictures_may_be_bytes_of_a_parquet_table(two_pictures, tmp_path, as_cell):
    content = (two_pictures / "0.png").read_bytes()
    table = pd.DataFrame({"prompt": captions.CAPTIONS[:1], "image": [as_cell(content)]})
    table.to_parquet(tmp_path / "mine.parquet")
    jobs = rows.image_jobs(tmp_path / "run", "mine", str(tmp_path / "mine.parquet"), None)
    assert jobs.prompt.tolist() == captions.CAPTIONS[:1]
    assert (tmp_path / "run" / jobs.image[0]).read_bytes() == content


def write_caption(folder: Path) -> Path:
    (folder / "1.txt").write_bytes("ein Bär".encode("latin-1"))
    return folder


def write_parquet(column: str, value):
    def write(folder: Path) -> Path:
        row = {"prompt": "a", "image": "0.png"} | {column: value}
        pd.DataFrame([row]).to_parquet(folder / "mine.parquet")
        return folder / "mine.parquet"
    return write


def write_link(folder: Path) -> Path:
    (folder / "link.png").symlink_to(folder.parent / "elsewhere.png")
    Image.new("RGB", (32, 32)).save(folder.parent / "elsewhere.png")
    return write_parquet("image", "link.png")(folder)


def write_empty_caption(folder: Path) -> Path:
    (folder / "1.txt").write_text(" \n")
    return folder


def write_no_parquet(folder: Path) -> Path:
    (folder / "mine.parquet").write_bytes(b"PAR1 is not all")
    return folder / "mine.parquet"


@pytest.mark.parametrize("write, words", [
    (write_caption, ["1.txt, line 1", "UTF-8"]),
    (write_empty_caption, ["1.png", "no prompt"]),
    (write_parquet("prompt", None), ["mine.parquet, row 1", "no prompt"]),
    (write_parquet("prompt", 7), ["mine.parquet, row 1", "prompt is 7"]),
    (write_parquet("prompt", ["a", "b"]), ["mine.parquet, row 1", "prompt is"]),
    (write_parquet("image", None), ["mine.parquet, row 1", "no image"]),
    (write_parquet("image", 7), ["mine.parquet, row 1", "no image"]),
    (write_parquet("image", "x" * 300), ["mine.parquet, row 1", "no file"]),
    (write_parquet("image", b"x" * 300), ["mine.parquet, row 1", "cannot read the image"]),
    (write_link, ["mine.parquet, row 1", "link", "move the table"]),
    (write_no_parquet, ["mine.parquet", "not a readable Parquet file"]),
])
def test_pictures_that_cannot_be_read_are_told_in_a_line(two_pictures, tmp_path, write, words):
    where = str(write(two_pictures))
    message = refuses(rows.image_jobs, tmp_path / "run", "mine", where, None)
    assert len(message) < 500
    for word in words:
        assert word in message


def test_a_folder_of_pictures_may_be_a_link(two_pictures, tmp_path):
    (tmp_path / "link").symlink_to(two_pictures)
    (two_pictures / "._0.png").write_bytes(b"of macOS")
    read = rows.read_images(str(tmp_path / "link"))
    assert [picture.image.name for picture in read] == ["0.png", "1.png"]


# ---- what is kept, and for whom ----

def test_noise_belongs_to_a_prompt_and_not_to_a_model(run):
    drawn = evaluate(run, "--row", "same=extrapolate:Iter0:1", "--eval-seeds", 2)
    wide = drawn.pivot(index=["prompt_id", "seed"], columns="model", values="image")
    assert wide.notna().all(axis=None)
    assert len(wide) == 8
    assert drawn.seed.nunique() == 8
    expected = {seed_of("eval", prompt, n) for prompt in set(drawn.prompt) for n in (0, 1)}
    assert set(drawn.seed) == expected

    for row in wide.itertuples():
        assert (run / row.same).read_bytes() == (run / row.Iter0).read_bytes()
        assert (run / row.same).read_bytes() != (run / row.base).read_bytes()


def test_another_model_under_a_used_name_never_gets_the_old_scores(made, run, tmp_path):
    mine = shutil.copytree(made / "iter3/unet", tmp_path / "mine")
    first = evaluate(run, "--row", f"mine={mine}")
    assert np.array_equal(scores_of(first, "mine"), scores_of(first, "Iter3"))
    assert not np.array_equal(scores_of(first, "Iter0"), scores_of(first, "Iter3"))

    # Another one in the same place,
    shutil.copy(made / "iter0/unet/diffusion_pytorch_model.safetensors", mine)
    second = evaluate(run, "--row", f"mine={mine}")
    assert np.array_equal(scores_of(second, "mine"), scores_of(first, "Iter0"))

    # and one from another place.
    third = evaluate(run, "--row", "mine=extrapolate:Iter3:1")
    assert np.array_equal(scores_of(third, "mine"), scores_of(first, "Iter3"))


class Stopping:
    """A function, interrupted once after so many calls, that notes those that went through."""

    def __init__(self, function, calls: int):
        self.function = function
        self.calls = calls
        self.through = []
        self.stopped = False

    def __call__(self, *given):
        if len(self.through) == self.calls and not self.stopped:
            self.stopped = True
            raise KeyboardInterrupt
        self.through.append(given)
        return self.function(*given)


def test_an_interrupted_evaluation_continues_and_scores_nothing_twice(run, tmp_path, monkeypatch):
    whole = evaluate(run, "--only", "base,Iter0")
    again = tmp_path / "again"
    shutil.copytree(run / "iter0", again / "iter0", copy_function=shutil.copy2)

    # Two batches of two pictures for each of two models, and two chunks of two scores.
    score = Stopping(people.score, calls=3)
    sample = Stopping(sampler.sample, calls=3)
    monkeypatch.setattr(scores, "CHUNK", 2)
    monkeypatch.setattr(people, "score", score)
    monkeypatch.setattr(sampler, "sample", sample)
    arguments = ["--only", "base,Iter0", "--sample-batch", 2]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(again, *arguments)
    assert len(sample.through) == 4
    assert len(score.through) == 3
    assert not (again / "eval/scores.parquet").exists()

    table = evaluate(again, *arguments)
    assert len(sample.through) == 4
    assert len(score.through) == 4
    expected = whole.drop(columns="image")
    pd.testing.assert_frame_equal(table.drop(columns="image"), expected, rtol=1e-3)

    # Once it is done, nothing is drawn or scored anew.
    evaluate(again, *arguments)
    assert len(sample.through) == 4
    assert len(score.through) == 4


@pytest.fixture
def as_two_processes(monkeypatch):
    """Run work(index) in two threads, which stand for processes and meet where those would."""
    here = threading.local()
    barrier = threading.Barrier(2)

    def together(work) -> list:
        results = [None, None]

        def process(index: int) -> None:
            here.state = SimpleNamespace(
                process_index=index, num_processes=2, is_main_process=index == 0,
                is_local_main_process=False, wait_for_everyone=lambda: barrier.wait(60))
            results[index] = work(index)

        monkeypatch.setattr(lib.run, "process_state", lambda: here.state)
        threads = [threading.Thread(target=process, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        return results

    return together


def test_two_processes_share_the_scoring(run, s, as_two_processes, monkeypatch):
    whole = evaluate(run, "--only", "base")
    shutil.rmtree(run / "eval/scores")
    jobs = whole[["prompt_id", "prompt", "seed", "image"]]

    scored_by = {}
    score = people.score

    def counting(prompts, images):
        scored_by.setdefault(threading.current_thread(), []).extend(prompts)
        return score(prompts, images)

    def score_rows(index: int) -> np.ndarray:
        results, _ = scores.score_rows(s, {"base": jobs})
        return results["base"][scores.WORLD].to_numpy()

    monkeypatch.setattr(scores, "CHUNK", 1)
    monkeypatch.setattr(people, "score", counting)
    first, second = as_two_processes(score_rows)
    assert np.array_equal(first, whole[scores.WORLD])
    assert np.array_equal(second, whole[scores.WORLD])
    assert [len(prompts) for prompts in scored_by.values()] == [2, 2]
    assert sorted(sum(scored_by.values(), [])) == sorted(jobs.prompt)


def test_a_broken_picture_is_made_again_as_the_message_says(run, s):
    of_base = evaluate(run, "--only", "base")
    shutil.rmtree(run / "eval/scores")
    picture = run / of_base.image[2]
    whole = picture.read_bytes()
    picture.write_bytes(b"broken")
    message = refuses(scores.score_rows, s, {"base": of_base})
    assert f"{picture}: cannot read the image" in message
    assert "delete it, and the same command makes it again" in message

    picture.unlink()
    evaluate(run, "--only", "base")
    assert picture.read_bytes() == whole


@pytest.mark.parametrize("reward, column", [
    ("world", "utility"),
    ("world-aesthetics", "aesthetics"),
])
def test_online_dpo_is_told_the_scores_in_the_order_of_the_images(run, reward, column,
                                                                  monkeypatch):
    of_base = evaluate(run, "--only", "base")
    monkeypatch.setattr(online_dpo, "BATCH", 3)
    s = Settings(run=str(run), device="cpu", reward=reward)
    images = [run / image for image in of_base.image]
    told = online_dpo.score(s, of_base.prompt.tolist(), images)
    np.testing.assert_allclose(told, of_base[column], rtol=1e-6)
