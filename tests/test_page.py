"""The page: hostile text stays text, every row is there, and a real browser can work with it.

The browser tests speak the DevTools protocol over a pipe to a headless Chromium (no driver, no package); they are
skipped where no Chromium is installed. SAIL_SHOTS=folder keeps screenshots.
"""

import base64
import html.parser
import itertools
import json
import math
import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lib import page, world
from lib.run import UserError

MODELS = ["base", "Iter0", "SAIL 1", "SAIL 2", "SAIL 3"]
NAMES = ["PickScore", "HPSv2", "ImageReward", "Aesthetics"]
HOSTILE = ['</script><script>window.pwned=1</script>', '<img src=x onerror="window.pwned=1">', '<!-- <script>',
           '&lt;b&gt; "quotes" \'n\' `${window.pwned=1}`', "\u2028 \x00 日本語 שלום 🦊", "<!--tables-->",
           "constructor </SCRIPT x"]


def example(run: Path, prompts: list[str], models=MODELS, seeds=(0,), size=None) -> pd.DataFrame:
    """A run folder with rendered pictures of a few captions, shared by all prompts, and made-up scores."""
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    captions = [prompt if world.parse(prompt) else world.CAPTIONS[97 * i % 1728] for i, prompt in
                enumerate(prompts[:60])]
    for m, model in enumerate(models):
        scene = world.sample_scenes(captions, generator)
        scene["softness"] = scene["softness"] * (2 - m / len(models))
        (run / "eval/images" / model).mkdir(parents=True)
        for i, picture in enumerate(world.to_pil(world.render(scene))):
            (picture.resize(size) if size else picture).save(run / f"eval/images/{model}/{i:05}_0.png")
    skill = rng.normal(size=(len(prompts), 1))
    style = lambda i: world.STYLES[parsed[2] if (parsed := world.parse(prompts[i])) else i % 4]
    rows = []
    for m, model in enumerate(models):
        for i, seed in itertools.product(range(len(prompts)), seeds):
            rows.append((model, ("HPSv2", "Pick-a-Pic")[i % 2], style(i), i, prompts[i], seed,
                         f"eval/images/{model}/{i % len(captions):05}_0.png"))
    table = pd.DataFrame(rows, columns=page.KEYS)
    draw = lambda scale: scale * (.6 * skill[table["prompt_id"], 0] + .5 * rng.normal(size=len(table))
                                  + .25 * table["model"].map(models.index))
    return table.assign(PickScore=20.6 + draw(1), HPSv2=.275 + draw(.01), ImageReward=.1 + draw(.8),
                        Aesthetics=5.4 + draw(.4))


def results(scores: pd.DataFrame) -> pd.DataFrame:
    """A table with as many columns as the real one."""
    groups = scores.groupby(["model", "benchmark"], sort=False)[NAMES].mean()
    base = groups.loc["base"]
    rows = []
    for (model, benchmark), values in groups.iterrows():
        row = {"model": model, "benchmark": benchmark}
        for name in NAMES:
            v, g = values[name], values[name] - base.loc[benchmark, name]
            row |= {name: f"{v:.3f} [{v - .1:.3f}, {v + .1:.3f}]",
                    f"{name} gain": "" if model == "base" else f"{g:+.3f}",
                    f"{name} paper": math.nan if model == "SAIL 1" else round(v, 2)}
        rows.append(row | {"win rate": "–" if model == "base" else "63.1%", "pairs": 64})
    return pd.DataFrame(rows)


def embedded(path: Path) -> dict:
    """The JSON of a written page, as a browser's HTML parser would cut it out."""
    class Parser(html.parser.HTMLParser):
        text, scripts, inside = "", 0, False

        def handle_starttag(self, tag, attributes):
            self.scripts += tag == "script"
            self.inside = dict(attributes).get("id") == "data"

        def handle_endtag(self, tag):
            self.inside = False

        def handle_data(self, data):
            self.text += data if self.inside else ""

    parser = Parser()
    parser.feed(path.read_text())
    assert parser.scripts == 2 and not set("<>&") & set(parser.text)
    return json.loads(parser.text)


# ---- without a browser ----

