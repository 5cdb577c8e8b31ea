"""Stage 02: N candidates per new prompt, drawn from the current model.

reads   prompts.parquet (split iterK), the model of round K-1 (iter(K-1)/unet/)
writes  iterK/candidates.parquet (prompt_id, prompt, candidate, seed, image), iterK/images/, iterK/latents/

    x_0^(1..N) ~ p_theta(. | y),  theta = the current model, y from a prompt set no earlier round has seen

The sampler's own latents are kept, so that stages 03 and 04 never run the VAE. A candidate's noise depends on
(run seed, round, prompt, candidate) alone: the same picture whatever the batch size or the point of resume.

    python 02_generate.py --run runs/tiny --iter 1
"""

from pathlib import Path

import pandas as pd
from accelerate import PartialState

from lib import models
from lib.run import Ledger, read_prompts, run_stage, seed_of, write_table
from lib.sampler import paint
from lib.settings import ITER, Settings, load


def candidate_jobs(s: Settings, k: int, prompts: pd.DataFrame) -> pd.DataFrame:
    """One row per candidate; a prompt's N candidates stand together, so it is encoded once for all of them."""
    return pd.DataFrame([{"prompt_id": p.prompt_id, "prompt": p.prompt, "candidate": n,
                          "seed": seed_of(s.seed, "candidate", k, int(p.prompt_id), n),
                          "image": f"iter{k}/images/{p.prompt_id:06d}_{n:02d}.png"}
                         for p in prompts.itertuples() for n in range(s.candidates)])


def main(argv: list[str]) -> None:
    s, own = load(argv, __doc__, ITER)
    k, table = own.iter, Path(s.run) / f"iter{own.iter}" / "candidates.parquet"
    if table.exists():
        return print(f"02 generate: {table} is there, nothing to do")
    jobs = candidate_jobs(s, k, read_prompts(s.run, f"iter{k}"))
    with Ledger(s.run, "02_generate", k, str(models.device_of(s))) as ledger:
        paint(s, k - 1, jobs, ledger, f"iter{k} candidates", keep_latents=True)
    if PartialState().is_main_process:
        write_table(jobs, table)
        print(f"02 generate, iter {k}: {len(jobs)} candidates for {jobs.prompt.nunique()} prompts from model {k - 1}")


if __name__ == "__main__":
    run_stage(main)
