"""A scripted person of the embedded world, who answers through the page's own interface.

Their taste is none that the world's people have (lib/world/people.py): so an experiment can tell
whether a model has come to please this very person.

    python -m lib.taste.person ADDRESS --taste small-dark

ADDRESS is what the command in the terminal prints, with its token. Like a person they see a prompt
and two pictures, and nothing else.
"""

import argparse
import io
import json
import secrets
import time
import urllib.request
from http.cookiejar import CookieJar
from urllib.parse import urljoin, urlsplit

import torch
from PIL import Image

from lib.run import PICTURE_FORMATS, generator, run_stage
from lib.sheets import as_tensor
from lib.world import people, scenes

# What each taste is made of, in equal parts, each from 0 to 1. A utility is alignment + 2 taste, as
# the world's own.
TASTES = {
    "small-dark": ("small", "dark"),
    "pale-aside": ("pale", "aside"),
}
EDGE = 3                        # pixels along the picture's edge, which are background


def utility(prompts: list[str], pictures: torch.Tensor, taste: str) -> torch.Tensor:
    """What a person of this taste gets (B,) of pictures (B, 3, 32, 32) in 0..1 of captions."""
    seen = people.score(prompts, pictures)

    luma = torch.einsum("bchw,c->bhw", pictures, torch.tensor(scenes.LUMA))
    background = torch.ones(luma.shape[1:], dtype=torch.bool)
    background[EDGE:-EDGE, EDGE:-EDGE] = False
    parts = {
        "small": 1 - seen["size"],
        "dark": 1 - luma[:, background].mean(1),
        "pale": 1 - seen["saturation"],
        "aside": 1 - seen["centring"],
    }
    of_taste = [parts[name] for name in TASTES[taste]]
    return seen["alignment"] + 2 * torch.stack(of_taste).mean(0)


class Visitor:
    """Somebody at the page: it keeps the cookie and says where its requests come from."""

    def __init__(self, address: str):
        # No proxy stands between a page and its own machine.
        cookies = urllib.request.HTTPCookieProcessor(CookieJar())
        self.opener = urllib.request.build_opener(cookies, urllib.request.ProxyHandler({}))
        self.address = urljoin(address, "/")
        self.origin = f"http://{urlsplit(address).netloc}"
        self.opener.open(address, timeout=30).close()

    def ask(self, path: str, message: dict | None = None) -> bytes:
        """The body of an answer to GET, or with a message to POST."""
        request = urllib.request.Request(urljoin(self.address, path))
        if message is not None:
            request.data = json.dumps(message).encode()
            request.add_header("Origin", self.origin)
        with self.opener.open(request, timeout=60) as reply:
            return reply.read()

    def state(self) -> dict:
        return json.loads(self.ask("state"))

    def answer(self, showing: dict, word: str, seconds: float = 1., id: str = "") -> dict:
        """Give an answer; the state that follows."""
        message = {"id": id or secrets.token_hex(8), "pair": showing["pair"],
                   "turn": showing["turn"], "answer": word, "seconds": seconds}
        return json.loads(self.ask("answer", message))

    def picture(self, path: str) -> Image.Image:
        with Image.open(io.BytesIO(self.ask(path)), formats=PICTURE_FORMATS) as picture:
            return picture.convert("RGB")


def answer_all(address: str, taste: str, noise: float, seed: int) -> int:
    """Answer until nothing is left, and finish; returns how many answers that took.

    A preference is a Bradley-Terry label, as those of the world's people.
    """
    visitor = Visitor(address)
    count = 0
    state = visitor.state()
    while not state["done"]:
        showing = state["showing"]
        if showing is None:                     # it is still being drawn
            time.sleep(.5)
            state = visitor.state()
            continue

        began = time.perf_counter()
        pictures = [visitor.picture(showing[side]) for side in ("left", "right")]
        rng = generator(seed, "person", taste, showing["prompt"], showing["pair"], showing["turn"])
        left, right = utility([showing["prompt"]] * 2, as_tensor(pictures), taste).split(1)
        prefers_left = people.first_wins(left, right, noise, rng).item()
        word = "left" if prefers_left else "right"
        state = visitor.answer(showing, word, time.perf_counter() - began)
        count += 1
    visitor.ask("finish", {})
    return count


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("address")
    parser.add_argument("--taste", choices=TASTES, required=True)
    parser.add_argument("--noise", type=float, default=.15, help="Bradley-Terry temperature")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    count = answer_all(given.address, given.taste, given.noise, given.seed)
    print(f"{given.taste}: {count} answers")


if __name__ == "__main__":
    run_stage(main)
