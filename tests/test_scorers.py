"""Our scores beside the official code, with the same random weights.

HPSv2 and ImageReward: the packages hpsv2 1.2.0 and image-reward 1.5 themselves, at a small model
size (tests/official.py). PickScore and aesthetics, published as snippets: CLIP written out below in
plain tensor algebra, in float64.
"""

import importlib
import importlib.util
import json
from importlib import metadata
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from conftest import SHARED_DATA, random_clip
from official import (import_hpsv2, random_hpsv2, random_imagereward, sized_hpsv2,
                      sized_imagereward, waves)
from PIL import Image
from safetensors.torch import save_file

from lib.eval import scorers, scores
from lib.eval.scorers import load_scorer, version
from lib.run import UserError, open_image
from lib.settings import Settings

HEAD = SHARED_DATA / "sac+logos+ava1-l14-linearMSE.pth"
FULL_BLIP_VISION = scorers.BLIP_VISION
FULL_BLIP_TEXT = scorers.BLIP_TEXT

PROMPTS = [
    "a red star on a blue background",
    "",
    "Mädchen mit Perlenohrring, 戴珍珠耳环的少女 — 🎨",
    "an astronaut riding a horse, " * 40,
    "  Two\n\tCATS it's 1999!  ",
]
ENTITY = "cats &amp; dogs &lt;3，ＯＫ"          # cleaned up by open_clip, not by transformers
PICTURES = [
    waves(256, 256),
    waves(301, 97),
    waves(90, 333),
    waves(5, 7),
    waves(224, 224),
    waves(200, 150, "L"),
    waves(150, 120, "CMYK"),
    waves(160, 170, "P"),
    waves(180, 140, "RGBA"),
]


def all_pairs(prompts: list[str]) -> tuple[list[str], list[Image.Image]]:
    """Each prompt with each of the pictures."""
    repeated = []
    for prompt in prompts:
        repeated += [prompt] * len(PICTURES)
    return repeated, PICTURES * len(prompts)


def assert_equal(ours, official, tolerance: float) -> None:
    """Within the tolerance, on scores that pictures and prompts move by 10,000 times as much."""
    ours = np.asarray(ours, dtype=float)
    official = np.asarray(official, dtype=float)
    deviation = np.abs(ours - official).max()
    spread = np.ptp(official)
    print(f"largest deviation {deviation:.1e}, spread {spread:.2g}")
    assert deviation < tolerance
    assert spread > 10000 * tolerance


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- CLIP, written out: one picture or prompt at a time, float64 ----

def linear(x, w, name: str):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x, w, name: str):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def clip_tower(x, w, name: str, heads: int, activation, causal: bool):
    """x (L, D) through the pre-norm transformer whose weights are w[f"{name}.encoder.layers.*"]."""
    mask = 0
    if causal:
        mask = torch.full((len(x), len(x)), -np.inf).triu(1)

    layer = f"{name}.encoder.layers.0"
    while f"{layer}.layer_norm1.weight" in w:
        inputs = norm(x, w, f"{layer}.layer_norm1")
        parts = []
        for part in "qkv":
            values = linear(inputs, w, f"{layer}.self_attn.{part}_proj")
            parts.append(values.unflatten(-1, (heads, -1)).transpose(0, 1))
        q, k, v = parts                                                     # (heads, L, D/heads)
        attention = (q @ k.transpose(1, 2) / q.shape[-1] ** .5 + mask).softmax(-1) @ v
        x = x + linear(attention.transpose(0, 1).flatten(1), w, f"{layer}.self_attn.out_proj")

        inputs = norm(x, w, f"{layer}.layer_norm2")
        hidden = activation(linear(inputs, w, f"{layer}.mlp.fc1"))
        x = x + linear(hidden, w, f"{layer}.mlp.fc2")

        number = int(layer.rpartition(".")[2])
        layer = f"{name}.encoder.layers.{number + 1}"
    return x


