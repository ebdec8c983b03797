"""What a person sees in the terminal: one bar a phase, with a rate and the time left; one table a round."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from actors.process import Progress as Said
from tokens.paths import printable

_HEAD = re.compile(r"\[(bold|yellow|bold red)\]([^\[\]]*)\[/\]")
"""What a line may begin with."""


def styled(text: str) -> Text:
    """A line for the terminal: what comes from data or models must neither style it nor steer the terminal."""
    head = _HEAD.match(text)
    line, rest = Text(), text
    if head:
        line.append(printable(head[2]), head[1])
        rest = text[head.end() :]
    return line.append(printable(rest))


LINE_EVERY_S = 10.0
"""How often a phase says in a log how far it is; docs/design/0012 tells why these are no tqdm bars."""


class Bar:
    """One phase: a live bar on a terminal; elsewhere, as in a job's log, a line now and then, and one at its end."""

    def __init__(self, console: RichConsole, title: str, unit: str) -> None:
        self.console, self.title, self.unit = console, title, unit
        self.done, self.total, self.tokens, self.note = 0, 0, 0, ""
        self.began = self.said = time.perf_counter()
        self.live: Progress | None = None
        if console.is_terminal:
            self.live = Progress(
                SpinnerColumn(),
                TextColumn("{task.description:<28}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[note]}"),
                console=console,
                transient=True,
            )
            self.task = self.live.add_task(title, total=None, rate="", note="")

    def __enter__(self) -> Bar:
        if self.live:
            self.live.start()
        return self

    def update(self, done: int, total: int, unit: str = "", tokens: int = 0, note: str = "") -> None:
        """Say how far the phase is."""
        self.done, self.total, self.tokens = done, total, tokens
        self.unit, self.note = unit or self.unit, note or self.note
        if self.live:
            self.live.update(self.task, completed=done, total=total or None, rate=self._rate(), note=self.note)
        else:
            self.line()

    def line(self) -> None:
        """A line for a log, if it is time for one."""
        now = time.perf_counter()
        if now - self.said < LINE_EVERY_S:
            return
        self.said, seconds = now, now - self.began
        count, left = "", ""
        if self.total:
            count = f"{self.done:,} of {self.total:,} {self.unit} ({self.done / self.total:.0%})"
            left = f"{seconds * (self.total - self.done) / self.done:,.0f} s left" if self.done else ""
        details = ", ".join(part for part in (count, self._rate(), left, self.note) if part)
        self.console.print(f"  … {self.title:<28} {seconds:6.0f} s  [dim]{details}[/]", highlight=False)

    def show(self, said: Sequence[Said]) -> None:
        """Say how far several processes are together; of none, only that time passes."""
        if not said:
            self.line()
        else:
            self.update(sum(p.done for p in said), sum(p.total for p in said), said[0].unit, sum(p.tokens for p in said))

    def _rate(self) -> str:
        seconds = time.perf_counter() - self.began
        if not self.done or not self.unit or seconds <= 0:
            return ""
        tokens = f", {self.tokens / seconds:,.0f} tokens/s" if self.tokens else ""
        return f"{self.done / seconds:,.1f} {self.unit}/s{tokens}"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()
        if kind is None:
            seconds = time.perf_counter() - self.began
            details = ", ".join(
                part
                for part in (f"{self.done:,} {self.unit}" if self.done and self.unit else "", self._rate(), self.note)
                if part
            )
            self.console.print(f"  [green]✓[/] {self.title:<28} {seconds:6.1f} s  [dim]{details}[/]", highlight=False)


class Console:
    """The terminal."""

    def __init__(self) -> None:
        self.rich = RichConsole(soft_wrap=True)
        if not self.rich.is_terminal:
            self.rich = RichConsole(soft_wrap=True, width=140)  # a log has no width; tables must not fold

    def say(self, text: str) -> None:
        """Print a line.

        Args:
            text: one leading ``[style]words[/]`` is drawn; all that follows is shown as it stands, whatever it holds.
        """
        self.rich.print(styled(text), highlight=False)

    def show(self, thing: RenderableType) -> None:
        """Print a table."""
        self.rich.print(thing)

    def bar(self, title: str, unit: str = "") -> Bar:
        """A bar for the phase ``title``."""
        return Bar(self.rich, title, unit)
