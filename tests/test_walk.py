"""How a run went, step by step: the story is whole, true to the tables, and does without any part.

The browser test is skipped where no Chromium is installed. SAIL_SHOTS=folder keeps screenshots.
"""

import html
import math
import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from PIL import Image

from lib.eval import page, table, walk
from lib.run import TRAIN_LOG_COLUMNS, write_json, write_table
from lib.settings import Settings

N, DRAWS, STEPS = 4, 5, 20
PROMPT = "a red ring on a plain blue background"
HOSTILE = [
    "</script><script>window.pwned=1</script>",
    '<img src=x onerror="window.pwned=1">',
    "![a](http://example.org/a.png) [b](javascript:window.pwned=1)",
    "| # `one` \n\n# two",
    "a very long prompt, " * 50,
]


# ---- a run to tell of ----

def make_run(run: Path, prompt: str = PROMPT) -> Settings:
    """The files of a small run with Iter0 and two rounds, as the stages write them."""
    s = Settings(run=str(run), iters=2, batch=8, candidates=N, draws=DRAWS, eval_seeds=1)
    human = pd.DataFrame({
        "pair_id": [f"human-{i}" for i in range(10)],
        "prompt": prompt,
        "win": "seed/images/a.png",
        "lose": "seed/images/b.png",
        "source": "human",
    })
    write_table(human[:6], run / "seed/pairs.parquet")
    write_table(human[6:], run / "seed/holdout.parquet")
    people = {
        "labels_against_their_own_utility": .26,
        "agree_with_themselves": .67,
        "agree_with_a_perfect_judge": .75,
    }
    write_json(people, run / "seed/people.json")
    paint(run, "seed/images/a.png", "seed/images/b.png")

    make_log(run, 0)
    for k in (1, 2):
        make_round(run, k, prompt)
        make_log(run, k)
    return s


def make_round(run: Path, k: int, prompt: str) -> None:
    """Two prompts of N candidates: the draws of their rewards, the pairs, and the judge."""
    rng = np.random.default_rng(k)
    draws = []
    for prompt_id in (10 * k, 10 * k + 1):
        for candidate in range(N):
            for draw, t in enumerate((700, 78, 400, 500, 999)):
                draws.append((prompt_id, candidate, draw, t, .1, .1, rng.normal()))
    names = ["prompt_id", "candidate", "draw", "t", "error", "anchor_error", "reward"]
    draws = pd.DataFrame(draws, columns=names)

    rewards = draws.groupby(["prompt_id", "candidate"]).reward.mean().reset_index()
    rewards["prompt"] = prompt
    rewards["seed"] = 0
    images = []
    for row in rewards.itertuples():
        images.append(f"iter{k}/images/{row.prompt_id}_{row.candidate}.png")
    rewards["image"] = images
    paint(run, *images)

    by_prompt = rewards.groupby("prompt_id")
    best = rewards.loc[by_prompt.reward.idxmax()].reset_index()
    worst = rewards.loc[by_prompt.reward.idxmin()].reset_index()
    pairs = pd.DataFrame({
        "pair_id": ["self-0", "self-1"],
        "prompt": prompt,
        "win": best.image,
        "lose": worst.image,
        "source": "self",
        "margin": best.reward - worst.reward,
        "prompt_id": best.prompt_id,
    })
    write_table(draws, run / f"iter{k}/draws.parquet")
    write_table(rewards, run / f"iter{k}/rewards.parquet")
    write_table(pairs, run / f"iter{k}/pairs.parquet")
    judge = {"accuracy": .59, "low": .52, "high": .66, "pairs": 4, "anchor": "base",
             "diversity": .4, "margin": 1.}
    write_json(judge, run / f"iter{k}/judge.json")


def make_log(run: Path, k: int, steps: int = STEPS) -> pd.DataFrame:
    """A training log that begins at log 2."""
    rng = np.random.default_rng(k)
    log = pd.DataFrame(rng.normal(size=(steps, len(TRAIN_LOG_COLUMNS))), columns=TRAIN_LOG_COLUMNS)
    log["step"] = range(steps)
    log["accuracy"] = rng.uniform(size=steps)
    log.loc[0, "loss"] = math.log(2)
    write_table(log, run / f"iter{k}/train_log.parquet")
    return log


