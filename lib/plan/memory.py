"""How much memory the stages of a run take, from the model's configs alone.

Weights, gradients and the optimizer's states are arithmetic. Activations are counted by running a
stage's largest call on the meta device, where tensors have sizes and no numbers, and watching what
lives at once (`LiveBytes`): on one picture, since all tensors of a call grow with its batch.
tests/test_plan.py holds this against the measured peak of a process.
"""

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib import diffusion, lora, models
from lib.plan.architecture import Architecture, random_inputs, without_weights
from lib.settings import Settings, has_reference

# What a process holds besides: the interpreter with torch and the libraries; on CUDA more of them,
# and on the card the context. Our own machines' values, rounded up.
HOST = 0.7e9
HOST_CUDA = 3e9
CONTEXT = 0.6e9

# A float32 weight: four bytes.
FULL = 4

# A device fits what takes no more than this share of it: the allocator leaves gaps.
FITS = 0.93

# The way of least memory (DiffusionSPO's learning rate, at rank 4).
LORA = {"lora_rank": 8, "lr": 6e-5}


class Memory:
    """Peak bytes of a run's stages: `device[stage]`, and `host[stage]` beside it.

    Where they are not on CUDA the two are one process's, and the same.
    """

    def __init__(self, s: Settings, architecture: Architecture, on_cuda: bool):
        self.s = s
        self.architecture = architecture
        self.dtype = models.dtype_of(s)
        self.unet = without_weights(UNet2DConditionModel, architecture.unet)
        self.vae = without_weights(AutoencoderKL, architecture.vae)
        self.unet_weights = count_weights(self.unet)
        self.vae_weights = count_weights(self.vae)
        self.traced: dict[tuple[bool, str], int] = {}

        self.device, self.host = {}, {}
        reading = self.reading()
        for stage, size in self.working().items():
            if on_cuda:
                self.device[stage] = int(CONTEXT + size)
                self.host[stage] = int(HOST_CUDA + reading[stage])
                continue
            self.device[stage] = int(HOST + size)
            if stage == "04_train_dpo" and s.lora_rank:
                self.device[stage] += reading[stage]
            self.host[stage] = self.device[stage]

    def working(self) -> dict[str, int]:
        """Weights and tensors of each stage's largest call."""
        painting = self.painting(self.s)
        beginning = max(self.encoding(), self.dtype.itemsize * self.architecture.text_weights)
        if self.s.pairs == "world":
            beginning = painting
        return {
            "01_seed": beginning,
            "02_generate": painting,
            "crossfit": self.training(self.s),
            "03_rank": self.ranking(self.s),
            "04_train_dpo": self.training(self.s),
            "05_eval": painting,
        }

    def reading(self) -> dict[str, int]:
        """What the host holds of weights on their way from a file or into one.

        A training ends in the full UNet in float32, which is what its file has.
        """
        size = self.dtype.itemsize
        unet = size * self.unet_weights
        return {
            "01_seed": size * max(self.vae_weights, self.architecture.text_weights),
            "02_generate": unet,
            "crossfit": unet if self.s.lora_rank else FULL * self.unet_weights,
            "03_rank": unet,
            "04_train_dpo": FULL * self.unet_weights,
            "05_eval": unet,
        }

    # ---- the stages' calls ----

    def encoding(self) -> int:
        """The VAE encodes a batch of pictures."""
        s = self.s
        batch = min(models.ENCODE_BATCH, max(1, models.VAE_PIXELS // s.resolution ** 2))
        vae = self.vae.to(self.dtype)

        def call():
            vae.encode(meta(self.dtype, 1, 3, s.resolution, s.resolution))

        return self.dtype.itemsize * self.vae_weights + batch * forward_peak(call)

    def painting(self, s: Settings) -> int:
        """The UNet samples a batch, and the VAE decodes it."""
        batch = s.sample_batch
        if s.cfg_scale > 1:
            batch *= 2
        sampling = batch * self.of_forward

        # The VAE takes so many at once; the batch's pictures come together in float32.
        at_once = min(s.sample_batch, models.decoded_at_once(s.resolution ** 2))
        pictures = s.sample_batch * 3 * s.resolution ** 2
        decoding = at_once * self.of_decoding + (self.dtype.itemsize + FULL) * pictures
        weights = self.unet_weights + self.vae_weights
        return self.dtype.itemsize * weights + max(sampling, decoding)

    def ranking(self, s: Settings) -> int:
        """Model and anchor see a batch of noised latents, one after the other."""
        asked = 2
        if s.reward == "self-confidence":
            asked = 1                           # no anchor
        weights = asked * self.dtype.itemsize * self.unet_weights
        return weights + ranked_at_once(s) * self.of_forward

    @cached_property
    def of_forward(self) -> int:
        """A latent's forward by the frozen UNet."""
        unet = self.unet.to(self.dtype)
        given = self.inputs(1, self.dtype)

        def call():
            diffusion.predict(unet, *given)

        return forward_peak(call)

    @cached_property
    def of_decoding(self) -> int:
        """A picture that the VAE decodes."""
        vae = self.vae.to(self.dtype)
        side = self.s.resolution // self.architecture.factor

        def call():
            vae.decode(meta(self.dtype, 1, vae.config.latent_channels, side, side))

        return forward_peak(call)

    def training(self, s: Settings) -> int:
        """A step: what is held for every weight, and the activations of a micro-batch."""
        return sum(self.held_in_training(s).values()) + self.activations(s)

    def held_in_training(self, s: Settings) -> dict[str, int]:
        """Bytes of policy, reference, gradients, optimizer and autocast's copies.

        Trained weights, their gradients and AdamW's two states are float32, frozen weights are in
        the run's dtype, and so is autocast's copy of the trained weights. An adapter (LoRA) is too
        small to count, and so are Adafactor's states.
        """
        frozen = self.dtype.itemsize * self.unet_weights
        trained = FULL * self.unet_weights
        if s.lora_rank:
            return {"policy": frozen}

        held = {"policy": trained}
        if has_reference(s):
            held["reference"] = frozen
        held["gradients"] = trained
        if s.optimizer == "adamw":
            held["optimizer"] = 2 * trained
        if self.dtype != torch.float32:
            held["autocast's copy"] = frozen
        return held

    def activations(self, s: Settings) -> int:
        """What forward and backward on a micro-batch of pairs hold beside the weights."""
        key = (s.lora_rank > 0, s.grad_checkpoint)
        if key not in self.traced:
            self.traced[key] = self.trace(s)
        return s.micro_batch * self.traced[key]

    def trace(self, s: Settings) -> int:
        """The peak of a forward and backward on a pair, without numbers."""
        unet = without_weights(UNet2DConditionModel, self.architecture.unet).to(self.dtype)
        if s.lora_rank:
            unet.requires_grad_(False)
            lora.add_adapters(unet, s.lora_rank, Path("none"), 0)
        if s.grad_checkpoint == "on":
            unet.enable_gradient_checkpointing()
        as_autocast_does(unet.train())

        # Gradients are counted with the weights: here they go as soon as they have come.
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(drop_gradient)

        def call():
            given = self.inputs(2, torch.float32)
            diffusion.predict(unet, *given).float().square().mean().backward()

        return peak_of(call)

    def inputs(self, batch: int, dtype: torch.dtype) -> tuple:
        """Inputs of a forward, without numbers."""
        side = self.s.resolution // self.architecture.factor
        x_t, t, condition = random_inputs(self.unet, self.architecture.tokens, side, batch, "meta")
        return x_t.to(dtype), t, {name: rows.to(dtype) for name, rows in condition.items()}


# ---- what would fit ----

def smaller(memory: Memory, capacity: float) -> dict | None:
    """Settings with which all stages fit into a device, the cheapest first: {} if they do already.

    None: no batch, no training and no adapter is small enough.
    """
    room = FITS * capacity - CONTEXT
    changes = {}
    calls = {"sample_batch": memory.painting, "rank_batch": memory.ranking}
    for setting, size_of in calls.items():
        s = memory.s
        while size_of(s) > room and getattr(s, setting) > 1:
            changes[setting] = getattr(s, setting) // 2
            s = replace(s, **{setting: changes[setting]})
        if size_of(s) > room:
            return None

    training = training_that_fits(memory, room)
    if training is None:
        return None
    return changes | training


def training_that_fits(memory: Memory, room: float) -> dict | None:
    """The changes after which a training step fits: a smaller micro-batch, which costs nothing,
    then activations computed again, another optimizer, an adapter."""
    again = {"grad_checkpoint": "on"}
    adapter = {}
    if not memory.s.lora_rank:
        adapter = LORA
    for way in ({}, again, again | {"optimizer": "adafactor"}, adapter, adapter | again):
        size = memory.s.micro_batch
        while size >= 1:
            small = replace(memory.s, **way, micro_batch=size)
            if memory.s.batch % size == 0 and memory.training(small) <= room:
                way = way | {"micro_batch": size}
                return {name: value for name, value in way.items()
                        if getattr(memory.s, name) != value}
            size //= 2
    return None


# ---- counting ----

def ranked_at_once(s: Settings) -> int:
    """Noised latents that stage 03 gives the UNet in a forward: whole prompts, or part of one."""
    of_prompt = s.candidates * s.draws
    whole = s.rank_batch // of_prompt * of_prompt
    return whole or s.rank_batch


def count_weights(model: torch.nn.Module) -> int:
    """How many numbers a model's parameters have."""
    return sum(parameter.numel() for parameter in model.parameters())


def meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor without numbers."""
    return torch.empty(shape, dtype=dtype, device="meta")


def forward_peak(call: Callable) -> int:
    """Bytes that live at once in a call without gradients."""
    with torch.no_grad():
        return peak_of(call)


def peak_of(call: Callable) -> int:
    """Bytes that live at once in a call on the meta device, beside what was there before."""
    attention = mock.patch.object(F, "scaled_dot_product_attention", fused_attention)
    with attention, LiveBytes() as live:
        call()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made within it that are alive: `now`, and the most `peak`."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, operation, types, args=(), options=None):
        # What comes in and is not known, the weights say, was there before.
        for storage in storages_of((args, options)):
            self.sizes.setdefault(storage._cdata, 0)

        result = operation(*args, **(options or {}))
        for storage in storages_of(result):
            self.meet(storage)
        return result

    def meet(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that is new; views share that of their tensor."""
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        """A storage is gone."""
        self.now -= self.sizes.pop(key)


def storages_of(values) -> list[torch.UntypedStorage]:
    """The storages of all tensors in nested values."""
    return [value.untyped_storage() for value in tree_leaves(values)
            if isinstance(value, torch.Tensor)]


class FusedAttention(torch.autograd.Function):
    """Attention as fused kernels hold it: query, key, value and result, no matrix of all pairs.

    On the meta device torch takes the plain form, which no device would.
    """

    @staticmethod
    def forward(context, query, key, value):
        result = torch.empty_like(query)
        context.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(context, gradient):
        query, key, value, _ = context.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def fused_attention(query, key, value, **_) -> torch.Tensor:
    """Stands in for torch's scaled_dot_product_attention."""
    return FusedAttention.apply(query, key, value)


def as_autocast_does(model: torch.nn.Module) -> None:
    """Let the layers of a frozen or copied 16-bit model compute as under autocast.

    Normalisations are in float32, and what comes to a layer is cast to the layer's own dtype.
    """
    norms = (torch.nn.GroupNorm, torch.nn.LayerNorm)
    for module in model.modules():
        if isinstance(module, norms):
            module.float()
        if isinstance(module, (*norms, torch.nn.Linear, torch.nn.Conv2d)):
            module.register_forward_pre_hook(cast_input)


def cast_input(module: torch.nn.Module, given: tuple) -> tuple:
    """A layer's input in its weights' dtype."""
    return (given[0].to(module.weight.dtype), *given[1:])


def drop_gradient(parameter: torch.nn.Parameter) -> None:
    """Forget a gradient."""
    parameter.grad = None
