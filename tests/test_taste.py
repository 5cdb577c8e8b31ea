"""Labelling and blind comparison: no answer is lost or counted twice, and nobody else gets in.

The page is driven in a real browser, with real keys; those tests are skipped where no Chromium is
installed. SAIL_SHOTS=folder keeps screenshots.
"""

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import uvicorn
from conftest import (ENV, ROOT, call, fails_with, make_pairs, picture, refused,
                      settings_of)

from lib import judge
from lib.data import few
from lib.data.folders import agreement_beside
from lib.settings import PRESETS, Settings, build_parser, check
from lib.taste import draw, duel, experiment, label, person, server, tally, votes
from lib.taste.answers import UNDO, Answer, AnswerFile, labels, standing
from lib.taste.answers import votes as votes_of
from lib.taste.showings import GAP, Showing, comes_twice, left_of, neighbours, outlook
from lib.world import scenes

HOSTILE = '<img src=x onerror="window.pwned=1"> </script> שלום 🦊'


# ---- the file of answers ----

def line(pair: str = "p", answer: str = "left", **others) -> Answer:
    values = {"id": "", "turn": 1, "left": "a", "seconds": 1., "time": "", "labeller": "me",
              "sitting": 1}
    return Answer(pair=pair, answer=answer, **values | others)


def as_text(answer: Answer) -> str:
    return json.dumps(answer._asdict()) + "\n"


# What stands in the file -> the words that count, by pair, and the faults that are told.
FILES = {
    "nothing": ("", {}, []),
    "two answers": (as_text(line("p")) + as_text(line("q", "tie")), {"p": "left", "q": "tie"}, []),
    "the last word counts": (as_text(line("p")) + as_text(line("p", "right")), {"p": "right"}, []),
    "taken back": (as_text(line("p")) + as_text(line("p", UNDO)), {}, []),
    "taken back and said anew": (
        as_text(line("p")) + as_text(line("p", UNDO)) + as_text(line("p", "skip")),
        {"p": "skip"}, []),
    "by hand": ('{"pair": "p", "answer": "right", "left": "b"}\n\n', {"p": "right"}, []),
    "no end of line": (as_text(line("p")).rstrip("\n"), {"p": "left"}, []),
    "cut off": (as_text(line("p")) + as_text(line("q"))[:40], {"p": "left"}, ["row 2: cut off"]),
    "broken in the middle": (
        as_text(line("p")) + "oops\n[1]\n" + '{"pair": "r", "answer": "best", "left": "a"}\n'
        + as_text(line("q")),
        {"p": "left", "q": "left"},
        ["row 2: no answer", "row 3: no answer", "row 4: no answer (answer is 'best'"]),
    "wrong types": ('{"pair": "p", "answer": ["left"], "left": "a"}\n', {}, ["row 1: no answer"]),
    "no text": (b"\xff\xfe\x00" + as_text(line("p")).encode() + as_text(line("q")).encode(),
                {"q": "left"}, ["row 1: no answer"]),
}


@pytest.mark.parametrize("name", FILES)
def test_of_each_pair_the_last_word_counts_and_broken_lines_are_named(tmp_path, name):
    text, words, faults = FILES[name]
    path = tmp_path / "answers.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    file = AnswerFile(path)
    assert {answer.pair: answer.answer for answer in standing(file.lines)} == words
    assert len(file.faults) == len(faults)
    for told, fault in zip(file.faults, faults):
        assert fault in told and str(path) in told

    # Whatever stands there, the next answer is a line of its own, and all before it stay.
    file.append(line("new", "right"))
    again = AnswerFile(path)
    assert {answer.pair: answer.answer for answer in standing(again.lines)} == words | {
        "new": "right"}


def test_on_a_full_disk_the_file_stays_as_it_was(tmp_path, monkeypatch):
    file = AnswerFile(tmp_path / "answers.jsonl")
    file.append(line("p"))
    before = file.path.read_bytes()

    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:10]))
    with pytest.raises(OSError, match="No space left"):
        file.append(line("q"))
    assert file.path.read_bytes() == before


def test_what_another_labeller_writes_is_seen_at_once(tmp_path):
    one, other = AnswerFile(tmp_path / "a.jsonl"), AnswerFile(tmp_path / "a.jsonl")
    one.append(line("p", labeller="anna"))
    other.append(line("p", "right", labeller="ben"))
    one.read()
    assert [answer.labeller for answer in one.lines] == ["anna", "ben"]
    assert (one.next_sitting("anna"), one.next_sitting("carl")) == (2, 1)


PAIRS = pd.DataFrame({"pair_id": list("pqr"), "prompt": ["x", "y", "z"],
                      "a": ["p1", "q1", "r1"], "b": ["p2", "q2", "r2"]})


def test_a_pair_to_train_on_is_what_most_answers_prefer():
    cast = votes_of([
        line("p", "left", left="b"),                                # b
        line("p", "right", left="b", turn=2),                       # a: no majority any more
        line("q", "right", left="a"),                               # b
        line("q", "tie", labeller="ben"),
        line("r", "skip"),
        line("r", "left", left="a", labeller="ben"),
        line("unknown", "left"),
    ], PAIRS)
    assert cast.winner.tolist() == ["b", "a", "b", "", "a"]
    assert labels(cast, PAIRS).values.tolist() == [["y", "q2", "q1"], ["z", "r1", "r2"]]


# ---- what is shown ----

IDS = [f"{number:03}" for number in range(60)]


def label_all(ids, labeller="me", word="left") -> list[Answer]:
    """Answer whatever comes next until nothing is left."""
    lines = []
    while True:
        view = outlook(ids, lambda pair: True, lines, labeller, all_drawn=True)
        if not view.next:
            assert view.left == 0
            return lines
        showing = view.next[0]
        lines.append(line(showing.pair, word, turn=showing.turn, labeller=labeller,
                          left=left_of(showing.pair, labeller, showing.turn)))
        assert view.answered == len(lines) - 1


def test_a_tenth_comes_twice_with_the_sides_swapped_some_time_apart():
    lines = label_all(IDS)
    places = {Showing(answer.pair, answer.turn): place for place, answer in enumerate(lines)}
    twice = [showing.pair for showing in places if showing.turn == 2]
    assert len(places) == len(lines) == 66 and sorted(p for p, t in places if t == 1) == IDS
    assert len(twice) == 6

    gaps = []
    for pair in twice:
        first, second = places[Showing(pair, 1)], places[Showing(pair, 2)]
        assert lines[first].left != lines[second].left
        gaps.append(second - first)
    assert min(gaps) > 10 and max(gaps) <= 2 * GAP + 1
    assert sum(gap > GAP for gap in gaps) >= 4                      # all but the last of them


