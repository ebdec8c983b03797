"""timeline.jsonl as it arises: a line per wait of the driver, and one per piece of work of a role's process."""

from __future__ import annotations

import json
from pathlib import Path

from evaluation.timeline import Span

DIGITS = 4
"""Of a second."""


class Timeline:
    """Appends spans to the file of a run.

    Args:
        directory: of the run.
    """

    def __init__(self, directory: Path) -> None:
        self.file = (directory / "timeline.jsonl").open("a", buffering=1)

    def __call__(self, span: Span) -> None:
        """Write a span."""
        times = {"start": round(span.start, DIGITS), "end": round(span.end, DIGITS)}
        self.file.write(json.dumps(vars(span) | times) + "\n")

    def close(self) -> None:
        """Close the file."""
        self.file.close()
