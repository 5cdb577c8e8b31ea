"""The four learned scores of the paper's table: PickScore, HPSv2, ImageReward, LAION aesthetics.

    score = load_scorer("hpsv2", device="cuda")
    score(["a red cube", "a blue cone"], [cube, cone])      # [27.2, 26.5]: image i under prompt i

Each is its official formula and weights, run by transformers and open_clip in place of the packages
that published it: one of them no longer imports beside a current stack, one reloads 3.9 GB on every
call. tests/test_scorers.py runs those packages beside this file. Common to all four:

- images go through in batches; a prompt is encoded once and what it gave is kept for later calls;
- weights are safetensors or read by torch.load(weights_only=True), and none that the model needs
  may be missing;
- any PIL image will do (RGBA, grayscale, CMYK, palette), in the mode that its file has, since the
  official codes differ in what they do before they make it RGB; and any prompt (empty, too long,
  in any script);
- `dtype` is that of the encoders' matrix products (autocast); normalisation, dot product and head
  are float32 always.

Run folders and tables are the business of lib/eval/scores.py, which imports this file, and with it
torchvision and transformers, only when a learned score is asked for.
"""

import hashlib
import importlib.metadata
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote
from urllib.request import Request, urlopen

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms import InterpolationMode, Normalize
from torchvision.transforms import functional as TF

from lib.hub import HUB_ID
from lib.run import UserError

BATCH = 32                                   # images, or prompts, per forward

# The files of each score and where they are published: a hub id or a web folder. The first is the
# weights file, which the argument `weights` replaces; the others are looked for beside it first.
OPENAI_L14 = "openai/clip-vit-large-patch14"
FILES = {
    "pickscore": {
        "model.safetensors": "yuvalkirstain/PickScore_v1",
        "config.json": "yuvalkirstain/PickScore_v1",
        "tokenizer.json": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    },
    # Version 2.0, that of the paper's table.
    "hpsv2": {
        "HPS_v2_compressed.pt": "xswu/HPSv2",
    },
    # It gives other scores for the same images: never mix the two.
    "hpsv2.1": {
        "HPS_v2.1_compressed.pt": "xswu/HPSv2",
    },
    "imagereward": {
        "ImageReward.pt": "THUDM/ImageReward",
        "vocab.txt": "google-bert/bert-base-uncased",
    },
    "aesthetics": {
        "sac+logos+ava1-l14-linearMSE.pth":
            "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main",
        "model.safetensors": OPENAI_L14,
        "config.json": OPENAI_L14,
    },
}

# Of the one file that comes from the web and not from the hub.
SHA256 = {
    "sac+logos+ava1-l14-linearMSE.pth":
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
}

# The packages whose code can move a score.
PACKAGES = ("torch", "torchvision", "transformers", "tokenizers", "open_clip_torch", "ftfy",
            "pillow", "numpy")

Score = Callable[[list[str], list], list[float]]


class Parts(NamedTuple):
    """What a score is made of: preprocessing, an encoder of texts, an encoder of images, a formula.

    What `encode_text` gives for a prompt is kept, and comes to the others stacked, as `texts`.
    """
    preprocess: Callable         # a PIL image -> (3, s, s)
    encode_text: Callable        # B prompts -> (B, ...)
    encode_image: Callable       # pixels (B, 3, s, s), texts (B, ...) -> features (B, D)
    finish: Callable             # features (B, D) in float32, texts (B, ...) -> scores (B,)


def load_scorer(name: str, weights: str = "", device: str = "cpu",
                dtype: torch.dtype = torch.float32) -> Score:
    """Load a score: score(prompts, images) -> floats, image i under prompt i.

    `weights` replaces the published weights: a local file, a local folder that has a file of that
    name, or a hub id. What exists locally is never looked up elsewhere.
    """
    paths = [path for _, path in locate(name, weights)]

    loaders = {
        "pickscore": load_pickscore,
        "hpsv2": load_hpsv2,
        "hpsv2.1": load_hpsv2,
        "imagereward": load_imagereward,
        "aesthetics": load_aesthetics,
    }
    parts = loaders[name](*paths, device)
    return batched(parts, device, dtype)