def clip_image(image: Image.Image, w, heads: int, activation, of_openai: bool = False):
    """An image's features (D,), at length 1.

    transformers makes it RGB first; OpenAI's CLIP resizes it as it is, and rounds the crop's place.
    """
    if not of_openai:
        image = image.convert("RGB")
    width, height = [int(224 * side / min(image.size)) for side in image.size]
    left, top = (width - 224) // 2, (height - 224) // 2
    if of_openai:
        left, top = round((width - 224) / 2), round((height - 224) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    crop = image.crop((left, top, left + 224, top + 224)).convert("RGB")
    mean = [.48145466, .4578275, .40821073]
    std = [.26862954, .26130258, .27577711]
    pixels = torch.tensor((np.asarray(crop) / 255 - mean) / std).permute(2, 0, 1)

    embeddings = "vision_model.embeddings"
    kernel = w[f"{embeddings}.patch_embedding.weight"]
    patches = F.conv2d(pixels[None], kernel, stride=32)[0].flatten(1).T     # (49, D)
    x = torch.cat([w[f"{embeddings}.class_embedding"][None], patches])
    x = x + w[f"{embeddings}.position_embedding.weight"]
    x = norm(x, w, "vision_model.pre_layrnorm")
    x = clip_tower(x, w, "vision_model", heads, activation, causal=False)
    features = w["visual_projection.weight"] @ norm(x[0], w, "vision_model.post_layernorm")
    return F.normalize(features, dim=0)


def clip_text(prompt: str, w, heads: int, activation):
    """A prompt's features (D,), at length 1."""
    ids = open_clip.tokenize([prompt])[0]
    ids = ids[:ids.argmax() + 1]                 # up to the end token, the highest id
    embeddings = "text_model.embeddings"
    x = w[f"{embeddings}.token_embedding.weight"][ids]
    x = x + w[f"{embeddings}.position_embedding.weight"][:len(ids)]
    x = clip_tower(x, w, "text_model", heads, activation, causal=True)
    features = w["text_projection.weight"] @ norm(x[-1], w, "text_model.final_layer_norm")
    return F.normalize(features, dim=0)


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


# ---- weights for each of the four ----

def need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is missing: "
                    f"pip install --no-deps hpsv2==1.2.0 image-reward==1.5 clint==0.5.1")


@pytest.fixture(scope="session")
def hpsv2(tmp_path_factory):
    """The weights file, and official(prompt, image) -> cosine."""
    need("hpsv2")
    package = import_hpsv2()
    with sized_hpsv2():
        path = random_hpsv2(tmp_path_factory.mktemp("hpsv2") / "HPS_v2_compressed.pt")

        def official(prompt: str, image: Image.Image) -> float:
            return package.score(image, prompt, cp=str(path))[0]

        yield path, official


@pytest.fixture(scope="session")
def imagereward(tmp_path_factory):
    """The folder of the weights, and the official model."""
    need("ImageReward")
    folder = tmp_path_factory.mktemp("imagereward")
    with sized_imagereward():
        yield folder, random_imagereward(folder)


@pytest.fixture(scope="session")
def pickscore(tmp_path_factory):
    """The folder of the weights, and the weights."""
    folder = tmp_path_factory.mktemp("pickscore")
    return folder, random_clip(folder, "gelu", 64)


@pytest.fixture(scope="session")
def aesthetics(tmp_path_factory):
    """The folder of the weights, the head's not among them, and the weights of CLIP."""
    folder = tmp_path_factory.mktemp("aesthetics")
    return folder, random_clip(folder, "quick_gelu", 768)


# ---- parity ----

def test_hpsv2_equals_the_package(hpsv2):
    path, official = hpsv2
    prompts, images = all_pairs(PROMPTS + [ENTITY])
    cosines = []
    for prompt, image in zip(prompts, images):
        if image.mode == "RGBA":
            image = image.convert("RGB")         # the package crashes on the others
        cosines.append(official(prompt, image))
    ours = load_scorer("hpsv2", str(path))(prompts, images)
    assert_equal(np.divide(ours, 100), cosines, 1e-6)


@pytest.mark.parametrize("image", [waves(180, 140, "RGBA"), waves(224, 100), waves(1000, 1)])
def test_hpsv2_takes_what_the_package_crashes_on(hpsv2, image):
    path, official = hpsv2
    with pytest.raises(Exception):
        official(PROMPTS[0], image)
    assert np.isfinite(load_scorer("hpsv2", str(path))(PROMPTS[:1], [image])[0])


def test_hpsv2_puts_black_bars_around(hpsv2):
    path, official = hpsv2
    bar = waves(224, 100)
    padded = Image.new("RGB", (224, 224))
    padded.paste(bar, (0, 62))
    score = load_scorer("hpsv2", str(path))(PROMPTS[:1], [bar])[0]
    assert abs(score - 100 * official(PROMPTS[0], padded)) < 1e-5


