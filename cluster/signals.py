"""What SIGTERM does: unwind, so that roles are ended and half-written rounds removed, and exit with 143."""

import signal
from types import FrameType

EXIT_TERMINATED = 143
_received: list[int] = []


def terminate(number: int, frame: FrameType | None) -> None:
    """A handler for SIGTERM. Ray installs its own when it starts, so this one is set again after that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the clean-up short
    _received.append(number)
    raise SystemExit(EXIT_TERMINATED)


def terminated() -> bool:
    """True once SIGTERM has come.

    What the handler raises can get lost: Ray's blocking calls make an exit with code 1 of it, and a finalizer that happens to
    run at that moment swallows it. So whoever waits in a loop asks here as well.
    """
    return bool(_received)


def obey_termination() -> None:
    """End a loop that waits, if SIGTERM has come.

    Raises:
        SystemExit: with ``EXIT_TERMINATED``.
    """
    if terminated():
        raise SystemExit(EXIT_TERMINATED)
