"""A process that holds something ready, and is told what to do line by line."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARK = "answer "
"""What a line that counts begins with; libraries print what they like before and between."""


class Child:
    """Takes a line of JSON on its standard input for each request, and answers with one on its standard output.

    Args:
        name: in error messages.
        command: that starts it.
        environment: of it.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=dict(environment)
        )

    def ask(self, request: Any) -> Any:
        """What it answers.

        Raises:
            RuntimeError: if it ended instead.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which is told below
            print(json.dumps(request), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise RuntimeError(f"the process of {self.name} ended with status {self.process.wait(60)}; what it printed says why")

    def end(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