def test_sides_are_drawn_evenly_and_labellers_have_orders_of_their_own():
    of_two = [label_all(IDS, name) for name in ("anna", "ben")]
    orders = [[answer.pair for answer in lines] for lines in of_two]
    assert orders[0] != orders[1]
    for lines in of_two:
        assert 20 <= sum(answer.left == "a" for answer in lines) <= 46


def test_skipped_pairs_do_not_come_again():
    assert len(label_all(IDS, word="skip")) == 60


def test_more_pairs_leave_what_was_chosen_to_come_twice():
    assert comes_twice(IDS[:40], "me") == comes_twice(IDS, "me") & set(IDS[:40])


def test_what_is_taken_back_comes_again_in_its_turn():
    lines = label_all(IDS)[:30]
    back = lines[-1:-4:-1]
    for answer in back:
        lines.append(answer._replace(answer=UNDO))
    coming = outlook(IDS, lambda pair: True, lines, "me", all_drawn=True)
    shown = [Showing(answer.pair, answer.turn) for answer in reversed(back)]
    assert coming.next[:3] == shown and coming.answered == 27


def test_pairs_that_are_not_drawn_yet_wait():
    view = outlook(IDS, lambda pair: pair in ("007", "009"), [], "me", all_drawn=False)
    assert {showing.pair for showing in view.next} == {"007", "009"}
    assert view.left == 66


def test_pictures_of_one_prompt_are_paired():
    prompts = ["x", "y", "x", "z", "y", "x", "x"]
    pairs = neighbours(prompts)
    assert all(prompts[one] == prompts[other] and one != other for one, other in pairs)
    assert sorted(prompts[one] for one, _ in pairs) == ["x", "x", "x", "y"]
    assert {prompts[one] for one, _ in pairs[:2]} == {"x", "y"}     # a pair of every prompt first
    assert {*pairs[0], *pairs[2]} >= {0, 2, 5, 6} or prompts[pairs[0][0]] == "y"


# ---- what votes tell ----

def vote(prompt, left, right, winner, turn=1, labeller="me", pair=None):
    return {"pair_id": pair or f"{prompt} {sorted((left, right))}", "prompt": prompt,
            "labeller": labeller, "turn": turn, "left": left, "right": right, "winner": winner}


def many_votes(count: int, chances: dict) -> pd.DataFrame:
    """Votes on `count` prompts between all models, of known chances that the first wins."""
    rng = np.random.default_rng(1)
    rows = []
    for number in range(count):
        for (one, other), chance in chances.items():
            winner = one if rng.random() < chance else other
            if rng.random() < .15:
                winner = ""
            sides = (one, other) if rng.random() < .5 else (other, one)
            rows.append(vote(f"prompt {number}", *sides, winner))
    return pd.DataFrame(rows)


def test_win_rate_and_its_interval_over_prompts():
    cast = many_votes(300, {("base", "Iter3"): .3})
    again = cast.assign(turn=2)                                     # tells nothing new
    rate = votes.win_rate(pd.concat([cast, again]), "Iter3", "base")

    points = [{"Iter3": 1, "base": 0, "": .5}[winner] for winner in cast.winner]
    half = 1.96 * np.std(points, ddof=1) / math.sqrt(len(points))
    assert rate.value == pytest.approx(np.mean(points))
    assert rate.low == pytest.approx(np.mean(points) - half, abs=.005)
    assert rate.high == pytest.approx(np.mean(points) + half, abs=.005)
    assert rate.ties == pytest.approx(np.mean([winner == "" for winner in cast.winner]))
    assert (rate.votes, rate.prompts, rate.more) == (600, 300, 900)

    opposite = votes.win_rate(cast, "base", "Iter3")
    assert opposite.value == pytest.approx(1 - rate.value)
    assert votes.win_rate(cast, "base", "other") is None


def test_a_few_votes_that_agree_are_no_certainty():
    cast = pd.DataFrame([vote(str(number), "a", "b", "a") for number in range(8)])
    rate = votes.win_rate(cast, "a", "b")
    assert rate.value == 1 and .6 < rate.low < .7 and rate.high == pytest.approx(1)


def test_strengths_are_the_most_likely_ones():
    names = ["base", "Iter0", "Iter3"]
    cast = many_votes(150, {("base", "Iter0"): .4, ("base", "Iter3"): .2, ("Iter0", "Iter3"): .3})
    told = votes.strengths(cast, names).set_index("model")

    # The likelihood, climbed plainly.
    games = [(row.left, row.right, {row.left: 1., row.right: 0.}.get(row.winner, .5))
             for row in cast.itertuples()]
    for one, other in (("base", "Iter0"), ("base", "Iter3"), ("Iter0", "Iter3")):
        games.append((one, other, .5))                              # the added tie
    left = torch.tensor([names.index(game[0]) for game in games])
    right = torch.tensor([names.index(game[1]) for game in games])
    points = torch.tensor([game[2] for game in games])
    strength = torch.zeros(3, requires_grad=True)
    climber = torch.optim.LBFGS([strength], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        climber.zero_grad()
        logits = strength[left] - strength[right]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, points)
        value.backward()
        return value

    climber.step(loss)
    expected = (strength - strength[0]).tolist()
    assert told.strength.tolist() == pytest.approx(expected, abs=.002)
    assert (told.low <= told.strength).all() and (told.strength <= told.high).all()
    assert told.low["Iter3"] > told.high["base"] == 0

    # Whoever has lost nothing keeps a finite strength.
    unbeaten = pd.DataFrame([vote(str(number), "a", "b", "b") for number in range(5)])
    assert 1 < votes.strengths(unbeaten, ["a", "b"]).strength[1] < 5


def test_side_bias_and_agreement_by_hand():
    cast = pd.DataFrame([
        vote("1", "a", "b", "a"), vote("1", "b", "a", "a", turn=2),                 # the same
        vote("2", "a", "b", "a"), vote("2", "b", "a", "b", turn=2),                 # the opposite
        vote("3", "a", "b", ""), vote("3", "b", "a", "b", turn=2),                  # half
        vote("4", "a", "b", ""), vote("4", "b", "a", "", turn=2),                   # no label
        vote("5", "b", "a", "a"),
        vote("1", "a", "b", "a", labeller="ben"), vote("5", "a", "b", "b", labeller="ben"),
    ])
    itself = votes.self_agreement(cast)
    assert (itself.value, itself.n) == (.5, 3)
    assert votes.self_agreement(cast[cast.labeller == "ben"]).n == 0
    assert str(votes.self_agreement(cast[cast.labeller == "ben"])) == "not known yet"
    between = votes.between_labellers(cast)
    assert list(between) == [("ben", "me")]
    assert (between["ben", "me"].value, between["ben", "me"].n) == (.5, 2)

    # Decided with the left one: 1, 2, 2 again, 3 again, and ben's first.
    bias = votes.side_bias(cast)
    assert (bias.value, bias.n) == (pytest.approx(5 / 8), 8)