def paint(run: Path, *images: str) -> None:
    for image in images:
        (run / image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), "teal").save(run / image)


def evaluate(run: Path, prompt: str = PROMPT,
             models=("base", "Iter0", "Iter1", "Iter2")) -> tuple[pd.DataFrame, pd.DataFrame]:
    """scores.parquet and the table that people read, of two prompts."""
    rows = []
    for m, model in enumerate(models):
        for prompt_id in (50, 51):
            image = f"eval/images/{model}/{prompt_id}.png"
            paint(run, image)
            rows.append((model, "world", "plain", prompt_id, prompt, 7, image, 1 + m / 10, .5, .5))
    names = ["utility", "alignment", "aesthetics"]
    pictures = pd.DataFrame(rows, columns=[*table.KEYS, *names])

    # The world tells more than that.
    pictures["cleanness"] = .9 - .2 * (pictures["model"] == models[-1])
    summary = table.summarise(pictures, names, "base", "Iter0")
    return pictures, table.readable(summary, names, {})


def tell(s: Settings, prompt: str = PROMPT) -> list[tuple]:
    return walk.tell(s, *evaluate(Path(s.run), prompt))


@pytest.fixture
def s(tmp_path, monkeypatch) -> Settings:
    """A small run, whose figures are blank: to draw them takes a second each."""
    def draw_blank(log, width, loss, path):
        paint(path.parent, path.name)

    monkeypatch.setattr(walk, "draw_log", draw_blank)
    return make_run(tmp_path)


# ---- what a story says ----

def headings(story: list[tuple]) -> list[str]:
    return [block[1] for block in story if block[0] == "heading"]


def words(story: list[tuple]) -> str:
    """All paragraphs and equations of a story, one a line."""
    return "\n".join(block[1] for block in story if block[0] in ("text", "equation"))


def part(story: list[tuple], heading: str) -> list[tuple]:
    """The blocks from a heading on, which begins so, up to the next one."""
    blocks = []
    within = False
    for block in story:
        if block[0] == "heading":
            within = block[1].startswith(heading)
        if within:
            blocks.append(block)
    assert blocks
    return blocks


def of_kind(story: list[tuple], kind: str) -> list:
    return [block[1] for block in story if block[0] == kind]


def images_of(story: list[tuple]) -> list[str]:
    images = of_kind(story, "picture")
    for strip in of_kind(story, "pictures"):
        images += [image for image, _ in strip]
    return images