def test_imagereward_equals_the_package(imagereward):
    folder, official = imagereward
    prompts, images = all_pairs(PROMPTS + [ENTITY])
    with torch.no_grad():
        expected = [official.score(prompt, image) for prompt, image in zip(prompts, images)]
    assert_equal(load_scorer("imagereward", str(folder))(prompts, images), expected, 1e-5)


@pytest.fixture
def pictures_of_all_kinds(tmp_path) -> list[Path]:
    """Files in every mode in which people's pictures come."""
    paths = []
    for i, (mode, ending) in enumerate([("P", "png"), ("RGBA", "png"), ("LA", "png"), ("L", "png"),
                                        ("1", "png"), ("CMYK", "jpg"), ("P", "gif")]):
        picture = waves(160 + 7 * i, 170, "RGB").convert("RGBA" if "A" in mode else "RGB")
        if "A" in mode:
            picture.putalpha(waves(160 + 7 * i, 170, "L"))
        paths.append(tmp_path / f"{i}.{ending}")
        picture.convert(mode).save(paths[-1])
    return paths


def test_stage_05_hands_a_picture_over_as_the_official_code_opens_it(imagereward, aesthetics,
                                                                     pictures_of_all_kinds):
    """From the file to the score; in palettes and alpha it matters when a picture becomes RGB."""
    folder, official = imagereward
    run = pictures_of_all_kinds[0].parent
    jobs = pd.DataFrame({"image": [path.name for path in pictures_of_all_kinds],
                         "prompt": PROMPTS[0]})
    s = Settings(run=str(run), device="cpu", scores="imagereward",
                 score_weights=f"imagereward={folder}")
    ours = scores.score_chunk(s, scores.load_score(s, "imagereward"), jobs)
    with torch.no_grad():
        theirs = [official.score(PROMPTS[0], str(path)) for path in pictures_of_all_kinds]
    assert_equal(ours.imagereward, theirs, 1e-5)

    # Aesthetics, whose code is a snippet, by the pixels that CLIP gets.
    for path, job in zip(pictures_of_all_kinds, jobs.image):
        opened = open_image(run / job, run, 1, mode="")
        with Image.open(path) as picture:
            picture.load()
            assert opened.mode == picture.mode
            assert torch.equal(scorers.cropped_pixels(opened, 224),
                               scorers.cropped_pixels(picture, 224))


def test_full_size_hpsv2_has_the_weights_of_the_package(hpsv2, monkeypatch):
    """Without a byte of them: on the meta device, where a tensor is only its shape."""
    theirs = importlib.import_module("hpsv2.src.open_clip")
    configs = []
    for package in (theirs, open_clip):
        path = Path(package.__file__).parent / "model_configs/ViT-H-14.json"
        configs.append(json.loads(path.read_text()))
    with init_empty_weights():
        state = theirs.CLIP(**configs[0]).state_dict()
    assert len(state) == 686

    monkeypatch.setattr(scorers, "read_weights", lambda path: state)
    with sized_hpsv2(configs[1]):
        scorers.load_hpsv2(Path(), "meta")


@pytest.mark.parametrize("name, number", [("hpsv2", "v2.0"), ("hpsv2.1", "v2.1")])
def test_hpsv2_has_the_file_that_the_package_has_for_its_version(hpsv2, name, number):
    files = importlib.import_module("hpsv2.utils").hps_version_map
    assert list(scorers.FILES[name]) == [files[number]]


