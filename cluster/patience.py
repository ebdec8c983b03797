"""Storage that is away for a while: what an error says of it, and waiting until it is there again."""

from __future__ import annotations

import errno
import time
import uuid
from collections.abc import Callable
from pathlib import Path

AWAY = frozenset(
    {
        errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EHOSTDOWN, errno.EHOSTUNREACH,
        errno.ENETDOWN, errno.ENETUNREACH, errno.ESHUTDOWN,
    }
)  # fmt: skip
"""What a file system says whose server or disk does not answer."""
LOOK_EVERY_S = 1.0


def errno_of(error: BaseException) -> int | None:
    """The number of a system's error; safetensors has it in words only.

    Args:
        error: of anything.
    """
    if isinstance(error, OSError):
        return error.errno
    _, found, rest = str(error).partition("(os error ")
    number = rest.partition(")")[0]
    return int(number) if found and number.isdigit() else None


def is_away(error: BaseException, directory: Path) -> bool:
    """Whether an error means that the storage is away, and may come back.

    Args:
        error: of anything that works on it.
        directory: on it, that was there before.
    """
    return errno_of(error) in AWAY or (isinstance(error, FileNotFoundError) and not directory.is_dir())


def until_there(directory: Path, limit_s: float, look: Callable[[], None]) -> float:
    """Wait until a file can be written, read and removed.

    Args:
        directory: that is away.
        limit_s: longest wait.
        look: called at each attempt.

    Returns:
        Seconds that it took.

    Raises:
        OSError: the last attempt's, when it has taken too long.
    """
    began = time.monotonic()
    while True:
        look()
        try:
            _try(directory)
        except OSError as error:
            late = time.monotonic() - began > limit_s
            if late or not is_away(error, directory):
                raise
        else:
            return time.monotonic() - began
        time.sleep(LOOK_EVERY_S)


def _try(directory: Path) -> None:
    probe, text = directory / f".probe-{uuid.uuid4().hex}", uuid.uuid4().hex
    try:
        probe.write_text(text)
        if probe.read_text() != text:
            raise OSError(errno.EIO, "a file that was just written reads as another", str(probe))
    finally:
        probe.unlink(missing_ok=True)
