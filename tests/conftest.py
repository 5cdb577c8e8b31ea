import base64
import gc
import importlib.util
import io
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

# What is compared is compared in float32, on the CPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def stage(name: str):
    """A numbered stage script as a module."""
    path = next(ROOT.glob(f"{name}*.py"))
    spec = importlib.util.spec_from_file_location("stage_" + path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", autouse=True)
def few_to_collect():
    """What is imported by now is left out when a stage frees a model's memory.

    That is half the time of a small evaluation.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def seed():
    return stage("01")


@pytest.fixture(scope="session")
def rank():
    return stage("03")


@pytest.fixture(scope="session")
def train():
    return stage("04")


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


# ---- runs ----

# A whole run of the embedded world that takes seconds: Iter0 and two rounds.
MINI = [
    "--iters", "2",
    "--seed-pairs", "8",
    "--holdout-pairs", "6",
    "--iter-prompts", "3",
    "--candidates", "4",
    "--draws", "3",
    "--sample-steps", "3",
    "--iter0-steps", "4",
    "--iter-steps", "4",
    "--batch", "4",
    "--micro-batch", "2",
    "--checkpoint-every", "1",
    "--eval-count", "8",
    "--lr", "1e-4",
]

# The driver takes this Python, and nothing is looked up on the hub.
ENV = os.environ | {
    "SAIL_ACTIVE": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "HF_HUB_OFFLINE": "1",
}

# Where a model folder of diffusers has a UNet's weights.
UNET_FILE = "diffusion_pytorch_model.safetensors"


def call(number: str, run: Path, *arguments: str) -> str | None:
    """Run a stage in this process; a UserError comes back as the line that is printed of it."""
    from lib.run import UserError
    try:
        stage(number).main(["--run", str(run), *arguments])
    except UserError as error:
        return str(error)
    return None


def finish(run: Path) -> None:
    """All stages of a miniature run after 01, as the driver runs them."""
    assert call("04", run, "--iter", "0") is None
    for k in ("1", "2"):
        for number in ("02", "03", "04"):
            assert call(number, run, "--iter", k) is None
    assert call("05", run) is None


@pytest.fixture(scope="session")
def mini(tmp_path_factory) -> Path:
    """A finished miniature run, to be read only; made by the first of pytest's workers to need it.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    run = folder / "mini"
    with FileLock(f"{run}.lock"):
        if not (run / "eval/index.html").exists():
            assert call("01", run, *MINI) is None
            finish(run)
    return run


@pytest.fixture
def mini_copy(mini, tmp_path) -> Path:
    """A finished miniature run to change or break."""
    return shutil.copytree(mini, tmp_path / "mini")


def settings_of(run: Path):
    from lib.settings import load
    return load(["--run", str(run)], "")[0]


def configure(run: Path, **changes):
    """Give a run other settings, as if it had been started with them; returns them all."""
    config = json.loads((run / "config.json").read_text())
    config["settings"] |= changes
    (run / "config.json").write_text(json.dumps(config))
    return settings_of(run)


def judge_of(run: Path, k: int) -> dict:
    return json.loads((run / f"iter{k}/judge.json").read_text())


def weights_of(run: Path, k: int) -> dict[str, torch.Tensor]:
    """The weights of the UNet that round k has written."""
    from safetensors.torch import load_file
    return load_file(run / f"iter{k}/unet" / UNET_FILE)


def same_tensors(one: dict, two: dict) -> bool:
    """Whether two dictionaries of tensors are the same to the bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def refused(message: str | None, *words: str) -> None:
    """The message of an error is one line and has these words."""
    assert message
    assert "\n" not in message
    for word in words:
        assert word in message


# ---- models ----

def tiny_unet(seed: int = 0):
    """A UNet of random weights for latents (B, 4, 8, 8) and prompt embeddings (B, T, 8)."""
    from diffusers import UNet2DConditionModel
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=8,
    )


def random_batch(rng: torch.Generator, size: int) -> tuple:
    """What tiny_unet is asked: x_0, noise, t and condition of `size` pictures."""
    x_0 = torch.randn(size, 4, 8, 8, generator=rng)
    noise = torch.randn(size, 4, 8, 8, generator=rng)
    t = torch.randint(1000, (size,), generator=rng)
    condition = {"embeds": torch.randn(size, 5, 8, generator=rng)}
    return x_0, noise, t, condition


def nudge(unet, size: float = .02) -> None:
    """Move the trained parameters at random: another model than before."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=rng)


def make_text_encoder(kind, tokenizer, width: int, activation: str):
    """A text encoder of random weights."""
    from transformers import CLIPTextConfig
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=12,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return kind(config).eval()


def make_pipeline(folder: Path, xl: bool, prediction: str):
    """Write SD1.5 or SDXL with random weights: the real classes, blocks and options, but few
    channels and layers. Returns the pipeline.

    SDXL's encoders differ in width, and its second tokenizer pads with an exclamation mark.
    """
    from diffusers import (AutoencoderKL, DDPMScheduler, StableDiffusionPipeline,
                           StableDiffusionXLPipeline, UNet2DConditionModel)
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from lib.plan import architecture
    torch.manual_seed(0)
    vocabulary = ROOT / "lib/world/base/tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(vocabulary)
    second_tokenizer = CLIPTokenizer.from_pretrained(vocabulary, pad_token="!")

    vae_options = architecture.SD_VAE | {
        "block_out_channels": (8,) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "scaling_factor": .13025 if xl else .18215,
    }
    vae = AutoencoderKL(**vae_options)

    unet_options = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4}
    if xl:
        unet_options = architecture.SDXL_UNET | unet_options | {
            "block_out_channels": (8, 16, 16),
            "transformer_layers_per_block": [1, 1, 2],
            "attention_head_dim": [1, 2, 2],
            "cross_attention_dim": 16 + 24,
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 12,
        }
    else:
        unet_options = architecture.SD15_UNET | unet_options | {
            "block_out_channels": (8, 16, 16, 16),
            "attention_head_dim": 2,
            "cross_attention_dim": 16,
        }
    unet = UNet2DConditionModel(**unet_options)

    scheduler = DDPMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear",
                              clip_sample=False, steps_offset=1, prediction_type=prediction)
    encoder = make_text_encoder(CLIPTextModel, tokenizer, 16, "quick_gelu")
    if xl:
        second_encoder = make_text_encoder(CLIPTextModelWithProjection, second_tokenizer, 24,
                                           "gelu")
        pipe = StableDiffusionXLPipeline(vae, encoder, second_encoder, tokenizer, second_tokenizer,
                                         unet, scheduler)
    else:
        pipe = StableDiffusionPipeline(vae, encoder, tokenizer, unet, scheduler,
                                       safety_checker=None, feature_extractor=None,
                                       requires_safety_checker=False)
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pairs(folder: Path, count: int = 8) -> Path:
    """A table of a user's own pairs, and prompts for the rounds and for the evaluation."""
    folder.mkdir(parents=True)
    lines = ["prompt,win,lose"]
    for i in range(count):
        for side in "wl":
            blue = 255 if side == "w" else 0
            image = Image.new("RGB", (80 + i, 64), (20 * i % 256, 90, blue))
            image.paste((200, 10 * i % 256, 30), (0, 0, 30, 40))             # left is not as right
            image.save(folder / f"{i}{side}.png")
        lines.append(f'"a thing, number {i}",{i}w.png,{i}l.png')

    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    (folder / "prompts.txt").write_text("".join(f"a new thing {i}\n" for i in range(6)))
    (folder / "eval.txt").write_text("something else\nand more\n")
    return folder


