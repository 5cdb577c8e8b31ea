"""One's own pairs through stages 01-04, on randomly initialised Stable Diffusion and SDXL pipelines."""

import csv

import pandas as pd
import pytest
import torch
from conftest import ROOT, stage
from diffusers import (AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline,
                       UNet2DConditionModel)
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


def make_pipeline(folder, xl: bool, prediction: str):
    """The classes and the layout of SD1.5 (f = 8, 4 latent channels) or SDXL, with few channels."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "lib/tiny/tokenizer")
    text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                          num_attention_heads=2, max_position_embeddings=12, projection_dim=8,
                          bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    vae = AutoencoderKL(block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
                        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=4,
                        scaling_factor=.13025 if xl else .18215)
    size = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 8} if xl else {}
    unet = UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                                cross_attention_dim=32 if xl else 16, **size)
    scheduler = DDPMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False,
                              prediction_type=prediction)
    if xl:
        pipe = StableDiffusionXLPipeline(vae, CLIPTextModel(text), CLIPTextModelWithProjection(text), tokenizer, tokenizer,
                                         unet, scheduler)
    else:
        pipe = StableDiffusionPipeline(vae, CLIPTextModel(text), tokenizer, unet, scheduler, safety_checker=None,
                                       feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return pipe


def make_pairs(folder):
    folder.mkdir()
    with open(folder / "pairs.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "win", "lose"])
        for i in range(8):
            for side in "wl":
                Image.new("RGB", (80 + i, 64), (20 * i, 90, 255 * (side == "w"))).save(folder / f"{i}{side}.png")
            rows.writerow([f"a thing, number {i}", f"{i}w.png", f"{i}l.png"])
    (folder / "prompts.txt").write_text("".join(f"a new thing {i}\n" for i in range(6)))
    (folder / "eval.txt").write_text("something else\nand more\n")


@pytest.mark.parametrize("xl, prediction", [(False, "epsilon"), (True, "v_prediction")])
def test_own_pairs_on_both_architectures(tmp_path, xl, prediction):
    pipe, own, run = make_pipeline(tmp_path / "model", xl, prediction), tmp_path / "own", tmp_path / "run"
    make_pairs(own)
    stage("01").main(["--preset", "sdxl" if xl else "sd15", "--run", str(run), "--model", str(tmp_path / "model"), "--vae", "",
                      "--resolution", "64", "--pairs", str(own / "pairs.csv"), "--prompts", str(own / "prompts.txt"),
                      "--eval-prompts", str(own / "eval.txt"), "--seed-pairs", "6", "--holdout-pairs", "2", "--iters", "1",
                      "--iter-prompts", "2", "--candidates", "3", "--draws", "2", "--sample-steps", "2", "--batch", "4",
                      "--micro-batch", "2", "--iter0-steps", "2", "--iter-steps", "2", "--lr", "1e-4"])
    stage("04").main(["--run", str(run), "--iter", "0"])
    stage("02").main(["--run", str(run), "--iter", "1"])
    stage("03").main(["--run", str(run), "--iter", "1"])
    stage("04").main(["--run", str(run), "--iter", "1"])
    seed, pairs = pd.read_parquet(run / "seed/pairs.parquet"), pd.read_parquet(run / "iter1/pairs.parquet")
    assert len(seed) == 6 and len(pd.read_parquet(run / "seed/holdout.parquet")) == 2 and len(pairs) == 2
    assert Image.open(run / seed.win[0]).size == (64, 64)
    latent = load_file(run / seed.win[0].replace("images", "latents").replace(".jpg", ".safetensors"))
    assert latent["mean"].shape == (4, 8, 8) and latent["std"].min() > 0
    trained = load_file(run / "iter1/unet/diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(trained[k], v) for k, v in pipe.unet.state_dict().items())

    # the conditioning that stages use is the pipeline's own
    from lib import models, settings
    s, _ = settings.load(["--run", str(run)], "")
    condition = models.PromptEncoder(s)(["a new thing 3"])
    given = pipe.encode_prompt("a new thing 3", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    assert torch.allclose(condition["embeds"], given[0], atol=1e-5)
    if xl:
        assert torch.allclose(condition["pooled"], given[2], atol=1e-5)
