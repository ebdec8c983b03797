"""What SIGTERM does: unwind, so that roles are ended and half-written rounds removed, and exit with 143."""

import signal
from types import FrameType

EXIT_TERMINATED = 143


def terminate(number: int, frame: FrameType | None) -> None:
    """A handler for SIGTERM. Ray installs its own when it starts, so this one is set again after that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the clean-up short
    raise SystemExit(EXIT_TERMINATED)
