"""Images per second of lib.scorers beside hpsv2.score() and ImageReward.score() as shipped, on random weights.

    python -m tests.bench.bench_scorers                     # towers of an eighth of their depth: a minute on a laptop
    python -m tests.bench.bench_scorers --shrink 1          # the real sizes: 4 GB of weights, made up in memory first

One run of each, in one process, the same pictures and prompts. What is timed is what a caller of the function waits
for: hpsv2.score() reads its checkpoint on every call, so that is in its figure; the others load once, which is given
apart. Needs hpsv2 and image-reward (pip install --no-deps, as in tests/test_scorers.py).
"""

import argparse
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import open_clip
import torch

from lib import scorers
from lib.settings import cpu_name
from tests.test_scorers import import_hpsv2, picture, random_hpsv2, random_imagereward, sized_hpsv2, sized_imagereward


def seconds(work) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def compare(name: str, preprocess, official, weights: Path, prompts: list[str], images: list, args) -> None:
    """One line for one score: both speeds, their ratio, and where the time of ours goes."""
    theirs, _ = seconds(lambda: [official(p, im) for p, im in zip(prompts, images)])
    loading, score = seconds(lambda: scorers.load_scorer(name, str(weights), args.device, args.dtype))
    ours, _ = seconds(lambda: score(prompts, images))
    again, _ = seconds(lambda: score(prompts, images))           # every prompt is known by now
    pictures, _ = seconds(lambda: [preprocess(im) for im in images])
    n = len(images)
    print(f"{name:12} ours {n / ours:7.2f} images/s, official {n / theirs:7.2f}, ratio {theirs / ours:5.1f} "
          f"({theirs / (ours + loading):.1f} with our loading, {loading:.1f} s); with prompts known {n / again:.2f}, "
          f"resizing alone {n / pictures:.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shrink", type=int, default=8, help="divide the depth of every tower by this (8)")
    parser.add_argument("--prompts", type=int, default=4, help="different prompts (4)")
    parser.add_argument("--images", type=int, default=2, help="images of each prompt (2)")
    parser.add_argument("--size", type=int, default=512, help="pixels per side (512)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's default")
    parser.add_argument("--dtype", default="float32", help="of ours: float32, bfloat16 or float16 (float32)")
    args = parser.parse_args()
    args.device, args.dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype)
    if args.threads:
        torch.set_num_threads(args.threads)
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
    packages = ("torch", "transformers", "open_clip_torch", "hpsv2", "image-reward")
    print(f"{hardware}, {torch.get_num_threads()} threads; " + ", ".join(f"{p} {version(p)}" for p in packages))
    print(f"{args.prompts} prompts x {args.images} images of {args.size} x {args.size}, ours in {str(args.dtype)[6:]}, "
          f"depth 1/{args.shrink} of the real models")

    prompts = [f"a red star on background {i}, detailed" for i in range(args.prompts) for _ in range(args.images)]
    images = [picture(args.size, args.size) for _ in prompts]
    depth = lambda layers: max(1, layers // args.shrink)

    hpsv2 = import_hpsv2()
    config = open_clip.get_model_config("ViT-H-14")
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["layers"] = depth(config[tower]["layers"])
    with tempfile.TemporaryDirectory() as folder, sized_hpsv2(config):
        path = random_hpsv2(Path(folder) / "HPS_v2_compressed.pt")
        hpsv2.initialize_model()                                 # the base model, made once per process there too
        compare("hpsv2", lambda image: scorers.hpsv2_pixels(image, 224),
                lambda prompt, image: hpsv2.score(image, prompt, cp=str(path)), path, prompts, images, args)
        hpsv2.model_dict.clear()

    vision, text = {"num_hidden_layers": depth(24)}, {"num_hidden_layers": depth(12)}
    with tempfile.TemporaryDirectory() as folder, sized_imagereward(vision, text), torch.no_grad():
        model = random_imagereward(Path(folder)).to(args.device)
        model.device = args.device
        compare("imagereward", scorers.imagereward_pixels, model.score, Path(folder), prompts, images, args)

    print("What bounds ours: the encoders' forward while resizing alone is much faster (a CPU), else resizing, which\n"
          "four threads share (a GPU). What the packages add per image: hpsv2 a read of its checkpoint and a text\n"
          "forward, ImageReward a forward of its own, which costs a CPU little and a GPU its batches.")


if __name__ == "__main__":
    main()