# ---- pictures and pairs from outside: Pick-a-Pic's shards, the user's tables, the hub ----

SHARED_DATA = ROOT.parent / "shared" / "data"       # published lists, where they are at hand


def picture(number: int, size: tuple[int, int] = (24, 16), mode: str = "RGB") -> Image.Image:
    """A picture of noise, another one for each number."""
    noise = np.random.default_rng(number)
    pixels = noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(number: int) -> bytes:
    return encoded(picture(number))


def shard_row(number: int, **changes) -> dict:
    """A Pick-a-Pic row; the winner's picture is 2 * number, whichever side it is on."""
    win, lose = jpeg(2 * number), jpeg(2 * number + 1)
    first_wins = number % 3 != 0
    row = {
        "are_different": True,
        "caption": f"prompt {number}",
        "has_label": True,
        "image_0_uid": f"a{number}",
        "image_1_uid": f"b{number}",
        "jpg_0": win if first_wins else lose,
        "jpg_1": lose if first_wins else win,
        "label_0": float(first_wins),
        "label_1": float(not first_wins),
        "model_0": "x",
        "unused": b"y" * 1000,
    }
    return row | changes


def write_shard(path: Path, rows: list[dict], row_group_size: int = 10) -> Path:
    """A Parquet file of these rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def make_shards(folder: Path, count: int = 4, rows: int = 30) -> Path:
    """A folder of `count` training shards in Pick-a-Pic's layout."""
    for shard in range(count):
        name = f"train-{shard:05d}-of-{count:05d}.parquet"
        numbers = range(shard * rows, (shard + 1) * rows)
        write_shard(folder / "data" / name, [shard_row(number) for number in numbers])
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    """A table in the format of its name: .csv as Excel writes it, .jsonl, or Parquet."""
    if path.suffix == ".csv":
        lines = [",".join(rows[0])]
        for row in rows:
            cells = [str(cell).replace('"', '""') for cell in row.values()]
            lines.append(",".join(f'"{cell}"' for cell in cells))
        path.write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")
    elif path.suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    else:
        write_shard(path, rows, row_group_size=2)
    return path


