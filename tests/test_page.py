"""The page: hostile text stays text, every picture is there, and a real browser can work with it.

The browser tests are skipped where no Chromium is installed. SAIL_SHOTS=folder keeps screenshots.
"""

import html.parser
import itertools
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lib.eval import page
from lib.eval.table import Cell, summarise
from lib.run import UserError
from lib.world import scenes
from lib.world.captions import CAPTIONS, STYLES, parse, style_of

MODELS = ["base", "Iter0", "SAIL 1", "SAIL 2", "SAIL 3"]
BENCHMARKS = ("HPSv2", "Pick-a-Pic")
NAMES = ["PickScore", "HPSv2", "ImageReward", "Aesthetics"]
CENTRES = {"PickScore": 20.6, "HPSv2": .275, "ImageReward": .1, "Aesthetics": 5.4}
SPREADS = {"PickScore": 1, "HPSv2": .01, "ImageReward": .8, "Aesthetics": .4}
HOSTILE = [
    "</script><script>window.pwned=1</script>",
    '<img src=x onerror="window.pwned=1">',
    "<!-- <script>",
    "&lt;b&gt; \"quotes\" 'n' `${window.pwned=1}`",
    "\u2028 \x00 日本語 שלום 🦊",
    "<!--tables-->",
    "constructor </SCRIPT x",
]


# ---- a run to show ----

def example(run: Path, prompts: list[str], models=MODELS, seeds=(0,), size=None) -> pd.DataFrame:
    """A run folder with rendered pictures of a few captions, shared by all prompts, and scores."""
    captions = []
    for i, prompt in enumerate(prompts[:60]):
        captions.append(prompt if parse(prompt) else CAPTIONS[97 * i % len(CAPTIONS)])
    draw_pictures(run, captions, models, size)

    rows = []
    for model in models:
        for i, seed in itertools.product(range(len(prompts)), seeds):
            style = style_of(prompts[i]) if parse(prompts[i]) else STYLES[i % 4]
            image = f"eval/images/{model}/{i % len(captions):05}_0.png"
            rows.append((model, BENCHMARKS[i % 2], style, i, prompts[i], seed, image))
    table = pd.DataFrame(rows, columns=page.KEYS)

    # A prompt has a skill that all models share, and each model is better than the one before.
    rng = np.random.default_rng(0)
    skill = rng.normal(size=len(prompts))[table["prompt_id"]]
    progress = table["model"].map(models.index)
    for name in NAMES:
        score = .6 * skill + .5 * rng.normal(size=len(table)) + .25 * progress
        table[name] = CENTRES[name] + SPREADS[name] * score
    return table


def draw_pictures(run: Path, captions: list[str], models: list[str], size) -> None:
    """One picture per model and caption; later models draw sharper edges."""
    generator = torch.Generator().manual_seed(0)
    for m, model in enumerate(models):
        folder = run / "eval/images" / model
        folder.mkdir(parents=True)
        scene = scenes.sample_scenes(captions, generator)
        scene["softness"] = scene["softness"] * (2 - m / len(models))
        for i, picture in enumerate(scenes.to_pil(scenes.render(scene))):
            if size:
                picture = picture.resize(size)
            picture.save(folder / f"{i:05}_0.png")


def results(scores: pd.DataFrame) -> pd.DataFrame:
    """A table with as many columns as the real one."""
    means = scores.groupby(["model", "benchmark"], sort=False)[NAMES].mean()
    rows = []
    for (model, benchmark), values in means.iterrows():
        row = {"model": model, "benchmark": benchmark}
        for name in NAMES:
            value = values[name]
            gain = value - means.loc["base"].loc[benchmark, name]
            row[name] = f"{value:.3f} [{value - .1:.3f}, {value + .1:.3f}]"
            row[f"{name} gain"] = Cell(f"{gain:+.3f}", int(np.sign(gain)))
            row[f"{name} paper"] = math.nan if model == "SAIL 1" else round(value, 2)
            if model == "base":
                row[f"{name} gain"] = Cell("")
        row["win rate"] = "–" if model == "base" else "63.1%"
        row["pairs"] = 64
        rows.append(row)
    return pd.DataFrame(rows)