def second_half(s: Settings, k: int) -> pd.Series:
    log = pd.read_parquet(Path(s.run) / f"iter{k}/train_log.parquet")
    return log[STEPS // 2:].mean()


def test_the_story_follows_the_method(s):
    assert headings(tell(s)) == [
        "People compare two pictures",
        "Iter0 learns from the human pairs",
        "Round 1: Iter0 paints candidates and ranks them itself",
        "Round 1: the mix of pairs",
        "Round 1: the next model, Iter1",
        "Round 2: Iter1 paints candidates and ranks them itself",
        "Round 2: the mix of pairs",
        "Round 2: the next model, Iter2",
        "The evaluation",
    ]


@pytest.mark.parametrize("word,explained", [
    ("prompt", "paints a picture for a text, the prompt"),
    ("winner", "says which is the better one. It is the winner"),
    ("utility", "a hidden taste, the utility of a picture"),
    ("alignment", "utility = alignment + 2 aesthetics"),
    ("timestep", "The timestep t, from 0 to 999, sets how much"),
    ("reference", "the reference, ref, which stays as it is"),
    ("winner gain", "winner gain = e_ref(x_w) - e_theta(x_w)"),
    ("margin", "margin = (beta / 2) (winner gain - loser gain)"),
    ("implicit accuracy", "It is the part of a step's pairs whose margin is above 0"),
    ("candidates", "paints 4 pictures, the candidates"),
    ("self-judge", "the model itself says which are good: it is the self-judge"),
    ("reward", "a score of any picture, its reward"),
    ("anchor", "the anchor is a fixed model to compare it with"),
    ("draw", "A draw is one random t with one random noise"),
    ("alpha", "A share alpha = 0.25 of them"),
])
def test_no_word_is_used_before_it_is_explained(s, word, explained):
    """The first paragraph that has the word explains it."""
    first = None
    for text in words(tell(s)).split("\n"):
        if first is None and re.search(rf"\b{word}s?\b", text, re.IGNORECASE):
            first = text
    assert explained in first


def test_the_human_pairs_are_counted_and_one_is_shown(s):
    story = part(tell(s), "People")
    assert "learns from 6 such pairs. 4 more are held out" in words(story)
    assert PROMPT in words(story)
    assert of_kind(story, "pictures") == [[("seed/images/a.png", "winner: preferred"),
                                           ("seed/images/b.png", "loser: the other")]]


def test_people_agree_as_far_as_stage_01_has_measured(s):
    text = words(part(tell(s), "People"))
    assert "26% of the answers go against" in text
    assert "the same answer in 67% of cases" in text
    assert "agree with only 75% of their answers" in text
    assert "sigmoid((utility of a - utility of b) / 0.15)" in text


def test_each_curve_of_iter0_is_told_with_its_numbers(s):
    text = words(part(tell(s), "Iter0"))
    late = second_half(s, 0)
    assert f"Loss: 0.693 at the first step, {late.loss:.3f} on average" in text
    assert (f"Winner gain and loser gain: {late.win_error_gain:+.2g} and "
            f"{late.lose_error_gain:+.2g}") in text
    assert f"Margin: {late.margin:+.2f}" in text
    assert f"Implicit accuracy: {late.accuracy:.2f}" in text
    assert "each of the 6 human pairs comes about 27 times" in text        # 20 steps of 8 pairs


def test_candidates_stand_in_order_of_reward(s):
    story = part(tell(s), "Round 2: Iter1 paints")
    rewards = pd.read_parquet(Path(s.run) / "iter2/rewards.parquet")
    pair = pd.read_parquet(Path(s.run) / "iter2/pairs.parquet").iloc[0]
    ranked = rewards[rewards.prompt_id == 20].sort_values("reward", ascending=False)

    (strip,) = of_kind(story, "pictures")
    assert [image for image, _ in strip] == ranked.image.tolist()
    assert strip[0] == (pair.win, f"1: reward {ranked.reward.max():+.2f}, the winner")
    assert strip[-1] == (pair.lose, f"{N}: reward {ranked.reward.min():+.2f}, the loser")
    assert "Iter1 paints 4 pictures, the candidates, for each of 2 new prompts" in words(story)
    sure = 1 / (1 + math.exp(-pair.margin))
    expected = f"The margin of the pair is {pair.margin:+.2f}: the self-judge is {sure:.0%} sure."
    assert expected in words(story)


def test_the_draws_of_a_pair_add_up_to_its_margin(s):
    story = part(tell(s), "Round 1: Iter0 paints")
    pair = pd.read_parquet(Path(s.run) / "iter1/pairs.parquet").iloc[0]
    draws = pd.read_parquet(Path(s.run) / "iter1/draws.parquet")
    at = draws[draws.prompt_id == 10].set_index(["candidate", "t"]).reward
    winner, loser = int(pair.win[-5]), int(pair.lose[-5])

    (shown,) = of_kind(story, "table")
    times = [78, 400, 500, 700, 999]
    assert shown["t of the draw"].tolist() == times
    assert shown["winner's reward"].tolist() == [f"{at[winner, t]:+.2f}" for t in times]
    assert shown["loser's reward"].tolist() == [f"{at[loser, t]:+.2f}" for t in times]
    parts = shown["difference / 5"].astype(float)
    assert parts.sum() == pytest.approx(pair.margin, abs=.03)

    largest = times[parts.argmax()]
    rest = pair.margin - (at[winner, largest] - at[loser, largest]) / DRAWS
    assert (f"The draw at t = {largest} alone makes {parts.max():+.2f} of the margin, all the "
            f"others together {rest:+.2f}.") in words(story)


def test_the_judges_agreement_stands_beside_peoples(s):
    text = words(part(tell(s), "Round 1: Iter0 paints"))
    assert "Of the 4 held-out pairs it gives the winner the higher reward in 59% [52%, 66%]" in text
    assert "People agree with themselves in 67%, and a perfect judge with them in 75%" in text
    assert "from a coin" not in text


def test_a_judge_that_may_be_a_coin_is_called_so(s):
    judge = {"accuracy": .52, "low": .45, "high": .6, "pairs": 9, "diversity": .4, "margin": 1.}
    write_json(judge, Path(s.run) / "iter1/judge.json")
    assert "cannot tell it from a coin" in words(part(tell(s), "Round 1: Iter0 paints"))


def test_the_mix_counts_places_as_stage_04_gives_them(s, train):
    for alpha in (.25, .3, 1.):
        order = train.mixup(6, 2, alpha, STEPS * s.batch, torch.Generator().manual_seed(0))
        self_made = int((order >= 6).sum())
        text = words(part(tell(replace(s, alpha=alpha)), "Round 1: the mix"))
        assert (f"20 steps of 8 pairs, which makes 160 places for pairs. A share alpha = {alpha:g} "
                f"of them, {self_made}, goes to self-made pairs") in text


def test_a_round_tells_its_training_in_short(s):
    text = words(part(tell(s), "Round 2: the next model"))
    late = second_half(s, 2)
    assert "Iter2 starts as a copy of Iter1, which is its reference too" in text
    assert f"loss {late.loss:.3f}, winner gain {late.win_error_gain:+.2g}" in text
    assert "dashed line" not in text


def test_the_same_picture_is_followed_through_the_models(s):
    (strip,) = of_kind(part(tell(s), "Round 2: the next model"), "pictures")
    assert strip == [
        ("eval/images/base/50.png", "base: utility 1"),
        ("eval/images/Iter0/50.png", "Iter0: utility 1.1"),
        ("eval/images/Iter1/50.png", "Iter1: utility 1.2"),
        ("eval/images/Iter2/50.png", "Iter2: utility 1.3"),
    ]


def test_the_evaluation_says_what_the_table_says(s):
    pictures, results = evaluate(Path(s.run))
    story = part(walk.tell(s, pictures, results), "The evaluation")
    text = words(story)
    assert of_kind(story, "table")[0] is results
    assert "one picture of the same 2 prompts" in text
    assert "Iter2 against base in utility: +0.300 [+0.300, +0.300], a clear gain." in text
    assert "Against Iter0: +0.200 [+0.200, +0.200], a clear gain;" in text
    assert "What Iter2 has lost: cleanness falls by 0.200 [0.200, 0.200]." in text
    assert "nothing of another run seed" in text


def test_the_evaluation_warns_of_what_it_cannot_tell(s):
    warning = "a run with --alpha 0 tells"
    assert warning in words(tell(s))
    assert warning not in words(tell(replace(s, alpha=0.)))
    assert warning not in words(tell(replace(s, iters=0)))


def test_each_benchmark_has_its_sentence_and_a_loss_is_called_one():
    results = pd.DataFrame({
        "benchmark": ["one", "two"],
        "x: gain over base": [table.Cell("-0.1 [-0.2, -0.1]", -1), table.Cell("+0.1", 0)],
    })
    first, second = walk.tell_gains(results, "Iter3", "x")
    assert first[1] == "Prompts of one. Iter3 against base in x: -0.1 [-0.2, -0.1], a clear loss."
    assert second[1].endswith("+0.1, no difference that these prompts can tell.")


# ---- pictures and figures ----

def test_every_picture_of_the_story_is_there(s):
    images = images_of(tell(s))
    assert len(images) == 2 + 2 * N + 2 + 3 + 4 + 3                    # the last are the figures
    for image in images:
        assert (Path(s.run) / image).exists()


def test_a_short_training_has_no_running_mean(s):
    make_log(Path(s.run), 1, 5)
    captions = [block[2] for block in tell(s) if block[0] == "picture"]
    assert captions[0].endswith("(pale), and the mean over 2 steps (strong)")
    assert captions[1] == "The training of Iter1: each step, the mean over its 8 pairs"


@pytest.mark.parametrize("steps", [1, 40, 2000])
def test_figures_are_small(tmp_path, steps):
    log = make_log(tmp_path, 0, steps)
    walk.draw_log(log, max(1, steps // 10), True, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as figure:
        assert max(figure.size) <= 1000
    assert (tmp_path / "figure.png").stat().st_size < 60_000


def test_a_log_without_gains_is_drawn_too(tmp_path):
    log = make_log(tmp_path, 0).assign(win_error_gain=math.nan, lose_error_gain=math.nan)
    walk.draw_log(log, 2, False, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").exists()


# ---- what is missing is left out ----

@pytest.mark.parametrize("missing,heading", [
    ("seed/pairs.parquet", "People compare two pictures"),
    ("iter1/pairs.parquet", "Round 1: Iter0 paints candidates and ranks them itself"),
    ("iter2/rewards.parquet", "Round 2: Iter1 paints candidates and ranks them itself"),
    ("iter2/train_log.parquet", "Round 2: the next model, Iter2"),
])
def test_without_its_table_a_section_is_left_out(s, missing, heading):
    whole = headings(tell(s))
    (Path(s.run) / missing).unlink()
    rest = headings(tell(s))
    assert heading in whole
    assert heading not in rest
    assert set(rest) < set(whole)


@pytest.mark.parametrize("missing,sentence", [
    ("seed/holdout.parquet", "are held out"),
    ("seed/people.json", "agree with themselves"),
    ("iter1/draws.parquet", "Rewards are means over draws"),
    ("iter1/judge.json", "The brackets are a 95% interval, what so few"),
    ("iter0/train_log.parquet", "Iter0 starts as a copy of the base"),
])
def test_without_its_file_a_sentence_is_left_out(s, missing, sentence):
    whole = tell(s)
    (Path(s.run) / missing).unlink()
    rest = tell(s)
    assert sentence in words(whole)
    assert sentence not in words(rest)
    assert headings(rest) == headings(whole)


def test_pictures_that_are_gone_are_left_out(s):
    pictures, results = evaluate(Path(s.run))
    for image in ("seed/images/a.png", "seed/images/b.png", "eval/images/Iter1/50.png"):
        (Path(s.run) / image).unlink()
    images = images_of(walk.tell(s, pictures, results))
    assert "seed/images/a.png" not in images
    assert "eval/images/Iter1/50.png" not in images
    assert "eval/images/Iter2/50.png" in images


def test_a_folder_that_only_compares_models_has_no_story(tmp_path):
    s = Settings(run=str(tmp_path))
    assert walk.tell(s, *evaluate(tmp_path, models=["base", "mine"])) == []
    assert not (tmp_path / "eval/walk").exists()


def test_pictures_that_are_scored_alone_are_no_models(s):
    story = walk.tell(s, *evaluate(Path(s.run), models=["images"]))
    assert "The evaluation" not in headings(story)
    assert not [image for image in images_of(story) if image.startswith("eval/images")]


def test_only_some_models_are_shown_if_only_some_are_evaluated(s):
    story = walk.tell(s, *evaluate(Path(s.run), models=["base", "Iter2"]))
    assert not of_kind(part(story, "Round 1: the next model"), "pictures")
    (strip,) = of_kind(part(story, "Round 2: the next model"), "pictures")
    assert [caption for _, caption in strip] == ["base: utility 1", "Iter2: utility 1.1"]


def test_a_run_of_an_earlier_version_is_told(s):
    """It had no prompt_id in its pairs, no draws, and nothing of its people."""
    run = Path(s.run)
    for k in (1, 2):
        path = run / f"iter{k}/pairs.parquet"
        write_table(pd.read_parquet(path).drop(columns="prompt_id"), path)
        (run / f"iter{k}/draws.parquet").unlink()
    (run / "seed/people.json").unlink()
    story = tell(s)
    assert len(headings(story)) == 9
    assert "The margin of the pair is" in words(story)


def test_an_iter0_that_was_given_has_no_curves_of_its_own(s):
    (Path(s.run) / "iter0/train_log.parquet").unlink()
    story = tell(replace(s, start="some/model"))
    iter0 = part(story, "Iter0 is given")
    assert "was given it: some/model" in words(iter0)
    assert not of_kind(iter0, "picture")
    assert "The dashed line is log 2" in words(part(story, "Round 1: the next model"))


def test_mapo_has_no_gains(s):
    for k in range(3):
        path = Path(s.run) / f"iter{k}/train_log.parquet"
        log = pd.read_parquet(path).assign(win_error_gain=math.nan, lose_error_gain=math.nan)
        write_table(log, path)
    text = words(tell(replace(s, loss="mapo")))
    assert "MaPO" in text
    assert "gain and" not in text
    assert "reference too" not in text
    assert "dashed line" not in text
    assert "nan" not in text


@pytest.mark.parametrize("first_loss, code", [
    (1., None),                                      # a hinge's, say
    (float(np.log(2)), "return F.relu(1 - margin), margin"),
])
def test_an_edited_loss_is_not_told_as_the_papers(s, first_loss, code):
    """Neither where the log shows it nor where only the code that the run keeps does."""
    log = make_log(Path(s.run), 0)
    log.loc[0, "loss"] = first_loss
    write_table(log, Path(s.run) / "iter0/train_log.parquet")
    (Path(s.run) / "code").mkdir()
    shipped = (ROOT / "04_train_dpo.py").read_text()
    kept = shipped.replace(walk.DPO_LOSS, code) if code else shipped
    (Path(s.run) / "code/04_train_dpo.py").write_text(kept)

    text = words(tell(s))
    assert walk.DPO_LOSS in shipped
    assert "is not the Diffusion-DPO of the paper" in text
    assert "loss = -log sigmoid(margin)" not in text
    assert "log 2" not in text
    assert "Loss: " in text                          # what it was is told all the same


def test_human_pairs_alone_have_no_candidates(s):
    story = tell(replace(s, alpha=0.))
    assert "Round 1: human pairs alone" in headings(story)
    assert "paints no candidates and goes on learning from the 6 human pairs" in words(story)
    assert "self-judge" not in words(story)


def test_without_human_pairs_in_the_mix_none_is_counted(s):
    text = words(part(tell(replace(s, alpha=1.)), "Round 1: the mix"))
    assert "No human pair is left in the mix" in text


def test_a_score_from_outside_has_no_draws(s):
    for k in (1, 2):
        path = Path(s.run) / f"iter{k}/draws.parquet"
        write_table(pd.read_parquet(path).assign(t=math.nan, error=math.nan), path)
    story = tell(replace(s, reward="world"))
    text = words(story)
    assert "Round 1: Iter0 paints candidates and world ranks them" in headings(story)
    assert "online DPO" in text
    assert "self-judge" not in text
    assert "self-made" not in text
    assert len(of_kind(story, "table")) == 1                       # the results


def test_one_draw_is_not_taken_apart(s):
    for k in (1, 2):
        path = Path(s.run) / f"iter{k}/draws.parquet"
        draws = pd.read_parquet(path)
        write_table(draws[draws.draw == 0], path)
    story = tell(replace(s, draws=1))
    assert "this run makes do with one" in words(story)
    assert len(of_kind(story, "table")) == 1


def test_of_many_draws_those_that_count_are_shown(s):
    path = Path(s.run) / "iter1/draws.parquet"
    draws = pd.read_parquet(path)
    more = [draws.assign(draw=draws.draw + DRAWS * i, t=draws.t + i, reward=draws.reward / 2 ** i)
            for i in range(10)]
    write_table(pd.concat(more), path)
    story = part(tell(s), "Round 1: Iter0 paints")
    (shown,) = of_kind(story, "table")
    assert len(shown) == walk.MOST_DRAWS
    assert shown["t of the draw"].is_monotonic_increasing
    assert "Of 50 draws, those with the 16 largest parts" in words(story)


def test_the_rewards_options_are_told(s):
    text = words(tell(replace(s, rank_t_min=500, reward_weights="balanced", select="random")))
    assert "t is taken from 500 to 999" in text
    assert "weighed by 1 over the anchor's error" in text
    assert "taken at random in this run" in text
    assert "The best and the worst candidate" not in text


def test_annotators_who_never_err_have_no_noise(s):
    text = words(tell(replace(s, label_noise=0.)))
    assert "utility = alignment" in text
    assert "toss of a coin" not in text


def test_people_from_outside_have_no_utility(s):
    text = words(part(tell(replace(s, pairs="mine/pairs.csv")), "People"))
    assert "utility" not in text


# ---- the story in the page and in Markdown ----

@pytest.mark.parametrize("prompt", HOSTILE)
def test_hostile_prompts_are_harmless(s, prompt):
    run = Path(s.run)
    make_run(run, prompt)
    story = tell(s, prompt)
    text = walk.as_markdown(story)
    assert "<script" not in text
    assert "onerror=" not in re.sub("&lt;.*?&gt;", "", text)
    assert "](" not in text
    assert len(re.findall("^# ", text, re.MULTILINE)) == 1
    for line in words(story).splitlines():
        assert len(line) < 1200

    nothing = pd.DataFrame(columns=table.KEYS)
    path = page.write_page(run, [], nothing, "t", [], [], story)
    assert "<script>window" not in path.read_text()
    assert "<img src=x" not in path.read_text()


def test_markdown_shows_what_the_page_shows(s):
    """Every picture is found from where walk.md lies, and every text stands in it."""
    story = tell(s)
    text = walk.as_markdown(story)
    folder = Path(s.run) / "eval"
    found = []
    for address in re.findall('<img src="(.*?)"', text):
        found.append((folder / unquote(address)).resolve())
    assert sorted(found) == sorted((Path(s.run) / image).resolve() for image in images_of(story))
    assert all(image.exists() for image in found)

    for heading in headings(story):
        assert f"\n## {heading}\n" in text
    for line in words(story).splitlines():
        assert html.escape(line, quote=False) in text
    assert "| t of the draw | winner's reward |" in text


def test_many_pictures_have_several_lines_in_markdown():
    strip = [(f"iter1/images/a b{i}.png", f"{i} | i") for i in range(walk.ACROSS + 1)]
    lines = walk.as_markdown([("pictures", strip)]).splitlines()[2:]
    assert len(lines) == 5
    assert lines[0].count("<img") == walk.ACROSS
    assert set(lines[1]) == set("| -")
    assert "../iter1/images/a%20b8.png" in lines[3]
    assert lines[4] == "| 8 \\| i |"


def test_a_real_run_has_its_story(mini):
    """Stage 05 writes it beside the page, which has it too."""
    text = (mini / "eval/walk.md").read_text()
    assert "Round 2: the next model, Iter2" in text
    assert "agree with themselves" in text
    assert "The draw at t = " in text
    assert "nan" not in text
    for address in re.findall('<img src="(.*?)"', text):
        assert (mini / "eval" / unquote(address)).exists()
    assert "Round 2: the next model, Iter2" in (mini / "eval/index.html").read_text()


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Path:
    """The page of a run with its figures."""
    run = tmp_path_factory.mktemp("told")
    s = make_run(run)
    pictures, results = evaluate(run)
    return page.write_page(run, [], pictures, "t", [], [], walk.tell(s, pictures, results))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width,height", [(1280, 900), (390, 844)])
def test_the_story_fits_its_page(browser, told, width, height, dark):
    """Nothing overflows; figures are as wide as the text, or as the phone."""
    browser.open(told, width, height, dark)
    browser.click("nav [href='#story']")
    browser.shot(f"walk-{width}-{'dark' if dark else 'light'}")
    figures = browser.js("[...document.querySelectorAll('#story > figure img')]"
                         ".map(image => [image.offsetWidth, image.offsetHeight])")
    wide = min(width - 32, 760)
    assert len(figures) == 3
    for across, down in figures:
        assert .85 * wide < across <= wide
        assert down <= 640
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert not browser.faults()
