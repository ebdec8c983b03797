"""Ports for the clusters that tests start, and their end."""

from __future__ import annotations

import signal
import socket
import subprocess

import psutil


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end(head: subprocess.Popen[bytes]) -> None:
    """End a head node, and what it leaves of its own."""
    family = psutil.Process(head.pid).children(recursive=True)
    head.send_signal(signal.SIGTERM)
    head.wait(timeout=60)
    for process in psutil.wait_procs(family, timeout=20)[1]:
        process.kill()
