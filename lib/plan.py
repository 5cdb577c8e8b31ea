"""What a run will cost, told before anything is spent: `./run_sail.sh sd15 --plan`, with any preset and any settings.

Counts (images, UNet forwards, optimizer steps) follow from the settings; the ledger of the run will say the same. Hours
come from a probe on the present device: the run's UNet and VAE at its resolution and batches, a minute at most; where a
batch would take longer, a smaller one, and then a smaller picture, is timed and scaled by its arithmetic. Speed does not
depend on the weights, so they are random, and nothing is downloaded but the model's small config files. With
SAIL_LAUNCH="accelerate launch --num_processes N" the hours are those of N such devices.
"""

import dataclasses
import functools
import importlib.util
import os
import re
import time
from pathlib import Path

import pandas as pd
import psutil
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig

from lib import benchmarks, lora, models
from lib.run import UserError, run_stage
from lib.settings import PRESETS, ROOT, Settings, build_parser, check, load, round_prompts

# The architectures of the two presets, as the config.json files of their UNets and VAEs say.
SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}         # else the class's defaults
SDXL_UNET = {"sample_size": 128, "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": [1, 2, 10],
             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
             "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
             "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "addition_embed_type": "text_time",
             "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
SD_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
          "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
PNG, JPEG = 2., .7                              # bytes per pixel of photographs as save_image writes them
BUDGET = {"unet": 10., "pair": 20., "encode": 10., "decode": 10.}           # seconds of the probe, a minute in all
FLAG = {"--plan": {"action": "store_true", "help": "print what the run will cost, and stop"}}


# ---- counts: as the ledger will say ----

@functools.cache
def stage(number: str):
    """A numbered script as a module."""
    path = next(ROOT.glob(f"{number}_*.py"))
    spec = importlib.util.spec_from_file_location(f"stage_{number}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def eval_prompts(s: Settings) -> int:
    """Evaluation prompts of all benchmarks; for one that would have to be fetched, the published number."""
    known = {name: min(s.eval_count or n, n) for name, n in benchmarks.PUBLISHED.items()}
    tokens = [token.strip() for token in s.eval_prompts.split(",") if token.strip()]
    return sum(known[token] if token in known else
               benchmarks.load(token, s.eval_count, s.pairs, say=lambda _: None).prompt.nunique() for token in tokens)


def painted(s: Settings, images: int) -> dict:
    return {"images": images, "unet_forwards": images * s.sample_steps * (2 if s.cfg_scale != 1 else 1), "decodes": images}


def trained(s: Settings, k: int, new: int) -> dict:
    """Stage 04 on `new` pairs whose mirror images nobody encoded yet."""
    steps = stage("04").steps_of(s, k, s.seed_pairs, new)
    return {"optimizer_steps": steps, "unet_forwards": steps * s.batch * (4 if s.loss == "dpo" else 2),
            "encodes": 2 * new if s.flip else 0}


def ranked(s: Settings, k: int) -> dict:
    """Stage 03: every draw is asked of model and anchor; an anchor's errors on the held-out pairs once per run."""
    rank = stage("03")
    if s.reward != "implicit":
        return {}
    asked = [rank.anchor_of(s, j) for j in range(1, k)]
    held = 2 * s.holdout_pairs * s.draws * (1 if rank.anchor_of(s, k) in asked else 2)
    return {"unet_forwards": 2 * round_prompts(s, k) * s.candidates * s.draws + held}


def counts(s: Settings) -> pd.DataFrame:
    """One row per stage and round: what the ledger counts, and pictures that the VAE encodes and decodes."""
    people = 2 * (s.seed_pairs + s.holdout_pairs)
    rows = [{"stage": "01_seed", **(painted(s, people) if s.pairs == "world" else {"images": people, "encodes": people})}]
    rows += [{"stage": "04_train_dpo", "iter": 0, **trained(s, 0, s.seed_pairs)}] if not s.start else []
    for k in range(1, s.iters + 1):
        new = round_prompts(s, k) if s.alpha > 0 else 0
        if new:
            rows += [{"stage": "02_generate", "iter": k, **painted(s, new * s.candidates)},
                     {"stage": "03_rank", "iter": k, **ranked(s, k)}]
        rows += [{"stage": "04_train_dpo", "iter": k, **trained(s, k, new)}]
    rows += [{"stage": "05_eval", **painted(s, (s.iters + 2) * eval_prompts(s) * s.eval_seeds)}]
    names = ["images", "unet_forwards", "optimizer_steps", "encodes", "decodes"]
    table = pd.DataFrame(rows).reindex(columns=["stage", "iter", *names])
    return table.astype({"iter": "Int64"}).fillna({n: 0 for n in names}).astype({n: "int64" for n in names})


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


def shape_of(s: Settings) -> Shape:
    """From the model's config files (a few kB) or, where they cannot be had, the preset's own architecture."""
    try:
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
            self.forward(unet, "sample", s.sample_batch * (2 if s.cfg_scale != 1 else 1))
            self.forward(unet, "rank", max(1, s.rank_batch // group) * group)
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
        allowed = BUDGET["pair" if times > 1 else what] * self.ceiling / 2 / times
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
                while len(taken) < least or len(taken) < 5 and sum(taken) < 3:
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
            self.seconds["step"] = min(seconds_of(optimizer.step, self.device) for _ in range(2))    # the first makes its states
        self.time("pair", "unet", s.micro_batch, make, forwards_per_pair(s))


# ---- disk, memory, and the report ----

def disk(s: Settings, shape: Shape, parameters: int, row: dict) -> int:
    """Bytes that a stage leaves behind: pictures, latents, prompt embeddings, a UNet in float32."""
    values = shape.vae["latent_channels"] * (s.resolution // shape.factor) ** 2
    kept, file = 4 * values, 150                                    # a sampler's own latent; a safetensors header
    posterior = 2 * models.dtype_of(s).itemsize * values + file     # of an encoded picture: mean and std
    outside = row["stage"] == "01_seed" and s.pairs != "world"
    size = row["images"] * s.resolution ** 2 * (JPEG if outside else PNG) if row["stage"] != "03_rank" else 0
    size += row["encodes"] * posterior
    if row["stage"] == "01_seed" and not outside or row["stage"] == "02_generate":
        size += row["images"] * (kept + file)
    if row["stage"] == "01_seed":
        prompts = s.seed_pairs + s.holdout_pairs + eval_prompts(s) + sum(round_prompts(s, k + 1) for k in range(s.iters))
        c = shape.unet
        pooled = c.get("projection_class_embeddings_input_dim") or 0
        size += prompts * models.dtype_of(s).itemsize * (shape.tokens * c["cross_attention_dim"] + pooled)
    return int(size + (4 * parameters if row["stage"] == "04_train_dpo" else 0))


def hours(s: Settings, seconds: dict, row: dict) -> float:
    vae = row["encodes"] * seconds["encode"] + row["decodes"] * seconds["decode"]
    if row["stage"] == "04_train_dpo":
        return (vae + row["optimizer_steps"] * (s.batch * seconds["pair"] + seconds["step"])) / 3600
    return (vae + row["unet_forwards"] * seconds["rank" if row["stage"] == "03_rank" else "sample"]) / 3600


def arithmetic(s: Settings, flops, row: dict) -> float:
    unet = row["unet_forwards"] if row["stage"] != "04_train_dpo" else row["optimizer_steps"] * s.batch * forwards_per_pair(s)
    return unet * flops("unet") + row["encodes"] * flops("encode") + row["decodes"] * flops("decode")


def memory(s: Settings, probe: Probe) -> str:
    """What training holds for every weight, and on CUDA the measured peaks beside the card."""
    p, low = probe.parameters, probe.dtype.itemsize
    parts = {"policy": p * (low if s.lora_rank else 4), "reference": 0 if s.lora_rank or s.loss != "dpo" else p * low,
             "gradients": 0 if s.lora_rank else 4 * p,
             "optimizer": 0 if s.lora_rank or s.optimizer == "adafactor" else 8 * p}
    gb = lambda size: f"{size / 1e9:.2g} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"
    text = "memory in training: " + " + ".join(f"{name} {gb(size)}" for name, size in parts.items() if size)
    text += f" = {gb(sum(parts.values()))} and activations"
    if probe.device.type != "cuda":
        return text + " (measured on CUDA only)"
    card = torch.cuda.get_device_properties(probe.device).total_memory
    peaks = ", ".join(f"{name} {gb(size)}" for name, size in probe.peak.items())
    fits = "fits" if max(probe.peak.values()) < .95 * card else "does NOT fit"
    return f"{text}\nmeasured peaks: {peaks}; the card has {gb(card)}: {fits}"


def plan(s: Settings, processes: int) -> tuple[pd.DataFrame, Probe]:
    """counts(s) with TFLOP, disk bytes and hours on `processes` devices like this one."""
    table, shape = counts(s), shape_of(s)
    probe = Probe(s, shape).run()
    rows = table.to_dict("records")
    return table.assign(tflop=[arithmetic(s, probe.flops, r) / 1e12 for r in rows],
                        disk_bytes=[disk(s, shape, probe.parameters, r) for r in rows],
                        hours=[hours(s, probe.seconds, r) / processes for r in rows]), probe


def settings_of(argv: list[str]) -> Settings:
    """A run's saved settings, or those a new run would have; no folder is made."""
    given = vars(build_parser(__doc__, FLAG).parse_args(argv))
    given.pop("plan", None)
    run = Path(given.get("run") or ROOT / "runs" / given.get("preset", "tiny"))
    if (run / "config.json").exists():
        return load(argv, __doc__, FLAG)[0]
    return check(Settings(**(PRESETS[given.get("preset", "tiny")] | given | {"run": str(run)})))


def main(argv: list[str]) -> None:
    s = settings_of(argv)
    launched = re.search(r"--num_processes[= ](\d+)", os.environ.get("SAIL_LAUNCH", ""))
    processes = int(launched[1]) if launched else 1
    table, probe = plan(s, processes)
    whole = table.drop(columns=["stage", "iter", "encodes", "decodes"]).sum().to_dict() | {"stage": "in all"}
    shown = pd.concat([table, pd.DataFrame([whole])], ignore_index=True)
    f = probe.flops
    text = pd.DataFrame({"stage": shown.stage, "round": shown.iter.map(lambda k: "" if pd.isna(k) else str(k))} | {
        title: shown[column].map(lambda v: f"{v:,.0f}" if v else "") for title, column in
        (("images", "images"), ("UNet forwards", "unet_forwards"), ("steps", "optimizer_steps"))} | {
        "TFLOP": shown.tflop.map(lambda v: f"{v:,.{0 if v >= 100 else 1}f}"), "disk, GB": (shown.disk_bytes / 1e9).map("{:,.2f}".format),
        "hours": shown.hours.map(lambda h: f"{h:,.1f}" if h >= 1 else f"{h:.2g}")})
    name = torch.cuda.get_device_name() if probe.device.type == "cuda" else probe.device.type
    print(f"plan of preset {s.preset} on {processes} x {name}, {str(probe.dtype)[6:]}; from {probe.shape.source}, random weights")
    print(text.to_string(index=False))
    print(f"one picture: UNet forward {f('unet') / 1e12:.3g} TFLOP, VAE encode {f('encode') / 1e12:.3g}, decode "
          f"{f('decode') / 1e12:.3g}; all of it at 100 TFLOP/s: {whole['tflop'] / 100 / 3600:,.2g} hours")
    print("\n".join(["measured here:", *(f"  {note}" for note in probe.notes), memory(s, probe)]))
    if s.alpha > 0 and s.min_margin:
        print("self-made pairs: at most; --min-margin drops some")
    print(f"while a model trains its checkpoint takes up to {24 * probe.parameters / 1e9:.1f} GB more disk\n"
          "not in the hours: scores of stage 05, prompt embeddings, downloads, files, starting Python")


if __name__ == "__main__":          # python -m lib.plan [settings] --plan: prints, makes nothing
    run_stage(main)