def draw_curves(scores: pd.DataFrame, path: Path, size=(8, 3)) -> None:
    """Plots on a white background."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=size)
    for axis, name in zip(axes, NAMES):
        axis.plot(scores.groupby("model", sort=False)[name].mean().tolist())
        axis.set_title(name)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


class Parser(html.parser.HTMLParser):
    """Reads a page as a browser does: its scripts, and the JSON that one of them holds."""

    def __init__(self):
        super().__init__()
        self.scripts = 0
        self.json = ""
        self.within_json = False

    def handle_starttag(self, tag, attributes):
        if tag == "script":
            self.scripts += 1
        self.within_json = dict(attributes).get("id") == "data"

    def handle_endtag(self, tag):
        self.within_json = False

    def handle_data(self, data):
        if self.within_json:
            self.json += data


def embedded(path: Path) -> dict:
    """The JSON of a written page, as a browser would cut it out."""
    parser = Parser()
    parser.feed(path.read_text())
    assert parser.scripts == 2                         # the JSON, and the page's own
    assert not set("<>&") & set(parser.json)
    return json.loads(parser.json)


def story_of(path: Path) -> str:
    """The HTML of a written page's story."""
    return re.search('<section id="story".*?</section>', path.read_text(), re.DOTALL).group()


def write_story(run: Path, story: list[tuple]) -> str:
    """The story's HTML in a page that has nothing else."""
    nothing = pd.DataFrame(columns=page.KEYS)
    return story_of(page.write_page(run, [], nothing, "a story", [], [], story))


def place(run: Path) -> page.Place:
    """A run's page at its usual place."""
    return page.Place(run, run / "eval/index.html")


# ---- the gallery, without a browser ----

def test_every_picture_and_score_comes_back(tmp_path):
    scores = example(tmp_path, HOSTILE, seeds=(3, 4))
    scores.loc[2, "HPSv2"] = math.nan
    scores = scores.rename(columns={"Aesthetics": "</script>"})
    path = page.write_page(tmp_path, [], scores, "title", [], [])
    data = embedded(path)

    assert data["models"] == MODELS
    assert data["scores"] == NAMES[:3] + ["</script>"]
    assert [row[3] for row in data["rows"]] == [p for p in HOSTILE for _ in range(2)]

    cells = {}
    for row in data["rows"]:
        for model, cell in zip(data["models"], row[4]):
            cells[model, row[3], cell[1]] = cell
    assert len(cells) == len(scores)

    for picture in scores.to_dict("records"):
        key = (picture["model"], picture["prompt"], str(picture["seed"]))
        address, _, *values = cells[key]
        file = path.parent / address.replace("%20", " ")
        expected = [picture[name] for name in data["scores"]]
        assert file.resolve() == (tmp_path / picture["image"]).resolve()
        np.testing.assert_allclose(np.array(values, float), expected, rtol=1e-5)


def test_hostile_text_stays_text(tmp_path):
    scores = example(tmp_path, HOSTILE)
    tables = [(HOSTILE[0], results(scores).assign(hostile=HOSTILE[1]))]
    sheets = [(HOSTILE[1], scores["image"][0])]
    path = page.write_page(tmp_path, tables, scores, HOSTILE[0], HOSTILE, sheets)
    text = path.read_text()

    assert path == tmp_path / "eval/index.html"
    assert not list(path.parent.glob(".*"))                    # no temporary file is left
    assert embedded(path)["rows"]
    for bad in HOSTILE[:3]:
        assert bad not in text
    assert not re.search(r"https?:|//[a-z]", text.split("<script>")[0])     # nothing from a network


