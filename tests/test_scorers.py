"""Our scores beside the official code, with the same random weights.

HPSv2 and ImageReward: the packages hpsv2 1.2.0 and image-reward 1.5 themselves, at a small model size, behind a few
shims for what has moved since they were published. PickScore and aesthetics, published as snippets: CLIP written out
below in plain tensor algebra, in float64.
"""

import contextlib
import gzip
import importlib
import importlib.util
import json
import sys
import types
from importlib import metadata
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from PIL import Image

from lib import scorers
from lib.run import UserError
from lib.scorers import load_scorer, version

HEAD = Path(__file__).resolve().parents[2] / "shared/data/sac+logos+ava1-l14-linearMSE.pth"
PROMPTS = ["a red star on a blue background", "", "Mädchen mit Perlenohrring, 戴珍珠耳环的少女 — 🎨",
           "an astronaut riding a horse, " * 40, "  Two\n\tCATS it's 1999!  "]
ENTITY = "cats &amp; dogs &lt;3，ＯＫ"                            # cleaned up by open_clip, not by transformers
HPSV2 = {"embed_dim": 96,
         "vision_cfg": {"image_size": 224, "layers": 2, "width": 160, "head_width": 80, "patch_size": 32},
         "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}}
FULL_BLIP = scorers.BLIP_VISION, scorers.BLIP_TEXT
BLIP_VISION = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512,
               "patch_size": 32}
