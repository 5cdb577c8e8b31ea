"""A run whose code has changed says so; an edit is tried beside it, from the same Iter0."""

import json
import shutil

import pandas as pd
import pytest

from conftest import call, refused, same_tensors, weights_of
from lib import again, code, settings
from lib.lock import tidy
from lib.run import UserError
from lib.settings import RUN_ARGUMENTS, load


def start(run, *arguments) -> None:
    """The driver's first two calls, of which the second is told `--from` or the like alone."""
    load(["--run", str(run), *arguments], "", RUN_ARGUMENTS, create=True)
    again.main(["--run", str(run), *arguments[:2]])


@pytest.fixture
def edited(monkeypatch):
    """edited("04_train_dpo.py"): as if these stages had been edited since."""
    real = code.fingerprint

    def edit(*scripts):
        monkeypatch.setattr(code, "fingerprint",
                            lambda name: "edited" if name in scripts else real(name))
    return edit


# ---- fingerprints ----

SOURCE = '"""A docstring."""\nfrom lib import run\n\n\ndef loss(x):\n    """Says."""\n    return x\n'
EDITS = {
    "a comment": (SOURCE.replace("    return", "    # why\n    return"), True),
    "a docstring": (SOURCE.replace("Says.", "Tells."), True),
    "an empty line": (SOURCE.replace("\n\n\n", "\n\n\n\n"), True),
    "the loss": (SOURCE.replace("return x", "return 2 * x"), False),
    "a text that counts": (SOURCE + 'name = "Says."\n', False),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_fingerprint_is_of_what_python_runs(tmp_path, monkeypatch, edit):
    text, is_same = EDITS[edit]
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/run.py").write_text("a = 1\n")
    (tmp_path / "lib/other.py").write_text("b = 1\n")
    monkeypatch.setattr(code, "ROOT", tmp_path)

    def of(source):
        code.fingerprint.cache_clear()
        code.parsed.cache_clear()
        (tmp_path / "01_seed.py").write_text(source)
        return code.fingerprint("01_seed.py")

    first = of(SOURCE)
    assert (of(text) == first) is is_same

    # What a stage imports belongs to it; another module does not.
    (tmp_path / "lib/other.py").write_text("b = 2\n")
    assert of(SOURCE) == first
    (tmp_path / "lib/run.py").write_text("a = 2\n")
    assert of(SOURCE) != first
    code.fingerprint.cache_clear()
    code.parsed.cache_clear()


def test_a_run_whose_code_has_changed_says_so(mini_copy, edited, capsys):
    start(mini_copy)
    assert capsys.readouterr().out == ""

    edited("04_train_dpo.py", "05_eval.py")
    start(mini_copy)
    line = capsys.readouterr().out
    assert line.startswith("note: 04_train_dpo.py ") and "iter0, iter1, iter2" in line
    assert "--redo-from iter0" in line and f"--from {mini_copy}" in line


# ---- --redo-from ----

def test_what_is_made_again_equals_what_was_there(mini_copy, mini, capsys):
    (mini_copy / "iter2/mine.txt").write_text("a note")
    (mini_copy / "iter3").mkdir()
    shutil.rmtree(mini_copy / "iter2/latents")
    (mini_copy / "iter2/latents").symlink_to(mini_copy / "iter1/latents")
    start(mini_copy, "--redo-from", "iter2")

    # What is not the project's stays, and what a link leads to.
    assert "made again: iter2" in capsys.readouterr().out
    assert [path.name for path in (mini_copy / "iter2").iterdir()] == ["mine.txt"]
    assert any((mini_copy / "iter1/latents").iterdir()) and (mini_copy / "iter1/unet").exists()
    assert not list((mini_copy / "eval").glob("*/Iter2-*"))
    assert list((mini_copy / "eval").glob("*/Iter1-*"))

    # The same command goes on with what it has made; that of other code begins anew.
    for number in ("02", "03", "04"):
        assert call(number, mini_copy, "--iter", "2") is None
        start(mini_copy, "--redo-from", "iter2")
        assert "made again" not in capsys.readouterr().out
    assert same_tensors(weights_of(mini_copy, 2), weights_of(mini, 2))


@pytest.mark.parametrize("where", ["iter", "2", "iter-1", "../iter1", "seed/../iter0"])
def test_only_a_place_of_the_run_is_made_again(mini, where):
    with pytest.raises(UserError, match="--redo-from .*: give seed, iter0, iter1"):
        settings.main(["--run", str(mini), f"--redo-from={where}"])


def test_all_may_be_made_again(mini_copy):
    start(mini_copy, "--redo-from", "seed")
    left = {path.name for path in mini_copy.iterdir()}
    assert left - {".lock", ".redo"} == {"code", "config.json", "embeds", "eval", "ledger.parquet"}


# ---- --from ----

def test_an_edit_of_the_loss_is_tried_from_the_same_iter0(mini, tmp_path, edited, capsys):
    """Of another run's first steps nothing is made again that would be the same."""
    run = tmp_path / "edit"
    edited("04_train_dpo.py")
    start(run, "--from", str(mini), "--alpha", "1")
    assert "human pairs and prompts, Iter0, the candidates of round 1, their ranking" in \
        capsys.readouterr().out

    mine = json.loads((run / "config.json").read_text())["settings"]
    theirs = json.loads((mini / "config.json").read_text())["settings"]
    differing = {name for name in mine if mine[name] != theirs[name]}
    assert differing == {"run", "alpha"}

    tidy(run)
    assert (run / "iter1/pairs.parquet").samefile(mini / "iter1/pairs.parquet")
    assert not (run / "iter1/unet").exists()
    assert call("04", run, "--iter", "1") is None
    assert not same_tensors(weights_of(run, 1), weights_of(mini, 1))

    # What the steps have cost stands in the new ledger, too.
    ledger = pd.read_parquet(run / "ledger.parquet")
    assert ledger.stage.tolist() == ["01_seed", "04_train_dpo", "02_generate", "03_rank",
                                     "04_train_dpo"]


TAKEN = {
    "another number of candidates": (["--candidates", "3"], [], ["seed", "iter0"]),
    "an edited ranking": ([], ["03_rank.py"], ["seed", "iter0", "candidates"]),
    "another learning rate": (["--lr", "2e-4"], [], ["seed"]),
    "another run seed": (["--seed", "7"], [], []),
}


@pytest.mark.parametrize("case", TAKEN)
def test_only_what_is_the_same_is_taken(mini, tmp_path, edited, case):
    arguments, scripts, taken = TAKEN[case]
    run = tmp_path / "run"
    edited(*scripts)
    start(run, "--from", str(mini), *arguments)
    there = {"seed": run / "seed/pairs.parquet", "iter0": run / "iter0/unet",
             "candidates": run / "iter1/candidates.parquet", "ranking": run / "iter1/pairs.parquet"}
    assert [name for name, path in there.items() if path.exists()] == taken


REFUSED = {
    "no such run": (["--run", "{tmp}/new", "--from", "{tmp}/nothing"], "has no config.json"),
    "no folder of its own": (["--from", "{mini}"], "a folder of its own with --run"),
    "the same folder": (["--run", "{mini}", "--from", "{mini}"], "a folder of its own with --run"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_cannot_go_on_from_another_is_told_so(mini, tmp_path, case):
    arguments, words = REFUSED[case]
    arguments = [word.format(tmp=tmp_path, mini=mini) for word in arguments]
    with pytest.raises(UserError) as error:
        load(arguments, "", RUN_ARGUMENTS, create=True)
    refused(str(error.value), "--from", words)
    assert not (tmp_path / "new").exists()