def test_seeds_pair_up(tmp_path):
    """Rows join equal seeds; models with other or no seeds take the free places; gaps stay."""
    pictures = [
        ("base", 0, 1),
        ("base", 0, 2),
        ("base", 1, 1),
        ("part", 0, 2),
        ("mine", 0, None),
        ("mine", 0, None),
    ]
    lines = []
    for i, (model, prompt_id, seed) in enumerate(pictures):
        prompt, image = f"prompt {prompt_id}", f"eval/{i}.png"
        lines.append((model, "b", None, prompt_id, prompt, seed, image, float(i)))
    scores = pd.DataFrame(lines, columns=[*page.KEYS, "s"])

    rows = page.gallery(place(tmp_path), scores)["rows"]
    numbers = [[cell and cell[2] for cell in row[4]] for row in rows]
    assert numbers == [[0, None, 4], [1, 3, 5], [2, None, None]]
    assert rows[0][4][0][1] == "1"
    assert rows[0][4][2][1] == ""


def test_addresses(tmp_path):
    def address(image: str) -> str:
        return page._address(place(tmp_path), image, page.SCORES, 7)

    assert address("eval/images/a b/#1?%.png") == "images/a%20b/%231%3F%25.png"
    assert address("iter1/images/x.png") == "../iter1/images/x.png"
    assert address("eval/javascript:alert(1)") == "javascript%3Aalert%281%29"
    for bad in ("../x.png", "/etc/passwd", "eval/../../x.png"):
        with pytest.raises(UserError, match="row 7.*leaves the run folder"):
            address(bad)


def test_a_path_that_leaves_the_run_is_told_by_its_row(tmp_path):
    """Rows count from 1."""
    scores = example(tmp_path, ["one prompt"], models=["base", "Iter0"])
    scores.loc[1, "image"] = "../x.png"
    with pytest.raises(UserError, match="scores.parquet, row 2: '../x.png' leaves"):
        page.gallery(place(tmp_path), scores)
    with pytest.raises(UserError, match="the page's sheets, row 1: '../x.png' leaves"):
        page.write_page(tmp_path, [], scores[:1], "title", [], [("caption", "../x.png")])


def test_an_empty_page(tmp_path):
    nothing = pd.DataFrame(columns=page.KEYS)
    path = page.write_page(tmp_path, [("", pd.DataFrame())], nothing, "nothing", [], [])
    assert embedded(path)["rows"] == []


# ---- tables ----

def test_a_table_is_shown_as_it_comes():
    table = pd.DataFrame({
        "model": ["<b>", "x"],
        "n": [64, 0],
        "paper": [.28, None],
        "rate": ["–", "63%"],
        "prompt": ["1girl", "an oil painting of a house"],
        "more": ["two", "a man who stands on the shore and looks at the sea"],
    })
    text = page._table(table)
    assert "<td>&lt;b&gt;</td>" in text
    assert '<td class="number">64</td>' in text
    assert '<td class="number">0.28</td>' in text
    assert '<td class="number"></td>' in text                  # None
    assert '<td class="number">63%</td>' in text
    assert '<td class="long">a man who stands' in text
    assert "nan" not in text


def test_most_cells_say_whether_a_column_is_of_numbers():
    assert page._holds_numbers(pd.Series([1.5, None]))
    assert page._holds_numbers(pd.Series(["", "+0.1 [-0.1, +0.3]", "−0.3"]))
    assert page._holds_numbers(pd.Series(["0", "50000 (0.05M)", " (0.8M)", "the start's"]))
    assert not page._holds_numbers(pd.Series(["1girl", "a house", "a tree"]))
    assert not page._holds_numbers(pd.Series(["", ""]))
    assert not page._holds_numbers(pd.Series([], dtype=object))


def test_clear_gains_and_losses_have_a_colour():
    cells = [Cell("+0.1", 1), Cell("-0.1", -1), Cell("+0.2", 0), Cell(""), "+0.3"]
    text = page._table(pd.DataFrame({"anything": cells}))
    classes = re.findall('<td class="(.*?)">', text)
    assert classes == ["number up", "number down", "number", "number", "number"]


