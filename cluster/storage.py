"""Where runs and caches live: a directory, or an object store with a working directory in front of it.

Everything happens in a directory: roles hand models to each other as paths, commits are renames, drivers exclude each other by a
lock. Object stores have none of the three, so with ``storage: s3://...`` that directory is only where the work is done, and
``cluster.store_mirror`` copies to the store what is committed. This module reads the two names and talks to the store.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileSystem, FileType

from cluster.config import RunConfig
from cluster.store_uri import check_storage_name, is_store
from tokens.errors import UserError
from tokens.paths import check_name

PAUSES_S = (1.0, 3.0, 8.0, 20.0, 40.0)
"""Between the attempts of an operation, of which each is three of pyarrow's: a store that is away for a minute is waited for."""
PIECE = 8 << 20
"""Bytes that are read and sent at a time."""
HOPELESS = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT_TOKEN_ID")
"""What S3 says where another attempt would say the same."""
T = TypeVar("T")


def storage_name(config: RunConfig) -> str:
    """``storage`` of the config, else RONDO_STORAGE, else ~/rondo.

    Raises:
        UserError: if RONDO_STORAGE is not one that could stand in a config.
    """
    try:
        return config.storage or check_storage_name(os.environ.get("RONDO_STORAGE") or "~/rondo")
    except ValueError as error:
        raise UserError(f"RONDO_STORAGE: {error}") from None


