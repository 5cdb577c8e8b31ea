"""Any model: computed as its own pipeline does, or refused by name before anything is spent."""

import json
import math
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pandas as pd
import pytest
import torch
from conftest import make_pipeline, refused
from PIL import Image
from safetensors.torch import load_file, save_file

from lib import hub, kinds, models
from lib.run import Ledger, UserError, is_whole, latent_path
from lib.sampler import lacking, paint, start_noise
from lib.settings import PRESETS, Settings

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> dict[str, Path]:
    """Random pipelines of SD1.5's and SDXL's architecture, to be read only."""
    folders = {}
    for name in ("sd15", "sdxl"):
        folders[name] = tmp_path_factory.mktemp("models") / name
        make_pipeline(folders[name], name == "sdxl", "epsilon")
    return folders


@pytest.fixture
def sd15(pipelines, tmp_path) -> Path:
    """One of SD1.5's architecture, to change or break."""
    return shutil.copytree(pipelines["sd15"], tmp_path / "model")


@pytest.fixture
def sdxl(pipelines, tmp_path) -> Path:
    return shutil.copytree(pipelines["sdxl"], tmp_path / "model")


def settings(folder: Path, **changes) -> Settings:
    """Settings of a small run on a model, beside it."""
    small = {"model": str(folder), "vae": "", "resolution": 64, "sample_steps": 3,
             "sampler": "ddim", "run": str(folder.parent / "run"), "device": "cpu"}
    return Settings(**PRESETS["sd15"] | small | changes)


def rewrite(file: Path, **changes) -> None:
    """Change the entries of a JSON file; None takes one out."""
    content = json.loads(file.read_text()) | changes
    content = {key: value for key, value in content.items() if value is not None}
    file.write_text(json.dumps(content))


def message_of(call, *arguments) -> str | None:
    """The message of the UserError that a call raises."""
    try:
        call(*arguments)
    except UserError as error:
        return str(error)
    return None


# ---- equal to the model's own pipeline ----

