"""--keep pairs: candidates are their latents, and pictures are there for people to look at."""

import io
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import (call, encoded, make_pairs, make_pipeline, picture, random_clip, refused,
                      same_tensors, settings_of, stage, weights_of)
import torch
from PIL import Image
from safetensors.torch import save_file

from lib import models, packs
from lib.data.pictures import decode, is_kept_as_it_came, write_square
from lib.plan.disk import count_files
from lib.run import latent_path, load_latent, open_image
from lib.settings import PRESETS, Settings

# A round of four prompts, three candidates each. Half of the pairs are mirrored, as in `sd15`.
SMALL = ["--preset", "sd15", "--resolution", "64", "--seed-pairs", "5", "--holdout-pairs", "2",
         "--iters", "1", "--iter-prompts", "4", "--candidates", "3", "--draws", "2",
         "--sample-steps", "3", "--batch", "4", "--micro-batch", "2", "--iter0-steps", "2",
         "--iter-steps", "3", "--lr", "1e-3", "--warmup", "0", "--scores", "none"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The same run with --keep pairs and with --keep all; the first of them is evaluated, too."""
    folder = tmp_path_factory.mktemp("keep")
    make_pipeline(folder / "model", False, "epsilon")
    own = make_pairs(folder / "own")

    # One picture of a pair is a JPEG of the run's size, in the middle of the table.
    (own / "3w.png").write_bytes(encoded(picture(3, (64, 64))))
    source = ["--model", str(folder / "model"), "--pairs", str(own / "pairs.csv"),
              "--prompts", str(own / "prompts.txt"), "--eval-prompts", str(own / "eval.txt")]

    runs = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("lib.ranking.SHOWN", 1)
        for keep in ("pairs", "all"):
            run = runs[keep] = folder / keep
            assert call("01", run, *SMALL, *source, "--keep", keep) is None
            assert call("04", run, "--iter", "0") is None
            for number in ("02", "03", "04"):
                assert call(number, run, "--iter", "1") is None
    assert call("05", runs["pairs"]) is None
    return runs


@pytest.fixture
def run(runs, tmp_path) -> Path:
    """A copy of the run with --keep pairs, to change or break."""
    return shutil.copytree(runs["pairs"], tmp_path / "run")


def table_of(run: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(run / f"{name}.parquet")


def latents_of(run: Path, table: str, mirrored: bool = False) -> dict[str, torch.Tensor]:
    """The latents of the pictures of a table of pairs, by the picture's name without its ending."""
    latents = {}
    pairs = table_of(run, table)
    for image in (*pairs.win, *pairs.lose):
        for name, values in load_latent(run / image, mirrored).items():
            latents[f"{Path(image).stem} {name}"] = values
    return latents


# ---- nothing is lost ----

def test_what_is_trained_does_not_depend_on_the_pictures_kept(runs):
    """Nor do human latents, mirrored ones among them, and the candidates' rewards."""
    for k in (0, 1):
        assert same_tensors(weights_of(runs["pairs"], k), weights_of(runs["all"], k))
    for table, mirrored in (("seed/pairs", False), ("seed/pairs", True), ("seed/holdout", False),
                            ("iter1/pairs", False), ("iter1/pairs", True)):
        one, two = [latents_of(run, table, mirrored) for run in runs.values()]
        assert len(one) >= 4
        assert same_tensors(one, two)
    one, two = [table_of(run, "iter1/rewards") for run in runs.values()]
    assert one.reward.tolist() == two.reward.tolist()


def test_only_pictures_that_people_look_at_are_kept(runs):
    """Those of the four pairs, and the third candidate of the one prompt that the walk shows."""
    pairs = table_of(runs["pairs"], "iter1/pairs")
    candidates = table_of(runs["pairs"], "iter1/candidates")
    first = candidates[candidates.prompt_id == pairs.prompt_id[0]]
    expected = {*pairs.win, *pairs.lose, *first.image}
    images = runs["pairs"].glob("iter1/images/*")
    assert {str(path.relative_to(runs["pairs"])) for path in images} == expected
    assert len(expected) == 4 * 2 + 1
    assert count_files(runs["all"] / "iter1/images") == 12


def test_a_kept_picture_is_that_of_its_latent(runs):
    image = table_of(runs["pairs"], "iter1/pairs").win[0]
    ours = np.asarray(Image.open(runs["pairs"] / image), int)
    theirs = Image.open(runs["all"] / Path(image).with_suffix(".png"))
    buffer = io.BytesIO()
    theirs.save(buffer, "JPEG", quality=95)
    assert np.array_equal(ours, np.asarray(Image.open(buffer), int))


def test_preview_walk_and_page_are_made(runs):
    run = runs["pairs"]
    pairs, candidates = table_of(run, "iter1/pairs"), table_of(run, "iter1/candidates")
    assert (run / "iter1/preview.png").exists()
    page = (run / "eval/index.html").read_text()
    walk = (run / "eval/walk.md").read_text()
    for image in candidates.image[candidates.prompt_id == pairs.prompt_id[0]]:
        assert image in page
        assert image in walk


# ---- what was lost is made again ----

def test_lost_pictures_of_pairs_are_decoded_again(runs, run, capsys):
    pairs = table_of(run, "iter1/pairs")
    (run / pairs.win[0]).unlink()
    (run / pairs.lose[2]).write_bytes(b"")
    assert call("03", run, "--iter", "1") is None
    assert "nothing to do" in capsys.readouterr().out
    for image in (pairs.win[0], pairs.lose[2]):
        assert (run / image).read_bytes() == (runs["pairs"] / image).read_bytes()


def test_a_lost_latent_is_drawn_again_with_the_same_bits(runs, run):
    shutil.rmtree(run / "iter1/unet")
    image = table_of(run, "iter1/pairs").win[1]
    lost = [packs.file_of(latent_path(run / image, mirrored)) for mirrored in (False, True)]
    whole = [path.read_bytes() for path in lost]
    lost[0].unlink()
    lost[1].write_bytes(whole[1][:-1])

    # The JPEG is no source of a latent.
    refused(call("04", run, "--iter", "1"), "000000_0", "02_generate.py --iter 1")
    for number in ("02", "03", "04"):
        assert call(number, run, "--iter", "1") is None
    assert [path.read_bytes() for path in lost] == whole
    assert same_tensors(weights_of(runs["pairs"], 1), weights_of(run, 1))


def test_a_round_that_was_drawn_keeps_what_it_kept(runs, run, tmp_path, capsys):
    """--keep may change within a run: the rounds to come follow it."""
    assert call("02", run, "--iter", "1", "--keep", "all") is None
    assert "nothing to do" in capsys.readouterr().out
    all_kept = shutil.copytree(runs["all"], tmp_path / "all")
    for number in ("02", "03"):
        assert call(number, all_kept, "--iter", "1", "--keep", "pairs") is None
        assert "nothing to do" in capsys.readouterr().out

    jobs = stage("02").candidate_jobs
    prompts = pd.DataFrame({"prompt_id": [0], "prompt": ["a"]})
    ending = stage("02").ending_of_pictures(settings_of(all_kept), all_kept / "iter2/none.parquet")
    assert jobs(settings_of(all_kept), 2, prompts, ending).image[0] == "iter2/images/000000_00.jpg"


def test_another_run_takes_the_candidates_over(runs, tmp_path):
    """Before any has been ranked there are no pictures to take."""
    from lib.again import take
    from lib.settings import RUN_ARGUMENTS, load
    source, run = shutil.copytree(runs["pairs"], tmp_path / "source"), tmp_path / "run"
    shutil.rmtree(source / "iter1/images")
    s, _ = load(["--run", str(run), "--from", str(source), "--draws", "3"], "", RUN_ARGUMENTS,
                create=True)
    assert [step.round for step in take(source, s)] == [None, 0, 1]
    for number in ("02", "03"):
        assert call(number, run, "--iter", "1") is None
    pairs = table_of(run, "iter1/pairs")
    assert all((run / image).exists() for image in (*pairs.win, *pairs.lose))


def test_a_score_ranks_candidates_that_have_no_pictures(runs, tmp_path):
    """Online DPO: the score sees the pixels of the PNGs."""
    from lib.rivals.online_dpo import rank
    random_clip(tmp_path, "gelu", 64)
    rewards = []
    for run in runs.values():
        s = settings_of(run).__class__(**vars(settings_of(run)) | {
            "reward": "pickscore", "score_weights": f"pickscore={tmp_path}"})
        candidates = table_of(run, "iter1/candidates")
        comparisons = stage("03").candidate_comparisons(s, 1, candidates)
        rewards.append(rank(s, comparisons, [])[0])
    assert rewards[0].unique().numel() == 12
    assert rewards[0].equal(rewards[1])


# ---- few large files ----

def test_latents_and_embeddings_come_a_batch_to_a_file(runs):
    """Mirror images, which stage 04 encodes in batches of 16, make packs of their own."""
    for folder, files in (("iter1/latents", 3), ("seed/latents", 3), ("embeds", 2)):
        assert [path.name for path in (runs["pairs"] / folder).iterdir()] == [packs.FOLDER]
        assert len(list((runs["pairs"] / folder / packs.FOLDER).iterdir())) <= files
        assert count_files(runs["pairs"] / folder) == count_files(runs["all"] / folder)


def some(number: int) -> dict[str, torch.Tensor]:
    return {"mean": torch.full((2, 3), float(number)), "std": torch.full((1,), -float(number))}


def test_a_pack_stands_for_the_files_in_it(tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    assert packs.shapes(paths[0]) is None
    packs.save_pack({path: some(i) for i, path in enumerate(paths[:3])})
    for i, path in enumerate(paths[:3]):
        assert same_tensors(packs.load(path), some(i))
        assert packs.shapes(path) == {"mean": (2, 3), "std": (1,)}
    assert not packs.is_there(paths[3])
    with pytest.raises(FileNotFoundError):
        packs.load(paths[3])

    # A file of its own comes first, if it is whole.
    save_file(some(7), paths[1])
    assert same_tensors(packs.load(paths[1]), some(7))
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    assert same_tensors(packs.load(paths[1]), some(1))


def test_a_batch_of_two_folders_makes_two_packs(tmp_path):
    paths = [tmp_path / folder / "a.safetensors" for folder in ("seed", "iter1")]
    packs.save_pack({path: some(i) for i, path in enumerate(paths)})
    for i, path in enumerate(paths):
        assert packs.file_of(path).is_relative_to(path.parent)
        assert same_tensors(packs.load(path), some(i))


def test_a_pack_that_changes_is_read_anew(tmp_path, capsys):
    """Cut short, written again, removed: at every moment what the disk has counts."""
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    packs.save_pack({path: some(1) for path in paths})
    pack = packs.file_of(paths[0])
    assert (pack.name, packs.count_in(pack.name)) == ("0.2.safetensors", 2)
    pack.write_bytes(pack.read_bytes()[:-1])
    assert not packs.is_there(paths[0])
    assert "damaged" in capsys.readouterr().out

    packs.save_pack({path: some(2) for path in paths})
    assert same_tensors(packs.load(paths[1]), some(2))
    pack.unlink()
    assert not packs.is_there(paths[1])


def test_of_two_packs_the_later_by_name_counts(tmp_path):
    """However they were read: two runs over one folder see the same."""
    path = tmp_path / "b.safetensors"
    packs.save_pack({path: some(2)})
    assert same_tensors(packs.load(path), some(2))
    packs.save_pack({tmp_path / "a.safetensors": some(1), path: some(1)})
    for _ in range(2):
        assert packs.is_there(tmp_path / "a.safetensors")
        assert same_tensors(packs.load(path), some(2))
        packs.look_again()


# ---- human pictures ----

TURNED = Image.Exif()
TURNED[0x0112] = 6
JPEGS = {
    "as it came": (encoded(picture(1, (64, 64))), ".jpg"),
    "another size": (encoded(picture(1, (80, 64))), ".webp"),
    "lying on its side": (encoded(picture(1, (64, 64)), exif=TURNED), ".webp"),
    "grey": (encoded(picture(1, (64, 64), "L")), ".webp"),
    "for print": (encoded(picture(1, (64, 64), "CMYK")), ".webp"),
    "something behind it": (encoded(picture(1, (64, 64))) + b"more", ".webp"),
    "no JPEG": (encoded(picture(1, (64, 64)), "PNG"), ".webp"),
}


@pytest.mark.parametrize("case", JPEGS)
def test_a_human_picture_is_kept_without_loss(tmp_path, case):
    content, ending = JPEGS[case]
    assert is_kept_as_it_came(content, 64) == (ending == ".jpg")
    path = tmp_path / f"a{ending}"
    write_square(content, path, 64)
    kept = np.asarray(open_image(path, tmp_path, 1))
    assert np.array_equal(kept, np.asarray(decode(content, 64)))
    if ending == ".jpg":
        assert path.read_bytes() == content


def test_human_pictures_have_the_names_of_their_formats(runs):
    endings = {path.suffix for path in (runs["pairs"] / "seed/images").iterdir()}
    assert endings == {".jpg", ".webp"}
    assert {path.suffix for path in (runs["all"] / "seed/images").iterdir()} == {".png"}


# ---- what it costs ----

def test_the_papers_runs_take_less_than_half_of_the_disk():
    from lib.plan import disk
    from lib.plan.architecture import architecture_of
    for preset in ("sd15", "sdxl"):
        size = {}
        for keep in ("pairs", "all"):
            s = Settings(**PRESETS[preset] | {"keep": keep, "dtype": "bfloat16"})
            found = architecture_of(s, ask_hub=False)
            size[keep] = sum(disk.parts_of_run(s, found, disk.parameters_of(found)).values())
        assert size["pairs"] < size["all"] / 2


def test_pictures_of_64_pixels_are_the_same_alone_and_in_a_batch(runs):
    """So a picture that is decoded again has the same bits."""
    s = settings_of(runs["pairs"])
    images = [runs["pairs"] / image for image in table_of(runs["pairs"], "iter1/candidates").image]
    vae = models.load_vae(s)
    latents, _ = models.stack_latents(images)
    together = models.decode(vae, latents)
    for i in range(len(images)):
        assert models.decode(vae, latents[i:i + 1])[0].equal(together[i])