def version(name: str, weights: str = "", dtype: torch.dtype = torch.float32) -> str:
    """Tell all that moves a score, in one line.

    That is its files with their sha256, the precision, and the packages that compute it.
    """
    words = [name]
    for source, path in locate(name, weights):
        words.append(f"{source}/{path.name}@{sha256(path)[:12]}")
    words.append(str(dtype).removeprefix("torch."))
    for package in PACKAGES:
        words.append(f"{package}=={importlib.metadata.version(package)}")
    return " ".join(words)


def batched(parts: Parts, device: str, dtype: torch.dtype) -> Score:
    """Make the function score(prompts, images) of a score's parts."""
    encoded = {}                             # prompt -> what encode_text gave

    def precision():
        kind = torch.device(device).type
        return torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32)

    def encode_new(prompts: list[str]) -> None:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in encoded]
        for i in range(0, len(new), BATCH):
            batch = new[i:i + BATCH]
            with precision():
                encoded.update(zip(batch, parts.encode_text(batch)))

    def prepare(images: list, threads: ThreadPoolExecutor) -> torch.Tensor:
        # Each distinct image once, so that no two threads work on the same one.
        distinct = {id(image): image for image in images}
        ready = dict(zip(distinct, threads.map(parts.preprocess, distinct.values())))
        return torch.stack([ready[id(image)] for image in images]).to(device)

    @torch.inference_mode()
    def score(prompts: list[str], images: list) -> list[float]:
        if len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts for {len(images)} images")
        encode_new(prompts)

        # Threads help: decoding and resizing hold no interpreter lock.
        scores = []
        with ThreadPoolExecutor(4) as threads:
            for i in range(0, len(images), BATCH):
                pixels = prepare(images[i:i + BATCH], threads)
                texts = torch.stack([encoded[prompt] for prompt in prompts[i:i + BATCH]])
                with precision():
                    features = parts.encode_image(pixels, texts)
                scores.extend(parts.finish(features.float(), texts).tolist())
        return scores

    return score


# ---- the four: each takes the files of its entry in FILES, in that order ----

def load_pickscore(weights: Path, config: Path, vocabulary: Path, device: str) -> Parts:
    """PickScore = exp(logit_scale) cos(text, image), with CLIP ViT-H/14 (Kirstain et al. 2023)."""
    from transformers import CLIPTokenizer

    clip, preprocess, encode_image = load_clip(weights, config, device)
    tokenizer = CLIPTokenizer.from_pretrained(vocabulary.parent)

    # A longer prompt is cut at CLIP's 77 tokens.
    def encode_text(prompts):
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=77,
                           return_tensors="pt").to(device)
        return unit(clip.get_text_features(**tokens).pooler_output)               # (B, D)

    def finish(features, texts):
        return clip.logit_scale.exp() * (unit(features) * texts).sum(-1)

    return Parts(preprocess, encode_text, encode_image, finish)


def load_hpsv2(weights: Path, device: str) -> Parts:
    """HPSv2 = 100 cos(text, image), with CLIP ViT-H/14 (Wu et al. 2023).

    The package hpsv2 itself leaves out the 100; the paper's table has it.
    """
    import open_clip

    config = open_clip.get_model_config("ViT-H-14")
    tokenizer = open_clip.get_tokenizer("ViT-H-14")
    with empty_weights():
        clip = open_clip.CLIP(**config)
    fill(clip, read_weights(weights), weights, device)

    def preprocess(image):
        return hpsv2_pixels(image, config["vision_cfg"]["image_size"])

    def encode_text(prompts):
        return unit(clip.encode_text(tokenizer(prompts).to(device)))              # (B, D)

    def encode_image(pixels, _):
        return clip.encode_image(pixels)                                          # (B, D)

    def finish(features, texts):
        return 100 * (unit(features) * texts).sum(-1)

    return Parts(preprocess, encode_text, encode_image, finish)


# Of the normalisation in ImageReward's own ImageReward.py.
REWARD_MEAN = 0.16717362830052426
REWARD_STD = 1.0333394966054072