def test_every_row_and_hostile_text_come_back(tmp_path):
    scores = example(tmp_path, HOSTILE, seeds=(3, 4))
    scores.loc[2, "HPSv2"] = math.nan
    scores = scores.rename(columns={"Aesthetics": "</script>"})
    tables = [(HOSTILE[0], results(example(tmp_path / "b", HOSTILE)))]
    path = page.write_page(tmp_path, tables, scores, HOSTILE[0], HOSTILE, [(HOSTILE[1], scores["image"][0])])
    assert path == tmp_path / "eval/index.html" and not list(path.parent.glob(".*"))
    data = embedded(path)
    assert data["models"] == MODELS and data["scores"] == NAMES[:3] + ["</script>"]
    assert [row[3] for row in data["rows"]] == [p for p in HOSTILE for _ in range(2)]
    back = {(data["models"][m], row[3], cell[1]): cell for row in data["rows"] for m, cell in enumerate(row[4])}
    assert len(back) == len(scores)
    for row in scores.to_dict("records"):
        address, _, *values = back[row["model"], row["prompt"], str(row["seed"])]
        assert (path.parent / address.replace("%20", " ")).resolve() == (tmp_path / row["image"]).resolve()
        np.testing.assert_allclose(np.array(values, float), [row[n] for n in data["scores"]], rtol=1e-5)
    text = path.read_text()
    assert not any(bad in text for bad in HOSTILE[:3])
    assert not re.search(r"https?:|//[a-z]", text.split("<script>")[0])                    # nothing from a network


def test_seeds_pair_up(tmp_path):
    """Rows join equal seeds; models with other or no seeds take the free places; partial models leave gaps."""
    keys = [("base", 0, 1), ("base", 0, 2), ("base", 1, 1), ("part", 0, 2), ("own", 0, None), ("own", 0, None)]
    scores = pd.DataFrame([(m, "b", None, p, f"prompt {p}", s, f"eval/{i}.png", float(i))
                           for i, (m, p, s) in enumerate(keys)], columns=[*page.KEYS, "s"])
    rows = page.gallery(tmp_path, scores)["rows"]
    assert [[cell and cell[2] for cell in row[4]] for row in rows] == [[0, None, 4], [1, 3, 5], [2, None, None]]
    assert rows[0][4][0][1] == "1" and rows[0][4][2][1] == ""


def test_addresses(tmp_path):
    address = lambda image: page._address(tmp_path, image, page.SCORES, 7)
    assert address("eval/images/a b/#1?%.png") == "images/a%20b/%231%3F%25.png"
    assert address("iter1/images/x.png") == "../iter1/images/x.png"
    assert address("eval/javascript:alert(1)") == "javascript%3Aalert%281%29"
    for bad in ("../x.png", "/etc/passwd", "eval/../../x.png"):
        with pytest.raises(UserError, match="row 7.*leaves the run folder"):
            address(bad)


def test_table_as_it_comes(tmp_path):
    frame = pd.DataFrame({"model": ["<b>", "x"], "HPSv2 gain": ["+0.12", "−0.3"], "n": [64, 0], "paper": [.28, None]})
    text = page._table(frame)
    assert "&lt;b&gt;" in text and '"number up">+0.12</td>' in text and '"number down">−0.3</td>' in text
    gains = ["+0.1 [+0.01, +0.3]", "-0.1 [-0.3, +0.1]", "+0.1 [+0.000, +0.2]", "−0.1 [−0.2, −0.01]", "+0.1 [-0.000, +0.2]"]
    cells = page._table(pd.DataFrame({"gain": gains})).split("<td")[1:]
    assert [cell.split('"')[1] for cell in cells] == ["number up", "number", "number", "number down", "number"]
    assert '<td class="number">64</td>' in text and '<td class="number">0.28</td>' in text and "nan" not in text


def test_empty(tmp_path):
    path = page.write_page(tmp_path, [("", pd.DataFrame())], pd.DataFrame(columns=page.KEYS), "nothing", [], [])
    assert embedded(path)["rows"] == []


# ---- in a browser ----