def test_full_size_imagereward_has_the_weights_of_the_package(imagereward, monkeypatch):
    blip = importlib.import_module("ImageReward.models.BLIP.blip")
    bert = importlib.import_module("ImageReward.models.BLIP.med")
    package = importlib.import_module("ImageReward.ImageReward")
    # Else it is BERT-base, the default.
    config = {"vocab_size": 30524, "add_cross_attention": True, "encoder_width": 1024}
    with init_empty_weights():
        vision, _ = blip.create_vit("large", 224)
        text = bert.BertModel(bert.BertConfig(**config), add_pooling_layer=False)
        head = package.MLP(768)

    state = {}
    parts = {"blip.visual_encoder": vision, "blip.text_encoder": text, "mlp": head}
    for prefix, part in parts.items():
        for key, value in part.state_dict().items():
            state[f"{prefix}.{key}"] = value
    monkeypatch.setattr(scorers, "read_weights", lambda path: state)
    monkeypatch.setattr(scorers, "BLIP_VISION", FULL_BLIP_VISION)
    monkeypatch.setattr(scorers, "BLIP_TEXT", FULL_BLIP_TEXT)
    scorers.load_imagereward(Path(), imagereward[0] / "vocab.txt", "meta")

    assert FULL_BLIP_VISION["num_attention_heads"] == vision.blocks[0].attn.num_heads
    assert FULL_BLIP_VISION["layer_norm_eps"] == vision.norm.eps
    assert FULL_BLIP_TEXT["num_attention_heads"] == text.config.num_attention_heads


def test_pickscore_equals_its_formula(pickscore):
    folder, w = pickscore
    prompts, images = all_pairs(PROMPTS)
    features = [clip_image(image, w, 2, F.gelu) for image in PICTURES]
    cosines = []
    for prompt in PROMPTS:
        text = clip_text(prompt, w, 2, F.gelu)
        cosines += [(text @ image).item() for image in features]
    ours = load_scorer("pickscore", str(folder))(prompts, images)
    assert_equal(np.divide(ours, np.exp(4.6)), cosines, 1e-6)


def test_aesthetics_equals_its_formula_with_the_real_head(aesthetics):
    if not HEAD.exists():
        pytest.skip(f"the real head {HEAD.name} is not in ../shared/data")
    folder, w = aesthetics
    (folder / HEAD.name).write_bytes(HEAD.read_bytes())

    head = {}
    for key, value in torch.load(HEAD, map_location="cpu", weights_only=True).items():
        head[key] = value.double()
    expected = []
    for image in PICTURES:
        x = clip_image(image, w, 2, quick_gelu, of_openai=True)
        for i in (0, 2, 4, 6, 7):
            x = head[f"layers.{i}.weight"] @ x + head[f"layers.{i}.bias"]
        expected.append(x.item())
    prompts = [""] * len(PICTURES)
    assert_equal(load_scorer("aesthetics", str(folder))(prompts, PICTURES), expected, 1e-5)


# ---- what all four share ----

@pytest.fixture(scope="session")
def folders(hpsv2, imagereward, pickscore, aesthetics) -> dict[str, Path]:
    """Score name -> a folder with all its files, a random head of aesthetics if it is not there."""
    if not (aesthetics[0] / HEAD.name).exists():
        torch.manual_seed(2)
        head = {}
        sizes = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
        for i, size in sizes.items():
            layer = torch.nn.Linear(*size)
            head[f"layers.{i}.weight"] = layer.weight.detach()
            head[f"layers.{i}.bias"] = layer.bias.detach()
        torch.save(head, aesthetics[0] / HEAD.name)

    folder = hpsv2[0].parent
    (folder / "HPS_v2.1_compressed.pt").write_bytes(hpsv2[0].read_bytes())
    return {
        "pickscore": pickscore[0],
        "hpsv2": folder,
        "hpsv2.1": folder,
        "imagereward": imagereward[0],
        "aesthetics": aesthetics[0],
    }


@pytest.fixture
def no_hub(monkeypatch) -> list:
    """The look-ups so far, each of which fails at once."""
    calls = []

    def fail(*args, **options):
        calls.append(args)
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    monkeypatch.setattr("torch.hub.get_dir", lambda: "/nonexistent")
    return calls


def weights_file(name: str) -> str:
    return next(iter(scorers.FILES[name]))


def copy(folder: Path, to: Path) -> Path:
    to.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (to / file.name).symlink_to(file)
    return to


def replace_weights(name: str, folder: Path, to: Path, change) -> Path:
    """A copy of the folder in which change(state) was applied to the weights file; that file."""
    path = copy(folder, to) / weights_file(name)
    state = scorers.read_weights(path)
    change(state)
    path.unlink()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


ALL = pytest.mark.parametrize("name", scorers.FILES)


@ALL
def test_scores_do_not_depend_on_batch_order_or_calls(name, folders, monkeypatch):
    prompts, images = all_pairs(PROMPTS[:2])
    together = load_scorer(name, str(folders[name]))(prompts, images)

    monkeypatch.setattr(scorers, "BATCH", 4)
    score = load_scorer(name, str(folders[name]))
    apart = []
    for prompt, image in zip(prompts[::-1], images[::-1]):
        apart += score([prompt], [image])
    assert np.allclose(together, apart[::-1], rtol=0, atol=2e-5)


