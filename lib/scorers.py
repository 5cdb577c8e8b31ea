"""The four scores of the paper's table: PickScore, HPSv2, ImageReward and LAION aesthetics.

    score = load_scorer("hpsv2", device="cuda")
    score(["a red cube", "a blue cone"], [cube, cone])          # [27.2, 26.5]: image i under prompt i

Each is its official formula and weights, run by transformers and open_clip in place of the packages that published it
(one no longer imports beside a current stack, one reloads 3.9 GB on every call). tests/test_scorers.py runs those
packages beside this file. Common to all four:

- images go through in batches; a prompt is encoded once and what it gave is kept for later calls;
- weights are safetensors or read by torch.load(weights_only=True), and none that the model needs may be missing;
- any PIL image will do (RGBA, grayscale, CMYK, palette), and any prompt (empty, too long, in any script);
- `dtype` is that of the encoders' matrix products (autocast); normalisation, dot product and head are float32 always.
"""

import hashlib
import importlib.metadata
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms import InterpolationMode, Normalize
from torchvision.transforms import functional as TF

from lib.run import UserError

SCORES = ("pickscore", "hpsv2", "imagereward", "aesthetics")     # the table's columns; "hpsv2.1" can stand for "hpsv2"
BATCH = 32                                                       # images, or prompts, per forward

# The files of each score and where they are published: a hub id or a web folder. The first is the weights file, which
# `weights` replaces; the others are looked for beside it first.
OPENAI_L14 = "openai/clip-vit-large-patch14"
FILES = {
    "pickscore": {"model.safetensors": "yuvalkirstain/PickScore_v1", "config.json": "yuvalkirstain/PickScore_v1",
                  "tokenizer.json": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"},
    "hpsv2": {"HPS_v2_compressed.pt": "xswu/HPSv2"},             # v2.0, the version of the paper's table
    "hpsv2.1": {"HPS_v2.1_compressed.pt": "xswu/HPSv2"},         # other scores for the same images: never mix the two
    "imagereward": {"ImageReward.pt": "THUDM/ImageReward", "vocab.txt": "google-bert/bert-base-uncased"},
    "aesthetics": {"sac+logos+ava1-l14-linearMSE.pth":
                   "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main",
                   "model.safetensors": OPENAI_L14, "config.json": OPENAI_L14},
}
SHA256 = {"sac+logos+ava1-l14-linearMSE.pth": "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"}
PACKAGES = ("torch", "torchvision", "transformers", "tokenizers", "open_clip_torch", "ftfy", "pillow", "numpy")

normalize = Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))   # CLIP's mean and std
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072
BLIP_VISION = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
               "patch_size": 16, "image_size": 224, "layer_norm_eps": 1e-6}     # timm's epsilon; BLIP's default is 1e-5
