"""Stages 01-05 on random pipelines of SD1.5's and SDXL's architecture, from pairs of outside."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (UNET_FILE, call, encoded, jpeg, judge_of, make_pairs, make_pipeline, picture,
                      random_clip, refused, same_tensors, settings_of, shard_row, weights_of,
                      write_shard)
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from lib import models, packs
from lib.data.few import fit_to_few_pairs
from lib.run import UserError, latent_path, load_latent
from lib.sampler import start_noise
from lib.settings import PRESETS, Settings

SMALL = [
    "--vae", "",
    "--resolution", "64",
    "--seed-pairs", "5",
    "--holdout-pairs", "2",
    "--iters", "1",
    "--iter-prompts", "2",
    "--candidates", "2",
    "--draws", "2",
    "--sample-steps", "3",
    "--batch", "4",
    "--micro-batch", "2",
    "--iter0-steps", "2",
    "--iter-steps", "2",
    "--lr", "1e-3",
    "--warmup", "0",
    "--scores", "pickscore",
    "--rank-batch", "4",
]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> Path:
    """A random PickScore."""
    folder = tmp_path_factory.mktemp("pickscore")
    random_clip(folder, "gelu", 64)
    return folder


def odd_shards(folder: Path) -> Path:
    """Pick-a-Pic as it is, with all that can be odd in it.

    There are ties, rows without a label, a JPEG that is cut off, pictures of all kinds, and
    captions that come again, in another script, empty, and of the evaluation.
    """
    def row(number: int, **changes) -> dict:
        return shard_row(number, **{"caption": f"a thing, number {number}"} | changes)

    pairs = [
        row(0),
        row(1, jpg_0=encoded(picture(90, mode="RGBA"), "PNG")),
        row(2, jpg_1=encoded(picture(91, mode="CMYK"))),
        row(3, jpg_0=encoded(picture(92, mode="L"))),
        row(4, caption="ein Bär, 火星 🐈"),
        row(5),
        row(6),
        row(7),
    ]
    odd = [
        row(8, label_0=.5, label_1=.5),
        row(9, has_label=False),
        row(10, jpg_1=jpeg(3)[:-20]),
        row(11, caption=" "),
        row(0),
        row(12, caption="something else"),
    ]
    others = [row(20 + i, caption=f"a new thing {i}") for i in range(6)]
    parts = (pairs[:4] + odd[:3], pairs[4:] + odd[3:], others)
    for number, part in enumerate(parts):
        write_shard(folder / f"train-{number:05d}-of-00003.parquet", part)
    return folder


def seed_run(folder: Path, name: str, xl: bool, scorer: Path, *changes: str) -> Path:
    """Stage 01 of a run on the pipeline in folder/model, from the user's files in folder/own."""
    files, run = folder / "own", folder / name
    arguments = [
        "--preset", "sdxl" if xl else "sd15",
        "--model", str(folder / "model"),
        "--pairs", str(files / "pairs.csv"),
        "--prompts", str(files / "prompts.txt"),
        "--eval-prompts", str(files / "eval.txt"),
        "--score-weights", f"pickscore={scorer}",
        *SMALL,
    ]
    assert call("01", run, *arguments, *changes) is None
    return run


def carry_on(run: Path, *arguments_of_05: str) -> None:
    """All further stages, as the driver runs them."""
    s = settings_of(run)
    assert call("04", run, "--iter", "0") is None
    for k in range(1, s.iters + 1):
        for number in ("02", "03", "04"):
            if number == "04" or s.alpha:
                assert call(number, run, "--iter", str(k)) is None
    assert call("05", run, *arguments_of_05) is None


# ---- SAIL on four combinations: architecture, prediction, full weights or adapters, source ----

CASES = {
    "SD1.5": SimpleNamespace(xl=False, prediction="epsilon", rank=0, shards=False),
    "SD2 with adapters": SimpleNamespace(xl=False, prediction="v_prediction", rank=2, shards=True),
    "SDXL with adapters": SimpleNamespace(xl=True, prediction="epsilon", rank=2, shards=False),
    "SDXL of velocity": SimpleNamespace(xl=True, prediction="v_prediction", rank=0, shards=True),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, scorer) -> SimpleNamespace:
    """A case, and what came of it: pipe and run."""
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("case")
    pipe = make_pipeline(folder / "model", case.xl, case.prediction)
    make_pairs(folder / "own")
    changes = ["--lora-rank", str(case.rank)]
    if case.shards:
        changes += ["--pairs", str(odd_shards(folder / "shards")), "--prompts", "pairs"]
    run = seed_run(folder, "run", case.xl, scorer, *changes)

    # Curves, walk and page once for each architecture, once with adapters.
    carry_on(run, *(["--scores-only"] if case.shards else []))
    return SimpleNamespace(pipe=pipe, run=run, **vars(case))