# ---- the story ----

def test_each_block_of_a_story_has_its_place_in_the_page(tmp_path):
    text = write_story(tmp_path, [
        ("heading", "Round 1"),
        ("text", "The model drew eight pictures of each prompt."),
        ("equation", "a = <b>\nc = d"),
        ("picture", "iter1/preview.png", "best and worst"),
        ("pictures", [("iter1/images/a.png", "a"), ("iter1/images/b.png", "")]),
        ("table", pd.DataFrame({"reward": [.5]})),
    ])
    order = ["<h2>How this run went", "<h3>Round 1</h3>", "<p>The model drew", "iter1/preview.png",
             '<div class="strip">', "iter1/images/a.png", "iter1/images/b.png", "<th"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert text.count("<figure>") == 3
    assert text.count("<figcaption>") == 2                     # an empty caption has none
    assert '<div class="scroll" tabindex="0"><table>' in text
    assert "hidden" not in text


def test_a_story_can_be_jumped_to_and_without_one_nothing_is_shown(tmp_path):
    nothing = pd.DataFrame(columns=page.KEYS)
    path = page.write_page(tmp_path, [], nothing, "t", [], [], [("text", "It went well.")])
    assert '<a href="#story" >Step by step</a>' in path.read_text()
    assert '<section id="story" >' in path.read_text()

    page.write_page(tmp_path, [], nothing, "t", [], [])
    assert '<a href="#story" hidden>' in path.read_text()
    assert '<section id="story" hidden>' in path.read_text()


def test_hostile_text_in_a_story_stays_text(tmp_path):
    text = write_story(tmp_path, [
        ("heading", HOSTILE[0]),
        ("text", HOSTILE[1]),
        ("picture", "eval/<b>.png", HOSTILE[2]),
        ("pictures", [('eval/"x.png', HOSTILE[0])]),
        ("table", pd.DataFrame({HOSTILE[1]: [HOSTILE[2]]})),
    ])
    for bad in (*HOSTILE[:3], "<b>", '"x.png'):
        assert bad not in text
    assert text.count("&lt;script&gt;") == 6       # heading, cell, two captions with their alt


@pytest.mark.parametrize("block", [
    ("picture", "../x.png", "caption"),
    ("pictures", [("eval/x.png", "fine"), ("/etc/passwd", "caption")]),
])
def test_pictures_of_a_story_stay_inside_the_run(tmp_path, block):
    with pytest.raises(UserError, match="the page's story, row 2: .* leaves the run folder"):
        write_story(tmp_path, [("text", "first"), block])


def test_an_unknown_block_of_a_story_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="block 1 .*'film'"):
        write_story(tmp_path, [("film", "x.mp4")])


# ---- in a browser ----

