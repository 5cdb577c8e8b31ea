"""What a run will cost, told before anything is spent: `./run_sail.sh sd15 --plan`, with any preset and any settings.

Counts (images, UNet forwards, optimizer steps) follow from the settings; the ledger of the run will say the same. Hours
come from a probe of this device, a minute or so: the run's own UNet and VAE at its resolution and batches. With
SAIL_LAUNCH="accelerate launch --num_processes N" they are those of N such devices.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from lib import benchmarks, models, own
from lib.probe import Probe, Shape, forwards_per_pair, shape_of, stage
from lib.run import run_stage
from lib.settings import PRESETS, ROOT, Settings, build_parser, check, load, round_prompts

PNG, JPEG = 2., .7                              # bytes per pixel of photographs as save_image writes them
FLAG = {"--plan": {"action": "store_true", "help": "print what the run will cost, and stop"}}


# ---- counts: as the ledger will say ----

def eval_prompts(s: Settings) -> int:
    """Evaluation prompts of all benchmarks; for one that would have to be fetched, the published number."""
    known = {name: min(s.eval_count or n, n) for name, n in benchmarks.PUBLISHED.items()}
    tokens = [token.strip() for token in s.eval_prompts.split(",") if token.strip()]
    return sum(known[token] if token in known else
               benchmarks.load(token, s.eval_count, s.pairs, say=lambda _: None).prompt.nunique() for token in tokens)


def painted(s: Settings, images: int) -> dict:
    return {"images": images, "unet_forwards": images * s.sample_steps * (2 if s.cfg_scale != 1 else 1), "decodes": images}


def trained(s: Settings, k: int, new: int) -> dict:
    """Stage 04 on `new` pairs whose mirror images nobody encoded yet."""
    steps = stage("04").steps_of(s, k, s.seed_pairs, new)
    return {"optimizer_steps": steps, "unet_forwards": steps * s.batch * (4 if s.loss == "dpo" else 2),
            "encodes": 2 * new if s.flip else 0}


def ranked(s: Settings, k: int) -> dict:
    """Stage 03: every draw is asked of model and anchor; an anchor's errors on the held-out pairs once per run."""
    rank = stage("03")
    if s.reward != "implicit":
        return {}
    asked = [rank.anchor_of(s, j) for j in range(1, k)]
    held = 2 * s.holdout_pairs * s.draws * (1 if rank.anchor_of(s, k) in asked else 2)
    return {"unet_forwards": 2 * round_prompts(s, k) * s.candidates * s.draws + held}


def counts(s: Settings) -> pd.DataFrame:
    """One row per stage and round: what the ledger counts, and pictures that the VAE encodes and decodes."""
    people = 2 * (s.seed_pairs + s.holdout_pairs)
    rows = [{"stage": "01_seed", **(painted(s, people) if s.pairs == "world" else {"images": people, "encodes": people})}]
    rows += [{"stage": "04_train_dpo", "iter": 0, **trained(s, 0, s.seed_pairs)}] if not s.start else []
    for k in range(1, s.iters + 1):
        new = round_prompts(s, k) if s.alpha > 0 else 0
        if new:
            rows += [{"stage": "02_generate", "iter": k, **painted(s, new * s.candidates)},
                     {"stage": "03_rank", "iter": k, **ranked(s, k)}]
        rows += [{"stage": "04_train_dpo", "iter": k, **trained(s, k, new)}]
    rows += [{"stage": "05_eval", **painted(s, (s.iters + 2) * eval_prompts(s) * s.eval_seeds)}]
    names = ["images", "unet_forwards", "optimizer_steps", "encodes", "decodes"]
    table = pd.DataFrame(rows).reindex(columns=["stage", "iter", *names])
    return table.astype({"iter": "Int64"}).fillna({n: 0 for n in names}).astype({n: "int64" for n in names})


# ---- disk, memory, and the report ----

