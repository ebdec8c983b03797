"""Faults, done to processes and files from outside: nothing in the product knows of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

PIECES = (16 << 20, 1 << 20, 64 << 10, 4 << 10)
"""In which a disk is filled, bytes."""
FREEZE_S = 0.15
"""A process that is stopped first is killed in the middle of what it did when the trigger was seen."""


def kill(process: psutil.Process) -> float:
    """SIGKILL; when."""
    process.kill()
    return time.time()


def kill_frozen(process: psutil.Process) -> float:
    """Stop a process where it is, and kill it a little later: what it was doing stays undone. When it was killed."""
    process.suspend()
    time.sleep(FREEZE_S)
    return kill(process)


def freeze(process: psutil.Process) -> float:
    """SIGSTOP; when."""
    process.suspend()
    return time.time()


def thaw(process: psutil.Process) -> bool:
    """SIGCONT; False if it is gone by now."""
    try:
        process.resume()
    except psutil.NoSuchProcess:
        return False
    return True


@contextlib.contextmanager
def slowed(process: psutil.Process, times: int, period_s: float = 0.05) -> Iterator[None]:
    """Let a process run a part of the time only.

    Args:
        process: to slow down.
        times: it gets 1 / times of its time.
        period_s: of stop and go.
    """
    over = threading.Event()

    def work() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while not over.is_set():
                process.resume()
                time.sleep(period_s / times)
                process.suspend()
                time.sleep(period_s * (times - 1) / times)
            process.resume()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def starve(process: psutil.Process, spare_mib: int) -> None:
    """Let a process have little more memory than it has now: what it asks for beyond is refused, as without memory.

    Args:
        process: to limit.
        spare_mib: address space beyond what it has.
    """
    limit = process.memory_info().vms + (spare_mib << 20)
    process.rlimit(psutil.RLIMIT_AS, (limit, limit))


class Crammed:
    """A control group with room for a few pages more than its process has: the kernel kills what asks for memory beyond, as in a
    container at its limit. Needs the right to make one.

    Args:
        process: to put into it; what it has already does not count.
        spare_kib: that it gets in all.
    """

    ROOT = Path("/sys/fs/cgroup")

    def __init__(self, process: psutil.Process, spare_kib: int) -> None:
        old = self.ROOT / "memory"
        root, limit = (old, "memory.limit_in_bytes") if old.is_dir() else (self.ROOT, "memory.max")
        self.place = root / f"rondo-faults-{process.pid}"
        self.place.mkdir()
        (self.place / limit).write_text(str(spare_kib << 10))
        (self.place / "cgroup.procs").write_text(str(process.pid))

    def end(self) -> None:
        """Remove it, once its process is gone."""
        with contextlib.suppress(OSError):
            self.place.rmdir()


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def truncate(path: Path, share: float = 0.5) -> None:
    """Cut the end of a file off."""
    os.truncate(path, int(path.stat().st_size * share))


def swap(one: Path, other: Path) -> None:
    """Let two files or directories change places."""
    aside = one.with_name(f".{one.name}.aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


class SmallDisk:
    """A file system in memory with little room; needs the right to mount.

    Args:
        place: directory to mount at; made.
        mib: size.
    """

    def __init__(self, place: Path, mib: int) -> None:
        self.place, self.mib = place, mib

    def __enter__(self) -> SmallDisk:
        self.place.mkdir(parents=True, exist_ok=True)
        _root("mount", "-t", "tmpfs", "-o", f"size={self.mib}m", "tmpfs", str(self.place))
        return self

    def __exit__(self, *error: object) -> None:
        _root("umount", "-l", str(self.place))

    def resize(self, mib: int) -> None:
        """Give it another size."""
        _root("mount", "-o", f"remount,rw,size={mib}m", str(self.place))

    def fill(self, leave_kib: int) -> Path:
        """Take the room away but for a little; remove the file to give it back."""
        ballast, size = self.place / "ballast", 0
        with ballast.open("wb") as file:
            for piece in PIECES:  # somebody writes beside us, so that nobody knows how much is free
                with contextlib.suppress(OSError):
                    while True:
                        os.posix_fallocate(file.fileno(), size, piece)
                        size += piece
            os.ftruncate(file.fileno(), max(0, size - (leave_kib << 10)))
        return ballast


@contextlib.contextmanager
def read_only(place: Path) -> Iterator[None]:
    """Make a directory one of a disk that nobody may write to: no file of it can be opened for writing, made or renamed.

    Args:
        place: of it.
    """
    _root("mount", "--bind", str(place), str(place))
    try:
        _root("mount", "-o", "remount,bind,ro", str(place))
        yield
    finally:
        _root("umount", "-l", str(place))


def may_mount() -> str | None:
    """Why a small disk cannot be had here; None if it can."""
    probe = Path("/tmp") / f"rf-mount-{os.getpid()}"
    try:
        with SmallDisk(probe, 1):
            return None
    except OSError as error:
        return f"mounting a tmpfs needs a right that this user does not have ({error})"
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _root(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise OSError(str(error)) from error
    if done.returncode:
        raise OSError(done.stderr.strip() or f"{command[0]} answered {done.returncode}")