def example_story(run: Path, scores: pd.DataFrame) -> list[tuple]:
    """A story with every kind of block, wide and narrow, long and hostile."""
    draw_curves(scores, run / "eval/wide.png", size=(10, 3))
    draw_curves(scores, run / "eval/narrow.png", size=(5, 3))
    Image.new("RGB", (512, 300), "teal").save(run / "eval/large.png")

    images = scores.image[scores.model == "Iter0"].tolist()
    strip = [(image, f"candidate {i}, reward {.3 * i - 1:+.2f}") for i, image in enumerate(images)]
    draws = pd.DataFrame({
        "candidate": range(4),
        "prompt": ["1girl", "a blue ring", HOSTILE[0], "a very long prompt, " * 12],
        "margin": [Cell("+0.412 [+0.2, +0.6]", 1), Cell("-0.2", -1), Cell("0"), Cell("")],
    })
    for t in (78, 163, 211, 308, 402, 516, 655, 699, 739, 804, 889, 951):
        draws[f"reward at t = {t}"] = [.123456 * t, -.5, 0, 1]
    return [
        ("text", "A run begins with a base model and a few human pairs. " * 4),
        ("heading", "Iter0: the human pairs"),
        ("text", f"People preferred the left pictures; {HOSTILE[0]}"),
        ("picture", "eval/wide.png", "The loss over the steps, and the margin."),
        ("picture", "eval/narrow.png", "A figure that is smaller than the page."),
        ("picture", images[0], "One picture of 32 pixels."),
        ("heading", "Round 1: the candidates of one prompt, a heading too long for a phone"),
        ("pictures", strip[:8]),
        ("pictures", strip[:2] + [("eval/large.png", "a larger picture, with a caption of some "
                                   "length that takes several lines")]),
        ("table", draws),
        ("table", pd.DataFrame({"step": [1, 20], "loss": [.693, .541]})),
    ]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """40 captions of the world (and one long, some hostile prompts), sheets, notes and a story."""
    run = tmp_path_factory.mktemp("run")
    prompts = [CAPTIONS[97 * i] for i in range(17)]
    prompts += ["an oil painting of " + "a very long prompt, " * 20] + HOSTILE
    prompts += [CAPTIONS[(97 * i + 5) % len(CAPTIONS)] for i in range(15)]
    scores = example(run, prompts)
    scores.loc[len(prompts), NAMES] = math.nan                 # Iter0 has no score for the first

    draw_curves(scores, run / "eval/curves.png")
    tables = [("Means", results(scores)), ("Again", results(scores).iloc[:, :4])]
    notes = ["preset: tiny", "steps: 10", "guidance: 2.0", "torch: 2.15.0", "diffusers: 0.42.1",
             "scorers: the world's oracle"]
    sheets = [("Scores over the iterations; bands are 95% intervals.", "eval/curves.png"),
              ("A preview sheet.", scores["image"][3])]
    return page.write_page(run, tables, scores, "SAIL in the embedded world", notes, sheets,
                           example_story(run, scores), ["Iter3 beats base <b>", "It costs"],
                           {"base": "the model before any <b>"}, "alpha 0.25, run seed 0")


# How many pictures of the gallery are in view and have not come.
MISSING_PICTURES = """
    new Promise(done => setTimeout(() => {
      const missing = [...document.querySelectorAll('.row img')].filter(image => {
        const box = image.getBoundingClientRect();
        return box.top < innerHeight && box.bottom > 0 && !image.naturalWidth;
      });
      done(missing.length);
    }, 300))"""


def heights_of(selector: str) -> str:
    """The expression for the heights of all elements of a kind; what is hidden has none."""
    return f"[...document.querySelectorAll({selector!r})].map(element => element.offsetHeight)"


SIZES = pytest.mark.parametrize("width,height", [(1280, 900), (390, 844)])
SCHEMES = pytest.mark.parametrize("dark", [False, True])


def name_of(width: int, dark: bool) -> str:
    """What the screenshots of a size and scheme are called."""
    device = "phone" if width < 800 else "desktop"
    return f"{device}-{'dark' if dark else 'light'}"


@SCHEMES
@SIZES
def test_looks(browser, small, width, height, dark):
    """No error or request, no sideways overflow, pictures there, rows all equally high."""
    name = name_of(width, dark)
    browser.open(small, width, height, dark)
    browser.shot(name + "-top")
    browser.js("document.getElementById('bar').scrollIntoView()")
    browser.frame()
    browser.shot(name + "-rows")
    background = browser.js("parseInt(getComputedStyle(document.body).backgroundColor.slice(4))")
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert (background < 128) == dark
    assert browser.js(MISSING_PICTURES) == 0

    heights = set()
    for place in (0, .3, .5, 1):
        browser.js("(box => scrollBy(0, box.top + box.height * "
                   f"{place}))(document.getElementById('rows').getBoundingClientRect())")
        browser.frame()
        heights.update(browser.js(heights_of(".row")))
        if place == .5:
            browser.shot(name + "-hostile")
    assert len(heights) == 1

    browser.click(".row .picture")
    browser.shot(name + "-box")
    assert browser.js("box.open")
    assert browser.js("box.scrollWidth <= innerWidth")
    assert browser.js("full.getBoundingClientRect().width") > 250
    assert browser.js("window.pwned") is None
    assert not browser.faults()