def ours_and_theirs(s: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture (H, W, 3) in 0..255 that we draw, and that diffusers draws from the same noise."""
    from diffusers import DiffusionPipeline

    jobs = pd.DataFrame([{"prompt": "a red thing", "seed": 5, "image": "iter1/images/a.png"}])
    with Ledger(s.run, "test", 1, "cpu") as ledger:
        paint(s, models.BASE, jobs, ledger, "test", keep_latents=True)
    ours = Image.open(Path(s.run) / "iter1/images/a.png")

    pipe = DiffusionPipeline.from_pretrained(s.model)
    pipe.set_progress_bar_config(disable=True)
    if s.sampler != "ddpm":
        pipe.scheduler = models.SAMPLERS[s.sampler].from_config(pipe.scheduler.config)
    noise, generators = start_noise([5], (4, 8, 8), "cpu")
    theirs = pipe("a red thing", height=64, width=64, latents=noise, generator=generators,
                  num_inference_steps=s.sample_steps, guidance_scale=s.cfg_scale).images[0]
    return as_tensor(ours), as_tensor(theirs)


def as_tensor(picture: Image.Image) -> torch.Tensor:
    from torchvision.transforms.functional import pil_to_tensor
    return pil_to_tensor(picture).int()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, file, changes, more", [
    ("sdxl", "vae/config.json", {"latents_mean": [-1., .5, 2., 0.],
                                 "latents_std": [2., 3., .5, 1.]}, {}),
    ("sdxl", "scheduler/scheduler_config.json",
     {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
      "timestep_spacing": "trailing"}, {}),
    ("sd15", "scheduler/scheduler_config.json", {"steps_offset": 0}, {}),
    ("sd15", "scheduler/scheduler_config.json", {"steps_offset": None}, {"sampler": "ddpm"}),
    ("sd15", "tokenizer/tokenizer_config.json", {"model_max_length": 9}, {"cfg_scale": 0.}),
])
def test_a_picture_is_the_pipelines_own(pipelines, tmp_path, name, file, changes, more):
    folder = shutil.copytree(pipelines[name], tmp_path / "model")
    rewrite(folder / file, **changes)
    s = settings(folder, **more)
    kinds.check_model(s)
    ours, theirs = ours_and_theirs(s)
    assert theirs.float().std() > 1
    assert (ours - theirs).abs().max() <= 1


def test_latents_of_pictures_have_the_units_of_those_that_are_drawn(sdxl):
    """With a mean and a spread for each channel: encoded, as the image-to-image pipeline has it."""
    mean, std = torch.tensor([-1., .5, 2., 0.]), torch.tensor([2., 3., .5, 1.])
    rewrite(sdxl / "vae/config.json", latents_mean=mean.tolist(), latents_std=std.tolist())
    vae = models.load_vae(settings(sdxl))
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        posterior = vae.encode(pictures * 2 - 1).latent_dist
    ours = models.encode(vae, pictures)
    shape = (1, 4, 1, 1)
    theirs = (posterior.mean - mean.view(shape)) * .13025 / std.view(shape)
    assert torch.allclose(ours["mean"], theirs, atol=1e-6)
    assert torch.allclose(ours["std"], posterior.std * .13025 / std.view(shape), atol=1e-6)


def test_a_vae_that_asks_for_it_is_float32_in_half_precision(sdxl):
    s = settings(sdxl, dtype="float16")
    assert models.load_vae(s).dtype == torch.float32
    rewrite(sdxl / "vae/config.json", force_upcast=False)
    assert models.load_vae(s).dtype == torch.float16


# ---- another kind of model ----

SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize("file, changes, words", [
    (SCHEDULER, {"_class_name": "EDMEulerScheduler", "beta_schedule": None}, ["EDMEulerScheduler"]),
    (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler", "beta_schedule": None},
     ["FlowMatchEulerDiscreteScheduler"]),
    (SCHEDULER, {"use_flow_sigmas": True}, ["noise schedule"]),
    (SCHEDULER, {"prediction_type": "sample"}, ["prediction_type sample", "epsilon"]),
    (SCHEDULER, {"prediction_type": "nonsense"}, ["prediction_type nonsense"]),
    (SCHEDULER, {"rescale_betas_zero_snr": True}, ["zero terminal SNR", "epsilon"]),
    (SCHEDULER, {"num_train_timesteps": 500}, ["500 timesteps", "1000"]),
    (SCHEDULER, {"beta_schedule": "odd"}, ["odd"]),
    (SCHEDULER, {"timestep_spacing": "odd"}, ["a value that no model has"]),
    (SCHEDULER, {"beta_start": math.nan}, ["betas"]),
    (SCHEDULER, {"beta_start": 0., "beta_end": 0.}, ["betas"]),
    (SCHEDULER, {"beta_start": .5, "beta_end": 3., "prediction_type": "v_prediction"}, ["betas"]),
    ("unet/config.json", {"time_cond_proj_dim": 8}, ["time_cond_proj_dim 8"]),
    ("unet/config.json", {"in_channels": 9}, ["9 channels", "inpainting"]),
    ("unet/config.json", {"cross_attention_dim": 20}, ["cross_attention_dim 20", "16"]),
    ("vae/config.json", {"_class_name": "AutoencoderTiny"}, ["AutoencoderTiny"]),
    ("vae/config.json", {"shift_factor": .1}, ["shift_factor"]),
    ("vae/config.json", {"latents_mean": [0.] * 4, "latents_std": [1.] * 4}, ["latents_mean"]),
    ("model_index.json", {"text_encoder": [None, None]}, ["text_encoder"]),
    ("model_index.json", {"unet": ["diffusers", "UNet3DConditionModel"]}, ["UNet3D"]),
    ("model_index.json", {"text_encoder_2": [None, None]}, ["_2 is None"]),
    ("model_index.json", {"unet": 7}, ["a value that no model has"]),
    (SCHEDULER, {"trained_betas": []}, ["a value that no model has"]),
    ("vae/config.json", {"block_out_channels": 8}, ["a value that no model has"]),
    ("vae/config.json", {"scaling_factor": math.nan}, ["scaling_factor nan"]),
    ("vae/config.json", {"scaling_factor": "x"}, ["a value that no model has"]),
    ("vae/config.json", {"scaling_factor": 0.}, ["scaling_factor 0.0"]),
    ("vae/config.json", {"latents_mean": [0.] * 3}, ["3 latents_mean", "4 channels"]),
])
def test_a_model_of_another_kind_is_refused_by_name(sd15, file, changes, words):
    rewrite(sd15 / file, **changes)
    models.pipeline_config.cache_clear()
    refused(message_of(kinds.check_model, settings(sd15)), str(sd15), *words)


@pytest.mark.parametrize("file", ["model_index.json", SCHEDULER, "unet/config.json",
                                  "vae/config.json", "text_encoder/config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", b"{}", b"[" * 100_000])
def test_a_configuration_that_is_none_is_refused_by_name(sd15, file, content):
    (sd15 / file).write_bytes(content)
    models.pipeline_config.cache_clear()
    refused(message_of(kinds.check_model, settings(sd15)), str(sd15))


@pytest.mark.parametrize("name, resolution, nearest", [
    ("sd15", 60, 64), ("sd15", 520, 512), ("sd15", -32, 64), ("sdxl", 33, 32), ("sdxl", 16, 32)])
def test_a_resolution_is_a_multiple_of_the_models_step(pipelines, name, resolution, nearest):
    s = settings(pipelines[name], resolution=resolution)
    message = message_of(kinds.check_model, s)
    refused(message, f"--resolution {resolution}", f"give --resolution {nearest}")
    kinds.check_model(settings(pipelines[name], resolution=nearest))


# ---- weights ----

def change_weights(file: Path, change) -> None:
    weights = load_file(file)
    save_file(change(weights), file, metadata={"format": "pt"})


def compiled(weights: dict) -> dict:
    return {f"_orig_mod.{name}": weight for name, weight in weights.items()}


def without_last(weights: dict) -> dict:
    last = max(name for name in weights if "norm" in name)
    return {name: weight for name, weight in weights.items() if name != last}


def not_finite(weights: dict) -> dict:
    first = min(weights)
    return weights | {first: torch.full_like(weights[first], torch.nan)}


def load_all(s: Settings) -> list[torch.nn.Module]:
    encoder = models.PromptEncoder(s).load_encoders()[0][1]
    return [models.load_unet(s, models.BASE), models.load_vae(s), encoder]


@pytest.mark.parametrize("part", [UNET, VAE, TEXT])
def test_weights_of_a_compiled_model_are_understood(pipelines, sd15, part):
    change_weights(sd15 / part, compiled)
    for ours, theirs in zip(load_all(settings(sd15)), load_all(settings(pipelines["sd15"]))):
        for one, other in zip(ours.state_dict().values(), theirs.state_dict().values()):
            assert torch.equal(one, other)


@pytest.mark.parametrize("part", [UNET, VAE, TEXT])
@pytest.mark.parametrize("change, words", [
    (without_last, ["weights lack", "norm"]),
    (not_finite, ["weights are not finite"]),
    (lambda weights: without_last(compiled(weights)), ["weights lack", "norm"]),
    (None, ["cannot load", "download it again"]),
])
def test_weights_that_are_not_whole_are_refused(sd15, part, change, words):
    if change:
        change_weights(sd15 / part, change)
    else:
        content = (sd15 / part).read_bytes()
        (sd15 / part).write_bytes(content[:len(content) // 2])
        words = ["download it again"]
    refused(message_of(load_all, settings(sd15)), part.split("/")[0], *words)


def test_a_tokenizer_without_words_is_refused(sd15):
    shutil.rmtree(sd15 / "tokenizer")
    refused(message_of(load_all, settings(sd15)), "its tokenizer has", "download it again")


def as_published(folder: Path, shards: bool) -> None:
    """Leave a pipeline only files in half precision, as `variant="fp16"` writes them."""
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(folder).to(dtype=torch.float16)
    shutil.rmtree(folder)
    size = "200KB" if shards else "10GB"
    pipe.save_pretrained(folder, variant="fp16", max_shard_size=size)


@pytest.mark.parametrize("shards", [False, True])
def test_a_model_published_in_half_precision_only_is_loaded(pipelines, sdxl, shards):
    as_published(sdxl, shards)
    assert bool(list(sdxl.glob("unet/*fp16-00001-of-*"))) == shards
    kinds.check_model(settings(sdxl))
    for ours, theirs in zip(load_all(settings(sdxl)), load_all(settings(pipelines["sdxl"]))):
        for one, other in zip(ours.parameters(), theirs.parameters()):
            assert torch.allclose(one, other, atol=1e-2)


def run_command(message: str, folder: Path) -> None:
    """Run the Python that a message tells to, with its FOLDER."""
    command = message.split("python -c ", 1)[1]
    code = shlex.split("-c " + command)[1]
    exec(code.replace("FOLDER", str(folder)))


def test_pickled_weights_are_refused_and_the_remedy_works(sd15):
    torch.save(load_file(sd15 / UNET), (sd15 / UNET).with_suffix(".bin"))
    (sd15 / UNET).unlink()
    message = message_of(kinds.check_model, settings(sd15))
    refused(message, "pickled", "unet/")
    run_command(message, sd15.parent / "safe")
    s = settings(sd15.parent / "safe")
    kinds.check_model(s)
    load_all(s)


# ---- tokenizers are data ----

def test_a_tokenizer_of_two_files_is_the_pipelines_own(pipelines, sd15):
    words = json.loads((sd15 / "tokenizer/tokenizer.json").read_text())["model"]
    for file in (sd15 / "tokenizer").iterdir():
        file.unlink()
    merges = [" ".join(pair) for pair in words["merges"]]
    (sd15 / "tokenizer/vocab.json").write_text(json.dumps(words["vocab"]))
    (sd15 / "tokenizer/merges.txt").write_text("\n".join(["#version: 0.2", *merges]))

    embeds = []
    for folder in (sd15, pipelines["sd15"]):
        encoder = models.PromptEncoder(settings(folder))
        embeds.append(encoder.encode(encoder.load_encoders(), ["a red thing"])[0]["embeds"])
    assert torch.equal(*embeds)


def test_code_that_comes_with_a_tokenizer_never_runs(sd15, monkeypatch):
    planted = sd15.parent / "planted"
    rewrite(sd15 / "tokenizer/tokenizer_config.json", tokenizer_class="Mine",
            auto_map={"AutoTokenizer": ["mine.Mine", None]})
    (sd15 / "tokenizer/mine.py").write_text(f"open({str(planted)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    models.PromptEncoder(settings(sd15)).load_encoders()
    assert not planted.exists()


# ---- nothing that is not finite is written ----

JOBS = pd.DataFrame([{"prompt": "a", "seed": 5, "image": "iter1/images/a.png"}])


def paint_one(s: Settings) -> None:
    with Ledger(s.run, "test", 1, "cpu") as ledger:
        paint(s, models.BASE, JOBS, ledger, "iter1 candidates", keep_latents=True)


@pytest.fixture(scope="module")
def painted(pipelines, tmp_path_factory) -> Settings:
    """The settings of a run with one picture; every test leaves it whole."""
    s = settings(pipelines["sd15"], run=str(tmp_path_factory.mktemp("painted")))
    paint_one(s)
    return s


def huge(weights: dict) -> dict:
    """Finite weights that no number survives."""
    last = ("out.weight", "final_layer_norm.weight")
    name = min(name for name in weights if name.endswith(last))
    return weights | {name: weights[name].sign() * 3e38}


@pytest.mark.parametrize("part, words", [
    (UNET, ["--cfg-scale", "float32"]),
    (VAE, ["VAE"]),
    (TEXT, ["text encoders"]),
])
def test_what_is_not_finite_is_not_written(sd15, part, words):
    change_weights(sd15 / part, huge)
    s = settings(sd15)
    message = message_of(paint_one, s)
    refused(message, "not finite", *words)
    assert "--lr" not in message
    assert not list(Path(s.run).glob("iter1/**/*.*"))
    assert part != TEXT or not list(Path(s.run).glob("embeds/*"))


# ---- damaged files of a run ----

def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def other_shape(file: Path) -> None:
    save_file({"mean": torch.zeros(4, 3, 3)}, file)


def no_mean(file: Path) -> None:
    save_file({"other": torch.zeros(4, 8, 8)}, file)


@pytest.mark.parametrize("name, damages", [
    ("iter1/images/a.png", [cut, empty, zeros]),
    ("iter1/latents/a.safetensors", [cut, empty, zeros, other_shape, no_mean]),
    ("embeds/packs/*", [cut, empty, zeros]),
])
def test_what_is_damaged_is_made_again_with_the_same_bits(painted, capsys, name, damages):
    file = next(Path(painted.run).glob(name))
    whole = file.read_bytes()
    for damage in damages:
        damage(file)
        noticed = lacking(painted, JOBS, models.latent_shape(painted))
        assert noticed == [file] or not is_whole(file)

    paint_one(painted)
    assert file.read_bytes() == whole
    assert f"{file}: damaged, and made again" in capsys.readouterr().out


# ---- nothing is written outside the run folder ----

def test_latents_stay_in_the_run_folder(pipelines, tmp_path):
    s = settings(pipelines["sd15"], run=str(tmp_path / "run"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run/iter1").mkdir(parents=True)
    (tmp_path / "run/iter1/latents").symlink_to(tmp_path / "elsewhere")
    refused(message_of(paint_one, s), "iter1/latents", "outside the run folder")
    assert not list((tmp_path / "elsewhere").iterdir())

    # A picture right in the run folder would have its latent beside it.
    picture = tmp_path / "run/a.png"
    Image.new("RGB", (64, 64)).save(picture)
    message = message_of(models.ensure_latents, [picture], s, lambda i: Image.open(picture))
    refused(message, "outside the run folder", "images/")
    assert not (tmp_path / "latents").exists()


def test_a_run_folder_may_itself_be_a_link(pipelines, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    paint_one(settings(pipelines["sd15"], run=str(tmp_path / "run")))
    assert is_whole(latent_path(tmp_path / "disk/iter1/images/a.png"))


# ---- names ----

def raised(name: str) -> Exception:
    """An error as huggingface_hub raises it, and a library another one after it."""
    from huggingface_hub import errors
    kind = getattr(errors, name)
    began = kind.__new__(kind)
    error = OSError("me/mine does not appear to have a file named config.json.")
    error.__context__ = began
    return error


@pytest.mark.parametrize("name, words", [
    ("LocalEntryNotFoundError", ["out of reach", "HF_HUB_OFFLINE", "local copy"]),
    ("OfflineModeIsEnabled", ["out of reach"]),
    ("RepositoryNotFoundError", ["no such model", "hf auth login"]),
    ("GatedRepoError", ["consent", "https://huggingface.co/me/mine"]),
    ("EntryNotFoundError", ["config.json", "check the folder or hub id"]),
])
def test_the_network_is_told_from_a_wrong_name(name, words):
    refused(hub.why(raised(name), "me/mine"), *words)


@pytest.mark.parametrize("model, words", [
    ("me/" + "x" * 300, ["x" * 300]),
    ("./nowhere", ["does not exist"]),
    ("a b/c", ["does not exist"]),
])
def test_a_model_that_is_not_there_is_refused(model, words, monkeypatch):
    def loader(*_, **__):
        raise raised("LocalEntryNotFoundError")

    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", loader)
    refused(message_of(kinds.check_model, settings(Path(model))), *words)


@pytest.mark.parametrize("name, key, kind", [
    ("sd.safetensors", "model.diffusion_model.out.0.weight", "StableDiffusionPipeline"),
    ("xl.safetensors", "conditioner.embedders.0.x", "StableDiffusionXLPipeline"),
    ("vae.safetensors", "decoder.conv_in.weight", "AutoencoderKL"),
    ("me/mine/sd.safetensors", None, "StableDiffusionPipeline"),
])
def test_a_checkpoint_of_one_file_is_no_model_and_the_message_converts_it(
        tmp_path, monkeypatch, name, key, kind):
    """As diffusers reads it, with the configuration that it takes from the hub."""
    if key:
        save_file({key: torch.zeros(1)}, tmp_path / name)
        name = str(tmp_path / name)
    message = message_of(kinds.check_model, settings(Path(name)))
    refused(message, name)

    called = {}
    made = SimpleNamespace(save_pretrained=lambda folder: called.update(folder=folder))
    loader = classmethod(lambda cls, file: called.update(kind=cls.__name__, file=file) or made)
    monkeypatch.setattr(getattr(diffusers, kind), "from_single_file", loader)
    run_command(message, tmp_path / "made")
    assert called["kind"] == kind
    assert called["file"].endswith(Path(name).name)
    assert called["folder"] == str(tmp_path / "made")


def test_auto_compiles_on_a_card_where_that_works(monkeypatch, capsys):
    s = Settings(**PRESETS["sd15"])
    assert s.compile == "auto"
    assert not models.is_compiled(replace(s, device="cpu"))
    assert models.is_compiled(replace(s, device="cpu", compile="on"))

    # A card that is not here compiles nothing.
    monkeypatch.setattr(models, "device_of", lambda s: torch.device("cuda"))
    models.can_compile.cache_clear()
    assert not models.is_compiled(s)
    told = capsys.readouterr().err
    assert told.startswith("torch.compile does not work here (") and told.count("\n") == 1
    assert not models.is_compiled(replace(s, compile="off"))

    models.can_compile.cache_clear()
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(*size))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert models.is_compiled(s)
    models.can_compile.cache_clear()