# BLIP with ViT-L/16. The epsilon is timm's, which ImageReward used; BLIP's default is 1e-5.
BLIP_VISION = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 16,
    "image_size": 224,
    "layer_norm_eps": 1e-6,
}
# The rest is that of BERT-base, which is the default.
BLIP_TEXT = {"num_attention_heads": 12, "encoder_hidden_size": 1024}

# The names of the image encoder's weights in ImageReward.pt, and in transformers.
BLIP_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)


def load_imagereward(weights: Path, vocabulary: Path, device: str) -> Parts:
    """ImageReward = (MLP(h) - mean) / std (Xu et al. 2023).

    h is the [CLS] state of BLIP's text encoder, which attends to the image's patches. So a prompt
    has no features of its own here: what is kept of it are its token ids and their mask.
    """
    state = read_weights(weights)
    vision, text = load_blip(state, weights, device)
    head = load_head(under("mlp.", state), weights, device)
    tokenizer = blip_tokenizer(vocabulary)

    # A longer prompt is cut at 35 tokens, as in the package.
    def encode_text(prompts):
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=35,
                           return_tensors="pt")
        return torch.stack([tokens.input_ids, tokens.attention_mask], 1).to(device)  # (B, 2, 35)

    # The text encoder sees the picture by cross-attention; its first state, [CLS], is of both.
    def encode_image(pixels, texts):
        ids, mask = texts[:, 0], texts[:, 1]
        patches = vision(pixel_values=pixels).last_hidden_state                   # (B, 197, 1024)
        states = text(ids, mask, encoder_hidden_states=patches).last_hidden_state
        return states[:, 0]                                                       # (B, 768)

    def finish(h, _):
        return (head(h)[:, 0] - REWARD_MEAN) / REWARD_STD

    def preprocess(image):
        return cropped_pixels(image, BLIP_VISION["image_size"])

    return Parts(preprocess, encode_text, encode_image, finish)


