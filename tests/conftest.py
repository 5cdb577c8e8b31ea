import importlib.util
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""                       # what is compared is compared in float32, on the CPU

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def stage(name: str):
    """A numbered stage script as a module."""
    path = next(ROOT.glob(f"{name}*.py"))
    spec = importlib.util.spec_from_file_location("stage_" + path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def seed():
    return stage("01")


@pytest.fixture(scope="session")
def rank():
    return stage("03")


@pytest.fixture(scope="session")
def train():
    return stage("04")


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def make_pipeline(folder: Path, xl: bool, prediction: str):
    """SD1.5 or SDXL with random weights: the classes, blocks and options of the real one, few channels and layers.
    SDXL's encoders differ in width, and its second tokenizer pads with an exclamation mark."""
    from diffusers import (AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline,
                           UNet2DConditionModel)
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from lib import probe
    torch.manual_seed(0)
    tokenizers = [CLIPTokenizer.from_pretrained(ROOT / "lib/tiny/tokenizer", **pad) for pad in ({}, {"pad_token": "!"})]
    text = lambda kind, width, activation: kind(CLIPTextConfig(
        vocab_size=len(tokenizers[0]), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, projection_dim=12, hidden_act=activation,
        bos_token_id=tokenizers[0].bos_token_id, eos_token_id=tokenizers[0].eos_token_id)).eval()
    vae = AutoencoderKL(**probe.SD_VAE | {"block_out_channels": (8,) * 4, "layers_per_block": 1}, norm_num_groups=4,
                        scaling_factor=.13025 if xl else .18215)
    small = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4}
    if xl:
        small |= {"block_out_channels": (8, 16, 16), "transformer_layers_per_block": [1, 1, 2],
                  "attention_head_dim": [1, 2, 2], "cross_attention_dim": 16 + 24, "addition_time_embed_dim": 4,
                  "projection_class_embeddings_input_dim": 6 * 4 + 12}
    else:
        small |= {"block_out_channels": (8, 16, 16, 16), "attention_head_dim": 2, "cross_attention_dim": 16}
    unet = UNet2DConditionModel(**(probe.SDXL_UNET if xl else probe.SD15_UNET) | small)
    scheduler = DDPMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False,
                              steps_offset=1, prediction_type=prediction)
    first = text(CLIPTextModel, 16, "quick_gelu")
    if xl:
        pipe = StableDiffusionXLPipeline(vae, first, text(CLIPTextModelWithProjection, 24, "gelu"), *tokenizers, unet,
                                         scheduler)
    else:
        pipe = StableDiffusionPipeline(vae, first, tokenizers[0], unet, scheduler, safety_checker=None,
                                       feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pairs(folder: Path, count: int = 8) -> Path:
    """A table of one's own pairs, and prompts for the rounds and for the evaluation, as a user has them."""
    from PIL import Image
    folder.mkdir(parents=True)
    lines = ["prompt,win,lose"]
    for i in range(count):
        for side in "wl":
            picture = Image.new("RGB", (80 + i, 64), (20 * i % 256, 90, 255 * (side == "w")))
            picture.paste((200, 10 * i % 256, 30), (0, 0, 30, 40))                      # left and right differ
            picture.save(folder / f"{i}{side}.png")
        lines.append(f'"a thing, number {i}",{i}w.png,{i}l.png')
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    (folder / "prompts.txt").write_text("".join(f"a new thing {i}\n" for i in range(6)))
    (folder / "eval.txt").write_text("something else\nand more\n")
    return folder