# ---- a server to work at ----

@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """24 pictures of 12 prompts, with a table."""
    folder = tmp_path_factory.mktemp("pictures")
    prompts = [HOSTILE, *(f"a thing, number {number}" for number in range(11))]
    lines = ["prompt,image"]
    for number, prompt in enumerate(prompts * 2):
        picture(number, (64, 64)).save(folder / f"secret-model-{number}.png")
        quoted = prompt.replace('"', '""')
        lines.append(f'"{quoted}",secret-model-{number}.png')
    (folder / "images.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder


@contextlib.contextmanager
def serving(desk: server.Desk):
    """A page for this desk in a thread: its address. `desk.ended` tells when it is finished."""
    desk.ended = threading.Event()
    with server.listen(server.LOCAL, 18000) as sock:
        port = sock.getsockname()[1]
        app = server.application(desk, "token", server.LOCAL, f"sail-{port}", desk.ended.set)
        config = uvicorn.Config(app, log_level="warning", lifespan="off",
                                timeout_graceful_shutdown=1)
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}/?token=token"
        finally:
            running.should_exit = True
            thread.join()


def desk_at(run: Path, pictures: Path, labeller: str = "me", count: int = 12) -> server.Desk:
    s = Settings(**PRESETS["tiny"] | {"run": str(run)})
    pairs = label.choose_pairs(s, str(pictures), count)
    return label.desk_of(s, pairs, AnswerFile(run / "answers.jsonl"), labeller)


