"""How the embedded world's base model was made: a small Stable Diffusion, pretrained on rendered scenes.

    python -m lib.pretrain --out lib/tiny        about an hour on 2 CPU cores

Three parts, each skipped when its folder is already there: a tokenizer that knows every caption word as one
token, an AutoencoderKL (32 x 32 x 3 to 8 x 8 x 12), and UNet2DConditionModel and CLIPTextModel trained together
on the usual noise-prediction loss. The result is a folder for StableDiffusionPipeline.from_pretrained.
"""

import argparse
import copy
import json
import math
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lib import world

TOKENS = 12                      # a caption's 8 words, begin, end, and two to spare
VAE_STEPS, VAE_BATCH, VAE_LR, KL_WEIGHT = 5000, 32, 2e-3, 3e-5
PICTURES = 65536                 # rendered and encoded once, then reused
UNET_STEPS, UNET_BATCH, UNET_LR = 4500, 128, 1e-3
EMPTY_PROMPT = .1                # for classifier-free guidance
EMA = .999


def cosine(step: int, steps: int, warmup: int = 200) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine to zero."""
    return min(step / warmup, 1) * .5 * (1 + math.cos(math.pi * min(step / steps, 1)))


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's file format, trained until every caption word is a single token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.decoder = normalizers.Lowercase(), decoders.ByteLevel()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(world.CAPTIONS, trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False))
    trained = json.loads(bpe.to_str())["model"]
    tokens = list(dict.fromkeys(letters + [c + "</w>" for c in letters]
                                + sorted(trained["vocab"], key=trained["vocab"].get)))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in trained["merges"]) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def scenes(count: int, generator: torch.Generator) -> tuple[list[str], torch.Tensor]:
    texts = [world.CAPTIONS[i] for i in torch.randint(len(world.CAPTIONS), (count,), generator=generator)]
    return texts, world.render(world.sample_scenes(texts, generator))


def train_vae(folder: Path) -> AutoencoderKL:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    vae = AutoencoderKL(block_out_channels=(16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3,
                        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=12, layers_per_block=1,
                        norm_num_groups=8, mid_block_add_attention=False, sample_size=world.SIZE)
    average = copy.deepcopy(vae).requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LR, betas=(.9, .99), weight_decay=1e-4)
    progress = tqdm(range(VAE_STEPS), desc="autoencoder", mininterval=10)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = VAE_LR * cosine(step, VAE_STEPS)
        pictures = scenes(VAE_BATCH, generator)[1] * 2 - 1
        posterior = vae.encode(pictures).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.std.shape, generator=generator)
        rebuilt = vae.decode(latents).sample
        error = F.mse_loss(rebuilt, pictures)
        (error + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(average, vae, step)
        if step % 100 == 0:
            progress.set_postfix(psnr=f"{10 * math.log10(4 / error.item()):.1f} dB")
    with torch.no_grad():
        latents = average.encode(scenes(2048, generator)[1] * 2 - 1).latent_dist.sample(generator)
    average.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    average.save_pretrained(folder)
    return average


def update_ema(average: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    decay = min(EMA, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def train_unet(folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, scheduler: DDIMScheduler,
               ) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=TOKENS, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=12, out_channels=12, block_out_channels=(48, 96), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, cross_attention_dim=64, norm_num_groups=8)          # attention_head_dim: number of heads
    both = torch.nn.ModuleList([unet, text_encoder])
    average = copy.deepcopy(both).requires_grad_(False)
    optimizer = torch.optim.AdamW(both.parameters(), lr=UNET_LR, betas=(.9, .99), weight_decay=1e-2)

    tokens, means, stds = [], [], []
    for _ in tqdm(range(PICTURES // 512), desc="render and encode", mininterval=10):
        texts, pictures = scenes(512, generator)
        tokens.append(tokenizer(texts, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids)
        with torch.no_grad():
            posterior = vae.encode(pictures * 2 - 1).latent_dist
        means.append(posterior.mean * vae.config.scaling_factor)
        stds.append(posterior.std * vae.config.scaling_factor)
    tokens, means, stds = torch.cat(tokens), torch.cat(means), torch.cat(stds)
    empty = tokenizer("", padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids

    progress = tqdm(range(UNET_STEPS), desc="UNet", mininterval=10)
    smooth = None
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = UNET_LR * cosine(step, UNET_STEPS)
        rows = torch.randint(PICTURES, (UNET_BATCH,), generator=generator)
        drop = torch.rand(UNET_BATCH, 1, generator=generator) < EMPTY_PROMPT
        latents = means[rows] + stds[rows] * torch.randn(means[rows].shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(1000, (UNET_BATCH,), generator=generator)
        embeds = text_encoder(torch.where(drop, empty, tokens[rows])).last_hidden_state
        loss = F.mse_loss(unet(scheduler.add_noise(latents, noise, timesteps), timesteps, embeds).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(average, both, step)
        smooth = loss.item() if smooth is None else .98 * smooth + .02 * loss.item()
        progress.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if step % 500 == 499:                                 # a model to look at while the rest trains
            average[0].save_pretrained(folder.parent / "unet-partial")
            average[1].save_pretrained(folder.parent / "text-partial")
    return average[0], average[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lib/tiny"))
    out = parser.parse_args().out
    started = time.time()
    tokenizer = make_tokenizer(out / "tokenizer")
    broken = [w for w in " ".join(world.CAPTIONS).split() if len(tokenizer(w).input_ids) != 3]
    assert not broken, f"not one token each: {set(broken)}"
    vae = (AutoencoderKL.from_pretrained(out / "vae") if (out / "vae").exists() else train_vae(out / "vae")).eval()
    scheduler = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)             # SD1.5's
    if not (out / "unet").exists():
        unet, text_encoder = train_unet(out / "unet", vae, tokenizer, scheduler)
        pipe = StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None,
                                       feature_extractor=None, requires_safety_checker=False)
        pipe.to(torch.float16).save_pretrained(out)           # half the bytes; loaded in float32
        for name in ("unet-partial", "text-partial"):
            shutil.rmtree(out / name, ignore_errors=True)
    print(f"{out}: {(time.time() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