@pytest.mark.parametrize("table, rows", [
    ("seed/pairs", 5), ("seed/holdout", 2), ("iter1/candidates", 4), ("iter1/pairs", 2)])
def test_a_pipeline_goes_through_all_stages(case, table, rows):
    assert len(pd.read_parquet(case.run / f"{table}.parquet")) == rows


def test_human_pictures_are_squares_with_a_posterior(case):
    image = case.run / pd.read_parquet(case.run / "seed/pairs.parquet").win[0]
    latent = load_latent(image)
    assert Image.open(image).size == (64, 64)
    assert latent["mean"].shape == (4, 8, 8)
    assert latent["std"].min() > 0


def test_every_picture_of_the_evaluation_has_a_score_of_its_own(case):
    scores = pd.read_parquet(case.run / "eval/scores.parquet")
    assert list(scores.model) == ["base", "base", "Iter0", "Iter0", "Iter1", "Iter1"]
    assert np.isfinite(scores.pickscore).all()
    assert scores.pickscore.nunique() == 6


def test_training_starts_at_its_reference_and_moves(case):
    for k in (0, 1):
        log = pd.read_parquet(case.run / f"iter{k}/train_log.parquet")
        assert np.isfinite(log.drop(columns="seconds")).all(axis=None)
        assert log.loss[0] == pytest.approx(np.log(2), abs=1e-3)
        assert log.grad_norm.min() > 0


def test_conditions_are_the_pipelines_own(case):
    """With a prompt and without one."""
    prompt = pd.read_parquet(case.run / "prompts.parquet").prompt[0]
    encoder = models.PromptEncoder(settings_of(case.run))
    theirs = case.pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1,
                                     do_classifier_free_guidance=True)

    # Embeddings with and without the prompt; of SDXL also the pooled ones, with and without.
    with_prompt, without = encoder([prompt]), encoder.unconditional()
    assert torch.allclose(with_prompt["embeds"], theirs[0], atol=1e-5)
    assert torch.allclose(without["embeds"], theirs[1], atol=1e-5)
    assert ("pooled" in with_prompt) == case.xl
    if case.xl:
        assert torch.allclose(with_prompt["pooled"], theirs[2], atol=1e-5)
        assert torch.allclose(without["pooled"], theirs[3], atol=1e-5)