class Browser:
    """Chromium, spoken to in the DevTools protocol over file descriptors 3 and 4."""
    FLAGS = ("--headless --disable-gpu --disable-quic --no-first-run --disable-background-networking "
             "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars "
             "--remote-debugging-pipe").split()
    PLUG = ("import os, sys; r, w = map(int, sys.argv[1:3]); high = max(r, w) + 1; os.dup2(r, high); "
            "os.dup2(w, high + 1); os.dup2(high, 3); os.dup2(high + 1, 4); os.execv(sys.argv[3], sys.argv[3:])")

    def __init__(self, program: str, profile: Path):
        read, self.write = os.pipe()
        self.read, write = os.pipe()
        flags = [*self.FLAGS, f"--user-data-dir={profile}"] + ["--no-sandbox"] * (os.geteuid() == 0)
        self.process = subprocess.Popen(
            [sys.executable, "-IS", "-c", self.PLUG, str(read), str(write), program, *flags],
            pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(read), os.close(write)
        self.buffer, self.events, self.number, self.session = b"", [], 0, None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(domain + ".enable")

    def message(self) -> dict:
        while b"\0" not in self.buffer:
            assert select.select([self.read], [], [], 60)[0], "the browser says nothing"
            part = os.read(self.read, 1 << 20)
            assert part, "the browser is gone"
            self.buffer += part
        text, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(text)

    def __call__(self, method: str, **parameters) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self.message()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path, width=1280, height=900, dark=False, fragment="") -> float:
        """Load a page at a size; returns the seconds until its script is through."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 800)
        self("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self("Page.navigate", url="about:blank")
        self.events.clear()
        start = time.perf_counter()
        self("Page.navigate", url=path.resolve().as_uri() + fragment)
        while not self.js("document.readyState === 'complete' && !!document.querySelector('#means > *')"):
            assert time.perf_counter() - start < 20
            time.sleep(.02)
        return time.perf_counter() - start

    def js(self, expression: str):
        answer = self("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def frame(self):
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))")

    def key(self, key: str):
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        codes = {"Escape": 27, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        code = codes.get(key, ord(key[0].upper()))
        self("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)
        self.frame()

    def click(self, selector: str):
        x, y = self.js(f"(e => {{ e.scrollIntoView({{ block: 'center' }}); const r = e.getBoundingClientRect();"
                       f"return [r.x + r.width / 2, r.y + r.height / 2] }})(document.querySelector({selector!r}))")
        self.frame()
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.frame()

    def set(self, name: str, value: str):
        self.js(f"{name}_ = document.getElementById({name!r}); {name}_.value = {value!r};"
                f"{name}_.dispatchEvent(new Event('input')); 0")
        self.frame()

    def faults(self) -> list:
        """Console errors, uncaught exceptions, and requests that are not for files."""
        found = []
        for event in self.events:
            method, value = event.get("method"), event.get("params", {})
            if method in ("Runtime.exceptionThrown", "Log.entryAdded") or (
                    method == "Runtime.consoleAPICalled" and value["type"] in ("error", "warning", "assert")):
                found.append(event)
            if method == "Network.requestWillBeSent" and not re.match("file:|about:|data:", value["request"]["url"]):
                found.append(value["request"]["url"])
        return found

    def shot(self, name: str):
        """Keep a screenshot of the window when SAIL_SHOTS names a folder."""
        if folder := os.environ.get("SAIL_SHOTS"):
            self.js("new Promise(done => setTimeout(done, 300))")
            Path(folder, name + ".png").write_bytes(base64.b64decode(self("Page.captureScreenshot")["data"]))

    def close(self):
        self.session = None
        self("Browser.close")
        self.process.wait(10)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium or google-chrome on this machine")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """40 captions of the world (and one long, one hostile prompt), sheets and notes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    run = tmp_path_factory.mktemp("run")
    prompts = [world.CAPTIONS[97 * i] for i in range(17)] + ["an oil painting of " + "a very long prompt, " * 20]
    prompts += HOSTILE + [world.CAPTIONS[(97 * i + 5) % 1728] for i in range(15)]
    scores = example(run, prompts)
    scores.loc[len(prompts), NAMES] = math.nan                                  # Iter0 has no score for the first
    figure, axes = plt.subplots(1, 2, figsize=(8, 3))
    for axis, name in zip(axes, NAMES):
        axis.plot(scores.groupby("model", sort=False)[name].mean().tolist())
        axis.set_title(name)
    figure.tight_layout()
    figure.savefig(run / "eval/curves.png", dpi=120)
    plt.close(figure)
    notes = [f"{k}: {v}" for k, v in {"preset": "tiny", "steps": 10, "guidance": 2.0, "torch": "2.15.0",
                                      "diffusers": "0.42.1", "scorers": "the world's oracle"}.items()]
    tables = [("Means", results(scores)), ("Again", results(scores).iloc[:, :4])]
    page.write_page(run, tables, scores, "SAIL in the embedded world", notes, [
        ("Scores over the iterations; bands are 95% intervals.", "eval/curves.png"),
        ("A preview sheet.", scores["image"][3])])
    return run / "eval/index.html"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width,height", [(1280, 900), (390, 844)])
