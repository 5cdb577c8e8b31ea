"""How fast is this device on a run's UNet and VAE, and how much memory do they take?

The probe makes the calls that fill the stages, a minute or so in all, and times them. Speed does
not depend on the weights: they are random, and nothing but small config files is downloaded. Where
a call would exceed its budget a smaller batch, and then a smaller picture, is timed instead and
scaled by its arithmetic. What the seconds add up to is the business of lib/plan/report.py.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from lib import diffusion, lora, models
from lib.plan.architecture import (Architecture, count_flops, pair_arithmetic, random_inputs,
                                   without_weights)
from lib.plan.memory import ranked_at_once
from lib.plan.stages import load_stage
from lib.run import UserError
from lib.settings import Settings, has_reference

# Seconds that a call of the probe may take. The fastest of REPEATS calls counts, or of fewer where
# they take long: after REPEAT_SECONDS no further one is made.
BUDGET = {"encode": 10.0, "decode": 10.0, "sample": 10.0, "rank": 10.0, "pair": 20.0}
REPEATS = 5
REPEAT_SECONDS = 2.5


class Probe:
    """Measures this device on one run; call `run` once, then read what it found.

    seconds     of a picture's "encode" and "decode" by the VAE, of its forward by the UNet in
                sampling ("sample") and in ranking ("rank"), of a training "pair" and, once a
                step, of the optimizer's "step"
    peak        highest memory in bytes of each of these calls; empty on other devices than CUDA
    notes       what was measured, in lines of text
    parameters  of the UNet
    where       the device's name
    capacity    its memory in bytes
    ceiling     FLOP per second of a large matrix product
    """

    def __init__(self, s: Settings, architecture: Architecture):
        self.s = s
        self.architecture = architecture
        self.device = models.device_of(s)
        self.dtype = models.dtype_of(s)
        self.where = self.device.type
        self.capacity = psutil.virtual_memory().total
        if self.device.type == "cuda":
            card = torch.cuda.get_device_properties(self.device)
            self.where, self.capacity = card.name, card.total_memory
        self.ceiling = matmul_rate(self.device, self.dtype)
        self.parameters = 0
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        self.notes: list[str] = []
        self.counted: dict[tuple[str, int], float] = {}

    def run(self) -> "Probe":
        """Time every call, or estimate those that do not fit into memory; returns itself."""
        self.time_vae("encode")
        self.time_vae("decode")
        unet = self.time_forwards()

        # An estimate of training, which holds where it cannot be timed.
        forwards = pair_arithmetic(self.s)
        self.seconds["pair"] = forwards * self.seconds["rank"]
        self.seconds["step"] = 0.0

        # A fifth more than the weights need: activations of the smallest batch.
        needed = 1.2 * self.parameters * self.bytes_in_training()
        if unet is None or needed > free_memory(self.device):
            self.notes.append(
                f"a training step was not timed (it needs over {needed / 1e9:.0f} GB): its hours "
                f"follow from the forward's, {forwards} forwards a pair")
        else:
            self.time_training(unet)
        return self

    def flops(self, what: str, resolution: int = 0) -> float:
        """FLOP of a picture's "unet" forward, "encode" or "decode"; 0: at the run's resolution."""
        key = (what, resolution or self.s.resolution)
        if key not in self.counted:
            self.counted[key] = count_flops(self.architecture, *key)
        return self.counted[key]

    # ---- the three kinds of calls ----

    def time_vae(self, what: str) -> None:
        """A batch that the VAE encodes or decodes."""
        empty = without_weights(AutoencoderKL, self.architecture.vae)
        vae = fill(empty, self.dtype, self.device)

        def make(batch: int, resolution: int) -> Callable:
            if what == "encode":
                pictures = torch.rand(batch, 3, resolution, resolution)
                return functools.partial(models.encode, vae, pictures)
            side = resolution // self.architecture.factor
            channels = vae.config.latent_channels
            latents = torch.randn(batch, channels, side, side, device=self.device)
            return functools.partial(models.decode, vae, latents)

        # The batches of stages 01 and 02, cut as lib/models.py cuts them.
        batch = models.ENCODE_BATCH
        at_once = max(1, models.VAE_PIXELS // self.s.resolution ** 2)
        if what == "decode":
            batch = self.s.sample_batch
            at_once = models.decoded_at_once(self.s.resolution ** 2)
        self.time_call(what, what, min(batch, at_once), make)

    def time_forwards(self) -> torch.nn.Module | None:
        """The UNet in sampling and in ranking; returns it, or None where it does not fit."""
        unet = without_weights(UNet2DConditionModel, self.architecture.unet)
        self.parameters = sum(parameter.numel() for parameter in unet.parameters())

        # Another device would run it: the hours are those of one as fast as this.
        size = self.parameters * self.dtype.itemsize
        if 1.3 * size > free_memory(self.device):
            self.notes.append(f"the UNet's {size / 1e9:.1f} GB do not fit here: its hours follow "
                              f"from the VAE's speed")
            speed = self.flops("decode") / self.seconds["decode"]
            self.seconds["sample"] = self.flops("unet") / speed
            self.seconds["rank"] = self.seconds["sample"]
            return None

        unet = fill(unet, self.dtype, self.device)
        frozen = unet
        if models.is_compiled(self.s):
            frozen = torch.compile(unet)

        # Guidance doubles a sampler's batch.
        sampled = self.s.sample_batch
        if self.s.cfg_scale > 1:
            sampled *= 2
        ranked = ranked_at_once(self.s)

        self.time_unet(frozen, "sample", sampled)
        call = self.size_of_call("sample", "unet", sampled)
        if self.size_of_call("rank", "unet", ranked) == call:
            self.seconds["rank"] = self.seconds["sample"]
        else:
            self.time_unet(frozen, "rank", ranked)
        return unet

    def time_unet(self, unet: torch.nn.Module, title: str, wanted: int) -> None:
        """A forward of the frozen UNet on a batch of `wanted` latents, or of fewer."""
        @torch.no_grad()
        def forward(given: tuple) -> None:
            diffusion.predict(unet, *given)

        def make(batch: int, resolution: int) -> Callable:
            return functools.partial(forward, self.inputs_for(unet, batch, resolution))

        self.time_call(title, "unet", wanted, make)

    def time_training(self, ref: torch.nn.Module) -> None:
        """Stage 04's step beside the reference, with the optimizer's states in memory."""
        policy = self.make_policy(ref)
        parameters = [p for p in policy.parameters() if p.requires_grad]
        optimizer = load_stage("04").make_optimizer(self.s, parameters)
        mixed = self.dtype != torch.float32

        def forward_and_backward(given: tuple) -> None:
            with torch.autocast(self.device.type, self.dtype, enabled=mixed):
                if has_reference(self.s):
                    with torch.no_grad():
                        diffusion.predict(ref, *given)
                diffusion.predict(policy, *given).square().mean().backward()

        def make(pairs: int, resolution: int) -> Callable:
            given = self.inputs_for(policy, 2 * pairs, resolution)
            return functools.partial(forward_and_backward, given)

        # Gradients come first, from the smallest picture; then two steps, of which the first makes
        # the optimizer's states. So the peak of the pairs has all that training holds.
        make(1, 8 * self.architecture.factor)()
        trained = sum(parameter.numel() for parameter in parameters)
        if 24 * trained < free_memory(self.device):
            first = seconds_of(optimizer.step, self.device)
            second = seconds_of(optimizer.step, self.device)
            self.seconds["step"] = min(first, second)

        self.time_call("pair", "unet", self.s.micro_batch, make, pair_arithmetic(self.s))

    def make_policy(self, ref: torch.nn.Module) -> torch.nn.Module:
        """The UNet that trains, as stage 04 has it."""
        if self.s.lora_rank:
            policy = ref
            lora.add_adapters(policy, self.s.lora_rank, Path("none"), 0)
        elif self.device.type == "cpu" and self.dtype == torch.float32:
            # Both are alike here, and memory may be scarce: one copy plays both parts.
            policy = ref.requires_grad_(True)
        else:
            empty = without_weights(UNet2DConditionModel, self.architecture.unet)
            policy = fill(empty, torch.float32, self.device).requires_grad_(True)

        if self.s.grad_checkpoint == "on":
            policy.enable_gradient_checkpointing()
        return policy.train()

    def bytes_in_training(self) -> int:
        """Bytes for each weight that a timed training step needs: weights, gradients, states."""
        if self.s.lora_rank:
            return 4
        if self.device.type == "cpu":
            return 8
        return 16

    def inputs_for(self, unet: torch.nn.Module, batch: int, resolution: int) -> tuple:
        """Random inputs of a forward, on the device."""
        side = resolution // self.architecture.factor
        return random_inputs(unet, self.architecture.tokens, side, batch, self.device)

    # ---- one call ----

    def size_of_call(self, title: str, what: str, wanted: int,
                     forwards: int = 1) -> tuple[int, int]:
        """Batch and resolution of a call that should take no more than its budget."""
        # Half of the budget at half the matrix product's speed: a slow model is still within it.
        allowed = BUDGET[title] / 2 * self.ceiling / 2 / forwards
        resolution = self.s.resolution
        smallest = 8 * self.architecture.factor
        while self.flops(what, resolution) > allowed and resolution // 2 >= smallest:
            resolution //= 2
        batch = min(wanted, int(allowed / self.flops(what, resolution)))
        return max(1, batch), resolution

    def time_call(self, title: str, what: str, wanted: int, make: Callable,
                  forwards: int = 1) -> None:
        """Fill in seconds[title] from calls of make(batch, resolution)(), its peak and a note.

        A picture of the call has `forwards` times the arithmetic of `what`.
        """
        intended, resolution = self.size_of_call(title, what, wanted, forwards)
        batch, seconds = self.time_what_fits(title, intended, resolution, make)
        if self.device.type == "cuda":
            self.peak[title] = torch.cuda.max_memory_allocated()

        # A smaller picture counts by its arithmetic.
        flops = self.flops(what, resolution)
        scale = self.flops(what) / flops
        self.seconds[title] = seconds / batch * scale

        if batch < intended:
            self.notes.append(f"{title}: a batch of {intended} does NOT fit into memory, "
                              f"{batch} does: choose a smaller one")
        scaled = ""
        if scale > 1:
            scaled = f" (x {scale:.1f} for {self.s.resolution} px)"
        speed = forwards * batch * flops / seconds
        self.notes.append(
            f"{title}: {seconds:.2f} s for {batch} at {resolution} px{scaled}: "
            f"{speed / 1e12:.3g} TFLOP/s, {speed / self.ceiling:.0%} of a matrix product's")

    def time_what_fits(self, title: str, batch: int, resolution: int,
                       make: Callable) -> tuple[int, float]:
        """The batch, halved until it fits into memory, and the seconds of a call on it."""
        while True:
            try:
                work = make(batch, resolution)
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                return batch, best_seconds(work, self.device)
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise UserError(
                        f"{title}: not even a batch of 1 fits into this device's memory; see "
                        f"--lora-rank, --grad-checkpoint and --resolution") from None
                batch //= 2
                torch.cuda.empty_cache()


# ---- the device ----

def fill(model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """A model without weights on the device, with random ones of about the size of real ones."""
    model = model.to(dtype).to_empty(device=device)
    model.requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    return model


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a large matrix product: what no model goes beyond."""
    side = 1024
    if device.type == "cuda":
        side = 8192
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    product = functools.partial(torch.matmul, matrix, matrix)
    fastest = min(seconds_of(product, device) for _ in range(8))
    return 2 * side ** 3 / fastest


def seconds_of(work: Callable, device: torch.device) -> float:
    """How long a call of `work` keeps the device busy."""
    started = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started


def best_seconds(work: Callable, device: torch.device) -> float:
    """The fastest of up to REPEATS calls; after REPEAT_SECONDS no further one is made."""
    least = 1
    if device.type != "cpu":
        least = 3  # the first calls compile, and choose kernels
    taken = []
    while len(taken) < least or (len(taken) < REPEATS and sum(taken) < REPEAT_SECONDS):
        taken.append(seconds_of(work, device))
    return min(taken)
