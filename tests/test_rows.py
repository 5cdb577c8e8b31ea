"""Stage 05's rows: each kind gives the pictures it says, and scores that belong to nothing else."""

import pandas as pd
import pytest
import torch
from conftest import ROOT, stage
from diffusers import UNet2DConditionModel

from lib.run import UserError

SMALL = ["--preset", "tiny", "--eval-count", "4", "--eval-seeds", "1", "--sample-steps", "2", "--device", "cpu"]


def changed(seed: int) -> UNet2DConditionModel:
    """The base's UNet with noise on its weights."""
    unet = UNet2DConditionModel.from_pretrained(ROOT / "lib/tiny", subfolder="unet")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(.1 * p.std(correction=0) * torch.randn(p.shape, generator=generator))
    return unet


def evaluate(run, *more) -> pd.DataFrame:
    """Stage 05's scores of a run folder."""
    stage("05").main(["--run", str(run), *SMALL, *map(str, more)])
    return pd.read_parquet(run / "eval/scores.parquet")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with Iter0 and Iter3, for stage 05 alone."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    for k in (0, 3):
        changed(k).save_pretrained(folder / f"iter{k}/unet")
    return folder


# ---- which rows there are ----

@pytest.mark.parametrize("only, models", [("", ["base", "Iter0", "Iter3"]), ("Iter3, base", ["base", "Iter3"]),
                                          ("Iter3", ["Iter3"]), ("Iter0,Iter3", ["Iter0", "Iter3"])])
def test_only_these_models_are_drawn_scored_and_shown(run, only, models, tmp_path):
    for k in (0, 3):
        (tmp_path / f"iter{k}").mkdir()
        (tmp_path / f"iter{k}/unet").symlink_to(run / f"iter{k}/unet")
    scores = evaluate(tmp_path, *(["--only", only] if only else []))
    assert list(scores.model.unique()) == models and len(scores) == 4 * len(models)
    assert sorted(p.name.rsplit("-", 1)[0] for p in (tmp_path / "eval/images").iterdir()) == sorted(models)
    table = pd.read_csv(tmp_path / "eval/table.csv")
    assert list(table.model.unique()) == models
    assert ("gain" in table) == ("base" in models) and ("over_iter0" in table) == ("Iter0" in models)


@pytest.mark.parametrize("more, words", [
    (["--only", "base,Iter7"], ["--only base,Iter7", "'Iter7'", "base, Iter0, Iter3"]), (["--only", ","], ["''"]),
    (["--row", "base=x/y"], ["'base'", "taken"]), (["--only", "base", "--row", "Iter0=x/y"], ["'Iter0'", "taken"]),
    (["--row", "x/y"], ["--row x/y", "NAME=WHERE"]), (["--row", "m=x/y", "--row", "m=x/z"], ["'m'", "taken"]),
    (["--images", "x", "--only", "base"], ["--images", "--row NAME=images:PATH"])])
def test_rows_that_cannot_be_are_refused_in_one_line(run, more, words):
    with pytest.raises(UserError) as error:
        evaluate(run, *more)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value