BLIP_TEXT = {"num_attention_heads": 12, "encoder_hidden_size": 1024}            # the rest is BERT-base, as by default
BLIP_NAMES = (                                                                  # ImageReward.pt -> transformers
    (r"^cls_token$", "embeddings.class_embedding"), (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."), (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."), (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."), (r"\.attn\.proj\.", ".self_attn.projection."))


def load_scorer(name: str, weights: str = "", device: str = "cpu", dtype: torch.dtype = torch.float32):
    """score(prompts, images) -> list of float. `weights` replaces the published weights: a local file, a local folder
    that has a file of that name (what exists locally is never looked up elsewhere), or a hub id."""
    load = {"pickscore": load_pickscore, "imagereward": load_imagereward, "aesthetics": load_aesthetics}
    paths = [path for _, path in locate(name, weights)]
    return scorer(*load.get(name, load_hpsv2)(*paths, device), device, dtype)


def version(name: str, weights: str = "", dtype: torch.dtype = torch.float32) -> str:
    """What moves a score, in one line: its files with their sha256, the precision, the packages that compute it."""
    files = [f"{source}/{path.name}@{sha256(path)[:12]}" for source, path in locate(name, weights)]
    packages = [f"{package}=={importlib.metadata.version(package)}" for package in PACKAGES]
    return " ".join([name, *files, str(dtype).removeprefix("torch."), *packages])


def scorer(preprocess, encode_text, encode_pair, finish, device, dtype):
    """score(prompts, images), from the four parts of a score:

    preprocess(image) -> (3, s, s);  encode_text(prompts) -> (B, ...), kept by prompt;
    encode_pair(pixels, texts) -> (B, D), where pixels is (B, 3, s, s);  finish(features, texts) -> (B,), in float32.
    """
    known, kind = {}, torch.device(device).type
    precision = lambda: torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32)

    @torch.inference_mode()
    def score(prompts: list[str], images: list) -> list[float]:
        if len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts for {len(images)} images")
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        for i in range(0, len(new), BATCH):
            with precision():
                known.update(zip(new[i:i + BATCH], encode_text(new[i:i + BATCH])))
        scores = []
        with ThreadPoolExecutor(4) as pool:                      # decoding and resizing hold no interpreter lock
            for i in range(0, len(images), BATCH):
                distinct = {id(image): image for image in images[i:i + BATCH]}        # no two threads on one image
                ready = dict(zip(distinct, pool.map(preprocess, distinct.values())))
                pixels = torch.stack([ready[id(image)] for image in images[i:i + BATCH]]).to(device)
                texts = torch.stack([known[prompt] for prompt in prompts[i:i + BATCH]])
                with precision():
                    features = encode_pair(pixels, texts)
                scores += finish(features.float(), texts).tolist()
        return scores

    return score


# ---- the four: each takes the files of its entry in FILES, in that order, and gives the parts of `scorer` ----

def load_pickscore(weights: Path, config: Path, vocabulary: Path, device):
    """PickScore = exp(logit_scale) cos(text, image), with CLIP ViT-H/14 (Kirstain et al. 2023)."""
    from transformers import CLIPTokenizer

    model, preprocess, encode_image = load_clip(weights, config, device)
    tokenizer = CLIPTokenizer.from_pretrained(vocabulary.parent)

    def encode_text(prompts):                                                                     # (B, D)
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt").to(device)
        return unit(model.get_text_features(**tokens).pooler_output)

    return preprocess, encode_text, encode_image, lambda v, t: model.logit_scale.exp() * (unit(v) * t).sum(-1)


def load_hpsv2(weights: Path, device):
    """HPSv2 = 100 cos(text, image), with CLIP ViT-H/14 (Wu et al. 2023); the package itself leaves out the 100."""
    import open_clip

    config, tokenizer = open_clip.get_model_config("ViT-H-14"), open_clip.get_tokenizer("ViT-H-14")
    model = fill(lambda: open_clip.CLIP(**config), read_weights(weights), weights, device)
    return (lambda image: hpsv2_pixels(image, config["vision_cfg"]["image_size"]),
            lambda prompts: unit(model.encode_text(tokenizer(prompts).to(device))),               # (B, D)
            lambda pixels, _: model.encode_image(pixels), lambda v, t: 100 * (unit(v) * t).sum(-1))


def load_imagereward(weights: Path, vocabulary: Path, device):
    """ImageReward = (MLP(h) - mean) / std, h the [CLS] state of BLIP's text encoder, which attends to the image's
    patches (Xu et al. 2023). A prompt has no features of its own here: what is kept are its token ids and mask."""
    from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    state = read_weights(weights)
    under = lambda prefix: {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
    eyes = under("blip.visual_encoder.")
    for old, new in BLIP_NAMES:
        eyes = {re.sub(old, new, key): value for key, value in eyes.items()}
    vision = fill(lambda: BlipVisionModel(BlipVisionConfig(**BLIP_VISION)), eyes, weights, device)
    text = fill(lambda: BlipTextModel(BlipTextConfig(**BLIP_TEXT), add_pooling_layer=False),
                under("blip.text_encoder."), weights, device)
    head = load_head(under("mlp."), weights, device)
    with vocabulary.open(encoding="utf-8") as lines:
        tokenizer = BertTokenizer({line.rstrip("\n"): i for i, line in enumerate(lines)})
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)               # BLIP's own, after BERT's 30522

    def encode_text(prompts):                                                                     # (B, 2, 35)
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        return torch.stack([tokens.input_ids, tokens.attention_mask], 1).to(device)

    def encode_pair(pixels, texts):
        patches = vision(pixel_values=pixels).last_hidden_state                                   # (B, 197, 1024)
        return text(texts[:, 0], texts[:, 1], encoder_hidden_states=patches).last_hidden_state[:, 0]       # (B, 768)

    return imagereward_pixels, encode_text, encode_pair, lambda h, _: (head(h)[:, 0] - REWARD_MEAN) / REWARD_STD


def load_aesthetics(weights: Path, clip_weights: Path, config: Path, device):
    """LAION aesthetics = MLP(v), v the unit CLIP ViT-L/14 features of the image, about 1 to 10; no prompt enters
    (christophschuhmann/improved-aesthetic-predictor)."""
    head = load_head(read_weights(weights), weights, device)
    _, preprocess, encode_image = load_clip(clip_weights, config, device)
    return preprocess, lambda prompts: torch.empty(len(prompts), 0), encode_image, lambda v, _: head(unit(v))[:, 0]


def unit(features: torch.Tensor) -> torch.Tensor:
    return F.normalize(features.float(), dim=-1)


# ---- pictures: PIL image -> (3, s, s) ----

def hpsv2_pixels(image, size: int) -> torch.Tensor:
    """Long side to s (bicubic on the tensor, antialiased, not clamped), black bars around: nothing is cropped."""
    pixels = TF.to_tensor(image.convert("RGB"))                                                   # (3, H, W)
    ratio = size / max(pixels.shape[1:])
    height, width = (max(1, round(n * ratio)) for n in pixels.shape[1:])
    pixels = TF.resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)
    top, left = (size - height) // 2, (size - width) // 2
    return normalize(F.pad(pixels, (left, size - width - left, top, size - height - top)))        # (3, s, s)


