"""Live curves: what stages 03 to 05 send to a tracker, and that a run's curves go on."""

import importlib.machinery
import shutil
import sys
from types import ModuleType

import pandas as pd
import pytest
from conftest import MINI, call, refused



class FakeWandb(ModuleType):
    """wandb as accelerate's tracker uses it: keeps what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.started, self.points, self.axes = [], [], {}

    def init(self, **options):
        self.started.append(options)
        return self

    def define_metric(self, curves, step_metric):
        self.axes[curves] = step_metric

    def log(self, values, step=None):
        self.points.append(values)

    def Image(self, pixels):
        return pixels.shape

    def finish(self):
        pass


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def curve(wandb, name: str, axis: str) -> list[tuple]:
    return [(point[axis], point[name]) for point in wandb.points if name in point]


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_spent(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = call("01", tmp_path / "run", *MINI, "--track", "wandb")
    refused(message, "--track wandb", "not installed", "pip")
    assert not (tmp_path / "run").exists()


def test_the_curves_are_those_of_the_tables_and_go_on_through_the_rounds(mini_copy, wandb):
    shutil.rmtree(mini_copy / "iter1/unet")
    (mini_copy / "iter1/pairs.parquet").unlink()
    assert call("03", mini_copy, "--iter", "1", "--track", "wandb") is None
    assert call("04", mini_copy, "--iter", "1", "--track", "wandb") is None
    assert call("05", mini_copy, "--track", "wandb") is None

    before = len(pd.read_parquet(mini_copy / "iter0/train_log.parquet"))
    log = pd.read_parquet(mini_copy / "iter1/train_log.parquet")
    assert curve(wandb, "train/loss", "optimizer step") == list(zip(log.step + before, log.loss))
    assert [x for x, _ in curve(wandb, "judge/accuracy", "round")] == [1]
    table = pd.read_csv(mini_copy / "eval/table.csv")
    means = table[(table.score == "utility") & table["style"].isna()].set_index("model")["mean"]
    shown = dict(curve(wandb, "eval/world utility", "round"))
    assert shown[2] == pytest.approx(means["Iter2"], rel=1e-5)
    assert wandb.axes["train/*"] == "optimizer step"


def test_sheets_of_pictures_are_sent_too(mini_copy, wandb):
    (mini_copy / "iter1/pairs.parquet").unlink()
    assert call("03", mini_copy, "--iter", "1", "--track", "wandb") is None
    (shape,), = [point["judge/preview"] for point in wandb.points if "judge/preview" in point]
    assert shape[2] == 3


def test_all_stages_write_into_one_run(mini_copy, wandb):
    (mini_copy / "iter1/pairs.parquet").unlink()
    assert call("03", mini_copy, "--iter", "1", "--track", "wandb") is None
    assert call("05", mini_copy, "--track", "wandb") is None
    assert len({options["id"] for options in wandb.started}) == 1
    assert all(options["resume"] == "allow" for options in wandb.started)


def test_tensorboards_files_hold_each_step_once_after_a_stop(mini_copy):
    """A training that is stopped after its checkpoint draws a step twice: the first is discarded."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed")
    shutil.rmtree(mini_copy / "iter1/unet")
    for _ in range(2):
        shutil.rmtree(mini_copy / "iter1/unet", ignore_errors=True)
        assert call("04", mini_copy, "--iter", "1", "--track", "tensorboard") is None
    events = accumulator.EventAccumulator(str(mini_copy / "tracking/train"))
    events.Reload()
    steps = [point.step for point in events.Scalars("train/loss")]
    assert len(steps) == len(set(steps)) > 0