@pytest.fixture
def opened_shards(monkeypatch) -> list[str]:
    """Names of the Parquet files that the code under test opens, in order."""
    import pyarrow.parquet as pq

    names = []
    real = pq.ParquetFile

    def open_and_note(file, **options):
        names.append(Path(str(file)).name)
        return real(file, **options)

    monkeypatch.setattr(pq, "ParquetFile", open_and_note)
    return names


def fake_hub(monkeypatch, folder: Path, error: Exception | None = None) -> list[str]:
    """huggingface_hub's three entry points, answered from a local folder for some/pairs.

    Returns the names of what is fetched, as it happens; a name that is only read in part has
    "peek " before it. With an `error` the hub raises it when asked for a dataset.
    """
    import huggingface_hub

    log = []

    def dataset_info(self, repo):
        if error:
            raise error
        files = sorted(folder.rglob("*.*"), reverse=True)
        names = [file.relative_to(folder).as_posix() for file in files]
        siblings = [SimpleNamespace(rfilename=name) for name in names]
        return SimpleNamespace(sha="abc", siblings=siblings)

    def download(repo, name, repo_type, revision):
        assert (repo_type, revision) == ("dataset", "abc")
        log.append(name)
        return str(folder / name)

    class FileSystem:
        def open(self, path, block_size):
            name = path.removeprefix("datasets/some/pairs@abc/")
            log.append(f"peek {name}")
            return open(folder / name, "rb")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FileSystem)
    return log


def http_error(kind: str, status: int) -> Exception:
    """huggingface_hub's own exception, made the way it makes them."""
    from huggingface_hub import errors

    response = SimpleNamespace(headers={}, status_code=status, request=None)
    text = f"{status} Client Error.\n\nRepository Not Found"
    return getattr(errors, kind)(text, response=response)


def fails_with(match: str, call, *arguments) -> str:
    """The message of the UserError that a call raises, in one line; a stream is read to its end."""
    from lib.run import UserError

    with pytest.raises(UserError, match=match) as caught:
        result = call(*arguments)
        if not isinstance(result, (list, dict)):
            list(result)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- scorers ----

def random_clip(folder: Path, activation: str, projection: int) -> dict[str, torch.Tensor]:
    """Write a small random CLIP as transformers saves it, with the real vocabulary.

    Returns its weights in float64.
    """
    import open_clip
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "hidden_act": activation,
    }
    config = CLIPConfig(
        projection_dim=projection,
        logit_scale_init_value=4.6,
        # The published files have this end token too.
        text_config=sizes | {"hidden_size": 64, "eos_token_id": 2},
        vision_config=sizes | {"hidden_size": 128, "patch_size": 32},
    )
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
    return {key: weight.double() for key, weight in model.state_dict().items()}


# ---- a page in a real browser ----

