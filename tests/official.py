"""hpsv2 1.2.0 and image-reward 1.5 as they were published, for tests/test_scorers.py and the bench.

Both run here on random weights, at any size, behind a few shims for what has moved in the packages
that they import since. Neither is needed to score pictures: lib/eval/scorers.py computes the same.
"""

import contextlib
import gzip
import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from lib.eval import scorers

# Small towers, with which a test takes a moment.
HPSV2 = {
    "embed_dim": 96,
    "vision_cfg": {
        "image_size": 224,
        "layers": 2,
        "width": 160,
        "head_width": 80,
        "patch_size": 32,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
    },
}
BLIP_VISION = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "patch_size": 32,
}
BLIP_TEXT = {"encoder_hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 101}

VOCABULARY = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "star",
    *"abcdefghijklmnopqrstuvwxyz0123456789!,'&;戴珍珠的",
]


def waves(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture of coloured waves and noise, with alpha where the mode has it."""
    rng = np.random.default_rng([width, height])
    y = np.arange(height)[:, None, None] / 40
    x = np.arange(width)[:, None] / 40
    wave = np.sin(x * rng.uniform(-3, 3, 4) + y * rng.uniform(-3, 3, 4) + rng.uniform(0, 6, 4))
    noise = rng.uniform(-60, 60, 4) + 90 * wave + rng.normal(0, 25, (height, width, 4))

    picture = Image.fromarray(np.clip(127 + noise, 0, 255).astype("uint8"))
    if mode == "RGBA":
        return picture
    return picture.convert("RGB").convert(mode)


def spread_out(model: torch.nn.Module) -> None:
    """Draw a model's matrices anew, so wide that inputs move what it gives."""
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -.5)


# ---- hpsv2 ----

@contextlib.contextmanager
def sized_hpsv2(config: dict = HPSV2):
    """Give "ViT-H-14" these sizes, in open_clip and in hpsv2's copy of it."""
    with pytest.MonkeyPatch.context() as patch:
        for package in ("open_clip", "hpsv2.src.open_clip"):
            factory = importlib.import_module(f"{package}.factory")
            patch.setitem(factory._MODEL_CONFIGS, "ViT-H-14", config)
        yield


def import_hpsv2():
    """Import hpsv2.img_score.

    Its wheel lacks CLIP's vocabulary, it imports tkinter's turtle, and it downloads base weights
    that the checkpoint then overwrites.
    """
    vocabulary = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    open_gzip = gzip.open

    def open_vocabulary(path, *rest):
        if not Path(path).exists():
            path = vocabulary
        return open_gzip(path, *rest)

    sys.modules.setdefault("turtle", types.SimpleNamespace(forward=None))
    gzip.open = open_vocabulary
    try:
        module = importlib.import_module("hpsv2.img_score")
    finally:
        gzip.open = open_gzip

    create = importlib.import_module("hpsv2.src.open_clip").create_model_and_transforms

    def create_without_weights(name, pretrained, **options):
        return create(name, None, **options)

    module.create_model_and_transforms = create_without_weights
    module.model_dict.clear()
    return module


def random_hpsv2(path: Path) -> Path:
    """Write a checkpoint of random weights, of the size that "ViT-H-14" has now."""
    torch.manual_seed(0)
    clip = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    torch.save({"state_dict": clip.state_dict()}, path)
    return path


# ---- image-reward ----

@contextlib.contextmanager
def sized_imagereward(vision: dict = BLIP_VISION, text: dict = BLIP_TEXT):
    """Give BLIP these sizes, in lib.eval.scorers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorers, "BLIP_VISION", scorers.BLIP_VISION | vision)
        patch.setattr(scorers, "BLIP_TEXT", scorers.BLIP_TEXT | text)
        yield


def import_imagereward(vocabulary: Path):
    """Import ImageReward.ImageReward on transformers 5 and timm 1, without the package's __init__.

    Names have moved there, and the __init__ imports training code. The tokenizer is the old one in
    Python.
    """
    from transformers import modeling_utils, pytorch_utils
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    root = Path(importlib.util.find_spec("ImageReward").origin).parent
    for name, folder in (("ImageReward", root), ("ImageReward.models", root / "models")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    for end in ("", ".nn", ".nn.checkpoint", ".nn.checkpoint.checkpoint_activations"):
        module = types.ModuleType("fairscale" + end)
        sys.modules.setdefault("fairscale" + end, module).checkpoint_wrapper = None

    modeling_utils.apply_chunking_to_forward = pytorch_utils.apply_chunking_to_forward
    modeling_utils.prune_linear_layer = pytorch_utils.prune_linear_layer
    modeling_utils.find_pruneable_heads_and_indices = None
    module = importlib.import_module("ImageReward.ImageReward")

    def get_head_mask(self, mask, layers):
        return [None] * layers

    def invert_attention_mask(self, mask):
        return (1 - mask[:, None, None].float()) * torch.finfo(torch.float32).min

    bert = importlib.import_module("ImageReward.models.BLIP.med").BertModel
    bert.all_tied_weights_keys = {}
    bert.get_head_mask = get_head_mask
    bert.invert_attention_mask = invert_attention_mask

    class Tokenizer(BertTokenizerLegacy):
        @property
        def additional_special_tokens_ids(self):
            return self.convert_tokens_to_ids(["[ENC]"])

        @classmethod
        def from_pretrained(cls, name):
            return cls(vocabulary)

    importlib.import_module("ImageReward.models.BLIP.blip").BertTokenizer = Tokenizer
    return module


def random_imagereward(folder: Path) -> torch.nn.Module:
    """The official model with random weights; these and its vocabulary are written to the folder.

    Its size is the one that lib.eval.scorers has now.
    """
    words = VOCABULARY + [f"##{word}" for word in VOCABULARY[5:]]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words) + "\n", encoding="utf-8")
    module = import_imagereward(vocabulary)
    vision = scorers.BLIP_VISION
    text = scorers.BLIP_TEXT

    def create_vit(*_):
        transformer = importlib.import_module("ImageReward.models.BLIP.vit").VisionTransformer
        tower = transformer(
            img_size=224,
            patch_size=vision["patch_size"],
            embed_dim=vision["hidden_size"],
            depth=vision["num_hidden_layers"],
            num_heads=vision["num_attention_heads"],
        )
        return tower, vision["hidden_size"]

    config = {
        "vocab_size": text.get("vocab_size", 30524),
        "hidden_size": 768,
        "num_hidden_layers": text.get("num_hidden_layers", 12),
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "add_cross_attention": True,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    (folder / "med_config.json").write_text(json.dumps(config))
    importlib.import_module("ImageReward.models.BLIP.blip_pretrain").create_vit = create_vit

    # As published the weights start near zero, with which all scores are alike.
    torch.manual_seed(0)
    model = module.ImageReward(str(folder / "med_config.json")).eval()
    spread_out(model)
    torch.save(model.state_dict(), folder / "ImageReward.pt")
    return model