@ALL
def test_nothing_has_no_scores(name, folders):
    assert load_scorer(name, str(folders[name]))([], []) == []


@ALL
def test_a_complete_folder_asks_for_nothing(name, folders, no_hub):
    load_scorer(name, str(folders[name]))
    assert not no_hub


@ALL
def test_each_prompt_is_encoded_once(name, folders, monkeypatch):
    encoded = []
    batched = scorers.batched

    def counting(parts, device, dtype):
        def encode_text(prompts):
            encoded.extend(prompts)
            return parts.encode_text(prompts)

        return batched(parts._replace(encode_text=encode_text), device, dtype)

    monkeypatch.setattr(scorers, "batched", counting)
    score = load_scorer(name, str(folders[name]))
    score(["a", "b", "a"], PICTURES[:3])
    score(["b", "c"], PICTURES[:2])
    assert encoded == ["a", "b", "c"]


@ALL
def test_half_precision_is_near_and_not_the_same(name, folders):
    prompts, images = all_pairs(PROMPTS[:1])
    full = np.array(load_scorer(name, str(folders[name]))(prompts, images))
    half = load_scorer(name, str(folders[name]), dtype=torch.bfloat16)(prompts, images)
    assert 0 < np.abs(full - half).max() < .1 * np.ptp(full)


@ALL
def test_a_grayscale_picture_scores_as_in_rgb(name, folders):
    gray = waves(200, 150, "L")
    ours, rgb = load_scorer(name, str(folders[name]))(["x"] * 2, [gray, gray.convert("RGB")])
    assert ours == pytest.approx(rgb, abs=1e-5)


@ALL
def test_an_opaque_alpha_channel_changes_nothing(name, folders):
    opaque = waves(140, 140).convert("RGBA")
    ours, rgb = load_scorer(name, str(folders[name]))(["x"] * 2, [opaque, opaque.convert("RGB")])
    assert ours == pytest.approx(rgb, abs=1e-5)


def test_lengths_must_agree(folders):
    with pytest.raises(ValueError, match="2 prompts for 1 images"):
        load_scorer("hpsv2", str(folders["hpsv2"]))(["a", "b"], PICTURES[:1])


# ---- versions and files ----

@ALL
def test_version_names_weights_precision_and_packages(name, folders):
    line = version(name, str(folders[name]))
    assert line.startswith(f"{name} local/{weights_file(name)}@")
    assert f" float32 torch=={metadata.version('torch')} " in line
    assert str(folders[name]) not in line
    assert "\n" not in line


@ALL
def test_other_weights_have_another_version(name, folders, tmp_path):
    def change(state):
        next(iter(state.values())).add_(1)

    changed = replace_weights(name, folders[name], tmp_path, change)
    assert version(name, str(changed)) != version(name, str(folders[name]))


@ALL
def test_another_precision_has_another_version(name, folders):
    half = version(name, str(folders[name]), torch.bfloat16)
    assert half != version(name, str(folders[name]))


@pytest.fixture
def published(folders, tmp_path, no_hub, monkeypatch):
    """The files of pickscore and aesthetics as the hub's cache and the web have them."""
    snapshots = {
        "yuvalkirstain/PickScore_v1": ("model.safetensors", "config.json"),
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": ("tokenizer.json",),
        "openai/clip-vit-large-patch14": ("model.safetensors", "config.json"),
    }
    for source, files in snapshots.items():
        folder = folders["pickscore"]
        if source.startswith("openai"):
            folder = folders["aesthetics"]
        (tmp_path / source).mkdir(parents=True)
        # The cache has a large file under its sha256, and a link with its name.
        for file in files:
            name = f"blob-{file}"
            if file.startswith("model"):
                name = scorers.sha256(folder / file)
            blob = tmp_path / source / name
            blob.write_bytes((folder / file).read_bytes())
            (tmp_path / source / file).symlink_to(blob)

    def cached(source, file):
        if file in snapshots.get(source, ()):
            return str(tmp_path / source / file)
        return None

    def download(url, to, sha256):
        assert url.endswith("raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth")
        assert sha256.startswith("21dd590f")
        Path(to).write_bytes((folders["aesthetics"] / HEAD.name).read_bytes())

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "torch"))


