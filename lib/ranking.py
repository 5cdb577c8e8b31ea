"""What stage 03 needs beside the method: its candidates read, and what is measured already.

The reward, the pairs and the agreement with people are in the stage itself.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lib import models
from lib.judge import CROSSFIT
from lib.run import UserError, inside, is_whole, read_table, refuse_other_kinds
from lib.settings import Settings

# Pairs on a round's preview. Of their prompts all candidates' pictures are kept.
SHOWN = 24


# ---- candidates ----

def read_candidates(s: Settings, k: int) -> pd.DataFrame:
    """The candidates of round k, those of a prompt together, each with a whole latent.

    UserError: one has none, or the prompts have different numbers of them.
    """
    path = Path(s.run) / f"iter{k}" / "candidates.parquet"
    columns = ("prompt_id", "prompt", "candidate", "image")
    made_by = f"02_generate.py --iter {k}"
    table = read_table(path, columns, made_by)
    refuse_other_kinds(path, table, made_by, texts=("prompt", "image"),
                       numbers=("prompt_id", "candidate"))

    shape = models.latent_shape(s)
    for row, name in enumerate(table.image, start=1):
        image = inside(s.run, name, path, row)
        if not models.has_latent(image, False, shape):
            raise UserError(f"{path}, row {row}: no whole latent of shape {shape} beside {name}; "
                            f"run {made_by} again, which makes it")

    # With unequal numbers the rewards would make no table (P, N).
    prompts = table.groupby("prompt_id", sort=False)
    sizes = prompts.size()
    if sizes.nunique() > 1 or sizes.iloc[0] < 2:
        raise UserError(f"{path}: every prompt needs the same number of candidates, 2 or more; "
                        f"delete it and run 02_generate.py again")
    together = prompts.ngroup().argsort(kind="stable")
    return table.iloc[together].reset_index(drop=True)


def latents_differ(run: Path, win: str, lose: str) -> bool:
    """Whether winner and loser are two pictures, and not one that was drawn twice."""
    (of_win, of_lose), _ = models.stack_latents([Path(run) / win, Path(run) / lose])
    return not torch.equal(of_win, of_lose)


# ---- what is measured already ----

def known_anchor_errors(
    run: Path,
    k: int,
    pair_ids: list[str],
    t: torch.Tensor,
) -> torch.Tensor | None:
    """The errors (pairs, 2, D) of round k's anchor on the held-out pairs; None where unknown.

    They hold for the same pairs and the same timesteps t (pairs, D) alone: a user may have dropped
    a pair since, or changed the draws. A table that cannot be read is as good as none.
    """
    path = Path(run) / f"iter{k}" / "holdout_draws.parquet"
    if not path.exists():
        return None
    columns = ("pair_id", "side", "t", "anchor_error")
    try:
        table = read_table(path, columns, f"03_rank.py --iter {k}")
    except UserError:
        print(f"{path} cannot be read: the anchor is measured again")
        return None

    # The table's rows, as they must be: pair by pair, winner and loser, draw by draw.
    D = t.shape[1]
    if table.pair_id.tolist() != np.repeat(pair_ids, 2 * D).tolist():
        return None
    if table.side.tolist() != np.tile(np.repeat(["win", "lose"], D), len(t)).tolist():
        return None
    if table.t.tolist() != t[:, None].expand(-1, 2, -1).flatten().tolist():
        return None

    errors = pd.to_numeric(table.anchor_error, errors="coerce")
    if not np.isfinite(errors).all():
        return None
    return torch.tensor(errors.to_numpy(np.float32)).reshape(len(t), 2, D)


def crossfit_rewards(run: Path) -> torch.Tensor | None:
    """Rewards (pairs, 2) of all human pairs, the preferred picture first, from lib/crossfit.py.

    Each pair's are by a model that has not seen it; they speak for Iter0, the judge of round 1.
    None where it was not needed.
    """
    path = Path(run) / CROSSFIT
    if not is_whole(path):
        return None
    table = read_table(path, ("pair_id", "side", "reward"), "lib/crossfit.py")
    by_side = table.groupby(["pair_id", "side"]).reward.mean().unstack()
    return torch.stack([torch.tensor(list(by_side[side])) for side in ("win", "lose")], 1)


# ---- in words ----

def judge_name(s: Settings, k: int) -> str:
    """Who ranks in round k."""
    if s.reward == "implicit":
        return f"model {k - 1}"
    return s.reward


def refuse_no_pairs(s: Settings, k: int, pairs: pd.DataFrame) -> None:
    """UserError if no prompt has given a pair."""
    if pairs.empty:
        raise UserError(f"{s.run}/iter{k}/candidates.parquet: no prompt has two candidates that "
                        f"{judge_name(s, k)} tells apart (it is as its anchor, or they are alike); "
                        f"train it longer or with a higher --lr, in another --run")
