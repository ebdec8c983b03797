"""A small chat-completions server that answers by rule, on a port of its own."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_S = 1.2
BUSY_TIMES = 9
"""How often the server is busy before it answers: oftener than a request is tried."""


class Endpoint(ThreadingHTTPServer):
    """The first word of a prompt says how the server answers; ``asked`` counts questions, ``keys`` the Authorization headers.

    ``down``: nothing is answered; ``down_after``: nothing after so many questions; ``by_length``: to prompts without a rule the
    longer response is the better one.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.keys: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.down = self.by_length = False
        self.down_after: int | None = None
        self.busiest = self.busy = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        if "[Prompt]" not in question:  # whoever asks this wants to know whether anybody is there
            self._send(200, completion("A"))
            return
        with self.server.lock:
            self.server.asked[question] += 1
            self.server.keys[self.headers["Authorization"]] += 1
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
            times = self.server.asked[question]
            if self.server.down_after is not None and self.server.asked.total() > self.server.down_after:
                self.server.down = True
        self._answer(question, times)

    def _answer(self, question: str, times: int) -> None:
        prompt, first = (question.split(mark)[1].split("\n\n[")[0].strip() for mark in ("[Prompt]\n", "[Response A]\n"))
        rule = prompt.split()[0]
        if self.server.down or rule == "broken":
            return self._send(500, {"error": {"message": "out of order"}})
        if rule == "flaky" and times == 1:
            return self._send(503, {"error": {"message": "try again"}}, {"Retry-After": "0.01"})
        if rule == "limited" and times == 1:
            return self._send(429, {"error": {"message": "slow down"}})
        if rule == "busy" and times <= BUSY_TIMES:
            return self._send(429, {"error": {"message": "slow down"}}, {"Retry-After": "0"})
        if rule == "closed":
            return self._send(429, {"error": {"message": "come back tomorrow"}}, {"Retry-After": "86400"})
        if rule == "slow" and times == 1:
            time.sleep(SLOW_S)
        if rule == "forbidden":
            return self._send(401, {"error": {"message": f"wrong key {self.headers['Authorization']}"}})
        if rule == "refused":
            return self._send(400, {"error": {"message": f"too long; you sent {self.headers['Authorization']}"}})
        if rule == "page":
            return self._send(200, f"<html>not an endpoint {self.headers['Authorization']}</html>")
        if rule == "silent":
            return self._send(200, completion(None))
        if rule == "reasoning":
            return self._send(200, completion("", "length"))
        if rule == "filtered":
            return self._send(200, completion(None, "content_filter"))
        if rule == "equal":
            return self._send(200, completion("Tie."))
        if rule == "nothing":
            return self._send(200, completion("A") | {"choices": []})
        second = question.split("[Response B]\n")[1].split("\n\n[")[0].strip()
        good = "A" if (len(first) > len(second) if self.server.by_length else first.startswith("good")) else "B"
        bad = "B" if good == "A" else "A"
        replies = {"first": "A", "garbage": "I like both. A bit.", "bad": bad, "wordy": f"The better response is **{good}**."}
        time.sleep(0.01)
        return self._send(200, completion(replies[rule] if rule in replies else good))

    def _send(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        with self.server.lock:
            self.server.busy = max(0, self.server.busy - 1)  # before the client has its answer and asks the next question
        try:
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if isinstance(content, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            """Who asked did not wait for the answer."""


def completion(text: str | None, finish_reason: str = "stop") -> dict[str, object]:
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


@contextmanager
def serve() -> Iterator[Endpoint]:
    """The server, for as long as the context lasts."""
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
