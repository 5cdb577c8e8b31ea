"""The embedded world: what the oracle reads, whom it may speak to, and the shipped base model."""

import re

import pytest
import torch

from conftest import ROOT
from lib import oracle, world


@pytest.fixture(scope="module")
def scenes():
    g = torch.Generator().manual_seed(7)
    captions = [world.CAPTIONS[i] for i in torch.randint(len(world.CAPTIONS), (200,), generator=g)]
    scene = world.sample_scenes(captions, g)
    return captions, scene, world.render(scene)


def test_oracle_reads_true_renders(scenes):
    captions, scene, pictures = scenes
    seen = oracle.read(pictures)
    for name in ("colour", "shape", "style", "background"):
        assert (seen[name] == scene[name]).float().mean() > .98, name
    for name, tolerance in (("size", .02), ("x", .02), ("y", .02), ("saturation", .05), ("light", .03)):
        assert (seen[name] - scene[name]).abs().mean() < tolerance, name
    score = oracle.score(captions, pictures)
    assert score["alignment"].mean() > .98 and score["cleanness"].mean() > .85


def test_oracle_sees_wrong_captions_and_dirt(scenes):
    captions, scene, pictures = scenes
    score = oracle.score(captions, pictures)
    wrong = oracle.score(captions[1:] + captions[:1], pictures)
    assert wrong["alignment"].mean() < .5
    dirty = oracle.score(captions, (pictures + .08 * torch.randn(pictures.shape)).clamp(0, 1))
    assert dirty["cleanness"].mean() < score["cleanness"].mean() - .3
    assert torch.allclose(score["utility"], score["alignment"] + 2 * score["aesthetics"])


def test_oracle_refuses_other_text(scenes):
    with pytest.raises(ValueError, match="a photo of a cat"):
        oracle.score(["a photo of a cat"], scenes[2][:1])


def test_light_is_rare():
    g = torch.Generator().manual_seed(0)
    light = world.sample_scenes(world.CAPTIONS * 3, g)["light"]
    assert .07 < (light > .73).float().mean() < .13


@pytest.mark.parametrize("noise", [0., .25, 1.])
def test_annotators_disagree_as_often_as_bradley_terry_says(noise):
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 20000, generator=g) * .3
    first = oracle.first_wins(a, b, noise, g)
    wrong = (first != (a > b)).float().mean()
    expected = torch.sigmoid(-(a - b).abs() / noise).mean() if noise else torch.tensor(0.)
    assert wrong == pytest.approx(float(expected), abs=.012)


def test_only_the_annotator_the_evaluation_and_the_study_see_the_oracle():
    """SAIL never looks: no import of the oracle, direct or through another room, in stages 02, 03 and 04; but for the
    rival "online DPO", whose reward from outside stage 03 imports in the one function that --reward leads to."""
    imports = lambda text: set(re.findall(r"\b(?:lib\.(\w+)|from lib import ([\w, ]+))", text))
    def rooms(path, without=""):
        text = path.read_text().replace(without, "")
        return {name.strip() for one, many in imports(text) for name in (one or many).split(",") if name.strip()}
    rival = re.search(r"def judge_from_outside.*?(?=\n\n\n)", (ROOT / "03_rank.py").read_text(), re.S)[0]
    assert "external" in rival
    for stage in ("02_generate.py", "03_rank.py", "04_train_dpo.py"):
        seen, todo = set(), rooms(ROOT / stage, rival)
        while todo:
            name = todo.pop()
            seen.add(name)
            todo |= {r for r in rooms(ROOT / "lib" / f"{name}.py") if (ROOT / "lib" / f"{r}.py").exists()} - seen
        assert "oracle" not in seen and "run" in seen, (stage, seen)
    assert "oracle" in rooms(ROOT / "01_seed.py") and "oracle" in rooms(ROOT / "lib/scoring.py")


def test_every_caption_word_is_one_token_and_any_text_is_tokenized():
    from transformers import CLIPTokenizer
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "lib/tiny/tokenizer")
    ids = tokenizer(world.CAPTIONS).input_ids
    assert all(len(i) == len(c.split()) + 2 for i, c in zip(ids, world.CAPTIONS))
    assert len({tuple(i) for i in ids}) == len(world.CAPTIONS)
    assert tokenizer.decode(tokenizer("Ein Bär 火星").input_ids, skip_special_tokens=True).strip() == "ein bär 火星"


def test_base_model_is_a_plain_pipeline_that_draws_what_is_asked(scenes):
    from diffusers import StableDiffusionPipeline
    size = sum(f.stat().st_size for f in (ROOT / "lib/tiny").rglob("*") if f.is_file())
    assert size < 10e6
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "lib/tiny", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    captions, _, pictures = scenes
    drawn = pipe(captions[:32], num_inference_steps=10, guidance_scale=2., output_type="pt",
                 generator=torch.Generator().manual_seed(0)).images
    assert oracle.score(captions[:32], drawn)["alignment"].mean() > .7
    with torch.no_grad():
        rebuilt = pipe.vae.decode(pipe.vae.encode(pictures * 2 - 1).latent_dist.mean).sample / 2 + .5
    assert -10 * (rebuilt.clamp(0, 1) - pictures).square().mean().log10() > 33               # dB
    before, after = oracle.score(captions, pictures), oracle.score(captions, rebuilt.clamp(0, 1))
    assert after["alignment"].mean() > .98 and (before["utility"] - after["utility"]).abs().mean() < .06