def winners_in(run: Path) -> dict:
    """The file, read plainly: the picture preferred of each (labeller, pair, turn), or the word."""
    found = {}
    for text in (run / "answers.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(text)
        key = (record["labeller"], record["pair"], record["turn"])
        left = record["left"]
        right = {"a": "b", "b": "a"}[left]
        found[key] = {"left": left, "right": right}.get(record["answer"], record["answer"])
    return {key: word for key, word in found.items() if word != "undo"}


class Person:
    """Somebody in front of the page, who notes what they did."""

    def __init__(self, browser, address: str, desk: server.Desk, **size):
        self.browser, self.desk = browser, desk
        self.given = {}
        self.order = []
        browser.open(address, **size)
        self.settle()

    def settle(self, condition: str = "(showing || state.done)"):
        end = time.monotonic() + 10
        while not self.browser.js(f"Boolean(state && !busy && {condition})"):
            assert time.monotonic() < end, self.browser.js("document.body.innerText")
            time.sleep(.01)

    def do(self, word: str, act) -> None:
        """Act, and note what was answered to the pair that can be seen."""
        now = self.browser.js("showing")
        act()
        self.settle()
        if word == "undo":
            del self.given[self.order.pop()]
            return
        pair_id = self.desk.pairs[now["pair"]]["pair_id"]
        left = left_of(pair_id, self.desk.labeller, now["turn"])
        right = {"a": "b", "b": "a"}[left]
        key = (self.desk.labeller, pair_id, now["turn"])
        self.order.append(key)
        self.given[key] = {"left": left, "right": right}.get(word, word)

    def key(self, word: str) -> None:
        keys = {"left": "ArrowLeft", "right": "ArrowRight", "tie": "ArrowDown", "skip": "ArrowUp",
                "undo": "Backspace"}
        self.do(word, lambda: self.browser.key(keys[word]))

    def tap(self, word: str) -> None:
        place = f"#{word}" if word in ("left", "right") else f"#keys [data-answer={word}]"
        self.do(word, lambda: self.browser.click(place))


SIZES = {"desktop": (1280, 800), "phone": (390, 844)}


@pytest.mark.parametrize("size", SIZES)
def test_what_is_answered_in_the_page_is_in_the_file(browser, tmp_path, pictures, size):
    width, height = SIZES[size]
    desk = desk_at(tmp_path, pictures)
    with serving(desk) as address:
        somebody = Person(browser, address, desk, width=width, height=height)
        act = somebody.key if size == "desktop" else somebody.tap
        boxes = browser.js("[...document.querySelectorAll('.picture, #prompt, #keys')].map(e => {"
                           "const b = e.getBoundingClientRect();"
                           "return [b.x, b.y, b.right, b.bottom, b.width, b.height] })")
        for left, top, right, bottom, *_ in boxes:                  # all of it can be seen
            assert left >= 0 and top >= 0 and right <= width and bottom <= height
        one, other = [box for box in boxes[1:3]]
        assert one[4:] == other[4:] and one[4] > 250
        assert (one[0] == other[0]) == (size == "phone")            # stacked on a phone
        browser.shot(f"label-{size}")

        # Each word is on the disk before the next pair shows.
        for word in ("left", "tie", "right", "skip", "undo", "undo", "left", "tie"):
            act(word)
            assert winners_in(tmp_path) == somebody.given
        assert "token" not in browser.js("location.href")
        assert browser.js("$('undo').innerText").endswith("undo tie")

        # The page is closed; whoever opens it again goes on, and may still take back all of it.
        somebody.browser.open(address, width=width, height=height, dark=True)
        somebody.settle()
        browser.shot(f"label-{size}-dark")
        for _ in range(4):
            act("undo")
        assert winners_in(tmp_path) == somebody.given == {}
        assert not browser.js("state.undo") and browser.js("$('undo').disabled")

        words = iter(["left", "left", "right", "tie", "skip"] * 4)
        hostile = 0
        while not browser.js("state.done"):
            hostile += browser.js("$('prompt').textContent") == HOSTILE
            act(next(words))
        browser.shot(f"label-{size}-end")
        assert hostile >= 1 and not browser.js("window.pwned")

        browser.click("#close")
        assert desk.ended.wait(5)
    assert winners_in(tmp_path) == somebody.given and len(somebody.given) in (13, 14)

    # No names of files or models in what the page gets.
    heard = [event for event in browser.events if "secret" in json.dumps(event)]
    assert heard == []
    faults = [fault for fault in browser.faults() if not isinstance(fault, str)]
    assert faults == []
    table = pd.read_csv(tmp_path / "pairs.csv")
    decided = [word for word in somebody.given.values() if word in "ab"]
    assert len(table) >= len(decided) - 2
    for row in table.itertuples():
        assert (tmp_path / row.win).is_file() and (tmp_path / row.lose).is_file()


def test_the_next_pair_is_there_before_it_is_asked_for(browser, tmp_path, pictures):
    desk = desk_at(tmp_path, pictures)
    with serving(desk) as address:
        somebody = Person(browser, address, desk)
        coming = browser.js("[state.next.left, state.next.right]")
        browser.js("Promise.all([...prepared.values()].map(each => each.ready))")
        browser.events.clear()
        somebody.key("left")
        asked = [event["params"]["request"]["url"] for event in browser.events
                 if event.get("method") == "Network.requestWillBeSent"]
        assert browser.js("[showing.left, showing.right]") == coming
        assert not [url for url in asked if url.endswith(tuple(coming))]


def test_an_answer_that_does_not_arrive_is_sent_again_and_counts_once(browser, tmp_path, pictures):
    desk = desk_at(tmp_path, pictures)
    with serving(desk) as address:
        somebody = Person(browser, address, desk)
        before = browser.js("showing.pair")

        # It arrives, but the page does not hear of it; then the connection is gone for a while.
        browser.js("window.real = fetch; window.times = 0; window.fetch = async (...given) => {"
                   "  times++;"
                   "  if (times === 1) await real(...given);"
                   "  if (times < 3) throw new TypeError('gone');"
                   "  return real(...given); }")
        browser.key("ArrowLeft")
        browser.js("new Promise(done => { const look = () =>"
                   "  $('note').innerText.includes('is sent as soon') ? done()"
                   "                                                  : setTimeout(look, 5);"
                   "  look(); })")
        assert browser.js("showing.pair") == before                 # nothing else can be answered
        browser.key("ArrowRight")
        somebody.settle(f"showing.pair !== {before}")
        assert browser.js("$('note').hidden") and browser.js("times") == 3
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1
    assert list(winners_in(tmp_path).values()) == [left_of(desk.pairs[before]["pair_id"], "me", 1)]


def test_a_held_key_is_one_answer_and_zoom_shows_both_alike(browser, tmp_path, pictures):
    desk = desk_at(tmp_path, pictures)
    with serving(desk) as address:
        somebody = Person(browser, address, desk)
        browser.js("for (const repeat of [false, true, true])"
                   "  dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowLeft', repeat }))")
        somebody.settle("state.answered > 0")
        browser.js("new Promise(done => setTimeout(done, 100))")
        assert browser.js("state.answered") == 1

        browser.key("z")
        zoomed = browser.js("sides.map(side => getComputedStyle($(side).firstChild).transform)")
        assert zoomed == ["matrix(2.5, 0, 0, 2.5, 0, 0)"] * 2
        browser.key("z")
        unzoomed = "getComputedStyle($('left').firstChild).transform === 'none'"
        assert browser.js(unzoomed)

        # A finger that stays on a picture zooms, and prefers nothing when it is lifted.
        browser.js("window.touch = kind => $('left').dispatchEvent(new PointerEvent(kind,"
                   "  { pointerType: 'touch', bubbles: true, clientX: 9, clientY: 9 }))")
        browser.js("touch('pointerdown'), new Promise(done => setTimeout(done, 450))")
        assert not browser.js(unzoomed)
        browser.js("touch('pointerup'), $('left').click()")
        assert browser.js(unzoomed) and not browser.js("busy")
        browser.js("touch('pointerdown'), touch('pointerup'), $('left').click()")
        somebody.settle("state.answered > 1")
        assert browser.js("state.answered") == 2


# ---- several people, and the answers of the server ----

def test_two_labellers_work_at_once_and_their_agreement_is_told(tmp_path, pictures):
    desks = [desk_at(tmp_path, pictures, name) for name in ("anna", "ben")]
    with serving(desks[0]) as one, serving(desks[1]) as other:
        people = [person.Visitor(one), person.Visitor(other)]

        # Anna likes a; Ben likes a but for one pair.
        odd = desks[0].pairs[3]["pair_id"]
        states = [visitor.state() for visitor in people]
        while not all(state["done"] for state in states):
            for place, (desk, visitor) in enumerate(zip(desks, people)):
                showing = states[place]["showing"]
                if showing:
                    pair_id = desk.pairs[showing["pair"]]["pair_id"]
                    wanted = "b" if desk.labeller == "ben" and pair_id == odd else "a"
                    on_left = left_of(pair_id, desk.labeller, showing["turn"]) == wanted
                    states[place] = visitor.answer(showing, "left" if on_left else "right")
                else:
                    states[place] = visitor.state()

    found = json.loads((tmp_path / "agreement.json").read_text())
    assert found["between"][0]["labellers"] == ["anna", "ben"]
    assert found["between"][0]["value"] == pytest.approx(11 / 12)
    assert found["between"][0]["pairs"] == 12
    assert found["labellers"]["anna"]["agrees_with_self"]["value"] == 1
    table = pd.read_csv(tmp_path / "pairs.csv")
    assert len(table) in (11, 12) and table.win.str.contains("_a").sum() >= 11
    assert "anna and ben agree in 92%" in " ".join(states[0]["summary"])


def status_of(address: str, path: str, cookie: str | None, message=None, **headers) -> int:
    request = urllib.request.Request(address + path)
    if cookie:
        request.add_header("Cookie", cookie)
    for name, value in headers.items():
        request.add_header(name, value)
    if message is not None:
        request.data = message if isinstance(message, bytes) else json.dumps(message).encode()
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        error.read()
        return error.code


def test_only_the_page_itself_gets_anything(tmp_path, pictures):
    desk = desk_at(tmp_path, pictures)
    good = {"id": "12345678", "pair": 0, "turn": 1, "answer": "left", "seconds": 1}
    with serving(desk) as full:
        address, _, _ = full.partition("/?")
        port = address.rpartition(":")[2]
        cookie = f"sail-{port}=token"
        own = {"Origin": address}

        # what is asked -> what comes back
        table = [
            (("/", None), 403),
            (("/?token=guess", None), 403),
            (("/?token=token", None), 200),
            (("/", cookie), 200),
            (("/state", None), 403),
            (("/state?token=token", None), 403),                    # only the page gives the cookie
            (("/state", f"sail-{port}=other"), 403),
            (("/state", "sail-1=token"), 403),
            (("/state", cookie), 200),
            (("/picture/0/1/left", None), 403),
            (("/picture/0/1/left", cookie), 200),
            (("/picture/12/1/left", cookie), 404),
            (("/picture/0/3/left", cookie), 404),
            (("/picture/0/1/a", cookie), 404),
            (("/picture/-1/1/left", cookie), 404),
            (("/picture/0/1/..%2f..%2fanswers.jsonl", cookie), 404),
            (("/picture/../config.json", cookie), 404),
            (("/images/secret-model-0.png", cookie), 404),
            (("/answer", None, good), 403),
            (("/answer", cookie, good), 403),                       # no origin: not from a page
        ]
        for arguments, status in table:
            assert status_of(address, *arguments) == status, arguments
        for origin in ("http://evil.example", f"http://localhost:{port}", "null",
                       f"http://127.0.0.1:{int(port) + 1}"):
            assert status_of(address, "/answer", cookie, good, Origin=origin) == 403, origin
            assert status_of(address, "/state", cookie, Origin=origin) == 403, origin
        for name, status in (("evil.example", 403), (f"evil.example:{port}", 403),
                             ("localhost:9", 200), ("192.168.1.7", 200), ("[::1]:80", 200)):
            assert status_of(address, "/state", cookie, Host=name) == status, name

        # What is no answer is refused, and leaves nothing.
        for change in ({"pair": 99}, {"pair": -1}, {"pair": "0"}, {"turn": 3}, {"answer": "best"},
                       {"seconds": -1}, {"seconds": "1"}, {"id": ""}, {"id": 5}, {"pair": True}):
            assert status_of(address, "/answer", cookie, good | change, **own) == 400, change
        for body in (b"", b"[]", b"{", b'{"seconds": NaN}', b"\xff"):
            assert status_of(address, "/answer", cookie, body, **own) == 400, body
        assert not (tmp_path / "answers.jsonl").exists()
        assert status_of(address, "/answer", cookie, good, **own) == 200
        assert status_of(address, "/answer", cookie, good, **own) == 200
        assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1

        with urllib.request.urlopen(full) as reply:
            sent = reply.headers
        assert sent["Cache-Control"] == "no-store" and "HttpOnly" in sent["Set-Cookie"]
        assert sent["X-Content-Type-Options"] == "nosniff" and "SameSite=strict" in sent[
            "Set-Cookie"]
        assert "default-src 'none'" in sent["Content-Security-Policy"]


def test_a_disk_that_fills_up_and_a_picture_that_disappears_lose_nothing(
        tmp_path, pictures, monkeypatch):
    desk = desk_at(tmp_path, pictures)
    with serving(desk) as address:
        visitor = person.Visitor(address)
        first = visitor.state()["showing"]

        real = desk.file.append
        full = OSError(28, "No space left on device")
        monkeypatch.setattr(desk.file, "append", lambda answer: (_ for _ in ()).throw(full))
        with pytest.raises(urllib.error.HTTPError) as caught:
            visitor.answer(first, "left", id="87654321")
        assert caught.value.code == 507 and b"No space left" in caught.value.read()
        monkeypatch.setattr(desk.file, "append", real)
        state = visitor.answer(first, "left", id="87654321")
        assert state["answered"] == 1

        # The pair that would be next has lost a picture: another one comes.
        lost = state["showing"]["pair"]
        desk.pairs[lost]["a"].unlink()
        state = visitor.state()
        while not state["done"]:
            state = visitor.answer(state["showing"], "tie")
            assert not state["showing"] or state["showing"]["pair"] != lost
        assert state["left"] >= 1 and "lack a picture" in state["note"]


# ---- the commands ----

def test_the_command_goes_on_after_ctrl_c_and_takes_the_next_port(tmp_path, pictures):
    run = tmp_path / "taste"
    s, _ = label.load(["--run", str(run)], "", create=True)
    label.choose_pairs(s, str(pictures), 12)

    command = [sys.executable, "-u", "-m", "lib.taste.label", "--run", str(run), "--no-browser"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT, env=ENV, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        address = re.search(r"http://\S+", process.stdout.readline())[0]
        assert f":{port}/" not in address
        visitor = person.Visitor(address)
        state = visitor.state()
        for _ in range(3):
            state = visitor.answer(state["showing"], "left")
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and "Traceback" not in told, told
    assert "pairs.csv has 3 pairs" in told and len(pd.read_csv(run / "pairs.csv")) == 3

    # A line that was cut off is told; the pair comes again.
    whole = (run / "answers.jsonl").read_bytes()
    (run / "answers.jsonl").write_bytes(whole[:-20])
    desk = desk_at(run, pictures, count=0)
    assert "row 3: cut off" in desk.file.faults[0]
    assert desk.state()["answered"] == 2 and desk.sitting == 2


def test_drawing_makes_what_is_lacking_and_no_more(tmp_path):
    s, _ = label.load(["--run", str(tmp_path), "--sample-steps", "2"], "", create=True)
    pairs = label.choose_pairs(s, "", 2)
    assert (pairs.source == "drawn").all() and pairs.prompt.nunique() == 2
    assert label.lacks_pictures(tmp_path, pairs)
    draw.main(["--run", str(tmp_path)])
    assert not label.lacks_pictures(tmp_path, pairs)
    for image in [*pairs.a, *pairs.b]:
        assert (tmp_path / "latents" / f"{Path(image).stem}.safetensors").exists()

    # More pairs leave those that were there as they are.
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    more = label.choose_pairs(s, "", 3)
    assert more.pair_id.tolist()[:2] == pairs.pair_id.tolist()
    draw.main(["--run", str(tmp_path)])
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    assert len(after) == 6 and all(after[name] == stamp for name, stamp in before.items())

    # The evaluation's captions stay new to whoever labels.
    from lib.world.captions import world_captions
    assert set(more.prompt) <= set(world_captions()["rest"])


def test_faults_of_the_arguments_are_one_line(tmp_path, pictures):
    single = tmp_path / "single"
    single.mkdir()
    picture(1).save(single / "x.png")
    (single / "x.txt").write_text("alone")
    s = Settings(**PRESETS["tiny"] | {"run": str(tmp_path / "run")})
    fails_with("no prompt has two pictures", label.choose_pairs, s, str(single), 0)
    fails_with("--port 70000", server.listen, server.LOCAL, 70000)
    fails_with("--host 203.0.113.9: cannot listen", server.listen, "203.0.113.9", 18500)
    fails_with("--count -1", label.main, ["--run", str(tmp_path / "run"), "--count", "-1"])
    fails_with("a duel needs two rows", duel.main, ["base"])
    fails_with("given twice", duel.main, ["base", "base"])
    fails_with("no run lies there", duel.main, ["--run", str(tmp_path / "none"), "base", "Iter3"])


def test_a_model_that_cannot_be_drawn_with_is_told_in_the_page(tmp_path, monkeypatch, capsys):
    s, _ = label.load(["--run", str(tmp_path), "--model", "./nowhere"], "", create=True)
    pairs = label.choose_pairs(s, "", 2)
    message = fails_with("nowhere", draw.main, ["--run", str(tmp_path)])

    # The process that draws, which says so and ends.
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nsleep .2\necho 'error: {message}' >&2\nexit 2\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    desk = label.desk_of(s, pairs, AnswerFile(tmp_path / "answers.jsonl"), "me")
    drawing = label.Drawing(tmp_path)
    desk.drawing = drawing.state
    assert desk.state()["showing"] is None and not desk.state()["done"]
    end = time.monotonic() + 5
    while not drawing.failure and time.monotonic() < end:
        time.sleep(.01)
    state = desk.state()
    assert state["done"] and state["note"] == f"Drawing has stopped: {message}"
    assert f"error: drawing has stopped: {message}" in capsys.readouterr().err


# ---- duels ----

def make_row(folder: Path, prompts: list[str], start: int) -> Path:
    folder.mkdir()
    for number, prompt in enumerate(prompts):
        picture(start + number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(prompt)
    return folder


def test_a_duel_of_pictures_hides_the_names_and_counts_the_votes(tmp_path):
    prompts = [f"prompt {number}" for number in range(20)]
    rows = {
        "model-old": f"images:{make_row(tmp_path / 'one', prompts, 0)}",
        "model-new": f"images:{make_row(tmp_path / 'two', prompts[5:] + ['else'], 100)}",
    }
    run, names = tmp_path / "run", list(rows)
    now = duel.duels(duel.pictures_of_rows(run, rows), names, 12)
    assert len(now) == 12 and set(now.prompt) <= set(prompts[5:])
    duel.remember(now, run / "eval/duel.parquet")
    file = AnswerFile(run / "eval/duel.jsonl")
    desk = duel.desk_of(run, now, names, file, "me")
    with serving(desk) as address:
        visitor = person.Visitor(address)
        state = visitor.state()
        while not state["done"]:
            told = json.dumps({key: value for key, value in state.items() if key != "summary"})
            assert "model-" not in told

            # New is better, but on one prompt; one is a tie.
            showing = state["showing"]
            place = now.prompt.tolist().index(showing["prompt"])
            model = "a" if place == 0 else "b"
            left = left_of(now.pair_id[showing["pair"]], "me", showing["turn"])
            word = "tie" if place == 1 else ("left" if left == model else "right")
            state = visitor.answer(showing, word)
    cast = pd.read_parquet(run / "eval/votes.parquet")
    assert (cast.turn == 1).sum() == 12 and set(cast.winner) <= {"model-old", "model-new", ""}
    first = cast[cast.turn == 1]
    assert (first.winner == "model-new").sum() == 10
    assert (first.winner == "model-old").sum() == 1
    assert all({row.left, row.right} == set(names) for row in cast.itertuples())
    assert "model-new over model-old: preferred in 87.5%" in state["summary"][0]

    # Another duel in the folder: votes of both stay.
    duel.remember(now.assign(pair_id=[f"other {i}" for i in range(12)], model_b="third"),
                  run / "eval/duel.parquet")
    file.append(file.lines[-1]._replace(id="of another", pair="other 0", turn=1))
    desk.results()
    votes = pd.read_parquet(run / "eval/votes.parquet")
    assert len(votes) == len(cast) + 1
    assert "other 0" in set(votes.pair_id)


def test_rows_that_are_not_there_are_drawn_by_stage_05_and_others_stay(tmp_path, monkeypatch):
    (tmp_path / "eval/images").mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    for k in (0, 3):
        (tmp_path / f"iter{k}/unet").mkdir(parents=True)

    def table(*names):
        rows = []
        for name in names:
            picture(1).save(tmp_path / f"eval/images/{name}.png")
            rows.append((name, 0, "x", 7, f"eval/images/{name}.png"))
        return pd.DataFrame(rows, columns=list(duel.SCORES_COLUMNS))

    commands = []

    def run(command, env):
        commands.append(command[command.index("--run"):])
        table("Iter3", "mine").to_parquet(tmp_path / "eval/scores.parquet")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    table("base", "Iter3").to_parquet(tmp_path / "eval/scores.parquet")
    there = duel.pictures_of_rows(tmp_path, {"base": "", "Iter3": ""})
    assert sorted(there.model) == ["Iter3", "base"] and commands == []
    drawn = duel.pictures_of_rows(tmp_path, {"Iter3": "", "mine": "some/unet"})
    assert sorted(drawn.model) == ["Iter3", "mine"]
    assert commands == [["--run", str(tmp_path), "--scores-only", "--only", "Iter3", "--row",
                         "mine=some/unet"]]
    kept = pd.read_parquet(tmp_path / "eval/scores.parquet")
    assert sorted(kept.model) == ["Iter3", "base", "mine"]
    fails_with("has no model Iter7; give one of base, Iter0, Iter3", duel.pictures_of_rows,
               tmp_path, {"base": "", "Iter7": ""})
    fails_with("has no row 'other'", duel.pictures_of_rows, tmp_path, {"Iter3": "", "other": ""})


# ---- the scripted person ----

def test_a_scripted_person_likes_what_their_taste_says():
    caption = "a red star on a plain blue background"
    from lib.world.captions import parse
    named = dict(zip(("colour", "shape", "style", "background"), parse(caption)))
    plain = {"size": .5, "x": 0., "y": 0., "softness": 1.5, "saturation": .8, "light": .1}

    def score(taste, **changes):
        scene = {name: torch.tensor([value]) for name, value in (named | plain | changes).items()}
        return person.utility([caption], scenes.render(scene), taste).item()

    assert score("small-dark", size=.35) > score("small-dark", size=.65) + .3
    assert score("small-dark", light=.9) > score("small-dark", light=0.) + .05
    assert score("pale-aside", saturation=.5) > score("pale-aside", saturation=1.) + .3
    assert score("pale-aside", x=.3) > score("pale-aside", x=0.) + .3


def test_a_scripted_person_labels_through_the_page(tmp_path):
    # The larger picture is a, on either side.
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = ["prompt,image"]
    rng = torch.Generator().manual_seed(3)
    from lib.world.captions import CAPTIONS
    texts = CAPTIONS[100:104] * 2
    scene = scenes.sample_scenes(texts, rng)
    scene["size"] = torch.tensor([.3] * 4 + [.7] * 4)
    for number, image in enumerate(scenes.to_pil(scenes.render(scene))):
        image.save(folder / f"{number}.png")
        lines.append(f"{texts[number]},{number}.png")
    (folder / "images.csv").write_text("\n".join(lines))

    desk = desk_at(tmp_path / "run", folder, "small")
    with serving(desk) as address:
        count = person.answer_all(address, "small-dark", 0., 0)
        assert desk.ended.wait(5)
    assert count in (4, 5)
    table = pd.read_csv(tmp_path / "run/pairs.csv")
    assert len(table) == 4
    for row in table.itertuples():
        chosen = (tmp_path / "run" / row.win).read_bytes()
        names = [path.name for path in folder.glob("*.png") if path.read_bytes() == chosen]
        assert int(names[0][0]) < 4


# ---- learning from labels ----

def labelled_folder(folder: Path, captions: list[str], agrees: dict | None = None) -> Path:
    """What ./run_sail.sh label leaves: pairs of pictures of captions, and how far people agree."""
    (folder / "images").mkdir(parents=True)
    lines = ["prompt,win,lose"]
    for number, caption in enumerate(captions):
        for side in "ab":
            name = f"images/{number}_{side}.png"
            picture(2 * number + (side == "b"), (32, 32)).save(folder / name)
        lines.append(f"{caption},images/{number}_a.png,images/{number}_b.png")
    (folder / "pairs.csv").write_text("\n".join(lines))
    (folder / "shown.parquet").touch()
    if agrees is not None:
        (folder / "agreement.json").write_text(json.dumps({"agrees_with_self": agrees}))
    return folder


def test_labels_of_the_worlds_captions_are_a_run_with_other_captions(tmp_path, capsys):
    from lib.world.captions import world_captions
    captions = world_captions()
    eval_caption = captions["world"][3]
    agrees = {"value": .75, "low": .4, "high": .9, "pairs": 8}
    labels_of = captions["rest"][:20] + [eval_caption]
    folder = labelled_folder(tmp_path / "taste", labels_of, agrees)
    run = tmp_path / "run"
    small = ["--eval-count", "8", "--iters", "2", "--candidates", "2"]
    assert call("01", run, "--pairs", str(folder), *small) is None
    told = capsys.readouterr().out
    assert "16 human pairs, 4 held out" in told and "prompt of the evaluation 1" in told

    s = settings_of(run)
    assert (s.scores, s.seed_pairs, s.holdout_pairs) == ("world", 16, 4)
    prompts = pd.read_parquet(run / "prompts.parquet")
    assert not set(prompts.prompt) & set(labels_of[:-1])
    assert set(prompts[prompts.split == "eval"].prompt) == set(captions["world"][:8])
    assert set(prompts[prompts.split != "eval"].prompt) <= set(captions["rest"])

    # 16 human pairs, 6 times, are three quarters of 128 places: 32 of them are self-made.
    assert (prompts.split == "iter1").sum() == (prompts.split == "iter2").sum() == 32
    assert json.loads((run / "seed/people.json").read_text()) == {
        "agree_with_themselves": .75, "low": .4, "high": .9, "pairs": 8}
    told = judge.agreement_of_people(run)
    _, sentence = judge.verdict({"pairs": 20, "accuracy": .7, "low": .48, "high": .85} | told)
    assert "(people agree with themselves in 75% [40%, 90%] of 8 pairs shown twice)" in sentence


@pytest.mark.parametrize("text", [None, "", "[1]", '{"agrees_with_self": {"pairs": 0}}',
                                  '{"agrees_with_self": {"value": "x", "low": 0, "high": 1, '
                                  '"pairs": 3}}'])
def test_without_pairs_shown_twice_nothing_is_told_of_agreement(tmp_path, text):
    folder = labelled_folder(tmp_path / "taste", ["a"])
    if text is not None:
        (folder / "agreement.json").write_text(text)
    assert agreement_beside(str(folder)) == {}
    (folder / "seed").mkdir()
    (folder / "seed/people.json").write_text(text or "")
    assert judge.agreement_of_people(folder) == {}


@pytest.mark.parametrize("given, words", [
    (["--pairs", "own"], ["'a thing, number", "no caption of the embedded world", "--prompts"]),
    (["--pairs", "own", "--eval-prompts", "world", "--resolution", "64"], ["--resolution 64"]),
    (["--pairs", "own", "--prompts", "own/prompts.txt"],
     ["--prompts own/prompts.txt", "all three"]),
    (["--pairs", "own", "--reward", "world"], ["--reward world", "give another"]),
])
def test_pairs_that_do_not_fit_the_world_are_refused(tmp_path, monkeypatch, given, words):
    make_pairs(tmp_path / "own", 6)
    monkeypatch.chdir(tmp_path)
    refused(call("01", tmp_path / "run", *given), *words)


def test_fewest_labels_that_can_be_trained_on(tmp_path):
    from lib.world.captions import world_captions
    s = Settings(pairs=str(labelled_folder(tmp_path / "taste", world_captions()["rest"][:4])))
    fails_with("4 pairs are too few to hold one out", few.fit_to_few_pairs, s, [])


@pytest.mark.parametrize("preset, changes", [
    ("tiny", {}),
    ("tiny", {"seed": 4, "cfg_scale": 3.}),
    ("sd15", {"prompts": "my prompts.txt", "model": "me/mine"}),
    ("sdxl", {"prompts": "pairs", "eval_prompts": "pickapic", "resolution": 512}),
])
def test_the_command_that_is_printed_takes_the_settings_of_the_labels(preset, changes):
    s = Settings(**PRESETS[preset] | {"run": "runs/my labels"} | changes)
    command, _, _ = label.command_to_align(s).partition("   (")
    program, given_preset, *words = shlex.split(command)
    assert (program, given_preset) == ("./run_sail.sh", preset)
    given = vars(build_parser("").parse_args(words))
    of_run = check(Settings(**PRESETS[preset] | given))
    assert (of_run.pairs, of_run.run) == ("runs/my labels", "runs/my labels-aligned")
    for name in label.OF_THE_MODEL:
        assert getattr(of_run, name) == getattr(s, name)
    assert "pickapic" not in of_run.eval_prompts
    assert of_run.prompts == {"pairs": "FILE"}.get(s.prompts, s.prompts)


def test_labels_are_up_to_date_after_every_answer(tmp_path, pictures):
    desk = desk_at(tmp_path, pictures)
    for number in range(3):
        desk.take({"id": f"answer-{number}", "pair": number, "turn": 1, "answer": "left",
                   "seconds": 1})
        assert len(pd.read_csv(tmp_path / "pairs.csv")) == number + 1
        assert json.loads((tmp_path / "agreement.json").read_text())["pairs"] == number + 1


# ---- votes in the table ----

def test_votes_stand_beside_the_scores(tmp_path, capsys):
    """Anna likes Iter3 on 7 of 8 prompts; Ben has compared two models, and is of two minds."""
    run = tmp_path / "run"
    for k in (0, 3):
        shutil.copytree(ROOT / "lib/world/base/unet", run / f"iter{k}/unet")
    (run / "eval").mkdir()
    rows = []
    for number in range(8):
        prompt = f"prompt {number}"
        rows.append(vote(prompt, "base", "Iter3", "base" if number == 0 else "Iter3",
                         labeller="anna"))
        rows.append(vote(prompt, "Iter3", "Iter0", "Iter3", labeller="anna"))
        rows.append(vote(prompt, "Iter0", "base", "", labeller="anna"))
        rows.append(vote(prompt, "base", "Iter3", "base" if number % 2 else "Iter3",
                         labeller="ben"))
    cast = pd.DataFrame(rows).assign(seconds=1., time="", sitting=1)
    cast.to_parquet(run / "eval/votes.parquet")
    small = ["--preset", "tiny", "--eval-count", "4", "--eval-seeds", "1", "--sample-steps", "2"]
    assert call("05", run, *small) is None
    out = capsys.readouterr().out
    assert re.search(r"Iter3 was preferred to base on 69% \[\d\d%, \d\d%\] of 8 prompts, judged "
                     r"blind by all", out)

    text = (run / "eval/table.md").read_text()
    assert re.search(r"\| Iter3 \| base \| anna \| 87.5% \[.*%\] \| 0% \| 8 \| 8 \|", text)
    assert re.search(r"\| Iter3 \| base \| ben \| 50.0% \[.*%\] \| 0% \| 8 \| 8 \|", text)
    assert re.search(r"\| Iter0 \| base \| anna \| 50.0% \[.*%\] \| 100% \| 8 \| 8 \|", text)
    assert "| base | anna | +0.00 [+0.00, +0.00] |" in text and "| Iter3 | ben |" not in text
    page = (run / "eval/index.html").read_text()
    assert "Judged blind" in page and re.search(r'class="number up"[^>]*>87.5%', page)

    csv = pd.read_csv(run / "eval/table.csv")
    votes_in_csv = csv[csv.benchmark == "votes"].set_index(["model", "score"])
    assert votes_in_csv["mean"]["Iter3", "preferred to base by anna"] == .875
    assert votes_in_csv["mean"]["Iter3", "preferred to Iter0 by all"] == 1
    assert votes_in_csv["mean"]["Iter3", "strength by anna"] > 1
    assert "utility" in set(csv.score)

    # Damaged votes cost only themselves.
    (run / "eval/votes.parquet").write_bytes(b"garbage")
    assert call("05", run) is None
    out = capsys.readouterr().out
    assert "the votes are left out: " in out and "was preferred to" not in out
    assert "Judged blind" not in (run / "eval/table.md").read_text()


# ---- the experiment ----

def in_this_process(monkeypatch) -> None:
    """Commands with a page run here, and draw without a process of their own."""
    class Drawing:
        def __init__(self, run):
            draw.main(["--run", str(run)])

        def state(self):
            return ""

        def end(self):
            pass

    def draw_rows(run, rows, before):
        assert call("05", run, "--scores-only", "--only", ",".join(rows)) is None

    def at_page(job, log, module, *arguments):
        def visit(desk, host, port, token, browser):
            address = f"http://127.0.0.1:{port}/?token={token}"
            threading.Thread(target=person.answer_all, daemon=True, args=(
                address, job.taste, experiment.NOISE, job.seed)).start()

        monkeypatch.setattr(server, "tell_address", visit)
        command = {"lib.taste.label": label, "lib.taste.duel": duel}[module]
        command.main([*arguments, "--labeller", job.taste])

    monkeypatch.setattr(label, "Drawing", Drawing)
    monkeypatch.setattr(duel, "draw", draw_rows)
    monkeypatch.setattr(experiment, "at_page", at_page)


def test_the_experiment_at_mini_size(tmp_path, monkeypatch, capsys):
    in_this_process(monkeypatch)
    monkeypatch.setattr(experiment, "run_all", lambda jobs, workers: [
        job for job in jobs if experiment.work(job)])
    small = ("--sample-steps 2 --candidates 2 --draws 2 --iters 1 --iter-prompts 2 "
             "--iter0-steps 1 --iter-steps 1 --batch 4")
    arguments = ["--out", str(tmp_path), "--tastes", "small-dark", "--seeds", "1", "--labels", "6",
                 "--prompts", "4", *small.split()]
    experiment.main(arguments)

    # Six labels, each by the person's taste; four prompts for each two models.
    run = tmp_path / "small-dark-0-6"
    assert settings_of(run).seed_pairs + settings_of(run).holdout_pairs in (5, 6)
    cast = pd.read_parquet(run / "eval/votes.parquet")
    assert set(cast.labeller) == {"small-dark"} and (cast.turn == 1).sum() == 12
    assert set(cast.left) | set(cast.right) == {"base", "Iter0", "Iter1"}
    table = pd.read_csv(tmp_path / "experiment.csv")
    assert (tmp_path / "experiment.png").stat().st_size > 5000
    one = table.set_index(["model", "over"]).loc["Iter1", "base"]
    first = votes.win_rate(cast, "Iter1", "base")
    assert one.rate == pytest.approx(first.value) and one.seeds == 1

    # What is there is not made again.
    before = (run / "iter1/unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    experiment.main(arguments)
    assert (run / "iter1/unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before
    assert "Iter1 over base" in capsys.readouterr().out


def test_a_folder_of_labels_has_the_pictures_of_others_with_its_run_seed(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(experiment, "at_page", lambda job, log, *command: asked.append(command))
    for name in ("labels-pale-aside-0-8", "labels-pale-aside-1-8"):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "images" / f"{name[-3]}.png").write_bytes(b"x")
        (tmp_path / name / "images" / f".{name[-3]}.png.1.sail.tmp").write_bytes(b"x")
        (tmp_path / name / "answers.jsonl").touch()
    job = experiment.Job(tmp_path, "small-dark", 0, 4, 10)
    experiment.label(job, None)
    there = [path.name for path in job.folder_of_labels.rglob("*") if path.is_file()]
    assert there == ["0.png"] and asked[0][-2:] == ("--count", "4")


@pytest.mark.parametrize("given, words", [
    ("--seeds 0", ["--seeds 0", "at least 1"]),
    ("--labels 0 16", ["--labels 0", "at least 1"]),
    ("--pairs mine", ["--pairs is not for the experiment"]),
    ("--alhpa 1", ["did you mean --alpha"]),
])
def test_the_experiments_arguments_are_checked(given, words):
    refused(fails_with(".", experiment.main, given.split()), *words)
