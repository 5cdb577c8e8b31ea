"""Stages 01-05 from one's own pairs and from Pick-a-Pic shards, on random pipelines of SD1.5's and SDXL's architecture."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_pairs, make_pipeline, stage
from PIL import Image
from safetensors.torch import load_file
from test_pairs import encoded, jpeg, picture, shard_row
from test_scorers import random_clip

from lib import models, own, sampler, settings
from lib.run import UserError

SMALL = ["--resolution", "64", "--seed-pairs", "5", "--holdout-pairs", "2", "--iters", "1", "--iter-prompts", "2",
         "--candidates", "2", "--draws", "2", "--sample-steps", "3", "--batch", "4", "--micro-batch", "2", "--iter0-steps",
         "2", "--iter-steps", "2", "--lr", "1e-3", "--warmup", "0", "--scores", "pickscore", "--rank-batch", "4"]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pickscore")
    random_clip(folder, "gelu", 64)
    return folder


def make_shards(folder):
    """Pick-a-Pic as it is: ties, no label, a cut-off JPEG, pictures of all kinds, captions repeated, foreign and empty."""
    row = lambda i, **changes: shard_row(i, **{"caption": f"a thing, number {i}"} | changes)
    rows = [row(0), row(1, jpg_0=encoded(picture(90, mode="RGBA"), "PNG")), row(2, jpg_1=encoded(picture(91, mode="CMYK"))),
            row(3, jpg_0=encoded(picture(92, mode="L"))), row(4, caption="ein Bär, 火星 🐈"), row(5), row(6), row(7)]
    odd = [row(8, label_0=.5, label_1=.5), row(9, has_label=False), row(10, jpg_1=jpeg(3)[:-20]), row(11, caption=" "),
           row(0), row(12, caption="something else")]
    more = [row(20 + i, caption=f"a new thing {i}") for i in range(6)]
    folder.mkdir()
    for i, part in enumerate((rows[:4] + odd[:3], rows[4:] + odd[3:], more)):
        pq.write_table(pa.Table.from_pylist(part), folder / f"train-{i:05d}-of-00003.parquet")
    return folder


@pytest.mark.parametrize("xl, prediction, rank, shards", [
    (False, "epsilon", 0, False), (False, "v_prediction", 2, True), (True, "epsilon", 2, False),
    (True, "v_prediction", 0, True)])
def test_all_stages_on_both_architectures(tmp_path, scorer, xl, prediction, rank, shards):
    pipe, files, run = make_pipeline(tmp_path / "model", xl, prediction), make_pairs(tmp_path / "own"), tmp_path / "run"
    source = [str(make_shards(tmp_path / "shards")), "pairs"] if shards else [files / "pairs.csv", files / "prompts.txt"]
    stage("01").main(["--preset", "sdxl" if xl else "sd15", "--run", str(run), "--model", str(tmp_path / "model"), "--vae",
                      "", "--pairs", str(source[0]), "--prompts", str(source[1]), "--eval-prompts",
                      str(files / "eval.txt"), "--lora-rank", str(rank), "--score-weights", f"pickscore={scorer}", *SMALL])
    stage("04").main(["--run", str(run), "--iter", "0"])
    for number in ("02", "03", "04"):
        stage(number).main(["--run", str(run), "--iter", "1"])
    stage("05").main(["--run", str(run)])

    seed, pairs = pd.read_parquet(run / "seed/pairs.parquet"), pd.read_parquet(run / "iter1/pairs.parquet")
    assert len(seed) == 5 and len(pd.read_parquet(run / "seed/holdout.parquet")) == 2 and len(pairs) == 2
    assert Image.open(run / seed.win[0]).size == (64, 64)
    latent = load_file(run / seed.win[0].replace("images", "latents").replace(".jpg", ".safetensors"))
    assert latent["mean"].shape == (4, 8, 8) and latent["std"].min() > 0
    scores = pd.read_parquet(run / "eval/scores.parquet")
    assert list(scores.model) == [m for m in ("base", "Iter0", "Iter1") for _ in range(2)]
    assert np.isfinite(scores.pickscore).all() and scores.pickscore.nunique() == 6
    logs = [pd.read_parquet(run / f"iter{k}/train_log.parquet") for k in (0, 1)]
    assert all(np.isfinite(log.drop(columns="seconds")).all(axis=None) for log in logs)
    assert abs(logs[0].loss[0] - np.log(2)) < 1e-3 and logs[0].grad_norm.min() > 0         # it starts at its reference

    # the conditioning that stages use is the pipeline's own, with and without a prompt
    s, _ = settings.load(["--run", str(run)], "")
    prompt = pd.read_parquet(run / "prompts.parquet").prompt[0]
    encoder = models.PromptEncoder(s)
    given = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    for ours, parts in ((encoder([prompt]), given[::2]), (encoder.unconditional(), given[1::2])):
        assert torch.allclose(ours["embeds"], parts[0], atol=1e-5)
        assert not xl or torch.allclose(ours["pooled"], parts[1], atol=1e-5)

    # plain diffusers draws round 1's candidates from Iter0, be it a UNet folder or an adapter
    drawn = pd.read_parquet(run / "iter1/candidates.parquet").iloc[1]
    kept = load_file(run / drawn.image.replace("images", "latents").replace(".png", ".safetensors"))["mean"]
    pipe.scheduler = models.SAMPLERS[s.sampler].from_config(pipe.scheduler.config)

    def draw():
        noise, generators = sampler.start_noise([int(drawn.seed)], (4, 8, 8), "cpu")
        return pipe(drawn.prompt, height=64, width=64, latents=noise, generator=generators, output_type="latent",
                    num_inference_steps=s.sample_steps, guidance_scale=s.cfg_scale).images[0]
    base = draw()
    if rank:
        pipe.load_lora_weights(run / "iter0/lora")
    else:
        pipe.unet = models.UNet2DConditionModel.from_pretrained(run / "iter0/unet")
    assert (draw() - kept).abs().max() < .02 * (base - kept).abs().max()


@pytest.mark.parametrize("xl", [False, True])
def test_every_ablation_and_rival_on_both_architectures(tmp_path, scorer, xl):
    """The settings of lib/study.py's arms, several in a run, with the presets of the paper's models."""
    make_pipeline(tmp_path / "model", xl, "epsilon")
    files = make_pairs(tmp_path / "own")

    def run(name: str, *changes: str, rows: tuple[str, ...] = ()):
        folder = tmp_path / name
        stage("01").main(["--preset", "sdxl" if xl else "sd15", "--run", str(folder), "--model", str(tmp_path / "model"),
                          "--vae", "", "--pairs", str(files / "pairs.csv"), "--prompts", str(files / "prompts.txt"),
                          "--eval-prompts", str(files / "eval.txt"), "--score-weights", f"pickscore={scorer}", *SMALL,
                          *changes])
        s, _ = settings.load(["--run", str(folder)], "")
        stage("04").main(["--run", str(folder), "--iter", "0"])
        for k in range(1, s.iters + 1):
            for number in ("02", "03", "04") if s.alpha else ("04",):
                stage(number).main(["--run", str(folder), "--iter", str(k)])
        stage("05").main(["--run", str(folder), *(part for row in rows for part in ("--row", row))])
        return folder, pd.read_parquet(folder / "eval/scores.parquet").set_index("model")
    weights = lambda folder, k: load_file(folder / f"iter{k}/unet/diffusion_pytorch_model.safetensors")
    judge = lambda folder, k: json.loads((folder / f"iter{k}/judge.json").read_text())

    mapo, _ = run("mapo", "--loss", "mapo", "--iters", "0")                         # a rival: no rounds, no reference
    log = pd.read_parquet(mapo / "iter0/train_log.parquet")
    assert np.isfinite(log.loss).all() and log.win_error_gain.isna().all()

    seed, table = run("seed-only", "--alpha", "0", "--start", str(mapo / "iter0/unet"),
                      rows=("further=extrapolate:Iter0:2", "same=extrapolate:Iter0:1", "guided=guide:Iter0:0"))
    given, kept = weights(mapo, 0), weights(seed, 0)
    assert all(torch.equal(given[name], kept[name]) for name in given) and not (seed / "iter1/images").exists()
    for row in ("same", "guided"):                                                  # gamma 1 and w 0 are Iter0 itself
        assert np.allclose(table.loc[row].pickscore, table.loc["Iter0"].pickscore, atol=1e-4)
    assert not np.allclose(table.loc["further"].pickscore, table.loc["Iter0"].pickscore, atol=1e-4)

    high, _ = run("high-t", "--iters", "2", "--anchor", "iter0", "--select", "random", "--alpha", "0.5", "--candidates",
                  "4", "--timesteps", "stratified", "--reward-weights", "balanced", "--rank-t-min", "500", "--min-margin",
                  ".001")
    rewards, pairs = (pd.read_parquet(high / f"iter2/{name}.parquet") for name in ("rewards", "pairs"))
    assert rewards.groupby("prompt_id").reward.nunique().eq(4).all() and (pairs.margin > 0).all()
    assert [judge(high, k)["anchor"] for k in (1, 2)] == ["base", "Iter0"] and judge(high, 2)["select"] == "random"

    online, _ = run("online", "--reward", "pickscore", "--alpha", "1")              # the loop, ranked from outside
    rewards, pairs = (pd.read_parquet(online / f"iter1/{name}.parquet") for name in ("rewards", "pairs"))
    best = rewards.loc[rewards.groupby("prompt_id").reward.idxmax()]
    assert list(pairs.win) == list(best.image) and set(pairs.source) == {"pickscore"}
    assert judge(online, 1)["reward"] == "pickscore" and len(pd.read_parquet(online / "iter1/train_log.parquet")) == 2


# ---- a hundred pairs are enough to start ----

def test_a_preset_fits_itself_to_few_pairs(tmp_path, capsys):
    """`sd15` with three files and no number: the run's settings say what became of the paper's, and hold for it."""
    files, run = make_pairs(tmp_path / "own", 12), tmp_path / "run"
    make_pipeline(tmp_path / "model", False, "epsilon")
    start = ["--preset", "sd15", "--run", str(run), "--model", str(tmp_path / "model"), "--resolution", "64", "--pairs",
             str(files / "pairs.csv"), "--prompts", str(files / "prompts.txt"), "--eval-prompts", str(files / "eval.txt")]
    stage("01").main(start)
    wanted = {"seed_pairs": 10, "holdout_pairs": 2, "iter_prompts": "2", "iter0_steps": 100, "iter_steps": 100}
    assert wanted.items() <= json.loads((run / "config.json").read_text())["settings"].items()
    assert "--seed-pairs 10 --holdout-pairs 2 --iter-prompts 2" in capsys.readouterr().out
    assert [len(pd.read_parquet(run / f"seed/{name}.parquet")) for name in ("pairs", "holdout")] == [10, 2]
    assert pd.read_parquet(run / "prompts.parquet").split.value_counts().to_dict() == {
        "iter1": 2, "iter2": 2, "iter3": 2, "eval": 2}
    stage("01").main(start)                                             # the same command continues, it is not refused


def test_numbers_given_by_hand_hold(tmp_path):
    files = make_pairs(tmp_path / "own", 12)
    of = lambda **changes: settings.Settings(**settings.SD15 | {
        "pairs": str(files / "pairs.csv"), "prompts": str(files / "prompts.txt"), "run": str(tmp_path / "run")} | changes)
    assert own.fit(of(seed_pairs=9, iter_prompts="1", iter0_steps=7, iter_steps=7), []) == {}
    assert own.fit(of(seed_pairs=9, holdout_pairs=3), ["A New thing 1"]) == {
        "iter_prompts": "1", "iter0_steps": 100, "iter_steps": 100}                      # 5 prompts left for 3 rounds
    assert own.fit(of(batch=4, seed_pairs=400, iter_prompts="100"), []) == {}            # one pass is 100 steps as it is
    assert "iter_steps" in own.fit(of(batch=4, seed_pairs=396, iter_prompts="100", alpha=0.), [])
    assert own.fit(of(pairs="some/dataset"), []) == {}
    with pytest.raises(UserError, match="--prompts pairs: .*give --prompts"):
        own.fit(of(prompts="pairs"), [])
