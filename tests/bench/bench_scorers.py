"""Images per second of lib/eval/scorers.py, and of hpsv2 and image-reward as shipped.

    python -m tests.bench.bench_scorers                towers of an eighth of their depth: a minute
                                                       on a laptop
    python -m tests.bench.bench_scorers --shrink 1     the real sizes: 4 GB of random weights, made
                                                       in memory first

One run of each, in one process, on the same pictures and prompts. What is timed is what a caller of
score() waits for: hpsv2.score() reads its checkpoint on every call, so that is in its figure; the
others load once, which is given apart. Needs hpsv2 and image-reward (pip install --no-deps, as in
tests/test_scorers.py).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import open_clip
import torch

from lib.eval import scorers
from lib.settings import cpu_name
from tests.official import (import_hpsv2, random_hpsv2, random_imagereward, sized_hpsv2,
                            sized_imagereward, waves)

PACKAGES = ("torch", "transformers", "open_clip_torch", "hpsv2", "image-reward")


def seconds(work: Callable) -> tuple[float, object]:
    """How long work() takes, and what it gives."""
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def compare(name: str, preprocess: Callable, official: Callable, weights: Path,
            prompts: list[str], images: list, args: argparse.Namespace) -> None:
    """Print one line for one score: both speeds, their ratio, and where the time of ours goes."""
    def score_officially():
        for prompt, image in zip(prompts, images):
            official(prompt, image)

    def resize():
        for image in images:
            preprocess(image)

    theirs, _ = seconds(score_officially)
    loading, score = seconds(
        lambda: scorers.load_scorer(name, str(weights), args.device, args.dtype))
    ours, _ = seconds(lambda: score(prompts, images))
    prompts_known, _ = seconds(lambda: score(prompts, images))
    resizing, _ = seconds(resize)

    n = len(images)
    print(f"{name:12} ours {n / ours:7.2f} images/s, official {n / theirs:7.2f}, "
          f"ratio {theirs / ours:5.1f} ({theirs / (ours + loading):.1f} with our loading, "
          f"{loading:.1f} s); with prompts known {n / prompts_known:.2f}, "
          f"resizing alone {n / resizing:.0f}", flush=True)


def compare_hpsv2(prompts: list[str], images: list, args: argparse.Namespace) -> None:
    package = import_hpsv2()
    config = open_clip.get_model_config("ViT-H-14")
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["layers"] = shrunk(config[tower]["layers"], args)

    with tempfile.TemporaryDirectory() as folder, sized_hpsv2(config):
        path = random_hpsv2(Path(folder) / "HPS_v2_compressed.pt")
        # The package makes the base model once per process, too.
        package.initialize_model()

        def preprocess(image):
            return scorers.hpsv2_pixels(image, 224)

        def official(prompt, image):
            return package.score(image, prompt, cp=str(path))

        compare("hpsv2", preprocess, official, path, prompts, images, args)
        package.model_dict.clear()


def compare_imagereward(prompts: list[str], images: list, args: argparse.Namespace) -> None:
    vision = {"num_hidden_layers": shrunk(24, args)}
    text = {"num_hidden_layers": shrunk(12, args)}
    with tempfile.TemporaryDirectory() as name, sized_imagereward(vision, text), torch.no_grad():
        folder = Path(name)
        model = random_imagereward(folder).to(args.device)
        model.device = args.device
        compare("imagereward", scorers.imagereward_pixels, model.score, folder, prompts, images,
                args)


def shrunk(layers: int, args: argparse.Namespace) -> int:
    return max(1, layers // args.shrink)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shrink", type=int, default=8,
                        help="divide the depth of every tower by this (8)")
    parser.add_argument("--prompts", type=int, default=4, help="different prompts (4)")
    parser.add_argument("--images", type=int, default=2, help="images of each prompt (2)")
    parser.add_argument("--size", type=int, default=512, help="pixels per side (512)")
    parser.add_argument("--threads", type=int, default=0,
                        help="CPU threads; 0 leaves torch's default")
    parser.add_argument("--dtype", default="float32",
                        help="of ours: float32, bfloat16 or float16 (float32)")
    args = parser.parse_args()

    args.device = "cpu"
    hardware = cpu_name()
    if torch.cuda.is_available():
        args.device = "cuda"
        hardware = torch.cuda.get_device_name()
    args.dtype = getattr(torch, args.dtype)
    if args.threads:
        torch.set_num_threads(args.threads)

    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    print(f"{hardware}, {torch.get_num_threads()} threads; {versions}")
    print(f"{args.prompts} prompts x {args.images} images of {args.size} x {args.size}, "
          f"ours in {str(args.dtype)[6:]}, depth 1/{args.shrink} of the real models")

    prompts = []
    for i in range(args.prompts):
        prompts += [f"a red star on background {i}, detailed"] * args.images
    images = [waves(args.size, args.size) for _ in prompts]
    compare_hpsv2(prompts, images, args)
    compare_imagereward(prompts, images, args)

    print("What bounds ours: the encoders' forward while resizing alone is much faster (a CPU), "
          "else resizing, which\nfour threads share (a GPU). What the packages add per image: "
          "hpsv2 a read of its checkpoint and a text\nforward, ImageReward a forward of its own, "
          "which costs a CPU little and a GPU its batches.")


if __name__ == "__main__":
    main()
