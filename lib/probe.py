"""How fast is this device on a model's UNet and VAE, and what memory do they take? For lib.plan and the benches.

Speed does not depend on the weights, so they are random, and nothing is downloaded but the model's small config files.
Where a call would take longer than its budget a smaller batch, and then a smaller picture, is timed and scaled by its
arithmetic, which is counted on the meta device.
"""

import dataclasses
import functools
import importlib.util
import time
from pathlib import Path

import psutil
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig

from lib import lora, models
from lib.run import UserError
from lib.settings import ROOT, Settings

# The architectures of the two presets, as the config.json files of their UNets and VAEs say.
SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}         # else the class's defaults
SDXL_UNET = {"sample_size": 128, "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": [1, 2, 10],
             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
             "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
             "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "addition_embed_type": "text_time",
             "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
SD_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
          "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
BUDGET = {"unet": 10., "pair": 20., "encode": 10., "decode": 10.}           # seconds of the probe, a minute in all


@functools.cache
def stage(number: str):
    """A numbered script as a module."""
    path = next(ROOT.glob(f"{number}_*.py"))
    spec = importlib.util.spec_from_file_location(f"stage_{number}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- the architecture ----

@dataclasses.dataclass(frozen=True)
class Shape:
    unet: dict
    vae: dict
    tokens: int
    source: str

    @property
    def factor(self) -> int:
        return 2 ** (len(self.vae["block_out_channels"]) - 1)


def ask(name: str) -> None:
    """OSError at once if a model is neither a folder, nor in the hub's cache, nor on the hub; loading a file of it would
    try again for half a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    if Path(models.local_or_hub(name)).is_dir() or isinstance(try_to_load_from_cache(name, "unet/config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:                                  # each network library raises its own kinds
        raise OSError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None


def shape_of(s: Settings) -> Shape:
    """From the model's config files (a few kB) or, where they cannot be had, the preset's own architecture."""
    try:
        ask(s.model)
        unet = UNet2DConditionModel.load_config(models.local_or_hub(s.model), subfolder="unet")
        where = {} if s.vae else {"subfolder": "vae"}
        vae = AutoencoderKL.load_config(models.local_or_hub(s.vae or s.model), **where)
        text = CLIPTextConfig.from_pretrained(models.local_or_hub(s.model), subfolder="text_encoder")
        return Shape(unet, vae, text.max_position_embeddings, f"{s.model}'s config files")
    except (OSError, ValueError) as error:
        if s.preset == "tiny":
            raise UserError(f"cannot read the config files of {s.model}: {str(error).splitlines()[0]}") from None
        xl = s.preset == "sdxl"
        return Shape(SDXL_UNET if xl else SD15_UNET, SD_VAE, 77,
                     f"the known architecture of {'SDXL' if xl else 'SD1.5'} ({s.model} is not within reach)")


def empty(kind, config: dict):
    """A model on the meta device: its shapes without its weights."""
    with torch.device("meta"):
        return kind.from_config(config)


def fill(model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """Random weights of about the size of real ones."""
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.normal_(std=.02)
    return model.to(memory_format=torch.channels_last) if device.type == "cuda" else model


def inputs(unet, tokens: int, side: int, batch: int, device) -> tuple:
    """Noisy latents, timesteps and conditioning, for models.predict."""
    c = unet.config
    condition = {"embeds": torch.randn(batch, tokens, c.cross_attention_dim, device=device)}
    if c.addition_embed_type == "text_time":
        pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
        condition["pooled"] = torch.randn(batch, pooled, device=device)
    return torch.randn(batch, c.in_channels, side, side, device=device), torch.full((batch,), 500, device=device), condition


def flops(shape: Shape, what: str, resolution: int) -> float:
    """Arithmetic of one picture's UNet forward ("unet"), VAE "encode" or "decode", counted on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        side = resolution // shape.factor
        if what == "unet":
            unet = empty(UNet2DConditionModel, shape.unet)
            models.predict(unet, *inputs(unet, shape.tokens, side, 1, "meta"))
        else:
            vae = empty(AutoencoderKL, shape.vae)
            size = (1, 3, resolution, resolution) if what == "encode" else (1, vae.config.latent_channels, side, side)
            getattr(vae, what)(torch.randn(size, device="meta"))
    return counter.get_total_flops()


def forwards_per_pair(s: Settings) -> int:
    """A training pair's arithmetic in UNet forwards: policy and reference on two pictures; a backward costs twice its
    forward, or once where the weights are frozen (LoRA), and recomputed activations a forward more."""
    return (4 if s.loss == "dpo" else 2) + 2 * (1 if s.lora_rank else 2) + (2 if s.grad_checkpoint == "on" else 0)


# ---- the probe ----

def seconds_of(work, device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a large matrix product: what no model goes beyond."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / min(seconds_of(lambda: a @ a, device) for _ in range(8))


def free_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return psutil.virtual_memory().available
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


class Probe:
    """Seconds of one picture's forward in sampling ("sample") and ranking ("rank"), of a training "pair", of the
    optimizer's "step", of a picture's "encode" and "decode"; on CUDA also the peak memory of each."""

    def __init__(self, s: Settings, shape: Shape):
        self.s, self.shape, self.device, self.dtype = s, shape, models.device_of(s), models.dtype_of(s)
        self.flops = functools.cache(lambda what, resolution=s.resolution: flops(shape, what, resolution))
        self.seconds, self.peak, self.notes = {}, {}, []
        self.ceiling = matmul_rate(self.device, self.dtype)

    def run(self) -> "Probe":
        s, group = self.s, self.s.candidates * self.s.draws
        self.vae("encode")
        self.vae("decode")
        unet = empty(UNet2DConditionModel, self.shape.unet)
        self.parameters = sum(p.numel() for p in unet.parameters())
        size = self.parameters * self.dtype.itemsize
        if size * 1.3 > free_memory(self.device):
            self.notes.append(f"the UNet's {size / 1e9:.1f} GB do not fit here: its hours follow from the VAE's speed")
            speed = self.flops("decode") / self.seconds["decode"]
            self.seconds |= {what: self.flops("unet") / speed for what in ("sample", "rank")}
            unet = None
        else:
            unet = fill(unet, self.dtype, self.device)
            if s.compile == "on":
                unet.compile()
            sampled, ranked = s.sample_batch * (2 if s.cfg_scale != 1 else 1), max(1, s.rank_batch // group) * group
            self.forward(unet, "sample", sampled)
            if self.size("unet", ranked) == self.size("unet", sampled):          # the same call
                self.seconds["rank"] = self.seconds["sample"]
            else:
                self.forward(unet, "rank", ranked)
        self.seconds |= {"pair": forwards_per_pair(s) * self.seconds["rank"], "step": 0.}
        need = 1.2 * self.parameters * (4 if s.lora_rank else 8 if self.device.type == "cpu" else 16)
        if unet is None or need > free_memory(self.device):
            self.notes.append(f"a training step was not timed (it needs over {need / 1e9:.0f} GB): its hours follow from "
                              f"the forward's, {forwards_per_pair(s)} forwards a pair")
        else:
            self.training(unet)
        return self

    def size(self, what: str, wanted: int, times: float = 1) -> tuple[int, int]:
        """Batch and resolution of a call that should stay within its budget at half the matrix product's speed."""
        allowed = BUDGET["pair" if times > 1 else what] / 2 * self.ceiling / 2 / times
        resolution = self.s.resolution
        while self.flops(what, resolution) > allowed and resolution // 2 >= 8 * self.shape.factor:
            resolution //= 2
        return max(1, min(wanted, int(allowed / self.flops(what, resolution)))), resolution

    def time(self, title: str, what: str, wanted: int, make, times: float = 1) -> None:
        """Seconds a picture (or pair) takes in calls of make(batch, resolution); smaller batches where memory ends."""
        batch, resolution = self.size(what, wanted, times)
        asked = batch
        while True:
            try:
                work = make(batch, resolution)
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                taken, least = [], 1 if self.device.type == "cpu" else 3   # the first call compiles, chooses kernels
                while len(taken) < least or len(taken) < 5 and sum(taken) < BUDGET["unet"] / 4:
                    taken.append(seconds_of(work, self.device))
                seconds = min(taken)
                break
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise UserError(f"{title}: not even a batch of 1 fits into this device's memory; see --lora-rank, "
                                    f"--grad-checkpoint and --resolution") from None
                batch //= 2
                torch.cuda.empty_cache()
        if self.device.type == "cuda":
            self.peak[title] = torch.cuda.max_memory_allocated()
        if batch < asked:
            self.notes.append(f"{title}: a batch of {asked} does NOT fit into memory, {batch} does: choose a smaller one")
        scale = self.flops(what) / self.flops(what, resolution)
        self.seconds[title] = seconds / batch * scale
        speed = times * batch * self.flops(what, resolution) / seconds
        self.notes.append(f"{title}: {seconds:.2f} s for {batch} at {resolution} px"
                          + (f" (x {scale:.1f} for {self.s.resolution} px)" if scale > 1 else "")
                          + f": {speed / 1e12:.3g} TFLOP/s, {speed / self.ceiling:.0%} of a matrix product's")

    def vae(self, what: str) -> None:
        vae = fill(empty(AutoencoderKL, self.shape.vae), self.dtype, self.device)

        def make(batch, resolution):
            side = resolution // self.shape.factor
            pictures = torch.rand(batch, 3, resolution, resolution)
            latents = torch.randn(batch, vae.config.latent_channels, side, side, device=self.device)
            return (lambda: models.encode(vae, pictures)) if what == "encode" else (lambda: models.decode(vae, latents))
        most = 16 if what == "encode" else self.s.sample_batch
        self.time(what, what, max(1, min(most, models.VAE_PIXELS // self.s.resolution ** 2)), make)

    def forward(self, unet, title: str, wanted: int) -> None:
        def make(batch, resolution):
            given = inputs(unet, self.shape.tokens, resolution // self.shape.factor, batch, self.device)

            def work():
                with torch.no_grad():
                    models.predict(unet, *given)
            return work
        self.time(title, "unet", wanted, make)

    def training(self, ref) -> None:
        """Stage 04's step, with its optimizer's states in memory when the peak is taken."""
        s, low = self.s, self.dtype != torch.float32
        if s.lora_rank:
            policy = ref
            lora.add_adapters(policy, s.lora_rank, Path("none"), 0)
        else:                                                   # on a CPU one copy of the weights plays both parts
            policy = ref if self.device.type == "cpu" and not low else \
                fill(empty(UNet2DConditionModel, self.shape.unet), torch.float32, self.device)
            policy.requires_grad_(True)
        policy.train()
        if s.grad_checkpoint == "on":
            policy.enable_gradient_checkpointing()
        parameters = [p for p in policy.parameters() if p.requires_grad]
        optimizer = stage("04").make_optimizer(s, parameters)

        def make(batch, resolution):
            given = inputs(policy, self.shape.tokens, resolution // self.shape.factor, 2 * batch, self.device)

            def work():
                with torch.autocast(self.device.type, self.dtype, enabled=low):
                    if s.loss == "dpo":
                        with torch.no_grad():
                            models.predict(ref, *given)
                    models.predict(policy, *given).square().mean().backward()
            return work
        make(1, 8 * self.shape.factor)()
        if 24 * sum(p.numel() for p in parameters) < free_memory(self.device):
            self.seconds["step"] = min(seconds_of(optimizer.step, self.device) for _ in range(2))  # the first makes states
        self.time("pair", "unet", s.micro_batch, make, forwards_per_pair(s))