def storage_root(config: RunConfig) -> Path:
    """The directory where the work is done: ``storage`` if that is a directory, else ``scratch``; never the current directory.

    Args:
        config: of the run.

    Returns:
        An absolute path.

    Raises:
        UserError: if it is not absolute, or cannot be made or written.
    """
    name, keys = storage_name(config), "storage or RONDO_STORAGE"
    if is_store(name):
        name, keys = config.scratch or os.environ.get("RONDO_SCRATCH") or "~/rondo", "scratch or RONDO_SCRATCH"
    elif config.scratch is not None:
        raise UserError(
            f"scratch is {config.scratch!r} and the storage a directory, {name!r}: the work is done there. Leave scratch out, or "
            "set storage to an object store (s3://bucket/prefix)"
        )
    check_name(name)
    root = Path(name.removeprefix("file://")).expanduser()
    if not root.is_absolute():
        raise UserError(
            f"the storage root must be an absolute path (a job's current directory is a temporary copy), got {name!r}; set {keys}"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the storage root {root} cannot be made: {error.strerror}; set {keys}") from error
    if not os.access(root, os.W_OK):
        raise UserError(f"the storage root {root} cannot be written to; set {keys}")
    return root


def refuse_store(config: RunConfig, command: str) -> None:
    """Stop a command that writes to a directory only.

    Args:
        config: of the command.
        command: its name.

    Raises:
        UserError: if the storage is an object store.
    """
    if is_store(name := storage_name(config)):
        raise UserError(
            f"storage is {name!r}: only `run` keeps its results in an object store. Set storage to a directory for `{command}`, "
            "and copy what it leaves there"
        )


@dataclass(frozen=True)
class Digest:
    """What a file holds.

    Args:
        size: bytes.
        sha256: of its content, in hexadecimal.
    """

    size: int
    sha256: str


class StoppedError(RuntimeError):
    """A transfer was given up because the driver is ending."""


class Store:
    """A prefix of an object store. Every operation is tried again a few times before it fails.

    Args:
        uri: as ``check_storage_name`` lets it pass; pyarrow finds credentials in the environment.
        pauses_s: between attempts, seconds.

    Raises:
        UserError: if pyarrow does not take the URI.
    """

    def __init__(self, uri: str, pauses_s: tuple[float, ...] = PAUSES_S) -> None:
        self.pauses_s, self.stopped = pauses_s, Event()
        self.name = uri.split("?")[0].rstrip("/")
        try:
            self.files, prefix = FileSystem.from_uri(uri)
        except (ArrowException, ImportError, ValueError) as error:
            raise UserError(f"storage {self.name} is not one that pyarrow opens: {one_line(error)}") from None
        self.prefix = prefix.rstrip("/")

    def check(self) -> None:
        """Look whether the bucket is there, at once and without patience.

        Raises:
            UserError: if it is not, or does not answer.
        """
        bucket = self.prefix.lstrip("/").split("/")[0]
        try:
            kind = self.files.get_file_info(bucket).type
        except OSError as error:
            raise UserError(self._refusal("the bucket be looked up", error)) from None
        if kind == FileType.NotFound:
            raise UserError(
                f"storage {self.name}: there is no bucket {bucket!r}, or these credentials may not see it; make it first"
            )

    def names(self, folder: str) -> list[str]:
        """Names of the objects right under a folder, sorted; none if there is no such folder."""
        chosen = FileSelector(self._key(folder), allow_not_found=True)
        found = self._try(f"{folder} be listed", lambda: self.files.get_file_info(chosen))
        return sorted(info.base_name for info in found if info.type == FileType.File)

    def tree(self, folder: str) -> list[str]:
        """Names of all objects under a folder, relative to it, sorted."""
        root = self._key(folder)
        chosen = FileSelector(root, allow_not_found=True, recursive=True)
        found = self._try(f"{folder} be listed", lambda: self.files.get_file_info(chosen))
        return sorted(info.path.removeprefix(f"{root}/") for info in found if info.type == FileType.File)

    def read(self, key: str) -> str | None:
        """An object's text; None if it is not there."""

        def work() -> str | None:
            try:
                with self.files.open_input_stream(self._key(key)) as stream:
                    return bytes(stream.read()).decode()
            except FileNotFoundError:
                return None

        return self._try(f"{key} be read", work)

    def write(self, key: str, text: str) -> None:
        """Replace an object in one step.

        A stream that is left by an exception is closed, and what it held becomes the object; so a thread does it, which a
        signal cannot interrupt.
        """

        def work() -> None:
            with self.files.open_output_stream(self._key(key)) as stream:
                stream.write(text.encode())

        with ThreadPoolExecutor(1) as hand:
            hand.submit(self._try, f"{key} be written", work).result()

    def remove(self, key: str) -> None:
        """Remove an object if it is there."""

        def work() -> None:
            try:
                self.files.delete_file(self._key(key))
            except FileNotFoundError:
                return

        self._try(f"{key} be removed", work)

    def remove_folder(self, folder: str) -> None:
        """Remove everything under a folder."""
        self._try(f"{folder} be emptied", lambda: self.files.delete_dir_contents(self._key(folder), missing_dir_ok=True))

    def upload(self, source: Path, key: str) -> Digest:
        """Copy a file to an object, read that back, and compare.

        Args:
            source: the file.
            key: of the object.

        Returns:
            What was sent and is there.
        """

        def work() -> Digest:
            sent = self._upload(source, key)
            if (there := self._digest(key)) != sent:
                raise OSError(f"sent {sent.size} bytes with SHA-256 {sent.sha256}, found {there.size} with {there.sha256}")
            return sent

        return self._try(f"{source} be copied to {key}", work)

    def _upload(self, source: Path, key: str) -> Digest:
        with source.open("rb") as file, self.files.open_output_stream(self._key(key)) as stream:
            return self._copy(file, stream)

    def _digest(self, key: str) -> Digest:
        with self.files.open_input_stream(self._key(key)) as stream:
            return self._copy(stream)

    def _copy(self, source: Any, *targets: Any) -> Digest:
        """Read one open file to its end, piece by piece, into others; what came."""
        total, digest = 0, hashlib.sha256()
        while piece := source.read(PIECE):
            self._refuse_to_go_on()
            for target in targets:
                target.write(piece)
            digest.update(piece)
            total += len(piece)
        return Digest(total, digest.hexdigest())

    def download(self, key: str, target: Path) -> Digest:
        """Copy an object to a file.

        Args:
            key: of the object.
            target: the file; its folder is made.

        Returns:
            What came.
        """
        target.parent.mkdir(parents=True, exist_ok=True)

        def work() -> Digest:
            with self.files.open_input_stream(self._key(key)) as stream, target.open("wb") as file:
                return self._copy(stream, file)

        return self._try(f"{key} be fetched", work)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def _try(self, what: str, work: Callable[[], T]) -> T:
        for pause in (*self.pauses_s, None):
            try:
                return work()
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):  # this machine's disk
                    raise
                hopeless = isinstance(error, FileNotFoundError) or any(word in str(error) for word in HOPELESS)
                if pause is None or hopeless:
                    raise UserError(self._refusal(what, error)) from error
            self.stopped.wait(pause)
            self._refuse_to_go_on()
        raise AssertionError("the last attempt returns or raises")

    def _refuse_to_go_on(self) -> None:
        if self.stopped.is_set():
            raise StoppedError(f"storage {self.name}: the driver is ending")

    def _refusal(self, what: str, error: OSError) -> str:
        return (
            f"storage {self.name} does not let {what}: {one_line(error)}. Check credentials, endpoint and network, and run "
            "the same command again: what was committed is intact in the working directory, and is sent then"
        )


def one_line(error: BaseException) -> str:
    """An error's text without line breaks and trailing colons."""
    return " ".join(str(error).split()).rstrip(" :.")
