"""The embedded world: its captions, what the oracle reads, who may ask it, and the shipped base."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from lib.world import captions, people, scenes

BASE_FOLDER = ROOT / "lib/world/base"


@pytest.fixture(scope="module")
def renders():
    """200 captions, their scenes and their pictures."""
    rng = torch.Generator().manual_seed(7)
    chosen = torch.randint(len(captions.CAPTIONS), (200,), generator=rng)
    texts = [captions.CAPTIONS[i] for i in chosen]
    scene = scenes.sample_scenes(texts, rng)
    return texts, scene, scenes.render(scene)


# ---- captions ----

def test_every_caption_means_what_it_says_and_other_text_means_nothing():
    assert len(set(captions.CAPTIONS)) == 6 * 9 * 8 * 4
    for text in captions.CAPTIONS:
        colour, shape, style, background = captions.parse(text)
        names = captions.COLOURS, captions.SHAPES, captions.STYLES, captions.COLOURS
        indices = colour, shape, style, background
        named = [names[i][index] for i, index in enumerate(indices)]
        assert captions.caption(*named) == text
        assert captions.style_of(text) == named[2]
    assert captions.parse("a photo of a cat") is None


def test_captions_are_set_aside_in_equal_numbers_of_each_style():
    parts = captions.world_captions()
    sizes = {name: len(part) for name, part in parts.items()}
    assert sizes == {"world": 240, "dev": 160, "rest": 1328}
    assert set().union(*parts.values()) == set(captions.CAPTIONS)
    for name, part in parts.items():
        for start in range(0, len(part), 4):
            turn = [captions.style_of(text) for text in part[start:start + 4]]
            assert turn == list(captions.STYLES), name


def test_the_captions_set_aside_stay_the_ones_that_results_were_measured_on():
    parts = captions.world_captions()
    assert parts["world"][0] == "a red cross on a plain teal background"
    assert parts["dev"][0] == "a blue heart on a plain white background"
    assert parts["rest"][0] == "a purple ring on a plain teal background"


def test_an_order_depends_on_its_key_alone():
    items = list(range(100))
    assert captions.permuted(items, "a", 1) == captions.permuted(items, "a", 1)
    assert captions.permuted(items, "a", 1) != captions.permuted(items, "a", 2)
    assert sorted(captions.permuted(items, "a", 1)) == items


def test_captions_load_no_torch_and_scenes_make_no_table_before_it_is_used():
    light = "import sys, lib.world.captions; assert 'torch' not in sys.modules"
    lazy = "from lib.world import people, scenes\n" + "".join(
        f"assert {table}.cache_info().currsize == 0\n" for table in (
            "scenes.palette", "scenes.pixel_grid", "scenes.patterns", "scenes.falloff",
            "scenes.distances", "people._coarse_hypotheses"))
    for code in (light, lazy):
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_light_is_rare():
    rng = torch.Generator().manual_seed(0)
    light = scenes.sample_scenes(captions.CAPTIONS * 3, rng)["light"]
    strong = (light > .73).float().mean()
    assert .07 < strong < .13


# ---- the oracle ----

def test_oracle_reads_true_renders(renders):
    texts, scene, pictures = renders
    seen = people.read(pictures)
    for name in captions.ATTRIBUTES:
        assert (seen[name] == scene[name]).float().mean() > .98, name

    tolerances = {"size": .02, "x": .02, "y": .02, "saturation": .05, "light": .03}
    for name, tolerance in tolerances.items():
        assert (seen[name] - scene[name]).abs().mean() < tolerance, name

    score = people.score(texts, pictures)
    assert score["alignment"].mean() > .98
    assert score["cleanness"].mean() > .85


def test_oracle_sees_wrong_captions(renders):
    texts, _, pictures = renders
    wrong = people.score(texts[1:] + texts[:1], pictures)
    assert wrong["alignment"].mean() < .5


def test_oracle_sees_dirt(renders):
    texts, _, pictures = renders
    dirt = .08 * torch.randn(pictures.shape)
    clean = people.score(texts, pictures)
    dirty = people.score(texts, (pictures + dirt).clamp(0, 1))
    assert dirty["cleanness"].mean() < clean["cleanness"].mean() - .3


def test_utility_is_alignment_and_the_taste_twice(renders):
    texts, _, pictures = renders
    score = people.score(texts, pictures)
    taste = .3 * score["light"] + .2 * score["saturation"] + .2 * score["size"]
    taste = taste + .1 * score["centring"] + .2 * score["cleanness"]
    assert torch.allclose(score["aesthetics"], taste)
    assert torch.allclose(score["utility"], score["alignment"] + 2 * score["aesthetics"])


def test_oracle_reads_a_picture_alone_as_among_others(renders):
    _, _, pictures = renders
    together = people.read(pictures[:40])
    alone = people.read(pictures[35:36])
    for name in ("colour", "background", "shape", "style"):
        assert alone[name] == together[name][35], name


def test_oracle_refuses_other_text(renders):
    _, _, pictures = renders
    with pytest.raises(ValueError, match="a photo of a cat"):
        people.score(["a photo of a cat"], pictures[:1])


# ---- the annotators ----

@pytest.fixture
def utilities(rng):
    """Utilities of 20,000 pairs of pictures."""
    return torch.randn(2, 20000, generator=rng) * .3


@pytest.mark.parametrize("noise", [0., .25, 1.])
def test_annotators_disagree_as_often_as_bradley_terry_says(utilities, rng, noise):
    first, second = utilities
    labels = people.first_wins(first, second, noise, rng)
    wrong = (labels != (first > second)).float().mean()
    expected = 0.
    if noise > 0:
        expected = torch.sigmoid(-(first - second).abs() / noise).mean().item()
    assert wrong == pytest.approx(expected, abs=.012)


@pytest.mark.parametrize("noise", [.25, 1.])
def test_self_agreement_is_what_labelling_twice_shows(utilities, rng, noise):
    first, second = utilities
    once = people.first_wins(first, second, noise, rng)
    again = people.first_wins(first, second, noise, rng)
    same, best_judge = people.self_agreement(first, second, noise)
    assert same == pytest.approx((once == again).float().mean().item(), abs=.012)
    assert best_judge == pytest.approx((once == (first > second)).float().mean().item(), abs=.012)


def test_self_agreement_of_pairs_by_hand():
    """Chances of 3/4 and 1/2: the same label 5/8 and 1/2 of the time, a perfect judge 3/4 and 1/2."""
    first = torch.tensor([.5 * torch.tensor(3.).log(), 1.])
    second = torch.tensor([0., 1.])
    same, best_judge = people.self_agreement(first, second, .5)
    assert same == pytest.approx((5 / 8 + 1 / 2) / 2)
    assert best_judge == pytest.approx((3 / 4 + 1 / 2) / 2)


def test_people_without_noise_always_agree(utilities):
    first, second = utilities
    assert people.self_agreement(first, second, 0.) == (1., 1.)
    assert people.self_agreement(first, first, 0.) == (1., 1.)


def test_a_note_tells_where_a_label_goes_against_the_annotators_own_utility(seed):
    notes = seed.notes_on_labels(torch.tensor([1.5, 2., 1.]), torch.tensor([2., 1.5, 1.]))
    assert notes == [
        "utility 1.50 : 2.00, against it",
        "utility 2.00 : 1.50",
        "utility 1.00 : 1.00",
    ]


# ---- who may ask the oracle ----

PEOPLE = "lib.world.people"
ONLINE_DPO = "lib.rivals.online_dpo"


def file_of(module: str, root: Path) -> Path | None:
    """The file of a module named lib.a or lib.a.b, or of a package; None where there is none."""
    path = root.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def imports_of(file: Path, root: Path) -> set[str]:
    """The modules of lib/ that a file imports anywhere, also within functions."""
    text = file.read_text(encoding="utf-8")
    for hidden in ("import_module", "__import__"):
        assert hidden not in text, f"{file}: the imports of this test are plain ones"

    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports by full name"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)

    # Python also runs the __init__.py of every package on the way.
    modules = set()
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            modules.add(".".join(parts[:length]))
    return {name for name in modules if name.startswith("lib.") and file_of(name, root)}


def reached(script: Path, door: str = "", root: Path = ROOT) -> set[str]:
    """All modules of lib/ that a script imports, directly or not; those behind a door do not count."""
    seen = set()
    to_do = imports_of(script, root)
    while to_do:
        module = to_do.pop()
        seen.add(module)
        if module != door:
            to_do |= imports_of(file_of(module, root), root) - seen
    return seen


@pytest.mark.parametrize("script", ["02_generate.py", "04_train_dpo.py"])
def test_generating_and_training_never_reach_the_oracle(script):
    modules = reached(ROOT / script)
    assert "lib.run" in modules
    assert PEOPLE not in modules
    assert ONLINE_DPO not in modules


def test_ranking_reaches_the_oracle_through_online_dpo_only():
    script = ROOT / "03_rank.py"
    modules = reached(script, door=ONLINE_DPO)
    assert "lib.run" in modules
    assert PEOPLE not in modules
    assert PEOPLE in reached(script)


def test_only_the_script_itself_opens_the_door_to_online_dpo():
    script = ROOT / "03_rank.py"
    assert ONLINE_DPO in imports_of(script, ROOT)
    for module in reached(script, door=ONLINE_DPO) - {ONLINE_DPO}:
        assert ONLINE_DPO not in imports_of(file_of(module, ROOT), ROOT), module


@pytest.mark.parametrize("file", ["01_seed.py", "lib/eval/scores.py"])
def test_the_annotator_and_the_evaluation_ask_the_oracle(file):
    assert PEOPLE in imports_of(ROOT / file, ROOT)


@pytest.mark.parametrize("line", [
    "import lib.b.deep",
    "import os, lib.b.deep as deep",
    "from lib.b import deep",
    "from lib.b import (other,\n    deep as d)",
    "from lib.b.deep import name",
    "def f():\n    from lib.b import deep",
    "class C:\n    import lib.b.deep",
    "from lib import a",
    "import lib.a",
])
def test_imports_of_every_kind_are_followed(tmp_path, line):
    (tmp_path / "lib/b").mkdir(parents=True)
    (tmp_path / "lib/a.py").write_text("if True:\n    from lib.b.deep import name\n")
    (tmp_path / "lib/b/__init__.py").write_text("")
    (tmp_path / "lib/b/other.py").write_text("import lib.a\n")
    (tmp_path / "lib/b/deep.py").write_text("name = 0\n")
    (tmp_path / "script.py").write_text(line + "\n")
    assert "lib.b.deep" in reached(tmp_path / "script.py", root=tmp_path)


# ---- the base model ----

def test_every_caption_word_is_one_token_and_no_two_captions_are_alike():
    from transformers import CLIPTokenizer
    tokenizer = CLIPTokenizer.from_pretrained(BASE_FOLDER / "tokenizer")
    tokens = tokenizer(captions.CAPTIONS).input_ids
    for text, ids in zip(captions.CAPTIONS, tokens):
        assert len(ids) == len(text.split()) + 2, text
    assert len({tuple(ids) for ids in tokens}) == len(captions.CAPTIONS)


def test_any_text_is_tokenized():
    from transformers import CLIPTokenizer
    tokenizer = CLIPTokenizer.from_pretrained(BASE_FOLDER / "tokenizer")
    ids = tokenizer("Ein Bär 火星").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "ein bär 火星"


def test_the_base_model_is_small():
    files = [file for file in BASE_FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 10e6


@pytest.fixture(scope="module")
def pipe():
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(BASE_FOLDER, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_base_model_is_a_plain_pipeline_that_draws_what_is_asked(renders, pipe):
    texts, _, _ = renders
    rng = torch.Generator().manual_seed(0)
    drawn = pipe(texts[:32], num_inference_steps=10, guidance_scale=2., output_type="pt",
                 generator=rng).images
    assert people.score(texts[:32], drawn)["alignment"].mean() > .7


def test_the_autoencoder_keeps_what_people_look_at(renders, pipe):
    texts, _, pictures = renders
    with torch.no_grad():
        latents = pipe.vae.encode(pictures * 2 - 1).latent_dist.mean
        rebuilt = (pipe.vae.decode(latents).sample / 2 + .5).clamp(0, 1)
    decibel = -10 * (rebuilt - pictures).square().mean().log10()
    assert decibel > 33

    before = people.score(texts, pictures)
    after = people.score(texts, rebuilt)
    assert after["alignment"].mean() > .98
    assert (before["utility"] - after["utility"]).abs().mean() < .06