@SCHEMES
@SIZES
def test_the_story_looks_right(browser, small, width, height, dark):
    """Strips wrap, wide tables and figures scroll in boxes of their own, figures stand on white."""
    browser.open(small, width, height, dark)
    browser.click("nav [href='#story']")
    top = browser.js("document.querySelector('#story h2').getBoundingClientRect().top")
    assert 0 <= top < 100
    for number in range(1, 4):
        browser.shot(f"{name_of(width, dark)}-story-{number}")
        browser.js("scrollBy(0, innerHeight - 80)")
        browser.frame()

    assert browser.js("document.documentElement.scrollWidth") <= width
    scrolls = browser.js("[...document.querySelectorAll('#story .scroll')].map("
                         "box => box.scrollWidth > box.clientWidth)")
    assert scrolls == [True, False]

    lines = browser.js("[...document.querySelectorAll('.strip')].map(strip => "
                       "new Set([...strip.children].map(figure => figure.offsetTop)).size)")
    assert lines == ([3, 1] if width < 800 else [1, 1])

    card = browser.js("(style => [style.backgroundColor, parseInt(style.paddingTop)])"
                      "(getComputedStyle(document.querySelector('#story > figure a')))")
    assert card == ["rgb(255, 255, 255)", 10 if dark else 0]
    figures = browser.js("[...document.querySelectorAll('#story > figure')]"
                         ".map(figure => figure.offsetWidth)")
    assert max(figures) <= width - 32
    assert min(figures) >= 192                                # a picture of 32 pixels is enlarged
    assert browser.js("window.pwned") is None
    assert not browser.faults()


def test_work(browser, small):
    """Filters, search, scores, orders, the means, and the address that keeps them."""
    count = "+document.querySelector('#means .name').textContent.split(' ')[0]"
    first = "document.querySelector('.row .words').textContent"
    browser.open(small)
    assert browser.js(count) == 40

    browser.set("benchmark", "0")
    assert browser.js(count) == 20
    browser.set("style", "1")
    of_both = browser.js("rows.filter(r => r.benchmark === 0 && r.style === 1).length")
    assert browser.js(count) == of_both < 20
    browser.set("search", "no such prompt")
    assert browser.js(count) == 0
    assert not browser.js("none.hidden")
    for name in ("search", "benchmark", "style"):
        browser.set(name, "")

    browser.js("document.getElementById('prompts').scrollIntoView()")
    browser.set("search", "a very LONG")
    assert browser.js(count) == 1
    assert browser.js(first).startswith("an oil painting")
    browser.set("search", "</script>")
    assert browser.js(count) == 1
    assert browser.js(first) == HOSTILE[0]
    browser.set("search", "#5")
    assert browser.js(count) == 1
    browser.set("search", "")
    assert not browser.faults()


def test_orders(browser, small):
    """Rows by their gain, up and down; a row without a score goes last."""
    browser.open(small)
    browser.js("document.getElementById('prompts').scrollIntoView()")
    browser.set("score", "2")
    gains = browser.js("rows.map(r => gain(r, 3, 2))")
    for way, expected in (("gain", sorted(gains, reverse=True)), ("loss", sorted(gains))):
        browser.set("order", way + " 3")
        text = browser.js("document.querySelectorAll('.row .chosen .gain')[3].textContent")
        assert browser.js("shown.map(r => gain(r, 3, 2))") == expected
        assert float(text.replace("−", "-")) == pytest.approx(expected[0], abs=.01)

    browser.set("order", "gain 1")
    browser.set("score", "0")
    assert browser.js("shown.at(-1).id") == "0"
    mean = browser.js("document.querySelectorAll('#means .gain')[2].textContent")
    expected = np.mean(browser.js("rows.map(r => gain(r, 3, 0))"))
    assert float(mean) == pytest.approx(expected, abs=.01)
    assert not browser.faults()