class Browser:
    """A headless Chromium, spoken to in the DevTools protocol over a pipe: no driver, no package.

    SAIL_SHOTS=folder keeps the screenshots that the tests take.
    """

    FLAGS = [
        "--headless",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--remote-debugging-pipe",
    ]

    # Chromium wants the ends of the pipes as file descriptors 3 and 4: a small Python process puts
    # them there (by way of two that are free) and becomes the browser.
    PLUG = "; ".join([
        "import os, sys",
        "r, w = map(int, sys.argv[1:3])",
        "high = max(r, w) + 1",
        "os.dup2(r, high)",
        "os.dup2(w, high + 1)",
        "os.dup2(high, 3)",
        "os.dup2(high + 1, 4)",
        "os.execv(sys.argv[3], sys.argv[3:])",
    ])

    KEY_CODES = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
                 "ArrowDown": 40, "Backspace": 8}

    def __init__(self, program: str, profile: Path):
        flags = [*self.FLAGS, f"--user-data-dir={profile}"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")

        read, self.write = os.pipe()
        self.read, write = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-IS", "-c", self.PLUG, str(read), str(write), program, *flags],
            pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)

        self.buffer = b""
        self.events = []
        self.number = 0
        self.session = None
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        attached = self.command("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(domain + ".enable")

    def command(self, method: str, **parameters) -> dict:
        """Send a command and return its result; events that come before it are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")

        answer = self.next_message()
        while answer.get("id") != self.number:
            self.events.append(answer)
            answer = self.next_message()
        assert "error" not in answer, answer
        return answer["result"]

    def next_message(self) -> dict:
        while b"\0" not in self.buffer:
            assert select.select([self.read], [], [], 60)[0], "the browser says nothing"
            part = os.read(self.read, 1 << 20)
            assert part, "the browser is gone"
            self.buffer += part
        text, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(text)

    def open(self, page: Path | str, width=1280, height=900, dark=False, fragment="") -> float:
        """Load a page at a size: a file, or an address. Returns the seconds until its scripts are
        through."""
        address = page if isinstance(page, str) else page.resolve().as_uri()
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=height,
                     deviceScaleFactor=1, mobile=width < 800)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])
        self.command("Page.navigate", url="about:blank")
        self.events.clear()

        start = time.perf_counter()
        self.command("Page.navigate", url=address + fragment)
        while not self.js("document.readyState === 'complete' && location.protocol !== 'about:'"):
            assert time.perf_counter() - start < 20
            time.sleep(.02)
        return time.perf_counter() - start

    def js(self, expression: str):
        """The value of an expression in the page."""
        answer = self.command("Runtime.evaluate", expression=expression, awaitPromise=True,
                              returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def frame(self) -> None:
        """Wait until the page is drawn anew."""
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def key(self, key: str) -> None:
        code = self.KEY_CODES.get(key, ord(key[0].upper()))
        text = {}
        if len(key) == 1:
            text = {"text": key}
        if key == "Enter":
            text = {"text": "\r"}

        for kind, typed in (("keyDown", text), ("keyUp", {})):
            self.command("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code,
                         **typed)
        self.frame()

    def click(self, selector: str) -> None:
        x, y = self.js(
            "(element => {"
            "  element.scrollIntoView({ block: 'center' });"
            "  const box = element.getBoundingClientRect();"
            "  return [box.x + box.width / 2, box.y + box.height / 2];"
            f"}})(document.querySelector({selector!r}))")
        self.frame()
        for kind in ("mousePressed", "mouseReleased"):
            self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left",
                         clickCount=1)
        self.frame()

    def set(self, name: str, value: str) -> None:
        """Give the control with this id a value, as a user would."""
        self.js(
            "(control => {"
            f"  control.value = {value!r};"
            "  control.dispatchEvent(new Event('input'));"
            f"}})(document.getElementById({name!r}))")
        self.frame()

    def faults(self) -> list:
        """Console errors, uncaught exceptions, and requests that are not for files."""
        faults = []
        for event in self.events:
            method = event.get("method")
            details = event.get("params", {})
            if method in ("Runtime.exceptionThrown", "Log.entryAdded"):
                faults.append(event)
            if method == "Runtime.consoleAPICalled":
                if details["type"] in ("error", "warning", "assert"):
                    faults.append(event)
            if method == "Network.requestWillBeSent":
                address = details["request"]["url"]
                if not address.startswith(("file:", "about:", "data:")):
                    faults.append(address)
        return faults

    def shot(self, name: str) -> None:
        """Keep a screenshot of the window where SAIL_SHOTS names a folder."""
        folder = os.environ.get("SAIL_SHOTS")
        if not folder:
            return
        self.js("new Promise(done => setTimeout(done, 300))")
        picture = self.command("Page.captureScreenshot")["data"]
        Path(folder, name + ".png").write_bytes(base64.b64decode(picture))

    def close(self) -> None:
        self.session = None
        self.command("Browser.close")
        self.process.wait(10)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless browser; tests that want one are skipped on a machine without Chromium."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium or google-chrome on this machine")
    chromium = Browser(program, tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()