@pytest.mark.parametrize("name", ["pickscore", "aesthetics"])
def test_published_files_come_from_the_cache_or_the_web(name, folders, published, no_hub):
    scores = load_scorer(name)(PROMPTS[:1], PICTURES[:1])
    assert scores == load_scorer(name, str(folders[name]))(PROMPTS[:1], PICTURES[:1])
    assert not no_hub


def test_the_version_of_published_files_says_where_they_come_from(folders, published):
    digest = scorers.sha256(folders["pickscore"] / "model.safetensors")[:12]
    start = f"pickscore yuvalkirstain/PickScore_v1/model.safetensors@{digest} yuval"
    assert version("pickscore").startswith(start)
    assert "linearMSE.pth" in version("aesthetics")


def fails(name: str, weights, *parts: str) -> None:
    """Loading the score is refused, in one line that has all these parts."""
    with pytest.raises(UserError) as error:
        load_scorer(name, str(weights))
    text = str(error.value)
    print(text)
    assert "\n" not in text
    for part in parts:
        assert part in text


@ALL
def test_missing_files_are_named_with_where_to_get_them(name, tmp_path, no_hub):
    (file, source), *_ = scorers.FILES[name].items()
    fails(name, tmp_path, str(tmp_path / file), scorers.url(source, file))
    fails(name, tmp_path / "weights.pt", str(tmp_path / "weights.pt"), scorers.url(source, file))
    fails(name, "weights/missing.pt", "weights/missing.pt")
    assert not no_hub                            # none of these can be a hub id


@ALL
def test_files_that_the_hub_does_not_give_are_named_too(name, no_hub):
    (file, source), *_ = scorers.FILES[name].items()
    fails(name, "", file, "ConnectionError", scorers.url(source, file))
    fails(name, "someone/else", file, "ConnectionError", scorers.url("someone/else", file))


@pytest.mark.parametrize("name, companion", [
    ("pickscore", "tokenizer.json"),
    ("imagereward", "vocab.txt"),
    ("aesthetics", "config.json"),
])
def test_missing_companions_are_named(name, companion, folders, tmp_path, no_hub):
    (copy(folders[name], tmp_path) / companion).unlink()
    fails(name, tmp_path, scorers.url(scorers.FILES[name][companion], companion))


def last_matrix(state: dict) -> str:
    return max(key for key in state if state[key].ndim == 2)


def without_a_weight(state: dict) -> None:
    state.pop(last_matrix(state))


def with_another_shape(state: dict) -> None:
    state[last_matrix(state)] = torch.zeros(3, 3)


def with_one_more(state: dict) -> None:
    state["unknown"] = torch.zeros(1)


@ALL
@pytest.mark.parametrize("change, fault", [
    (without_a_weight, "is missing"),
    (with_another_shape, "another shape"),
])
def test_damaged_weights_are_refused(name, change, fault, folders, tmp_path):
    path = replace_weights(name, folders[name], tmp_path, change)
    fails(name, path, str(path), fault)


@ALL
def test_more_weights_than_are_needed_do_no_harm(name, folders, tmp_path):
    path = replace_weights(name, folders[name], tmp_path, with_one_more)
    load_scorer(name, str(path))


@ALL
def test_wrong_files_are_refused(name, folders, tmp_path):
    other = "imagereward"
    if name == "imagereward":
        other = "aesthetics"
    others = (folders[other] / weights_file(other)).read_bytes()
    path = copy(folders[name], tmp_path) / weights_file(name)
    for content in (b"<html>404</html>", b"", others):
        path.unlink()
        path.write_bytes(content)
        fails(name, path, str(path))


class Payload:
    def __reduce__(self):
        return print, ("code ran",)


@ALL
def test_a_pickle_is_refused_and_not_run(name, folders, tmp_path, capsys):
    pickle = copy(folders[name], tmp_path) / "payload.pt"
    torch.save(Payload(), pickle)
    capsys.readouterr()
    fails(name, pickle, str(pickle), "not a readable weights file")
    assert "code ran" not in capsys.readouterr().out.splitlines()


def test_an_unknown_score_is_refused():
    fails("clip", "", "'clip'", "hpsv2.1")
