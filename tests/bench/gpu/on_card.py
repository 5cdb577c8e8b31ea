"""The tests in this environment, and those that only go through the stages also on the card.

tests/conftest.py hides a card from every test: what is compared is compared on the CPU. This file
is also a plugin of pytest that gives the card back, with float32 where nothing is said. Tests that
put a tensor of their own beside one of the card's then fail: what they say is of the test, so
failures there are told and are no fault.
"""

import importlib.util
import os

import pytest

from lib.settings import ROOT
from tests.bench.gpu.apart import new_process
from tests.bench.gpu.results import Results
from tests.bench.gpu.scale import Scale

VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")

# With this torch, transformers and diffusers, on the CPU.
EVERYWHERE = ["test_diffusion.py", "test_rank.py", "test_train.py", "test_models.py",
              "test_pipelines.py", "test_scorers.py", "test_run.py"]

# They run stages and look at what these have written.
ON_CARD = ["test_pipelines.py", "test_rows.py", "test_again.py"]


class Tally:
    """Counts what pytest reports."""

    def __init__(self):
        self.passed = 0
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.failed.append(report.nodeid.split("::", 1)[-1])
        elif report.when == "call" and report.passed:
            self.passed += 1


def pytest_configure(config) -> None:
    """As a plugin: the card is to be seen, after conftest.py has hidden it."""
    from lib import models
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if VISIBLE is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = VISIBLE

    settled = models.dtype_of

    def dtype_of(s):
        if s.dtype == "auto":
            return settled(type(s)(**vars(s) | {"dtype": "float32"}))
        return settled(s)

    models.dtype_of = dtype_of


def run_tests(scale: Scale, results: Results) -> None:
    """The step a-tests."""
    on_cpu, on_card = EVERYWHERE, ON_CARD
    options = []
    if scale.rehearse:
        on_cpu = on_card = ["test_diffusion.py"]
        options = ["-k", "prediction"]
    elif importlib.util.find_spec("xdist"):
        options = ["-n", "8", "--dist", "loadfile"]

    # Each in a process of its own, in which CUDA has not begun.
    everywhere = ("tests in this environment, on the CPU", on_cpu, options, True)
    with_card = ("tests on the card", on_card, [*options, "-p", __name__], False)
    for given in (everywhere, with_card):
        process = new_process(scale.rehearse, tell, (results, *given))
        process.start()
        process.join()


def tell(results: Results, title: str, files: list[str], options: list[str], must: bool) -> None:
    """Run test files; how many have passed, and which have failed."""
    tally = Tally()
    paths = [str(ROOT / "tests" / file) for file in files]
    pytest.main(["-q", "-p", "no:cacheprovider", *options, *paths], plugins=[tally])
    results.add(f"{title}: passed", tally.passed, "tests", " ".join(files))
    within = None
    if must:
        within = not tally.failed
    results.add(f"{title}: failed", len(tally.failed), "tests", "; ".join(tally.failed)[:600],
                within)
