"""The page's server: it shows one labeller pair after pair and writes what they answer.

    GET  /?token=...                    the page; the token becomes a cookie
    GET  /state                         what to show now and next, and how much is left
    GET  /picture/NUMBER/TURN/SIDE      a picture of pair NUMBER, SIDE being left or right
    POST /answer                        {"id", "pair": NUMBER, "turn", "answer", "seconds"}
    POST /finish                        writes the results and ends the command

Whoever lacks the token, or comes from a page of another origin, gets nothing. A request names
pictures by number and side alone: no text of a request becomes a path.
"""

import io
import ipaddress
import json
import math
import os
import secrets
import socket
import statistics
import sys
import threading
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from getpass import getuser
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from lib.run import PICTURE_FORMATS, UserError
from lib.taste.answers import ANSWERS, UNDO, Answer, AnswerFile, standing
from lib.taste.showings import Showing, left_of, outlook

LOCAL = "127.0.0.1"
PORTS_TO_TRY = 50
LATEST = 20                     # answers whose median tells how long the rest will take
MEDIA = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp",
         ".gif": "image/gif", ".avif": "image/avif"}

# With every answer of the server; the page's own scripts and styles bear a number used once.
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
PAGE_POLICY = ("default-src 'none'; img-src 'self' data:; connect-src 'self'; "
               "script-src 'nonce-{0}'; style-src 'nonce-{0}'; "
               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def nothing() -> str:
    return ""


@dataclass
class Desk:
    """One labeller at one set of pairs."""

    title: str
    question: str
    pairs: list[dict]                       # pair_id, prompt, a and b: paths of the pictures
    file: AnswerFile
    labeller: str
    worth: Callable[[], str]                # what the answers are good for so far
    results: Callable[[], list[str]]        # writes the results; lines for people
    after_answer: Callable[[], object] = nothing    # keeps what is made of them up to date
    drawing: Callable[[], str] = nothing    # "on" while pictures are drawn, or why it failed
    there: set[str] = field(default_factory=set)

    def __post_init__(self):
        self.sitting = self.file.next_sitting(self.labeller)
        self.numbers = {pair["pair_id"]: number for number, pair in enumerate(self.pairs)}

    def can_be_shown(self, pair_id: str) -> bool:
        """Whether both pictures of a pair are there."""
        # A picture that was seen once is looked for again only when its pair is next.
        if pair_id not in self.there and self.has_pictures(pair_id):
            self.there.add(pair_id)
        return pair_id in self.there

    def has_pictures(self, pair_id: str) -> bool:
        pair = self.pairs[self.numbers[pair_id]]
        return pair["a"].is_file() and pair["b"].is_file()

    def state(self) -> dict:
        """All that the page shows, for JSON."""
        self.file.read()
        drawing = self.drawing()
        own = [line for line in self.file.lines
               if line.labeller == self.labeller and line.pair in self.numbers]
        view = outlook(list(self.numbers), self.can_be_shown, own, self.labeller, drawing != "on")

        next_two = []
        for showing in view.next:
            if len(next_two) == 2:
                break
            if self.has_pictures(showing.pair):
                next_two.append(self.as_json(showing))
        done = not next_two and drawing != "on"

        answers = standing(own)
        undo = None
        if answers:
            last = answers[-1]
            undo = self.as_json(Showing(last.pair, last.turn)) | {"answer": last.answer}
        return {
            "title": self.title,
            "question": self.question,
            "showing": next_two[0] if next_two else None,
            "next": next_two[1] if len(next_two) > 1 else None,
            "answered": view.answered,
            "left": view.left,
            "seconds": usual_seconds(answers),
            "worth": self.worth(),
            "undo": undo,
            "note": self.note(drawing, view.left if done else 0),
            "done": done,
            "summary": self.summary() if done else [],
        }

    def summary(self) -> list[str]:
        """Write the results; lines about them for people."""
        try:
            self.file.read()
            return self.results()
        except OSError as error:
            return [f"the results could not be written ({error.strerror}): free some space and "
                    f"give the same command again; all answers are kept"]

    def as_json(self, showing: Showing) -> dict:
        number = self.numbers[showing.pair]
        address = f"picture/{number}/{showing.turn}"
        return {
            "pair": number,
            "turn": showing.turn,
            "prompt": self.pairs[number]["prompt"],
            "left": f"{address}/left",
            "right": f"{address}/right",
        }

    def note(self, drawing: str, lost: int) -> str:
        """What the person should know: drawing has failed, pictures are gone."""
        if drawing not in ("", "on"):
            return f"Drawing has stopped: {drawing}"
        if lost:
            return f"{lost} showings lack a picture; the same command makes them again."
        return ""

    def picture(self, number: int, turn: int, side: str) -> Path | None:
        """The file of a picture, None for none of those to be judged."""
        if not 0 <= number < len(self.pairs) or turn not in (1, 2) or side not in ("left", "right"):
            return None
        pair = self.pairs[number]
        left = left_of(pair["pair_id"], self.labeller, turn)
        if side == "left":
            return pair[left]
        return pair["b" if left == "a" else "a"]

    def take(self, message: dict) -> None:
        """Put an answer on disk, once for each id. ValueError: it is none. OSError: disk full."""
        answer = self.checked(message)
        self.file.read()
        if not self.file.has(answer.id):
            self.file.append(answer)
            try:
                self.after_answer()
            except OSError:
                pass                        # the answer is kept, and the end makes it again

    def checked(self, message: dict) -> Answer:
        number, turn, seconds = message["pair"], message["turn"], message["seconds"]
        if message["answer"] not in (*ANSWERS, UNDO) or turn not in (1, 2):
            raise ValueError("answer or turn")
        if type(number) is not int or not 0 <= number < len(self.pairs):
            raise ValueError("pair")
        if type(seconds) not in (int, float) or not 0 <= seconds < 1e9:
            raise ValueError("seconds")
        if not isinstance(message["id"], str) or not 8 <= len(message["id"]) <= 64:
            raise ValueError("id")

        pair_id = self.pairs[number]["pair_id"]
        return Answer(
            id=message["id"],
            pair=pair_id,
            turn=turn,
            answer=message["answer"],
            left=left_of(pair_id, self.labeller, turn),
            seconds=round(seconds, 3),
            time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            labeller=self.labeller,
            sitting=self.sitting,
        )


def listed(folder: Path, pairs) -> list[dict]:
    """What Desk.pairs holds, of a table with pair_id, prompt, a and b."""
    return [{"pair_id": pair.pair_id, "prompt": pair.prompt, "a": folder / pair.a,
             "b": folder / pair.b} for pair in pairs.itertuples()]


def usual_seconds(answers: list[Answer]) -> float | None:
    """The median time of the latest answers; None before there are a few."""
    seconds = [line.seconds for line in answers[-LATEST:] if not math.isnan(line.seconds)]
    if len(seconds) < 3:
        return None
    return statistics.median(seconds)


def for_browsers(path: Path | None) -> tuple[bytes, str]:
    """A picture's bytes and media type, as PNG where browsers do not know its format.

    OSError: there is no such picture, or it cannot be read.
    """
    if path is None:
        raise FileNotFoundError
    kind = MEDIA.get(path.suffix.lower())
    if kind:
        return path.read_bytes(), kind

    buffer = io.BytesIO()
    with Image.open(path, formats=PICTURE_FORMATS) as picture:
        picture.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue(), "image/png"


# ---- the application ----

def application(desk: Desk, token: str, host: str, cookie: str, end: Callable[[], None]):
    """The Starlette application for one labeller. `end` is called when they have finished."""
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    async def show_page(request: Request) -> Response:
        nonce = secrets.token_urlsafe(12)
        response = HTMLResponse(page.replace("<!--nonce-->", nonce))
        response.headers["Content-Security-Policy"] = PAGE_POLICY.format(nonce)
        response.set_cookie(cookie, token, httponly=True, samesite="strict")
        return response

    async def show_state(request: Request) -> Response:
        return JSONResponse(desk.state())

    async def show_picture(request: Request) -> Response:
        place = request.path_params
        path = desk.picture(place["number"], place["turn"], place["side"])
        try:
            content, kind = for_browsers(path)
        except OSError:
            return PlainTextResponse("no such picture", 404)
        return Response(content, media_type=kind)

    async def take_answer(request: Request) -> Response:
        try:
            desk.take(json.loads(await request.body()))
        except (ValueError, TypeError, KeyError) as error:
            return PlainTextResponse(f"not an answer ({error})", 400)
        except OSError as error:
            reason = f"{desk.file.path}: {error.strerror}"
            print(f"an answer could not be written: {reason}; free some space, the page sends it "
                  f"again", file=sys.stderr)
            return PlainTextResponse(reason, 507)
        return JSONResponse(desk.state())

    async def finish(request: Request) -> Response:
        state = desk.state()
        state["summary"] = desk.summary()
        end()
        return JSONResponse(state)

    async def guard(request: Request, call_next) -> Response:
        given = request.cookies.get(cookie, "")
        if request.url.path == "/":
            given = request.query_params.get("token", given)

        if not is_allowed_host(request.headers.get("host", ""), host):
            response = PlainTextResponse("another host's name", 403)
        elif not is_own_origin(request):
            response = PlainTextResponse("another origin", 403)
        elif not secrets.compare_digest(given.encode(), token.encode()):
            response = PlainTextResponse("Open the address that the terminal shows: this one is of "
                                         "an earlier time, or lacks its token.", 403)
        else:
            response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    routes = [
        Route("/", show_page),
        Route("/state", show_state),
        Route("/picture/{number:int}/{turn:int}/{side}", show_picture),
        Route("/answer", take_answer, methods=["POST"]),
        Route("/finish", finish, methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)])


