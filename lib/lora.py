"""Low-rank adapters: stage 04's training with a small memory, without a second UNet for the reference.

Every round trains one adapter on the same base: "policy" starts as a copy of the last round's adapter and goes on
training, "last" stays as it was and is the reference. In Iter0 there is no "last": the reference is the base, with
the adapter off. So iterK/lora is all that model K differs from the base in, and plain diffusers loads it.
"""

import contextlib
import shutil
import warnings
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

FILE = "pytorch_lora_weights.safetensors"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]                 # every projection of self- and cross-attention


def add_adapters(unet: UNet2DConditionModel, rank: int, last: Path, seed: int) -> None:
    """Put adapters on a frozen base: copies of the one in folder `last`, if it is there, else a new one (B = 0)."""
    if last.exists():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")           # two adapters on purpose
            for name in ("last", "policy"):
                unet.load_lora_adapter(load_file(last / FILE), prefix="unet", adapter_name=name)
    else:
        from peft import LoraConfig
        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet.add_adapter(config, "policy")
    unet.set_adapter("policy")
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.float()                 # adapters train in float32 whatever the base is in


@contextlib.contextmanager
def reference_of(policy: UNet2DConditionModel):
    """The policy as it was before this round: with the adapter "last", or none."""
    if "last" in policy.peft_config:
        policy.set_adapter("last")
    else:
        policy.disable_adapters()
    yield policy
    policy.enable_adapters()
    policy.set_adapter("policy")


def save_adapter(policy: UNet2DConditionModel, folder: Path) -> None:
    """The adapter as pipe.load_lora_weights reads it, whole or not at all."""
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    StableDiffusionPipeline.save_lora_weights(temporary, get_peft_model_state_dict(policy, adapter_name="policy"))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def fuse(unet: UNet2DConditionModel, folder: Path) -> UNet2DConditionModel:
    """A base with an adapter added to its weights."""
    unet.load_lora_adapter(load_file(folder / FILE), prefix="unet")
    unet.fuse_lora()
    unet.unload_lora()
    return unet
