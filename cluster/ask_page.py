"""The page that asks a person, served to this machine alone.

Whoever has the link may answer: it holds a random token. The socket is bound to 127.0.0.1; a request under another host's name,
as a web page of somebody else could send it (DNS rebinding), is refused, and so is an answer that another page sends.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cluster.interview import SIDES, Interview, Question, Side
from evaluation.page import render_page
from tokens.errors import UserError

HOST = "127.0.0.1"
LONGEST_BODY = 1000
"""Bytes of an answer; ours have about 40."""
CHOICES = (*SIDES, "skip", "undo", "done")
NOTHING, NO_FRAME = "default-src 'none'", "frame-ancestors 'none'"
"""What a reply may do that is no page, and what the page may not, besides what it says itself."""


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: of the reply.
    """

    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status.phrase)
        self.status = status


class AskServer(ThreadingHTTPServer):
    """Serves one interview until the person is done.

    Args:
        interview: what is asked.
        name: of the person, for the page.
        profile: where the profile is written, for the page.
        keeping: a sentence on what is kept of the answers.
        port: to listen on; 0 = any free one.

    Raises:
        UserError: if the port cannot be listened on.
    """

    daemon_threads = True

    def __init__(self, interview: Interview, name: str, profile: str, keeping: str, port: int) -> None:
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot listen on port {port} ({error}): give another one, --port 0 takes any that is free"
            ) from error
        self.token = secrets.token_urlsafe(24)
        self.names = {f"{host}:{self.server_port}" for host in (HOST, "localhost")}
        self._interview, self._question = interview, interview.question()
        self._words = {"name": name, "profile": profile, "keeping": keeping}
        self._finished, self._lock = self._question is None, threading.Lock()

    @property
    def link(self) -> str:
        """What the person opens."""
        return f"http://{HOST}:{self.server_port}/{self.token}/"

    def page(self, nonce: str) -> str:
        """The page; questions come into it by ``state``."""
        return render_page("ask.html.j2", nonce=nonce, **self._words)

    def state(self, trouble: str = "") -> str:
        """What the page shows, as JSON.

        Args:
            trouble: to be shown above the question.
        """
        with self._lock:
            return self._state(trouble)

    def take(self, number: int, choice: str) -> tuple[str, bool]:
        """Do what the person chose, unless it belongs to another question than the one that is open, as a second click does.

        Args:
            number: of the question that the page showed.
            choice: one of ``CHOICES``.

        Returns:
            What the page shows next, and whether the person is done.
        """
        with self._lock:
            try:
                return self._state(self._do(number, choice)), self._finished
            except UserError as error:
                return self._state(f"This answer does not count, the earlier ones do: {error}."), False

    def _do(self, number: int, choice: str) -> str:
        question = self._question
        if question is None or number != question.number:
            return "That question was answered already; this is the open one."
        if choice == "done":
            self._finished = True
            return ""
        if choice == "undo":
            if not self._interview.given:
                return "There is no answer to undo."
            self._interview.undo()
        else:
            self._interview.answer(question, _side(choice))
        self._question = self._interview.question()
        self._finished = self._question is None
        return ""

    def _state(self, trouble: str) -> str:
        question = self._question or Question(0, 0, "", "", "", False)
        state = {
            "number": question.number,
            "prompt": question.prompt,
            "a": question.a,
            "b": question.b,
            "answers": self._interview.num_answers,
            "accuracies": [round(accuracy, 4) for accuracy in self._interview.accuracies],
            "left": self._interview.left,
            "undo": bool(self._interview.given),
            "finished": self._finished,
            "trouble": trouble,
        }
        return json.dumps(state)


def _side(choice: str) -> Side | None:
    return next((side for side in SIDES if side == choice), None)


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: AskServer
    server_version, sys_version = "Rondo", ""
    timeout = 60

    def do_GET(self) -> None:
        """The page, or its state."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """An answer."""
        self._answer(self._post)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the link is a secret, and answers are."""

    def _answer(self, reply: Callable[[], None]) -> None:
        try:
            if self.headers["Host"] not in self.server.names:
                raise Refused(HTTPStatus.FORBIDDEN)
            reply()
        except Refused as refused:
            self._send(refused.status, "text/plain", refused.status.phrase, NOTHING)
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the browser went away; it asks again

    def _get(self) -> None:
        where = self._where()
        if where == "":
            self._send(HTTPStatus.OK, "text/html", self.server.page(secrets.token_urlsafe(16)), NO_FRAME)
        elif where == "state":
            self._send(HTTPStatus.OK, "application/json", self.server.state(), NOTHING)
        else:
            raise Refused(HTTPStatus.NOT_FOUND)

    def _post(self) -> None:
        if self._where() != "answer":
            raise Refused(HTTPStatus.NOT_FOUND)
        origin = self.headers["Origin"]
        if origin is not None and origin.removeprefix("http://") not in self.server.names:
            raise Refused(HTTPStatus.FORBIDDEN)
        if self.headers["Content-Type"] != "application/json":  # a form of another page cannot send this
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        state, finished = self.server.take(*_read(self._body()))
        self._send(HTTPStatus.OK, "application/json", state, NOTHING)
        if finished:
            threading.Thread(target=self.server.shutdown).start()  # it waits for the loop, which may be waiting for this one

    def _where(self) -> str:
        """What comes after the token."""
        if self.path == "/favicon.ico":
            raise Refused(HTTPStatus.NO_CONTENT)
        token, slash, where = self.path.removeprefix("/").partition("/")
        if not slash or not secrets.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(HTTPStatus.NOT_FOUND)
        return where

    def _body(self) -> bytes:
        length = self.headers["Content-Length"] or ""
        if not length.isdecimal() or int(length) > LONGEST_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        return self.rfile.read(int(length))

    def _send(self, status: HTTPStatus, kind: str, text: str, policy: str) -> None:
        body = b"" if status == HTTPStatus.NO_CONTENT else text.encode()
        headers: Mapping[str, str] = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _read(body: bytes) -> tuple[int, str]:
    """Number and choice of an answer."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(HTTPStatus.BAD_REQUEST) from error
    if not isinstance(given, dict) or given.keys() != {"number", "choice"}:
        raise Refused(HTTPStatus.BAD_REQUEST)
    number, choice = given["number"], given["choice"]
    if not isinstance(number, int) or isinstance(number, bool) or choice not in CHOICES:
        raise Refused(HTTPStatus.BAD_REQUEST)
    return number, choice