def is_allowed_host(given: str, host: str) -> bool:
    """Whether a request's Host is this machine's.

    A page elsewhere may let its own name point to this machine; an address or localhost is no name
    that it could have.
    """
    try:
        name = urlsplit(f"//{given}").hostname or ""
    except ValueError:
        return False
    if name == "localhost":
        return True
    if host != LOCAL and name in (host.lower(), socket.gethostname().lower()):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_own_origin(request: Request) -> bool:
    """Whether a request comes from the page itself; browsers say so with all but plain reading."""
    origin = request.headers.get("origin")
    if origin is None:
        return request.method == "GET"
    return urlsplit(origin).netloc == request.headers.get("host")


# ---- serving ----

def listen(host: str, port: int) -> socket.socket:
    """A socket on the port, or on the next one that is free."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port {port}: must lie in 1..65535")

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    last = min(port + PORTS_TO_TRY, 65536)
    for candidate in range(port, last):
        try:
            return socket.create_server((host, candidate), family=family)
        except PermissionError:
            raise UserError(f"--port {port}: not allowed here; give one above 1023") from None
        except OSError as error:
            # Another program has the port, or else the host is not this machine's.
            if "in use" not in str(error):
                raise UserError(f"--host {host}: cannot listen there ({error.strerror}); leave it "
                                f"out, or give 0.0.0.0") from None
    raise UserError(f"--port {port}: this and all ports to {last - 1} are in use; give another")


def serve(desk: Desk, host: str, port: int, browser: bool) -> None:
    """Serve the page until the person has finished, or Ctrl-C."""
    with listen(host, port) as sock:
        port = sock.getsockname()[1]
        token = secrets.token_urlsafe(16)

        # Cookies know no ports: the name keeps two servers apart.
        app = application(desk, token, host, f"sail-{port}", lambda: end(server))
        config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off",
                                ws="none", server_header=False, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)

        tell_address(desk, host, port, token, browser)
        try:
            server.run(sockets=[sock])
        except KeyboardInterrupt:
            print()


def end(server: uvicorn.Server) -> None:
    server.should_exit = True


def tell_address(desk: Desk, host: str, port: int, token: str, browser: bool) -> None:
    """Print where the page is, and open it where there is a screen."""
    shown = LOCAL if host in ("0.0.0.0", "::") else host
    if ":" in shown:
        shown = f"[{shown}]"
    address = f"http://{shown}:{port}/?token={token}"
    print(f"{desk.title}: {address}")

    if host not in (LOCAL, "localhost", "::1"):
        print(f"--host {host}: whoever reaches this machine and has the address sees the pictures "
              f"and can answer, and the connection is not encrypted")
    print("every answer is on disk before the next pair shows; Ctrl-C ends, the same command goes "
          "on", flush=True)

    connection = os.environ.get("SSH_CONNECTION", "").split()
    if connection and host == LOCAL:
        print(f"from your own machine: ssh -L {port}:{LOCAL}:{port} {getuser()}@{connection[2]}   "
              f"then open the address there", flush=True)
    if browser and has_screen():
        threading.Timer(.3, webbrowser.open, [address]).start()


def has_screen() -> bool:
    """Whether a browser can be seen: on Linux, where there is a display."""
    if sys.platform == "darwin" or os.name == "nt":
        return not os.environ.get("SSH_CONNECTION")
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