def load_blip(state: dict, path: Path, device: str) -> tuple[nn.Module, nn.Module]:
    """Load BLIP's image encoder and its text encoder, with cross-attention, of ImageReward.pt."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    # The image encoder's weights have timm's names.
    vision_state = {}
    for key, value in under("blip.visual_encoder.", state).items():
        for old, new in BLIP_NAMES:
            key = re.sub(old, new, key)
        vision_state[key] = value

    with empty_weights():
        vision = BlipVisionModel(BlipVisionConfig(**BLIP_VISION))
        text = BlipTextModel(BlipTextConfig(**BLIP_TEXT), add_pooling_layer=False)
    fill(vision, vision_state, path, device)
    fill(text, under("blip.text_encoder.", state), path, device)
    return vision, text


def blip_tokenizer(vocabulary: Path):
    """BERT's tokenizer with the two tokens that BLIP adds after BERT's 30522."""
    from transformers import BertTokenizer

    tokens = {}
    with vocabulary.open(encoding="utf-8") as lines:
        for i, line in enumerate(lines):
            tokens[line.rstrip("\n")] = i
    tokenizer = BertTokenizer(tokens)
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    return tokenizer


def load_aesthetics(weights: Path, clip_weights: Path, config: Path, device: str) -> Parts:
    """LAION aesthetics = MLP(v), about 1 to 10 (christophschuhmann/improved-aesthetic-predictor).

    v are the CLIP ViT-L/14 features of the image, at length 1.
    """
    head = load_head(read_weights(weights), weights, device)
    clip, _, encode_image = load_clip(clip_weights, config, device)

    # OpenAI's own preprocessing, as the predictor's code has it, and not that of transformers.
    def preprocess(image):
        return cropped_pixels(image, clip.config.vision_config.image_size)

    # No prompt enters, so there is nothing to keep of one.
    def encode_text(prompts):
        return torch.empty(len(prompts), 0)

    def finish(features, _):
        return head(unit(features))[:, 0]

    return Parts(preprocess, encode_text, encode_image, finish)


def unit(features: torch.Tensor) -> torch.Tensor:
    """Features (B, D) at length 1, in float32."""
    return F.normalize(features.float(), dim=-1)


# ---- pictures: a PIL image -> (3, s, s) ----

# CLIP's mean and standard deviation of R, G and B.
normalize = Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def hpsv2_pixels(image, size: int) -> torch.Tensor:
    """Resize the long side to `size` and put black bars around: nothing is cropped.

    It is resized as a tensor, bicubic, antialiased and not clamped, as in the package hpsv2. What
    open_clip does by default moves the score of a picture that is not square by up to 2.
    """
    pixels = TF.to_tensor(image.convert("RGB"))                                   # (3, H, W)
    ratio = size / max(pixels.shape[1:])
    height = max(1, round(pixels.shape[1] * ratio))
    width = max(1, round(pixels.shape[2] * ratio))
    pixels = TF.resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)

    top = (size - height) // 2
    left = (size - width) // 2
    bars = (left, size - width - left, top, size - height - top)
    return normalize(F.pad(pixels, bars))                                         # (3, s, s)


def cropped_pixels(image, size: int) -> torch.Tensor:
    """Resize the short side to `size`, crop at the centre: ImageReward's way, and OpenAI CLIP's.

    The image is resized in its own mode and only then made RGB, as in their code; pictures with
    alpha and with palettes notice.
    """
    image = TF.resize(image, size, InterpolationMode.BICUBIC)
    image = TF.center_crop(image, size)
    return normalize(TF.to_tensor(image.convert("RGB")))                          # (3, s, s)


# ---- weights into models ----

def load_clip(weights: Path, config: Path, device: str) -> tuple[nn.Module, Callable, Callable]:
    """Load a CLIP of transformers -> (model, preprocess, encode_image) as in `Parts`.

    The picture is made RGB, its short side resized to s (PIL, bicubic) and the centre cropped. PIL
    is on purpose: the processor without this suffix resizes tensors, which moves a score by up to
    0.002.
    """
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    with empty_weights():
        clip = CLIPModel(CLIPConfig.from_pretrained(config.parent))
    fill(clip, read_weights(weights), weights, device)

    size = clip.config.vision_config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": size},
                                      crop_size={"height": size, "width": size})

    def preprocess(image):
        return processor(image.convert("RGB"), return_tensors="pt").pixel_values[0]

    def encode_image(pixels, _):
        return clip.get_image_features(pixel_values=pixels).pooler_output         # (B, D)

    return clip, preprocess, encode_image


def load_head(state: dict, path: Path, device: str) -> nn.Module:
    """Load the MLP of ImageReward and of aesthetics: 768 -> 1024 -> 128 -> 64 -> 16 -> 1.

    It has no activations; Identity stands where training had dropout.
    """
    with empty_weights():
        head = nn.Sequential(
            nn.Linear(768, 1024),
            nn.Identity(),
            nn.Linear(1024, 128),
            nn.Identity(),
            nn.Linear(128, 64),
            nn.Identity(),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )
    return fill(head, under("layers.", state), path, device)


def under(prefix: str, state: dict) -> dict:
    """The weights whose names begin with the prefix, without it."""
    return {key.removeprefix(prefix): w for key, w in state.items() if key.startswith(prefix)}


def empty_weights():
    """A model built in this context spends no memory and no random numbers on its weights."""
    return init_empty_weights(include_buffers=False)


def fill(model: nn.Module, state: dict, path: Path, device: str) -> nn.Module:
    """Give an empty model every weight from `state`, in float32; `path` is for the messages.

    What the model has no place for is ignored, as the official loaders do.
    """
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state]
    if missing:
        raise UserError(f"{path}: weight {missing[0]!r} is missing ({len(missing)} such in all); "
                        f"is it the right file?")

    misfits = [key for key in wanted if state[key].shape != wanted[key].shape]
    if misfits:
        raise UserError(f"{path}: weight {misfits[0]!r} has another shape ({len(misfits)} such in "
                        f"all); is it the right file?")

    # Assigned, since an empty weight has no memory to copy into.
    model.load_state_dict({key: state[key].float() for key in wanted}, assign=True)
    return model.to(device).eval()


def read_weights(path: Path) -> dict:
    """Read a weights file -> {name: tensor}, without running any code that it might hold."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        # HPSv2's file wraps its weights so.
        return state.get("state_dict", state)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: not a readable weights file ({reason}); download it "
                        f"again") from None