def test_looks(browser, small, width, height, dark):
    """No error, no request, no sideways overflow, no foreign script, pictures there, rows all equally high."""
    browser.open(small, width, height, dark)
    name = f"{'phone' if width < 800 else 'desktop'}-{'dark' if dark else 'light'}"
    browser.shot(name + "-top")
    browser.js("document.getElementById('bar').scrollIntoView()")
    browser.frame()
    browser.shot(name + "-rows")
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert (browser.js("parseInt(getComputedStyle(document.body).backgroundColor.slice(4))") < 128) == dark
    wait = "new Promise(done => setTimeout(() => done([...document.querySelectorAll('.row img')].filter(i => {" \
           "const r = i.getBoundingClientRect(); return r.top < innerHeight && r.bottom > 0 && !i.naturalWidth })" \
           ".length), 300))"
    assert browser.js(wait) == 0
    heights = set()
    for place in (0, .3, .5, 1):
        browser.js(f"scrollTo(0, document.documentElement.scrollHeight * {place})")
        browser.frame()
        heights |= set(browser.js("[...document.querySelectorAll('.row')].map(e => e.offsetHeight)"))
        if place == .5:
            browser.shot(name + "-hostile")
    assert len(heights) == 1
    browser.click(".row .picture")
    browser.shot(name + "-box")
    assert browser.js("box.open && box.scrollWidth <= innerWidth && full.getBoundingClientRect().width > 250")
    assert browser.js("window.pwned") is None and not browser.faults()


def test_work(browser, small):
    """Filters, search, scores, orders, the means, and the address that keeps them."""
    browser.open(small)
    rows = "+document.querySelector('#means .name').textContent.split(' ')[0]"
    first = "document.querySelector('.row .words').textContent"
    assert browser.js(rows) == 40
    browser.set("benchmark", "0")
    assert browser.js(rows) == 20
    browser.set("style", "1")
    assert browser.js(rows) == browser.js("rows.filter(r => r.benchmark === 0 && r.style === 1).length") < 20
    browser.set("search", "no such prompt")
    assert browser.js(rows) == 0 and not browser.js("none.hidden")
    browser.set("search", "")
    for name in ("benchmark", "style"):
        browser.set(name, "")
    browser.js("document.getElementById('prompts').scrollIntoView()")
    browser.set("search", "a very LONG")
    assert browser.js(rows) == 1 and browser.js(first).startswith("an oil painting")
    browser.set("search", "</script>")
    assert browser.js(rows) == 1 and browser.js(first) == HOSTILE[0]
    browser.set("search", "#5")
    assert browser.js(rows) == 1
    browser.set("search", "")
    browser.set("score", "2")
    gains = browser.js("rows.map(r => gain(r, 3, 2))")
    for way, order in (("gain", sorted(gains, reverse=True)), ("loss", sorted(gains))):
        browser.set("order", way + " 3")
        assert browser.js("shown.map(r => gain(r, 3, 2))") == order
        text = browser.js("document.querySelectorAll('.row .chosen .gain')[3].textContent")
        assert abs(float(text.replace("−", "-")) - order[0]) < .01
    browser.set("order", "gain 1")
    browser.set("score", "0")                                                     # a row without a score goes last
    assert browser.js("shown.at(-1).id") == "0"
    assert float(browser.js("document.querySelectorAll('#means .gain')[2].textContent")) == pytest.approx(
        np.mean(browser.js("rows.map(r => gain(r, 3, 0))")), abs=.01)
    browser.set("search", "red")
    fragment, count, order = browser.js("location.hash"), browser.js(rows), browser.js("shown.map(r => r.id)")
    browser.open(small, fragment=fragment)
    assert browser.js(rows) == count < 40 and browser.js("shown.map(r => r.id)") == order
    assert not browser.faults()