def test_the_address_keeps_what_is_shown(browser, small):
    browser.open(small)
    browser.set("order", "gain 1")
    browser.set("search", "red")
    order = browser.js("shown.map(r => r.id)")
    browser.open(small, fragment=browser.js("location.hash"))
    assert len(order) < 40
    assert browser.js("shown.map(r => r.id)") == order
    assert not browser.faults()


def test_keys_and_clicks(browser, small):
    def at() -> list:
        return browser.js("[box.open, current, model]")

    browser.open(small)
    browser.js("document.getElementById('prompts').scrollIntoView()")
    browser.frame()
    browser.click(".row:nth-child(2) [data-model='3']")
    assert at() == [True, 1, 3]

    path = [
        ("ArrowRight", [True, 1, 4]),
        ("ArrowRight", [True, 1, 0]),
        ("ArrowLeft", [True, 1, 4]),
        ("j", [True, 2, 4]),
        ("ArrowDown", [True, 3, 4]),
        ("k", [True, 2, 4]),
        ("ArrowUp", [True, 1, 4]),
        ("2", [True, 1, 1]),
        ("Escape", [False, 1, 1]),
        ("j", [False, 2, 1]),
        ("k", [False, 1, 1]),
        ("k", [False, 0, 1]),
        ("k", [False, 0, 1]),
    ]
    for key, expected in path:
        browser.key(key)
        assert at() == expected, key

    # Stepping far keeps the row in view.
    for _ in range(30):
        browser.key("j")
    assert at() == [False, 30, 1]
    row = "document.querySelector('.row.current').getBoundingClientRect()"
    assert browser.js(f"{row}.top >= bar() - 1")
    assert browser.js(f"{row}.bottom <= innerHeight + 1")

    browser.key("Enter")
    assert at() == [True, 30, 1]
    assert browser.js("words.textContent === shown[30].prompt")
    assert browser.js("decodeURI(full.src).endsWith(decodeURI(shown[30].cells[1][0]))")
    browser.click("#matrix tbody tr:nth-child(3)")
    assert at() == [True, 30, 2]
    browser.click("#keys [data-step='1 0']")
    assert at() == [True, 31, 2]
    browser.click("#close")
    browser.key("/")
    assert at() == [False, 31, 2]
    assert browser.js("document.activeElement.id") == "search"
    assert not browser.faults()


def test_many(browser, tmp_path):
    """3,200 prompts x 5 models: writing under 10 s, loading under 5 s, then under 1 s an act."""
    def seconds(code: str) -> float:
        return browser.js(f"(() => {{ const t = performance.now(); {code}; "
                          "document.body.offsetHeight; return (performance.now() - t) / 1000 })()")

    def set_seconds(name: str, value: str) -> float:
        return seconds(f"{name}.value = '{value}'; {name}.dispatchEvent(new Event('input'))")

    prompts = [f"{CAPTIONS[i % len(CAPTIONS)]}, version {i}" for i in range(3200)]
    scores = example(tmp_path, prompts)
    start = time.perf_counter()
    path = page.write_page(tmp_path, [("Means", results(scores))], scores, "HPSv2", [], [])
    writing = time.perf_counter() - start
    loading = browser.open(path)
    acts = {
        "all rows": seconds("more.click()"),
        "search": set_seconds("search", "star"),
        "all again": set_seconds("search", ""),
        "order": set_seconds("order", "gain 4"),
        "filter": set_seconds("benchmark", "1"),
        "jump": seconds("scrollTo(0, document.documentElement.scrollHeight); draw()"),
    }
    print(f"write {writing:.2f} s, load {loading:.2f} s, then {acts}, {path.stat().st_size} bytes")
    assert writing < 10
    assert loading < 5
    assert max(acts.values()) < 1
    assert browser.js("document.querySelectorAll('.row').length") < 20
    assert browser.js("drawn.has(shown.length - 1)")
    assert not browser.faults()


