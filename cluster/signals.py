"""What SIGTERM and Ctrl-C do: unwind, so that roles are ended and half-written rounds removed; between PPO steps, save first."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143
"""128 + the number of SIGINT and of SIGTERM, as a shell has it."""
STOPPING = (
    b"\nstopping: finishing the step under way and saving the round; "
    b"a second signal ends at once, without what is not saved yet\n"
)

_received: list[int] = []
_finishing: list[bool] = []


class Stopped(SystemExit):
    """The end of a run that was asked to stop, at a place from which it goes on.

    Args:
        words: what is saved, and how to go on.
    """

    def __init__(self, words: str) -> None:
        super().__init__(exit_code())
        self.words = words


def listen() -> None:
    """Take SIGTERM and SIGINT. Ray installs a handler of its own when it starts, so this is called again after that."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def stop(number: int, frame: FrameType | None) -> None:
    """The handler."""
    _received.append(number)
    if _finishing and len(_received) == 1:
        os.write(2, STOPPING)
        return
    _ignore()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(exit_code())


def end(words: str) -> NoReturn:
    """End the run at a good place.

    Args:
        words: what is saved, and how to go on.

    Raises:
        Stopped: always.
    """
    _ignore()
    raise Stopped(words)


def _ignore() -> None:
    """From now on no signal cuts the clean-up short."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def stop_asked() -> bool:
    """True once a signal has come.

    What the handler raises can get lost: Ray's blocking calls make an exit with code 1 of it, and a finalizer that happens to
    run at that moment swallows it. So whoever waits in a loop asks ``obey_termination`` as well.
    """
    return bool(_received)


def exit_code() -> int:
    """That of the first signal."""
    return 128 + _received[0]


def obey_termination() -> None:
    """End a loop that waits, if a signal has come; inside ``finishing`` it takes two.

    Raises:
        SystemExit: with ``exit_code``.
    """
    if len(_received) > len(_finishing):
        raise SystemExit(exit_code())


@contextmanager
def finishing() -> Iterator[None]:
    """Work that comes to a good end before the first signal is obeyed: its caller looks at ``stop_asked``, and saves."""
    _finishing.append(True)
    try:
        yield
    finally:
        _finishing.pop()
