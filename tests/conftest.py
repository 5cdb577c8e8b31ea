import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def stage(name: str):
    """A numbered stage script as a module."""
    path = next(ROOT.glob(f"{name}*.py"))
    spec = importlib.util.spec_from_file_location("stage_" + path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