def test_box_and_keys(browser, small):
    browser.open(small)
    browser.js("document.getElementById('prompts').scrollIntoView()")
    browser.frame()
    browser.click(".row:nth-child(2) [data-model='3']")
    at = lambda: browser.js("[box.open, current, model]")
    assert at() == [True, 1, 3]
    path = [("ArrowRight", [True, 1, 4]), ("ArrowRight", [True, 1, 0]), ("ArrowLeft", [True, 1, 4]),
            ("j", [True, 2, 4]), ("ArrowDown", [True, 3, 4]), ("k", [True, 2, 4]), ("ArrowUp", [True, 1, 4]),
            ("2", [True, 1, 1]), ("Escape", [False, 1, 1]), ("j", [False, 2, 1]), ("k", [False, 1, 1]),
            ("k", [False, 0, 1]), ("k", [False, 0, 1])]
    for key, expected in path:
        browser.key(key)
        assert at() == expected, key
    for _ in range(30):
        browser.key("j")
    box = browser.js("(r => [r.top >= bar() - 1, r.bottom <= innerHeight + 1])"
                     "(document.querySelector('.row.current').getBoundingClientRect())")
    assert box == [True, True] and at() == [False, 30, 1]
    browser.key("Enter")
    assert at() == [True, 30, 1] and browser.js("words.textContent === shown[30].prompt")
    assert browser.js("full.src.endsWith(encodeURI(shown[30].cells[1][0])) || full.src.endsWith(shown[30].cells[1][0])")
    browser.click("#matrix tbody tr:nth-child(3)")
    assert at() == [True, 30, 2]
    browser.click("#keys [data-step='1 0']")
    assert at() == [True, 31, 2]
    browser.click("#close")
    browser.key("/")
    assert at() == [False, 31, 2] and browser.js("document.activeElement.id") == "search"
    assert not browser.faults()


def test_many(browser, tmp_path):
    """3,200 prompts x 5 models: writing under 10 s, loading under 5 s, filter, order and jump under 1 s each."""
    scores = example(tmp_path, [f"{world.CAPTIONS[i % 1728]}, version {i}" for i in range(3200)])
    start = time.perf_counter()
    path = page.write_page(tmp_path, [("Means", results(scores))], scores, "HPSv2", [], [])
    writing = time.perf_counter() - start
    loading = browser.open(path)
    timed = lambda code: browser.js(f"(() => {{ const t = performance.now(); {code}; document.body.offsetHeight;"
                                    "return (performance.now() - t) / 1000 })()")
    act = lambda name, value: timed(f"{name}.value = '{value}'; {name}.dispatchEvent(new Event('input'))")
    times = [act("search", "star"), act("search", ""), act("order", "gain 4"), act("benchmark", "1"),
             timed("scrollTo(0, document.documentElement.scrollHeight); draw()")]
    print(f"write {writing:.2f} s, load {loading:.2f} s, then {[round(t, 3) for t in times]} s, "
          f"{path.stat().st_size / 1e6:.1f} MB")
    assert writing < 10 and loading < 5 and max(times) < 1
    assert browser.js("document.querySelectorAll('.row').length") < 20 and browser.js("drawn.has(shown.length - 1)")
    assert not browser.faults()


def test_one_model_without_scores(browser, tmp_path):
    scores = example(tmp_path, world.CAPTIONS[:3], models=["own"], size=(768, 512)).drop(columns=NAMES)
    browser.open(page.write_page(tmp_path, [("", pd.DataFrame())], scores, "Own pictures", [], []), 390)
    browser.shot("phone-own")
    browser.click(".row .picture")
    browser.key("ArrowRight")
    assert browser.js("box.open && model === 0 && document.getElementById('order').hidden")
    page.write_page(tmp_path, [("", pd.DataFrame())], scores[:0], "Nothing", [], [])
    browser.open(tmp_path / "eval/index.html")
    assert not browser.faults()
