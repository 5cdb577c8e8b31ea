"""How the embedded world's base model was made: a small Stable Diffusion from rendered scenes.

    python -m lib.world.pretrain --out lib/world/base       about an hour on 2 CPU cores

Three parts: a tokenizer that knows every caption word as one token, an AutoencoderKL (32 x 32 x 3
to 8 x 8 x 12), and UNet2DConditionModel and CLIPTextModel trained together on the usual
noise-prediction loss. An autoencoder or UNet whose folder is already there is not trained again.
The result is a folder for StableDiffusionPipeline.from_pretrained.
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

from lib.world.captions import CAPTIONS, SIZE
from lib.world.scenes import render, sample_scenes

TOKENS = 12                      # a caption's 8 words, begin, end, and two to spare
LATENT_CHANNELS = 12             # with SD1.5's 4 the objects' colours were lost
LATENT_SIZE = 8

# The autoencoder.
VAE_STEPS = 5000
VAE_BATCH = 32
VAE_LR = 2e-3
KL_WEIGHT = 3e-5

# The UNet and the text encoder.
PICTURES = 65536                 # rendered and encoded once, then reused
UNET_STEPS = 4500
UNET_BATCH = 128
UNET_LR = 1e-3
EMPTY_PROMPT = .1                # for classifier-free guidance

EMA = .999


# ---- shared by both trainings ----

def cosine(step: int, steps: int, warmup: int = 200) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine to zero."""
    return min(step / warmup, 1) * .5 * (1 + math.cos(math.pi * min(step / steps, 1)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def update_ema(average: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    """Move the average of a model's weights towards the model; in early steps further."""
    decay = min(EMA, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def random_scenes(count: int, generator: torch.Generator) -> tuple[list[str], torch.Tensor]:
    """Captions drawn at random, and a picture (count, 3, 32, 32) of each in -1..1."""
    chosen = torch.randint(len(CAPTIONS), (count,), generator=generator)
    texts = [CAPTIONS[i] for i in chosen]
    return texts, render(sample_scenes(texts, generator)) * 2 - 1


# ---- tokenizer ----

def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's file format, trained until every caption word is one token."""
    # The same steps as CLIP's tokenizer: any text can be told in bytes.
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    bpe.decoder = decoders.ByteLevel()

    # There are few words, so 2,000 merges join each of them to one token.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(CAPTIONS, trainer)
    trained = json.loads(bpe.to_str())["model"]

    # CLIP's order: letters, letters that end a word, what was learned, begin and end of the text.
    endings = [letter + "</w>" for letter in letters]
    learned = sorted(trained["vocab"], key=trained["vocab"].get)
    tokens = list(dict.fromkeys(letters + endings + learned))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = ["#version: 0.2"] + [" ".join(merge) for merge in trained["merges"]]

    # CLIP's two files; transformers adds its own when it saves what it has read.
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def check_tokenizer(tokenizer: CLIPTokenizer) -> None:
    """Every word of the captions must be one token, between those of begin and end."""
    broken = set()
    for word in " ".join(CAPTIONS).split():
        if len(tokenizer(word).input_ids) != 3:
            broken.add(word)
    assert not broken, f"not one token each: {broken}"


# ---- autoencoder ----

def train_vae(folder: Path) -> AutoencoderKL:
    """Train the autoencoder on scenes never seen twice; save and return its averaged weights."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )
    average = copy.deepcopy(vae).requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LR, betas=(.9, .99), weight_decay=1e-4)

    progress = tqdm(range(VAE_STEPS), desc="autoencoder", mininterval=10)
    for step in progress:
        set_lr(optimizer, VAE_LR * cosine(step, VAE_STEPS))

        # New scenes at every step: rendering costs little beside the network.
        _, pictures = random_scenes(VAE_BATCH, generator)
        error, loss = vae_loss(vae, pictures, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(average, vae, step)

        # The pictures lie in -1..1, so the peak of the signal is 2 and its square 4.
        if step % 100 == 0:
            progress.set_postfix(psnr=f"{10 * math.log10(4 / error.item()):.1f} dB")

    # As in Stable Diffusion, the scaling factor gives the latents a standard deviation of 1.
    _, pictures = random_scenes(2048, generator)
    with torch.no_grad():
        latents = average.encode(pictures).latent_dist.sample(generator)
    average.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    average.save_pretrained(folder)
    return average


def vae_loss(
    vae: AutoencoderKL,
    pictures: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error of pictures (B, 3, 32, 32) rebuilt, and the loss: with a little KL."""
    posterior = vae.encode(pictures).latent_dist
    noise = torch.randn(posterior.std.shape, generator=generator)
    latents = posterior.mean + posterior.std * noise
    error = F.mse_loss(vae.decode(latents).sample, pictures)

    # Only enough KL to keep the latents near the normal distribution's size.
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return error, error + KL_WEIGHT * kl


# ---- UNet and text encoder ----

def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text model of two layers with random weights."""
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))


def new_unet() -> UNet2DConditionModel:
    """A UNet of SD1.5's kind with two levels and random weights."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,                   # for this class the number of heads
        cross_attention_dim=64,
        norm_num_groups=8,
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Tokens (B, 12) of captions."""
    padded = tokenizer(texts, padding="max_length", max_length=TOKENS, return_tensors="pt")
    return padded.input_ids


def encode_pictures(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Render and encode all pictures once.

    Returns tokens (PICTURES, 12) and the mean and std (PICTURES, 12, 8, 8) of each posterior, in
    the UNet's scaled units.
    """
    tokens, means, stds = [], [], []
    for _ in tqdm(range(PICTURES // 512), desc="render and encode", mininterval=10):
        texts, pictures = random_scenes(512, generator)
        with torch.no_grad():
            posterior = vae.encode(pictures).latent_dist
        tokens.append(tokenize(tokenizer, texts))
        means.append(posterior.mean * vae.config.scaling_factor)
        stds.append(posterior.std * vae.config.scaling_factor)
    return torch.cat(tokens), torch.cat(means), torch.cat(stds)


def train_unet(
    folder: Path,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    scheduler: DDIMScheduler,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train UNet and text encoder together on the noise-prediction loss; return their averages.

    Every 500 steps both are also saved beside `folder`, to be looked at while the rest trains.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    text_encoder = new_text_encoder(tokenizer)
    unet = new_unet()
    both = torch.nn.ModuleList([unet, text_encoder])
    average = copy.deepcopy(both).requires_grad_(False)
    optimizer = torch.optim.AdamW(both.parameters(), lr=UNET_LR, betas=(.9, .99), weight_decay=1e-2)

    # The autoencoder's work is done once, before training.
    data = encode_pictures(vae, tokenizer, generator)
    empty = tokenize(tokenizer, [""])

    smooth_loss = None
    progress = tqdm(range(UNET_STEPS), desc="UNet", mininterval=10)
    for step in progress:
        set_lr(optimizer, UNET_LR * cosine(step, UNET_STEPS))
        loss = unet_loss(unet, text_encoder, scheduler, data, empty, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(average, both, step)

        # The loss of a step is noisy; what the bar shows is smoothed over some fifty steps.
        if smooth_loss is None:
            smooth_loss = loss.item()
        smooth_loss = .98 * smooth_loss + .02 * loss.item()
        progress.set_postfix(loss=f"{smooth_loss:.4f}", refresh=False)
        if step % 500 == 499:
            average[0].save_pretrained(folder.parent / "unet-partial")
            average[1].save_pretrained(folder.parent / "text-partial")
    return average[0], average[1]


def unet_loss(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    scheduler: DDIMScheduler,
    data: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    empty: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """The noise-prediction loss of a random batch of the encoded pictures."""
    tokens, means, stds = data
    # One prompt in ten is left empty, so that the model also learns to draw without one.
    rows = torch.randint(PICTURES, (UNET_BATCH,), generator=generator)
    without_prompt = torch.rand(UNET_BATCH, 1, generator=generator) < EMPTY_PROMPT

    # A new sample of each picture's posterior, then a new noise and timestep.
    sampled = torch.randn(means[rows].shape, generator=generator)
    latents = means[rows] + stds[rows] * sampled
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(1000, (UNET_BATCH,), generator=generator)

    prompts = torch.where(without_prompt, empty, tokens[rows])
    embeds = text_encoder(prompts).last_hidden_state
    x_t = scheduler.add_noise(latents, noise, timesteps)
    predicted = unet(x_t, timesteps, embeds).sample
    return F.mse_loss(predicted, noise)


# ---- all of it ----

def main() -> None:
    """Make what the folder lacks, and save it all as one pipeline."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("lib/world/base"))
    out = parser.parse_args().out
    started = time.time()

    tokenizer = make_tokenizer(out / "tokenizer")
    check_tokenizer(tokenizer)

    # The hour is spent on these two; what is there already is taken as it is.
    if (out / "vae").exists():
        vae = AutoencoderKL.from_pretrained(out / "vae")
    else:
        vae = train_vae(out / "vae")
    vae.eval()

    # Stable Diffusion 1.5's schedule.
    scheduler = DDIMScheduler(
        beta_start=.00085,
        beta_end=.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    if not (out / "unet").exists():
        unet, text_encoder = train_unet(out / "unet", vae, tokenizer, scheduler)
        save_pipeline(out, vae, text_encoder, tokenizer, unet, scheduler)
    print(f"{out}: {(time.time() - started) / 60:.0f} minutes")


def save_pipeline(
    out: Path,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
) -> None:
    """Save the parts as one folder, and delete what was saved while training."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(out)               # half the bytes; loaded in float32
    for name in ("unet-partial", "text-partial"):
        shutil.rmtree(out / name, ignore_errors=True)


if __name__ == "__main__":
    main()
