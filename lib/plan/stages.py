"""The numbered scripts as modules.

An import statement cannot name `03_rank.py`, so this loads it by its path. Only lib/plan and
lib/study may: they stand above the stages, count what those do and run them; and what runs beside
them and takes their parts, lib/crossfit.py and the rivals that train by a loop of their own
(lib/rivals/spo.py). Nothing below a stage may reach up to it.
"""

import functools
import importlib.util
from types import ModuleType

from lib.settings import ROOT


@functools.cache
def load_stage(number: str) -> ModuleType:
    """The script whose name begins with `number`, "01" to "05"; a process loads it once."""
    path = next(ROOT.glob(f"{number}_*.py"))
    spec = importlib.util.spec_from_file_location(f"stage_{number}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
