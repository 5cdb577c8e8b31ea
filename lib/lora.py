"""Low-rank adapters (Hu et al. 2022): stage 04's training with a small memory and no second UNet.

Every round trains one adapter on the same base. "policy" starts as a copy of the last round's
adapter and goes on training; "last" stays as it was and is the reference. In Iter0 there is no
"last": the reference is the base, with the adapter off. So iterK/lora is all that model K differs
from the base in, and plain diffusers loads it.
"""

import contextlib
import warnings
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from lib.run import atomic_folder

FILE = "pytorch_lora_weights.safetensors"

# Every projection of self- and cross-attention.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def add_adapters(unet: UNet2DConditionModel, rank: int, last: Path, seed: int) -> None:
    """Put adapters on a frozen base: copies of the one in folder `last`, or else a new one (B = 0).

    `rank` and `seed` are those of the new one.
    """
    if last.exists():
        copy_adapter(unet, last)
    else:
        new_adapter(unet, rank, seed)
    unet.set_adapter("policy")

    # Adapters train in float32 whatever the base is in.
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.float()


def copy_adapter(unet: UNet2DConditionModel, folder: Path) -> None:
    """Load an adapter twice: as the reference and as the policy that goes on from it."""
    with warnings.catch_warnings():
        # peft warns of a second adapter, which is what we want.
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        for name in ("last", "policy"):
            weights = load_file(folder / FILE)
            unet.load_lora_adapter(weights, prefix="unet", adapter_name=name)


def new_adapter(unet: UNet2DConditionModel, rank: int, seed: int) -> None:
    """Add an adapter that changes nothing yet: A is drawn at random, B is zero."""
    from peft import LoraConfig
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                        target_modules=TARGETS)

    # peft draws A from torch's global random numbers, which nothing else may notice.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(config, "policy")


@contextlib.contextmanager
def reference_of(policy: UNet2DConditionModel):
    """Within it, the policy is what it was before this round.

    It has the adapter "last", or in Iter0 none.
    """
    if "last" in policy.peft_config:
        policy.set_adapter("last")
    else:
        policy.disable_adapters()
    yield policy

    # Back to what is trained.
    policy.enable_adapters()
    policy.set_adapter("policy")


def save_adapter(policy: UNet2DConditionModel, folder: Path) -> None:
    """Write the adapter as pipe.load_lora_weights reads it, whole or not at all."""
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(policy, adapter_name="policy")
    with atomic_folder(folder) as temporary:
        StableDiffusionPipeline.save_lora_weights(temporary, weights)


def fuse(unet: UNet2DConditionModel, folder: Path) -> UNet2DConditionModel:
    """A base with the adapter of a folder added to its weights."""
    unet.load_lora_adapter(load_file(folder / FILE), prefix="unet")
    unet.fuse_lora()

    # The weights have it now: without the adapter's layers the UNet is a plain one again.
    unet.unload_lora()
    return unet
