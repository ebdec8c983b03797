"""An S3 server in a thread of this process: moto's, behind a door that can be shut."""

from __future__ import annotations

import logging
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "models"


@dataclass
class ObjectStore:
    """The server, and what it does with requests."""

    port: int = 0
    answers: Callable[[str, str], int | None] = lambda method, path: None
    """The status that a request gets instead of an answer; None lets it through."""
    requests: list[tuple[str, str]] = field(default_factory=list)

    def uri(self, prefix: str, bucket: str = BUCKET) -> str:
        """Of a prefix in a bucket."""
        return f"s3://{bucket}/{prefix}?endpoint_override=http://127.0.0.1:{self.port}&region=us-east-1"

    @contextmanager
    def refusing(self, answers: Callable[[str, str], int | None]) -> Iterator[None]:
        """Refuse some requests meanwhile."""
        before, self.answers = self.answers, answers
        try:
            yield
        finally:
            self.answers = before


@contextmanager
def served() -> Iterator[ObjectStore]:
    """A server with one bucket, on a free port of loopback."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = DomainDispatcherApplication(create_backend_app)
    store = ObjectStore()

    def door(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        store.requests.append((method, path))
        status = store.answers(method, path)
        if status is None:
            return moto(environ, start)
        code = "AccessDenied" if status == 403 else "InternalError"
        start(f"{status} {code}", [("Content-Type", "application/xml")])
        return [f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()]

    server = make_server("127.0.0.1", 0, door, threaded=True)
    store.port = server.server_port
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    make = urllib.request.Request(f"http://127.0.0.1:{store.port}/{BUCKET}", method="PUT")
    urllib.request.urlopen(make, timeout=20).close()
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