BLIP_TEXT = {"encoder_hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 101}


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Coloured waves and noise; with alpha where the mode has it."""
    rng = np.random.default_rng([width, height])
    y, x = np.arange(height)[:, None, None] / 40, np.arange(width)[:, None] / 40
    waves = np.sin(x * rng.uniform(-3, 3, 4) + y * rng.uniform(-3, 3, 4) + rng.uniform(0, 6, 4))
    pixels = np.clip(127 + rng.uniform(-60, 60, 4) + 90 * waves + rng.normal(0, 25, (height, width, 4)), 0, 255)
    rgba = Image.fromarray(pixels.astype("uint8"))
    return rgba if mode == "RGBA" else rgba.convert("RGB").convert(mode)


PICTURES = [picture(256, 256), picture(301, 97), picture(90, 333), picture(5, 7), picture(224, 224),
            picture(200, 150, "L"), picture(150, 120, "CMYK"), picture(160, 170, "P"), picture(180, 140, "RGBA")]


def every_pair(prompts: list[str]) -> tuple[list[str], list[Image.Image]]:
    return [p for p in prompts for _ in PICTURES], PICTURES * len(prompts)


def assert_equal(ours, official, tolerance: float) -> None:
    """Within the tolerance, on scores that pictures and prompts move by ten thousand times as much."""
    ours, official = np.asarray(ours, dtype=float), np.asarray(official, dtype=float)
    print(f"largest deviation {np.abs(ours - official).max():.1e}, spread {np.ptp(official):.2g}")
    assert np.abs(ours - official).max() < tolerance
    assert np.ptp(official) > 10000 * tolerance


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- hpsv2 as published; used by tests/bench/bench_scorers.py too ----

@contextlib.contextmanager
def sized_hpsv2(config: dict = HPSV2):
    """Give "ViT-H-14" these sizes, in open_clip and in hpsv2's copy of it."""
    with pytest.MonkeyPatch.context() as patch:
        for package in ("open_clip", "hpsv2.src.open_clip"):
            patch.setitem(importlib.import_module(f"{package}.factory")._MODEL_CONFIGS, "ViT-H-14", config)
        yield


def import_hpsv2():
    """hpsv2.img_score. Its wheel lacks CLIP's vocabulary, it imports tkinter's turtle, and it downloads base weights
    that the checkpoint then overwrites."""
    vocabulary, open_gzip = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz", gzip.open
    sys.modules.setdefault("turtle", types.SimpleNamespace(forward=None))
    gzip.open = lambda path, *rest: open_gzip(path if Path(path).exists() else vocabulary, *rest)
    try:
        module = importlib.import_module("hpsv2.img_score")
    finally:
        gzip.open = open_gzip
    make = importlib.import_module("hpsv2.src.open_clip").create_model_and_transforms
    module.create_model_and_transforms = lambda name, pretrained, **options: make(name, None, **options)
    module.model_dict.clear()
    return module


def random_hpsv2(path: Path) -> Path:
    torch.manual_seed(0)
    torch.save({"state_dict": open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")).state_dict()}, path)
    return path


# ---- image-reward as published; used by the bench too ----

def import_imagereward(vocabulary: Path):
    """ImageReward.ImageReward on transformers 5 and timm 1: names that moved, and not the package's __init__, which
    imports training code. The tokenizer is the old one in Python."""
    from transformers import modeling_utils, pytorch_utils
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    root = Path(importlib.util.find_spec("ImageReward").origin).parent
    for name, folder in (("ImageReward", root), ("ImageReward.models", root / "models")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    for end in ("", ".nn", ".nn.checkpoint", ".nn.checkpoint.checkpoint_activations"):
        sys.modules.setdefault("fairscale" + end, types.ModuleType("fairscale" + end)).checkpoint_wrapper = None
    modeling_utils.apply_chunking_to_forward = pytorch_utils.apply_chunking_to_forward
    modeling_utils.prune_linear_layer = pytorch_utils.prune_linear_layer
    modeling_utils.find_pruneable_heads_and_indices = None
    module = importlib.import_module("ImageReward.ImageReward")
    bert = importlib.import_module("ImageReward.models.BLIP.med").BertModel
    bert.all_tied_weights_keys = {}
    bert.get_head_mask = lambda self, mask, layers: [None] * layers
    bert.invert_attention_mask = lambda self, mask: (1 - mask[:, None, None].float()) * torch.finfo(torch.float32).min

    class Tokenizer(BertTokenizerLegacy):
        additional_special_tokens_ids = property(lambda self: self.convert_tokens_to_ids(["[ENC]"]))
        from_pretrained = classmethod(lambda cls, name: cls(vocabulary))

    importlib.import_module("ImageReward.models.BLIP.blip").BertTokenizer = Tokenizer
    return module


@contextlib.contextmanager
def sized_imagereward(vision: dict = BLIP_VISION, text: dict = BLIP_TEXT):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorers, "BLIP_VISION", scorers.BLIP_VISION | vision)
        patch.setattr(scorers, "BLIP_TEXT", scorers.BLIP_TEXT | text)
        yield


def random_imagereward(folder: Path):
    """The official model at the sizes that lib.scorers has now, and its weights and vocabulary in the folder."""
    vocabulary = folder / "vocab.txt"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "star",
             *"abcdefghijklmnopqrstuvwxyz0123456789!,'&;戴珍珠的"]
    vocabulary.write_text("\n".join(words + [f"##{w}" for w in words[5:]]) + "\n", encoding="utf-8")
    module = import_imagereward(vocabulary)
    blip = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
    tower = importlib.import_module("ImageReward.models.BLIP.vit").VisionTransformer
    vision, text = scorers.BLIP_VISION, scorers.BLIP_TEXT
    blip.create_vit = lambda *_: (tower(img_size=224, patch_size=vision["patch_size"], embed_dim=vision["hidden_size"],
                                        depth=vision["num_hidden_layers"], num_heads=vision["num_attention_heads"]),
                                  vision["hidden_size"])
    config = {"vocab_size": 30524, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
              "intermediate_size": 3072, "add_cross_attention": True, "layer_norm_eps": 1e-12, "pad_token_id": 0}
    config |= {key: text[key] for key in ("vocab_size", "num_hidden_layers") if key in text}
    (folder / "med_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = module.ImageReward(str(folder / "med_config.json")).eval()
    for weight in model.parameters():                            # as published they start near zero, all scores alike
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -.5)
    torch.save(model.state_dict(), folder / "ImageReward.pt")
    return model


# ---- CLIP, written out: one picture or prompt at a time, float64 ----

def clip_tower(x, w, name: str, heads: int, activation, causal: bool):
    """x (L, D) through the pre-norm transformer whose weights are w[f"{name}.encoder.layers.*"]."""
    linear = lambda x, key: x @ w[key + ".weight"].T + w[key + ".bias"]
    norm = lambda x, key: F.layer_norm(x, x.shape[-1:], w[key + ".weight"], w[key + ".bias"])
    mask = torch.full((len(x), len(x)), -np.inf).triu(1) if causal else 0
    for i in range(sum(k.startswith(f"{name}.encoder.layers.") and k.endswith("layer_norm1.weight") for k in w)):
        layer = f"{name}.encoder.layers.{i}"
        q, k, v = (linear(norm(x, layer + ".layer_norm1"), f"{layer}.self_attn.{n}_proj").unflatten(-1, (heads, -1))
                   .transpose(0, 1) for n in "qkv")                                               # (heads, L, D/heads)
        attention = (q @ k.transpose(1, 2) / q.shape[-1] ** .5 + mask).softmax(-1) @ v
        x = x + linear(attention.transpose(0, 1).flatten(1), layer + ".self_attn.out_proj")
        x = x + linear(activation(linear(norm(x, layer + ".layer_norm2"), layer + ".mlp.fc1")), layer + ".mlp.fc2")
    return x, norm


def clip_image(image: Image.Image, w, heads: int, activation):
    image = image.convert("RGB")
    size = [int(224 * n / min(image.size)) for n in image.size]
    left, top = (size[0] - 224) // 2, (size[1] - 224) // 2
    crop = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
    pixels = (np.asarray(crop) / 255 - [.48145466, .4578275, .40821073]) / [.26862954, .26130258, .27577711]
    kernel = w["vision_model.embeddings.patch_embedding.weight"]
    patches = F.conv2d(torch.tensor(pixels).permute(2, 0, 1)[None], kernel, stride=32)[0].flatten(1).T     # (49, D)
    x = torch.cat([w["vision_model.embeddings.class_embedding"][None], patches])
    x = x + w["vision_model.embeddings.position_embedding.weight"]
    x = F.layer_norm(x, x.shape[-1:], w["vision_model.pre_layrnorm.weight"], w["vision_model.pre_layrnorm.bias"])
    x, norm = clip_tower(x, w, "vision_model", heads, activation, causal=False)
    return F.normalize(w["visual_projection.weight"] @ norm(x[0], "vision_model.post_layernorm"), dim=0)


def clip_text(prompt: str, w, heads: int, activation):
    ids = open_clip.tokenize([prompt])[0]
    ids = ids[:ids.argmax() + 1]                                 # up to the end token, the highest id
    x = w["text_model.embeddings.token_embedding.weight"][ids]
    x = x + w["text_model.embeddings.position_embedding.weight"][:len(ids)]
    x, norm = clip_tower(x, w, "text_model", heads, activation, causal=True)
    return F.normalize(w["text_projection.weight"] @ norm(x[-1], "text_model.final_layer_norm"), dim=0)


def random_clip(folder: Path, activation: str, projection: int) -> dict:
    """A small CLIP as transformers saves it, with the real vocabulary; its weights in float64."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256, "hidden_act": activation}
    config = CLIPConfig(projection_dim=projection, logit_scale_init_value=4.6,
                        text_config=sizes | {"hidden_size": 64, "eos_token_id": 2},       # as the published files say
                        vision_config=sizes | {"hidden_size": 128, "patch_size": 32})
    torch.manual_seed(1)
    model = CLIPModel(config)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -.5)
    model.save_pretrained(folder)
    bpe = open_clip.tokenizer.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): i for token, i in bpe.encoder.items()}
    CLIPTokenizer(vocabulary, list(bpe.bpe_ranks)).save_pretrained(folder)
    return {k: v.double() for k, v in model.state_dict().items()}


def need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is missing: pip install --no-deps hpsv2==1.2.0 image-reward==1.5 clint==0.5.1")


@pytest.fixture(scope="session")
def hpsv2(tmp_path_factory):
    need("hpsv2")
    official = import_hpsv2()
    with sized_hpsv2():
        path = random_hpsv2(tmp_path_factory.mktemp("hpsv2") / "HPS_v2_compressed.pt")
        yield path, lambda prompt, image: official.score(image, prompt, cp=str(path))[0]


@pytest.fixture(scope="session")
def imagereward(tmp_path_factory):
    need("ImageReward")
    folder = tmp_path_factory.mktemp("imagereward")
    with sized_imagereward():
        yield folder, random_imagereward(folder)


@pytest.fixture(scope="session")
def pickscore(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pickscore")
    return folder, random_clip(folder, "gelu", 64)


@pytest.fixture(scope="session")
def aesthetics(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aesthetics")
    return folder, random_clip(folder, "quick_gelu", 768)


# ---- parity ----

def test_hpsv2_equals_the_package(hpsv2):
    path, official = hpsv2
    prompts, images = every_pair(PROMPTS + [ENTITY])
    cosines = [official(p, im.convert("RGB") if im.mode == "RGBA" else im) for p, im in zip(prompts, images)]
    assert_equal(np.divide(load_scorer("hpsv2", str(path))(prompts, images), 100), cosines, 1e-6)


def test_hpsv2_takes_what_the_package_crashes_on(hpsv2):
    path, official = hpsv2
    score = load_scorer("hpsv2", str(path))
    bar, padded = picture(224, 100), Image.new("RGB", (224, 224))
    padded.paste(bar, (0, 62))
    for crash in (picture(180, 140, "RGBA"), bar, picture(1000, 1)):
        with pytest.raises(Exception):
            official(PROMPTS[0], crash)
    assert abs(score(PROMPTS[:1], [bar])[0] - 100 * official(PROMPTS[0], padded)) < 1e-5
    assert np.isfinite(score(PROMPTS[:1], [picture(1000, 1)])[0])


def test_imagereward_equals_the_package(imagereward):
    folder, official = imagereward
    prompts, images = every_pair(PROMPTS + [ENTITY])
    with torch.no_grad():
        expected = [official.score(p, im) for p, im in zip(prompts, images)]
    assert_equal(load_scorer("imagereward", str(folder))(prompts, images), expected, 1e-5)


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_full_size_hpsv2_has_the_weights_of_the_package(hpsv2, version, monkeypatch):
    """Without a byte of them: on the meta device, where a tensor is only its shape. And the file's name."""
    theirs = importlib.import_module("hpsv2.src.open_clip")
    configs = [Path(package.__file__).parent / "model_configs/ViT-H-14.json" for package in (theirs, open_clip)]
    with init_empty_weights():
        state = theirs.CLIP(**json.loads(configs[0].read_text())).state_dict()
    monkeypatch.setattr(scorers, "read_weights", lambda path: state)
    with sized_hpsv2(json.loads(configs[1].read_text())):
        scorers.load_hpsv2(Path(), "meta")
    assert len(state) == 686
    ours = scorers.FILES["hpsv2" if version == "v2.0" else "hpsv2.1"]
    assert list(ours) == [importlib.import_module("hpsv2.utils").hps_version_map[version]]


def test_full_size_imagereward_has_the_weights_of_the_package(imagereward, monkeypatch):
    blip = importlib.import_module("ImageReward.models.BLIP.blip")
    bert = importlib.import_module("ImageReward.models.BLIP.med")
    text = {"vocab_size": 30524, "add_cross_attention": True, "encoder_width": 1024}     # else BERT-base, the default
    with init_empty_weights():
        vision, _ = blip.create_vit("large", 224)
        text = bert.BertModel(bert.BertConfig(**text), add_pooling_layer=False)
        head = importlib.import_module("ImageReward.ImageReward").MLP(768)
    state = {f"blip.visual_encoder.{k}": v for k, v in vision.state_dict().items()}
    state |= {f"blip.text_encoder.{k}": v for k, v in text.state_dict().items()}
    state |= {f"mlp.{k}": v for k, v in head.state_dict().items()}
    monkeypatch.setattr(scorers, "read_weights", lambda path: state)
    monkeypatch.setattr(scorers, "BLIP_VISION", FULL_BLIP[0])
    monkeypatch.setattr(scorers, "BLIP_TEXT", FULL_BLIP[1])
    scorers.load_imagereward(Path(), imagereward[0] / "vocab.txt", "meta")
    assert FULL_BLIP[0]["num_attention_heads"] == vision.blocks[0].attn.num_heads
    assert FULL_BLIP[0]["layer_norm_eps"] == vision.norm.eps
    assert FULL_BLIP[1]["num_attention_heads"] == text.config.num_attention_heads


def test_pickscore_equals_its_formula(pickscore):
    folder, w = pickscore
    prompts, images = every_pair(PROMPTS)
    texts = {p: clip_text(p, w, 2, F.gelu) for p in PROMPTS}
    features = [clip_image(im, w, 2, F.gelu) for im in PICTURES] * len(PROMPTS)
    cosines = [(texts[p] @ v).item() for p, v in zip(prompts, features)]
    assert_equal(np.divide(load_scorer("pickscore", str(folder))(prompts, images), np.exp(4.6)), cosines, 1e-6)


def test_aesthetics_equals_its_formula_with_the_real_head(aesthetics):
    if not HEAD.exists():
        pytest.skip(f"the real head {HEAD.name} is not in ../shared/data")
    folder, w = aesthetics
    (folder / HEAD.name).write_bytes(HEAD.read_bytes())
    head = {k: v.double() for k, v in torch.load(HEAD, map_location="cpu", weights_only=True).items()}
    expected = []
    for image in PICTURES:
        x = clip_image(image, w, 2, lambda x: x * torch.sigmoid(1.702 * x))
        for i in (0, 2, 4, 6, 7):
            x = head[f"layers.{i}.weight"] @ x + head[f"layers.{i}.bias"]
        expected.append(x.item())
    assert_equal(load_scorer("aesthetics", str(folder))([""] * len(PICTURES), PICTURES), expected, 1e-5)


# ---- what all four share ----

@pytest.fixture(scope="session")
def folders(hpsv2, imagereward, pickscore, aesthetics):
    """Score name -> a folder with all its files, the aesthetics head being a random one if it is not there."""
    if not (aesthetics[0] / HEAD.name).exists():
        torch.manual_seed(2)
        sizes = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
        layers = {i: torch.nn.Linear(*size) for i, size in sizes.items()}
        torch.save({f"layers.{i}.{k}": v for i, layer in layers.items() for k, v in layer.state_dict().items()},
                   aesthetics[0] / HEAD.name)
    (hpsv2[0].parent / "HPS_v2.1_compressed.pt").write_bytes(hpsv2[0].read_bytes())
    return {"pickscore": pickscore[0], "hpsv2": hpsv2[0].parent, "hpsv2.1": hpsv2[0].parent,
            "imagereward": imagereward[0], "aesthetics": aesthetics[0]}


@pytest.fixture
def no_hub(monkeypatch):
    """Every look-up fails at once, and is counted."""
    calls = []

    def fail(*args, **options):
        calls.append(args)
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    monkeypatch.setattr("torch.hub.get_dir", lambda: "/nonexistent")
    return calls


def copy(folder: Path, to: Path) -> Path:
    for file in folder.iterdir():
        (to / file.name).symlink_to(file)
    return to


def replace_weights(name: str, folder: Path, to: Path, change) -> Path:
    """A copy of the folder in which change(state) was applied to the weights file; that file."""
    path = copy(folder, to) / next(iter(scorers.FILES[name]))
    state = scorers.read_weights(path)
    change(state)
    path.unlink()
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


ALL = pytest.mark.parametrize("name", scorers.FILES)


@ALL
def test_scores_do_not_depend_on_batch_order_or_calls(name, folders, no_hub, monkeypatch):
    prompts, images = every_pair(PROMPTS[:2])
    together = load_scorer(name, str(folders[name]))(prompts, images)
    monkeypatch.setattr(scorers, "BATCH", 4)
    score = load_scorer(name, str(folders[name]))
    apart = [score([p], [im])[0] for p, im in zip(prompts[::-1], images[::-1])][::-1]
    assert np.allclose(together, apart, rtol=0, atol=2e-5)
    assert score([], []) == []
    assert not no_hub                                            # a complete folder asks for nothing


@ALL
def test_each_prompt_is_encoded_once(name, folders, monkeypatch):
    seen, parts = [], scorers.scorer

    def counting(preprocess, encode_text, *rest):
        return parts(preprocess, lambda prompts: seen.extend(prompts) or encode_text(prompts), *rest)

    monkeypatch.setattr(scorers, "scorer", counting)
    score = load_scorer(name, str(folders[name]))
    score(["a", "b", "a"], PICTURES[:3])
    score(["b", "c"], PICTURES[:2])
    assert seen == ["a", "b", "c"]


@ALL
def test_half_precision_is_near_and_not_the_same(name, folders):
    prompts, images = every_pair(PROMPTS[:1])
    full = np.array(load_scorer(name, str(folders[name]))(prompts, images))
    half = np.array(load_scorer(name, str(folders[name]), dtype=torch.bfloat16)(prompts, images))
    assert 0 < np.abs(full - half).max() < .1 * np.ptp(full)


def test_the_same_picture_in_other_modes(folders):
    """Grayscale, and an opaque alpha channel, change nothing."""
    gray, opaque = picture(200, 150, "L"), picture(140, 140).convert("RGBA")
    images = [gray, gray.convert("RGB"), opaque, opaque.convert("RGB")]
    for name, folder in folders.items():
        a, b, c, d = load_scorer(name, str(folder))(["x"] * 4, images)
        assert a == pytest.approx(b, abs=1e-5) and c == pytest.approx(d, abs=1e-5)


def test_lengths_must_agree(folders):
    with pytest.raises(ValueError, match="2 prompts for 1 images"):
        load_scorer("hpsv2", str(folders["hpsv2"]))(["a", "b"], PICTURES[:1])


# ---- versions and files ----

@ALL
def test_version_names_weights_precision_and_packages(name, folders, tmp_path, no_hub):
    line = version(name, str(folders[name]))
    file = next(iter(scorers.FILES[name]))
    assert line.startswith(f"{name} local/{file}@") and f" float32 torch=={metadata.version('torch')} " in line
    assert str(folders[name]) not in line and "\n" not in line
    changed = replace_weights(name, folders[name], tmp_path, lambda state: next(iter(state.values())).add_(1))
    assert version(name, str(changed)) != line
    assert version(name, str(folders[name]), torch.bfloat16) != line


def test_published_files_come_from_the_cache_or_the_web(folders, tmp_path, no_hub, monkeypatch):
    snapshots = {"yuvalkirstain/PickScore_v1": ("model.safetensors", "config.json"),
                 "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": ("tokenizer.json",),
                 "openai/clip-vit-large-patch14": ("model.safetensors", "config.json")}
    for source, files in snapshots.items():
        folder = folders["aesthetics" if source.startswith("openai") else "pickscore"]
        (tmp_path / source).mkdir(parents=True)
        for file in files:
            blob = tmp_path / source / (scorers.sha256(folder / file) if file.startswith("model") else f"blob-{file}")
            blob.write_bytes((folder / file).read_bytes())
            (tmp_path / source / file).symlink_to(blob)

    def cached(source, file):
        return str(tmp_path / source / file) if file in snapshots.get(source, ()) else None

    def download(url, to, sha256):
        assert url.endswith("raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth") and sha256.startswith("21dd590f")
        Path(to).write_bytes((folders["aesthetics"] / HEAD.name).read_bytes())

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "torch"))
    for name in ("pickscore", "aesthetics"):
        published = load_scorer(name)(PROMPTS[:1], PICTURES[:1])
        assert published == load_scorer(name, str(folders[name]))(PROMPTS[:1], PICTURES[:1])
    digest = scorers.sha256(folders["pickscore"] / "model.safetensors")[:12]
    assert version("pickscore").startswith(f"pickscore yuvalkirstain/PickScore_v1/model.safetensors@{digest} yuval")
    assert "linearMSE.pth" in version("aesthetics") and not no_hub


