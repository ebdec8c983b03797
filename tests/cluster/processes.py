"""Ports for the clusters that tests start, and their end."""

from __future__ import annotations

import random
import signal
import socket
import subprocess

import psutil

PORTS = range(21_000, 32_000)
"""Above those that Ray gives its workers, below those that Linux gives to whoever asks for any (32768 and up): between the
question and the use, nobody takes one because another test starts a cluster meanwhile."""


def free_port() -> int:
    while True:
        with socket.socket() as probe:
            port = random.SystemRandom().choice(PORTS)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def end(head: subprocess.Popen[bytes]) -> None:
    """End a head node, and what it leaves of its own."""
    family = psutil.Process(head.pid).children(recursive=True)
    head.send_signal(signal.SIGTERM)
    head.wait(timeout=60)
    for process in psutil.wait_procs(family, timeout=20)[1]:
        process.kill()