def test_the_page_tells_the_tables_win_rate(browser, tmp_path):
    """Of prompts, by the mean of their pictures: here 2 of 3, where of pictures it is 2 of 6."""
    gains = {0: (.3, -.1), 1: (.3, -.1), 2: (-.1, -.3)}
    scores = example(tmp_path, CAPTIONS[:3], models=["base", "Iter0"], seeds=(0, 1))
    scores = scores.drop(columns=NAMES).assign(utility=1., benchmark="world")
    for prompt_id, of_pictures in gains.items():
        for seed, gain in enumerate(of_pictures):
            chosen = (scores["prompt_id"] == prompt_id) & (scores["seed"] == seed)
            scores.loc[chosen & (scores["model"] == "Iter0"), "utility"] += gain

    summary = summarise(scores, ["utility"], "base", "Iter0")
    rate = summary[(summary["model"] == "Iter0") & (summary["style"] == "")].win_rate.iloc[0]
    path = page.write_page(tmp_path, [], scores, "two pictures", [], [])
    browser.open(path)
    means = browser.js("document.getElementById('means').textContent")
    assert rate == pytest.approx(2 / 3)
    assert "wins 67%" in means
    assert "3 of 3 prompts" in means
    assert not browser.faults()


def test_what_was_found_stands_first_and_names_are_explained(browser, small):
    """Sentences, the table, pictures; then the rest, which a long list of prompts does not hide."""
    browser.open(small, 1440)
    order = browser.js("[...document.querySelectorAll('main > *')].map(part => part.id)")
    assert order == ["", "table", "prompts", "sheets", "story", "notes"]
    assert browser.js("sentences.innerText").split("\n")[0] == "Iter3 beats base <b>."
    assert browser.js("training.textContent") == "alpha 0.25, run seed 0"
    assert browser.js("document.querySelector('dl').textContent").startswith("basethe model before")
    assert browser.js("document.querySelector('#table td').title") == "the model before any <b>"

    # A box that is narrower than its table has a shadow at the edge, under whatever covers it.
    boxes = browser.js("[...document.querySelectorAll('#table .scroll')].map("
                       "box => getComputedStyle(box).backgroundImage.split('gradient').length)")
    assert boxes == [5, 5]

    few = browser.js("count()")
    assert few == 6 < browser.js("shown.length")
    browser.click("#more")
    assert browser.js("count() === shown.length")
    assert browser.js("document.getElementById('more').hidden")
    assert not browser.faults()


def test_one_model_without_scores(browser, tmp_path):
    scores = example(tmp_path, CAPTIONS[:3], models=["mine"], size=(768, 512)).drop(columns=NAMES)
    path = page.write_page(tmp_path, [("", pd.DataFrame())], scores, "My pictures", [], [])
    browser.open(path, 390)
    browser.shot("phone-mine")
    browser.click(".row .picture")
    browser.key("ArrowRight")
    assert browser.js("box.open")
    assert browser.js("model") == 0
    assert browser.js("document.getElementById('order').hidden")
    assert not browser.faults()


def test_without_content_only_the_prompts_section_is_shown(browser, tmp_path):
    nothing = pd.DataFrame(columns=page.KEYS)
    path = page.write_page(tmp_path, [("", pd.DataFrame())], nothing, "Nothing", [], [])
    browser.open(path)
    header, *sections = browser.js(heights_of("main > *"))
    assert header > 0
    assert [height > 0 for height in sections] == [False, True, False, False, False]
    links = browser.js(heights_of("nav a"))
    assert [height > 0 for height in links] == [False, True, False, False, False]
    assert not browser.faults()