# ---- files ----

def locate(name: str, weights: str = "", get: Callable | None = None) -> list[tuple[str, Path]]:
    """Find the files of a score -> (where it comes from, its path), in the order of FILES.

    `get` finds a published file: `fetch`, if nothing else is said.
    """
    get = get or fetch
    if name not in FILES:
        raise UserError(f"score {name!r} is not known; choose from {', '.join(FILES)}")

    (file, published), *companions = FILES[name].items()
    source, path = locate_weights(file, published, weights, get)

    files = [(source, path)]
    for companion, home in companions:
        # What was published beside the weights comes from where the weights now come from.
        if home == published and source != "local":
            home = source
        beside = path.parent / companion
        if beside.is_file():
            files.append((source, beside))
        else:
            files.append((home, get(home, companion)))
    return files


def locate_weights(file: str, published: str, weights: str, get: Callable) -> tuple[str, Path]:
    """Find the weights file -> (where it comes from, its path); "local" is what was given so."""
    given = Path(weights).expanduser()
    is_file_name = given.suffix in (".pt", ".pth", ".safetensors")
    is_hub_id = HUB_ID.fullmatch(weights) and not is_file_name

    if not weights:
        return published, get(published, file)
    if is_hub_id and not given.exists():
        return weights, get(weights, file)

    path = given
    if given.is_dir():
        path = given / file
    if not path.is_file():
        raise UserError(f"{path} does not exist: get {file} from {url(published, file)}")
    return "local", path


def fetch(source: str, file: str) -> Path:
    """Find a published file in this machine's cache, or download it into it."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        if source.startswith("https://"):
            return fetch_from_web(source, file)

        # The answer is a path, None, or a mark that the file is known not to exist.
        cached = try_to_load_from_cache(source, file)
        if isinstance(cached, str):
            return Path(cached)
        return Path(hf_hub_download(source, file))
    except Exception as error:
        raise UserError(f"{file} cannot be downloaded ({type(error).__name__}): get it from "
                        f"{url(source, file)} and give its folder as the score's weights "
                        f"(--score-weights NAME=FOLDER)") from None


def refuse_lacking(name: str, weights: str = "") -> None:
    """UserError, which names all of them, if files of a score are neither here nor within reach.

    Nothing is downloaded.
    """
    lacking = []

    def look(source: str, file: str) -> Path:
        if not is_within_reach(source, file):
            lacking.append(url(source, file))
        return Path(source, file)

    locate(name, weights, look)
    if lacking:
        raise UserError(f"{' and '.join(lacking)} cannot be had here: get what is named into a "
                        f"folder of its own")


def is_within_reach(source: str, file: str) -> bool:
    """Whether a published file is in this machine's cache, or is where it was published."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    # Each network library raises its own kinds of errors.
    try:
        if source.startswith("https://"):
            if not web_path(file).is_file():
                urlopen(Request(url(source, file), method="HEAD"), timeout=10).close()
        elif not isinstance(try_to_load_from_cache(source, file), str):
            get_hf_file_metadata(hf_hub_url(source, file), timeout=10)
    except Exception:
        return False
    return True


def web_path(file: str) -> Path:
    """Where a file from the web is kept."""
    return Path(torch.hub.get_dir(), "scorers", file)


def fetch_from_web(source: str, file: str) -> Path:
    path = web_path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        torch.hub.download_url_to_file(url(source, file), str(path), SHA256[file])
    return path


def url(source: str, file: str) -> str:
    """The web address of a published file."""
    folder = source
    if not source.startswith("https://"):
        folder = f"https://huggingface.co/{source}/resolve/main"
    return f"{folder}/{quote(file)}"


def sha256(path: Path) -> str:
    """A file's sha256; a large file in the hub's cache bears it as its real name."""
    name = path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", name):
        return name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
