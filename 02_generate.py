"""Stage 02: N candidates per new prompt, drawn from the current model.

reads   prompts.parquet (split iterK), the model of round K-1 (iter(K-1)/unet/)
writes  iterK/candidates.parquet   prompt_id, prompt, candidate, seed, image
        iterK/latents/, with --keep all also iterK/images/

    x_0^(1..N) ~ p_theta(. | y),   theta = the current model, y from a set of prompts that no
                                   earlier round has seen

The sampler's own latents are kept, so that stages 03 and 04 need no VAE (mirror images aside). With
--keep pairs nothing is decoded here: a candidate is its latent, and stage 03 makes pictures of
those that it chooses. A candidate's noise depends on (run seed, round, prompt_id, candidate) alone:
the picture is the same, up to rounding, whatever the batch size, the number of processes or the
point of resume.

    python 02_generate.py --run runs/tiny --iter 1
"""

import lib.program  # noqa: F401, I001  first: Ctrl-C is answered from here on

from pathlib import Path

import pandas as pd

from lib import models
from lib.run import (CANDIDATE_COLUMNS, Ledger, begin, is_main, is_whole, read_prompts, read_table,
                     run_stage, seed_of, wait, write_table)
from lib.sampler import lacking, paint
from lib.settings import ITER, Settings, load, of_candidates


def ending_of_pictures(s: Settings, table: Path) -> str:
    """`.png` where the pictures are kept; where a candidate is its latent `.jpg`, the name that its
    picture would have."""
    keeps_all = s.keep == "all"

    # A round that has been drawn keeps what it kept then, whatever --keep has become.
    if is_whole(table):
        images = read_table(table, CANDIDATE_COLUMNS, "02_generate.py").image
        keeps_all = not str(images[0]).endswith(".jpg")
    if keeps_all:
        return ".png"
    return ".jpg"


def candidate_jobs(s: Settings, k: int, prompts: pd.DataFrame, ending: str) -> pd.DataFrame:
    """One row per candidate: what to draw, from which random seed, and where it goes."""
    jobs = []
    for row in prompts.itertuples():
        for candidate in range(s.candidates):
            seed = seed_of(s.seed, "candidate", k, int(row.prompt_id), candidate)
            image = f"iter{k}/images/{row.prompt_id:06d}_{candidate:02d}{ending}"
            jobs.append({
                "prompt_id": row.prompt_id,
                "prompt": row.prompt,
                "candidate": candidate,
                "seed": seed,
                "image": image,
            })
    return pd.DataFrame(jobs)


def main(argv: list[str]) -> None:
    s, stage = load(argv, __doc__, ITER)
    k = stage.iter
    table = Path(s.run) / f"iter{k}" / "candidates.parquet"

    # read
    prompts = read_prompts(s.run, f"iter{k}")
    jobs = candidate_jobs(s, k, prompts, ending_of_pictures(s, table))

    # A picture that was lost or damaged since is drawn again.
    is_done = is_whole(table) and not lacking(s, jobs, models.latent_shape(s))
    wait()
    if is_done:
        if is_main():
            print(f"02 generate: {table} is there, nothing to do")
        return
    if is_main():
        begin(s.run, __file__)

    # compute: the pictures and their latents are files of their own
    with Ledger(s.run, "02_generate", k, str(models.device_of(s))) as ledger:
        paint(of_candidates(s), k - 1, jobs, ledger, f"iter{k} candidates", keep_latents=True)

    # write
    if is_main():
        write_table(jobs, table)
        print(f"02 generate, iter {k}: {len(jobs)} candidates for {len(prompts)} prompts from "
              f"model {k - 1}")


if __name__ == "__main__":
    run_stage(main)