def test_plain_diffusers_draws_the_same_candidate(case):
    """From Iter0, be it a folder of a UNet or an adapter."""
    s = settings_of(case.run)
    candidate = pd.read_parquet(case.run / "iter1/candidates.parquet").iloc[1]
    ours = load_latent(case.run / candidate.image)["mean"]
    pipe = type(case.pipe).from_pretrained(s.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = models.SAMPLERS[s.sampler].from_config(pipe.scheduler.config)

    def draw() -> torch.Tensor:
        noise, generators = start_noise([int(candidate.seed)], (4, 8, 8), "cpu")
        return pipe(candidate.prompt, height=64, width=64, latents=noise, generator=generators,
                    num_inference_steps=s.sample_steps, guidance_scale=s.cfg_scale,
                    output_type="latent").images[0]

    of_base = draw()
    if case.rank:
        pipe.load_lora_weights(case.run / "iter0/lora")
    else:
        pipe.unet = UNet2DConditionModel.from_pretrained(case.run / "iter0/unet")
    effect = (of_base - ours).abs().max()
    assert (draw() - ours).abs().max() < .02 * effect


@pytest.mark.parametrize("case", ["SD1.5"], indirect=True)
def test_damaged_candidates_are_drawn_again_with_the_same_bits(case, tmp_path, capsys):
    run = shutil.copytree(case.run, tmp_path / "run")
    images = [run / image for image in pd.read_parquet(run / "iter1/candidates.parquet").image]
    pack = packs.file_of(latent_path(images[0]))
    whole = pack.read_bytes()
    pack.write_bytes(whole[:-1])
    assert call("02", run, "--iter", "1") is None
    assert pack.read_bytes() == whole
    assert "damaged, and made again" in capsys.readouterr().out

    assert call("02", run, "--iter", "1") is None
    assert "nothing to do" in capsys.readouterr().out


def without_a_weight(folder: Path) -> None:
    """Take one tensor out of the UNet's file."""
    file = folder / "unet" / UNET_FILE
    weights = load_file(file)
    weights.pop("conv_out.weight")
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("prediction, change, words", [
    ("sample", None, "prediction_type sample"),
    ("epsilon", without_a_weight, "model/unet: its weights lack conv_out.weight"),
])
def test_stage_01_refuses_a_model_before_anything(tmp_path, prediction, change, words):
    make_pipeline(tmp_path / "model", False, prediction)
    if change:
        change(tmp_path / "model")
    files = make_pairs(tmp_path / "own")
    message = call("01", tmp_path / "run", "--preset", "sd15", "--model", str(tmp_path / "model"),
                   "--pairs", str(files / "pairs.csv"), "--prompts", str(files / "prompts.txt"),
                   "--eval-prompts", str(files / "eval.txt"), *SMALL)
    refused(message, str(tmp_path / "model"), words)
    assert not (tmp_path / "run/seed").exists()


# ---- every ablation and rival, several in a run; what makes a condition on both architectures ----

@pytest.fixture(scope="module", params=[False, True], ids=["SD1.5", "SDXL"])
def rival_run(request, tmp_path_factory, scorer):
    """make(name, *changes, arguments_of_05): a finished run with these settings."""
    folder = tmp_path_factory.mktemp("rivals")
    make_pipeline(folder / "model", request.param, "epsilon")
    make_pairs(folder / "own")

    def make(name: str, *changes: str, arguments_of_05: tuple = ()) -> Path:
        run = seed_run(folder, name, request.param, scorer, *changes)
        carry_on(run, "--scores-only", *arguments_of_05)
        return run

    return make


@pytest.fixture(scope="module")
def mapo_run(rival_run) -> Path:
    """A rival without rounds and without a reference."""
    return rival_run("mapo", "--loss", "mapo", "--iters", "0")


def test_mapo(mapo_run):
    log = pd.read_parquet(mapo_run / "iter0/train_log.parquet")
    assert np.isfinite(log.loss).all()
    assert log.win_error_gain.isna().all()


def test_human_pairs_alone_from_a_given_start_and_the_controls(rival_run, mapo_run):
    run = rival_run("human-only", "--alpha", "0", "--start", str(mapo_run / "iter0/unet"),
                    arguments_of_05=("--row", "further=extrapolate:Iter0:2",
                                     "--row", "same=extrapolate:Iter0:1",
                                     "--row", "guided=guide:Iter0:0"))
    assert same_tensors(weights_of(mapo_run, 0), weights_of(run, 0))
    assert not (run / "iter1/images").exists()

    # gamma = 1 and w = 0 are Iter0 itself.
    scores = pd.read_parquet(run / "eval/scores.parquet").set_index("model").pickscore
    assert np.allclose(scores["same"], scores["Iter0"], atol=1e-4)
    assert np.allclose(scores["guided"], scores["Iter0"], atol=1e-4)
    assert not np.allclose(scores["further"], scores["Iter0"], atol=1e-4)


@pytest.mark.parametrize("rival_run", [False], indirect=True)
def test_the_ablations_of_ranking(rival_run):
    run = rival_run("ranking", "--iters", "2", "--anchor", "iter0", "--select", "random",
                    "--alpha", "0.5", "--candidates", "4", "--reward-weights", "balanced",
                    "--rank-t-min", "500")
    rewards = pd.read_parquet(run / "iter2/rewards.parquet")
    pairs = pd.read_parquet(run / "iter2/pairs.parquet")
    draws = pd.read_parquet(run / "iter2/draws.parquet")
    assert rewards.groupby("prompt_id").reward.nunique().eq(4).all()
    assert (pairs.margin > 0).all()
    assert draws.t.between(500, 999).all()
    assert [judge_of(run, k)["anchor"] for k in (1, 2)] == ["base", "Iter0"]
    assert judge_of(run, 2)["select"] == "random"


@pytest.mark.parametrize("rival_run", [False], indirect=True)
def test_online_dpo_by_a_learned_score(rival_run):
    run = rival_run("online", "--reward", "pickscore", "--alpha", "1")
    rewards = pd.read_parquet(run / "iter1/rewards.parquet")
    pairs = pd.read_parquet(run / "iter1/pairs.parquet")
    best = rewards.loc[rewards.groupby("prompt_id").reward.idxmax()]
    assert list(pairs.win) == list(best.image)
    assert set(pairs.source) == {"pickscore"}
    assert judge_of(run, 1)["reward"] == "pickscore"
    assert len(pd.read_parquet(run / "iter1/train_log.parquet")) == 2


# ---- a preset fits itself to few pairs ----

@pytest.fixture(scope="module")
def few(tmp_path_factory) -> SimpleNamespace:
    """Stage 01 of `sd15` with three files and no number: its arguments, its run, its output."""
    folder = tmp_path_factory.mktemp("few")
    files, run = make_pairs(folder / "own", 12), folder / "run"
    make_pipeline(folder / "model", False, "epsilon")
    arguments = [
        "--preset", "sd15",
        "--model", str(folder / "model"),
        "--resolution", "64",
        "--pairs", str(files / "pairs.csv"),
        "--prompts", str(files / "prompts.txt"),
        "--eval-prompts", str(files / "eval.txt"),
    ]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert call("01", run, *arguments) is None
    return SimpleNamespace(arguments=arguments, run=run, output=output.getvalue())


def test_a_preset_fits_itself_to_few_pairs(few):
    config = json.loads((few.run / "config.json").read_text())
    fitted = {"seed_pairs": 10, "holdout_pairs": 2, "iter_prompts": "2", "iter0_steps": 1,
              "iter_steps": 1, "warmup": 0}
    assert fitted.items() <= config["settings"].items()
    assert "--seed-pairs 10 --holdout-pairs 2 --iter-prompts 2" in few.output


def test_fitted_numbers_hold_for_the_run(few):
    assert len(pd.read_parquet(few.run / "seed/pairs.parquet")) == 10
    assert len(pd.read_parquet(few.run / "seed/holdout.parquet")) == 2
    splits = pd.read_parquet(few.run / "prompts.parquet").split.value_counts()
    assert splits.to_dict() == {"iter1": 2, "iter2": 2, "iter3": 2, "eval": 2}


def test_a_fitted_run_continues_by_the_same_command(few):
    assert call("01", few.run, *few.arguments) is None


@pytest.fixture
def with_12_pairs(tmp_path):
    """make(**changes): sd15's settings, with files of 12 pairs and of 6 prompts."""
    files = make_pairs(tmp_path / "own", 12)

    def make(**changes) -> Settings:
        given = {"pairs": str(files / "pairs.csv"), "prompts": str(files / "prompts.txt")}
        return Settings(**PRESETS["sd15"] | given | changes)

    return make


def test_numbers_given_by_hand_hold(with_12_pairs):
    s = with_12_pairs(seed_pairs=9, iter_prompts="1", iter0_steps=7, iter_steps=7)
    assert fit_to_few_pairs(s, []) == {}


def test_rounds_share_the_prompts_that_the_evaluation_leaves(with_12_pairs):
    """5 prompts for 3 rounds; the number of pairs is given by hand."""
    s = with_12_pairs(seed_pairs=9, holdout_pairs=3)
    assert fit_to_few_pairs(s, ["A New thing 1"]) == {
        "iter_prompts": "1", "iter0_steps": 1, "iter_steps": 1, "warmup": 0}


def test_training_grows_longer_only_where_one_pass_is_short(with_12_pairs):
    """With batches of 4, 400 human pairs are 100 steps, and so are 100 prompts at alpha .25."""
    s = with_12_pairs(batch=4, seed_pairs=400, iter_prompts="100")
    assert fit_to_few_pairs(s, []) == {}
    s = with_12_pairs(batch=4, seed_pairs=396, iter_prompts="100")
    assert fit_to_few_pairs(s, []) == {"iter0_steps": 100, "warmup": 10}
    s = with_12_pairs(batch=4, seed_pairs=396, iter_prompts="100", alpha=0.)
    assert fit_to_few_pairs(s, []) == {"iter0_steps": 100, "iter_steps": 100, "warmup": 10}


def test_a_dataset_of_the_hub_is_not_few_pairs(with_12_pairs):
    assert fit_to_few_pairs(with_12_pairs(pairs="some/dataset"), []) == {}


def test_a_file_of_pairs_has_no_prompts_for_the_rounds(with_12_pairs):
    with pytest.raises(UserError, match="--prompts pairs: .*give --prompts"):
        fit_to_few_pairs(with_12_pairs(prompts="pairs"), [])
