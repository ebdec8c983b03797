"""The terminal interface that asks a person."""

from __future__ import annotations

from rich.columns import Columns
from rich.padding import Padding
from rich.panel import Panel
from rich.text import Text

from cluster.console import Console
from cluster.interview import Interview, Question, Side
from tokens.paths import printable

KEYS: dict[str, Side] = {"a": "a", "b": "b"}
SKIP, UNDO, DONE = "s", "u", "d"
SIDE_BY_SIDE = 110
"""Columns of a terminal in which two responses stand beside each other."""


def ask_in_terminal(interview: Interview, console: Console) -> None:
    """Ask until the person is done, the input ends, or the pool is used up.

    Args:
        interview: what is asked.
        console: to show and read on.
    """
    console.say("Type a or b for the better response, s to skip, u to undo, d when done; then Enter.")
    while (question := interview.question()) is not None:
        _show(question, console)
        choice = _read(console)
        if choice == DONE:
            break
        if choice == UNDO:
            if not interview.given:
                console.say("There is no answer to undo.")
                continue
            interview.undo()
        elif choice == SKIP:
            interview.answer(question, None)
        else:
            interview.answer(question, KEYS[choice])
        console.say(sure(interview))
    else:
        console.say("Every pair of the pool was shown.")


def sure(interview: Interview) -> str:
    """How far the profile is, in a sentence.

    Args:
        interview: whose profile.
    """
    answers = f"{interview.num_answers} answer{'' if interview.num_answers == 1 else 's'}"
    return f"{answers}; the profile expects to foretell {interview.accuracies[-1]:.0%} of your answers"


def _show(question: Question, console: Console) -> None:
    beside = console.rich.width >= SIDE_BY_SIDE
    width = console.rich.width // 2 - 1 if beside else None
    sides = [
        Panel(lines(text), title=name, title_align="left", width=width) for name, text in (("A", question.a), ("B", question.b))
    ]
    console.show(
        Padding(
            Panel(lines(question.prompt), title=f"{question.number}. Which response do you prefer?", title_align="left"),
            (1, 0, 0, 0),
        )
    )
    if beside:
        console.show(Columns(sides))
    else:
        for side in sides:
            console.show(side)


def lines(text: str) -> Text:
    """A text of several lines for the terminal, which it can neither style nor steer.

    Args:
        text: of a model or a file.
    """
    return Text("\n".join(printable(line) for line in text.splitlines()))


def _read(console: Console) -> str:
    """A choice; the end of the input is ``DONE``."""
    while True:
        try:
            typed = console.rich.input("[bold]a / b / s / u / d: [/]").strip().lower()
        except EOFError:
            return DONE
        if typed in (*KEYS, SKIP, UNDO, DONE):
            return typed
        console.say(f"got {typed!a}, expected a, b, s (skip), u (undo) or d (done)")