def disk(s: Settings, shape: Shape, parameters: int, row: dict) -> int:
    """Bytes that a stage leaves behind: pictures, latents, prompt embeddings, a UNet in float32."""
    values = shape.vae["latent_channels"] * (s.resolution // shape.factor) ** 2
    kept, file = 4 * values, 150                                    # a sampler's own latent; a safetensors header
    posterior = 2 * models.dtype_of(s).itemsize * values + file     # of an encoded picture: mean and std
    outside = row["stage"] == "01_seed" and s.pairs != "world"
    size = row["images"] * s.resolution ** 2 * (JPEG if outside else PNG) if row["stage"] != "03_rank" else 0
    size += row["encodes"] * posterior
    if row["stage"] == "01_seed" and not outside or row["stage"] == "02_generate":
        size += row["images"] * (kept + file)
    if row["stage"] == "01_seed":
        prompts = s.seed_pairs + s.holdout_pairs + eval_prompts(s) + sum(round_prompts(s, k + 1) for k in range(s.iters))
        c = shape.unet
        pooled = c.get("projection_class_embeddings_input_dim") or 0
        size += prompts * models.dtype_of(s).itemsize * (shape.tokens * c["cross_attention_dim"] + pooled)
    return int(size + (4 * parameters if row["stage"] == "04_train_dpo" else 0))


def hours(s: Settings, seconds: dict, row: dict) -> float:
    """Of a stage on one device; `seconds` are those of Probe."""
    vae = row["encodes"] * seconds["encode"] + row["decodes"] * seconds["decode"]
    if row["stage"] == "04_train_dpo":
        return (vae + row["optimizer_steps"] * (s.batch * seconds["pair"] + seconds["step"])) / 3600
    return (vae + row["unet_forwards"] * seconds["rank" if row["stage"] == "03_rank" else "sample"]) / 3600


def arithmetic(s: Settings, flops, row: dict) -> float:
    """FLOP of a stage; `flops` is that of Probe."""
    pairs = row["optimizer_steps"] * s.batch
    unet = pairs * forwards_per_pair(s) if pairs else row["unet_forwards"]
    return unet * flops("unet") + row["encodes"] * flops("encode") + row["decodes"] * flops("decode")


def memory(s: Settings, probe: Probe) -> str:
    """What training holds for every weight, and on CUDA the measured peaks beside the card."""
    p, low = probe.parameters, probe.dtype.itemsize
    parts = {"policy": p * (low if s.lora_rank else 4), "reference": 0 if s.lora_rank or s.loss != "dpo" else p * low,
             "gradients": 0 if s.lora_rank else 4 * p,
             "optimizer": 0 if s.lora_rank or s.optimizer == "adafactor" else 8 * p}
    gb = lambda size: f"{size / 1e9:.2g} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"
    text = "memory in training: " + " + ".join(f"{name} {gb(size)}" for name, size in parts.items() if size)
    text += f" = {gb(sum(parts.values()))} and activations"
    if probe.device.type != "cuda":
        return text + " (measured on CUDA only)"
    card = torch.cuda.get_device_properties(probe.device).total_memory
    peaks = ", ".join(f"{name} {gb(size)}" for name, size in probe.peak.items())
    fits = "fits" if max(probe.peak.values()) < .95 * card else "does NOT fit"
    return f"{text}\nmeasured peaks: {peaks}; the card has {gb(card)}: {fits}"


def plan(s: Settings, processes: int) -> tuple[pd.DataFrame, Probe]:
    """counts(s) with TFLOP, disk bytes and hours on `processes` devices like this one."""
    table, shape = counts(s), shape_of(s)
    probe = Probe(s, shape).run()
    rows = table.to_dict("records")
    return table.assign(tflop=[arithmetic(s, probe.flops, r) / 1e12 for r in rows],
                        disk_bytes=[disk(s, shape, probe.parameters, r) for r in rows],
                        hours=[hours(s, probe.seconds, r) / processes for r in rows]), probe


def settings_of(argv: list[str]) -> Settings:
    """A run's saved settings, or those a new run would have; no folder is made."""
    given = vars(build_parser(__doc__, FLAG).parse_args(argv))
    given.pop("plan", None)
    run = Path(given.get("run") or ROOT / "runs" / given.get("preset", "tiny"))
    if (run / "config.json").exists():
        return load(argv, __doc__, FLAG)[0]
    return check(Settings(**(PRESETS[given.get("preset", "tiny")] | given | {"run": str(run)})))


def main(argv: list[str]) -> None:
    s = settings_of(argv)
    if few := own.fit(s, ()):
        print(own.told(s, few))
        s = replace(s, **few)
    launched = re.search(r"--(?:num_processes|nproc[-_]per[-_]node)[= ](\d+)", os.environ.get("SAIL_LAUNCH", ""))
    processes = int(launched[1]) if launched else 1
    table, probe = plan(s, processes)
    whole = table.drop(columns=["stage", "iter", "encodes", "decodes"]).sum().to_dict() | {"stage": "in all"}
    shown = pd.concat([table, pd.DataFrame([whole])], ignore_index=True)
    f = probe.flops
    text = pd.DataFrame({"stage": shown.stage, "round": shown.iter.map(lambda k: "" if pd.isna(k) else str(k))} | {
        title: shown[column].map(lambda v: f"{v:,.0f}" if v else "") for title, column in
        (("images", "images"), ("UNet forwards", "unet_forwards"), ("steps", "optimizer_steps"))} | {
        "TFLOP": shown.tflop.map(lambda v: f"{v:,.{0 if v >= 100 else 1}f}"),
        "disk, GB": (shown.disk_bytes / 1e9).map("{:,.2f}".format),
        "hours": shown.hours.map(lambda h: f"{h:,.1f}" if h >= 1 else f"{h:.2g}")})
    name = torch.cuda.get_device_name() if probe.device.type == "cuda" else probe.device.type
    print(f"plan of preset {s.preset} on {processes} x {name}, {str(probe.dtype)[6:]}; from {probe.shape.source}, with "
          f"random weights")
    print(text.to_string(index=False))
    print(f"one picture: UNet forward {f('unet') / 1e12:.3g} TFLOP, VAE encode {f('encode') / 1e12:.3g}, decode "
          f"{f('decode') / 1e12:.3g}; all of it at 100 TFLOP/s: {whole['tflop'] / 100 / 3600:,.2g} hours")
    print("\n".join(["measured here:", *(f"  {note}" for note in probe.notes), memory(s, probe)]))
    if s.alpha > 0 and s.min_margin:
        print("self-made pairs: at most; --min-margin drops some")
    kept = 0 if s.lora_rank else 4 if s.optimizer == "adafactor" else 12           # bytes of a weight; the old one stays
    print(f"while a model trains its checkpoint takes up to {2 * kept * probe.parameters / 1e9:.1f} GB more disk\n"
          "not in the hours: scores of stage 05, prompt embeddings, downloads, files, starting Python")


if __name__ == "__main__":          # python -m lib.plan [settings] --plan: prints, makes nothing
    run_stage(main)