def imagereward_pixels(image) -> torch.Tensor:
    """As in `load_clip`, but resized in the image's own mode and only then made RGB: alpha and palettes notice."""
    size = BLIP_VISION["image_size"]
    image = TF.center_crop(TF.resize(image, size, InterpolationMode.BICUBIC), size)
    return normalize(TF.to_tensor(image.convert("RGB")))                                          # (3, 224, 224)


# ---- weights into models; what a model has no place for is ignored, as the official loaders do ----

def load_clip(weights: Path, config: Path, device):
    """A CLIP of transformers, its preprocessing image -> (3, s, s) and its image encoder (B, 3, s, s) -> (B, D).

    Short side to s (PIL bicubic), centre crop. PIL on purpose: the processor without this suffix resizes tensors, which
    moves a score by up to 0.002.
    """
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    model = fill(lambda: CLIPModel(CLIPConfig.from_pretrained(config.parent)), read_weights(weights), weights, device)
    size = model.config.vision_config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return (model, lambda image: processor(image.convert("RGB"), return_tensors="pt").pixel_values[0],
            lambda pixels, _: model.get_image_features(pixel_values=pixels).pooler_output)


def load_head(state: dict, path: Path, device) -> nn.Module:
    """768 -> 1024 -> 128 -> 64 -> 16 -> 1 without activations, the MLP of ImageReward and of aesthetics alike."""
    layers = lambda: nn.Sequential(                              # Identity stands where training had dropout
        nn.Linear(768, 1024), nn.Identity(), nn.Linear(1024, 128), nn.Identity(),
        nn.Linear(128, 64), nn.Identity(), nn.Linear(64, 16), nn.Linear(16, 1))
    return fill(layers, {key.removeprefix("layers."): value for key, value in state.items()}, path, device)


def fill(make, state: dict, path: Path, device) -> nn.Module:
    """make() with every weight from `state`, in float32."""
    with init_empty_weights(include_buffers=False):              # no memory and no random numbers spent on 1e9 weights
        model = make()
    wanted = model.state_dict()
    for fault, keys in (("is missing", [k for k in wanted if k not in state]),
                        ("has another shape", [k for k in wanted if k in state and state[k].shape != wanted[k].shape])):
        if keys:
            raise UserError(f"{path}: weight {keys[0]!r} {fault} ({len(keys)} such in all); is it the right file?")
    model.load_state_dict({k: state[k].float() for k in wanted}, assign=True)
    return model.to(device).eval()


def read_weights(path: Path) -> dict:
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        return state.get("state_dict", state)                    # the wrapping of HPSv2's file
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: not a readable weights file ({reason}); download it again") from None


# ---- files ----

def locate(name: str, weights: str = "") -> list[tuple[str, Path]]:
    """(where it comes from, its path), for each of the score's files."""
    if name not in FILES:
        raise UserError(f"score {name!r} is not known; choose from {', '.join(FILES)}")
    (file, published), *others = FILES[name].items()
    given = Path(weights).expanduser()
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", weights) and given.suffix not in (".pt", ".pth", ".safetensors")
    if weights and (given.exists() or not hub_id):
        source, path = "local", given / file if given.is_dir() else given
        if not path.is_file():
            raise UserError(f"{path} does not exist: get {file} from {url(published, file)}")
    else:
        source = weights or published
        path = fetch(source, file)
    found = [(source, path)]
    for other, home in others:
        home = source if home == published and source != "local" else home
        beside = path.parent / other
        found.append((source, beside) if beside.is_file() else (home, fetch(home, other)))
    return found


def fetch(source: str, file: str) -> Path:
    """A published file, from this machine's cache or else downloaded into it."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        if source.startswith("https://"):
            path = Path(torch.hub.get_dir(), "scorers", file)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                torch.hub.download_url_to_file(url(source, file), str(path), SHA256[file])
            return path
        cached = try_to_load_from_cache(source, file)            # a path, None, or a mark that it is known not to exist
        return Path(cached if isinstance(cached, str) else hf_hub_download(source, file))
    except Exception as error:
        raise UserError(f"{file} cannot be downloaded ({type(error).__name__}): get it from {url(source, file)} and "
                        "give its folder as the score's weights") from None


def url(source: str, file: str) -> str:
    folder = source if source.startswith("https://") else f"https://huggingface.co/{source}/resolve/main"
    return f"{folder}/{quote(file)}"


def sha256(path: Path) -> str:
    """A large file in the hub's cache bears its sha256 as its real name; any other is read."""
    name = path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", name):
        return name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