def fails(name: str, weights, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        load_scorer(name, str(weights))
    text = str(error.value)
    print(text)
    assert "\n" not in text and all(part in text for part in parts), text


@ALL
def test_missing_files_are_named_with_where_to_get_them(name, tmp_path, no_hub):
    (file, source), *_ = scorers.FILES[name].items()
    fails(name, tmp_path, str(tmp_path / file), scorers.url(source, file))
    fails(name, tmp_path / "weights.pt", str(tmp_path / "weights.pt"), scorers.url(source, file))
    fails(name, "weights/missing.pt", "weights/missing.pt")
    assert not no_hub                                            # none of these can be a hub id
    fails(name, "", file, "ConnectionError", scorers.url(source, file))
    fails(name, "someone/else", file, "ConnectionError", scorers.url("someone/else", file))


def test_missing_companions_are_named(folders, tmp_path, no_hub):
    companions = {"pickscore": "tokenizer.json", "imagereward": "vocab.txt", "aesthetics": "config.json"}
    for name, companion in companions.items():
        (tmp_path / name).mkdir()
        (copy(folders[name], tmp_path / name) / companion).unlink()
        fails(name, tmp_path / name, scorers.url(scorers.FILES[name][companion], companion))


@ALL
def test_damaged_weights_are_refused(name, folders, tmp_path):
    last = lambda state: max(k for k in state if state[k].ndim == 2)
    changes = {"is missing": lambda state: state.pop(last(state)),
               "another shape": lambda state: state.update({last(state): torch.zeros(3, 3)}),
               "": lambda state: state.update(unknown=torch.zeros(1))}          # more than is needed does no harm
    for fault, change in changes.items():
        (tmp_path / fault).mkdir(exist_ok=True)
        path = replace_weights(name, folders[name], tmp_path / fault, change)
        fails(name, path, str(path), fault) if fault else load_scorer(name, str(path))


class Payload:
    def __reduce__(self):
        return print, ("code ran",)


@ALL
def test_wrong_files_are_refused(name, folders, tmp_path, capsys):
    path = copy(folders[name], tmp_path) / next(iter(scorers.FILES[name]))
    other = "imagereward" if name != "imagereward" else "aesthetics"
    for content in (b"<html>404</html>", b"", (folders[other] / next(iter(scorers.FILES[other]))).read_bytes()):
        path.unlink()
        path.write_bytes(content)
        fails(name, path, str(path))
    pickle = tmp_path / "payload.pt"
    torch.save(Payload(), pickle)
    capsys.readouterr()
    fails(name, pickle, str(pickle), "not a readable weights file")
    assert "code ran" not in capsys.readouterr().out.splitlines()


def test_an_unknown_score_is_refused():
    fails("clip", "", "'clip'", "hpsv2.1")
