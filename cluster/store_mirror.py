"""What is committed in a working directory, copied to an object store as it is committed.

PREFIX/runs/NAME/ in the store:
    start/..., rounds/round_000/...   the files of what is committed, each read back and compared after it was sent
    manifests/start.json, ...         size and SHA-256 of each of them
    config.yaml, metrics.jsonl, ...   as they were at the last commit or report
    best/best.json                    which of the rounds is the best; its policy is there once, in the round
    ledger.json                       put last: one object is replaced in one step, so readers see whole rounds only
    .claims/                          which driver has the run (cluster.claims)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from cluster.best_directory import CARD
from cluster.best_directory import FOLDER as BEST
from cluster.claims import FOLDER, PACE, Claim, Pace
from cluster.config import RunConfig
from cluster.draft import steps_among
from cluster.ledger import parse_ledger
from cluster.mirror import IDENTITY, Ledger, Mirror, Mirrored, NoMirror
from cluster.storage import Digest, Store, storage_name
from cluster.store_uri import is_store
from tokens.errors import UserError

LEDGER, CONFIG = "ledger.json", "config.yaml"
NOT_THE_REST = ("start", "rounds", "manifests", BEST, FOLDER, LEDGER)
"""Names in a run that are sent or fetched in their own way."""
NUM_HANDS = 4
"""Files on their way at a time; pyarrow sends the parts of each in threads of its own."""


class StoreMirror:
    """A run's mirror in an object store.

    Args:
        store: where.
        folder: of the run in it, such as runs/NAME.
        path: of the working directory.
        say: shows a line to the user.
        pace: of the driver's signs of life.
    """

    def __init__(self, store: Store, folder: str, path: Path, say: Callable[[str], None], pace: Pace = PACE) -> None:
        self.store, self.folder, self.path, self.say, self.pace = store, folder, path, say, pace
        self.place = f"{store.name}/{folder}"
        self.hands = ThreadPoolExecutor(NUM_HANDS)
        self.claim: Claim | None = None
        self.seen: str | None = None
        self.sent: dict[Path, tuple[int, int]] = {}
        self.drafted: dict[Path, tuple[int, int]] = {}

    def read(self) -> Mirrored | None:
        """What is there; None if there is no run.

        Raises:
            UserError: if the store does not answer, or has no such bucket.
        """
        self.store.check()
        self.seen = self.store.read(self._key(LEDGER))
        if self.seen is None:
            return None
        config = self.store.read(self._key(CONFIG))
        if config is None:
            raise UserError(f"{self.place} has a {LEDGER} and no {CONFIG}: it is no run of ours; choose another name or storage")
        return Mirrored(self.place, parse_ledger(self.seen, f"{self.place}/{LEDGER}"), config)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Claim the run in the store; the working directory's lock is held already.

        Raises:
            UserError: if another driver has it.
        """
        identity = self.path / IDENTITY
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex)
        self.claim = Claim(self.store, self.folder, identity.read_text(), self.say, self.pace)
        with self.claim.held():
            try:
                yield
            finally:
                self.store.stopped.set()
                self.hands.shutdown(cancel_futures=True)

    def saved_steps(self, name: str) -> int:
        """PPO steps of the last checkpoint in a draft; 0 where it is not there, whole: its manifest is put after its files."""
        listed = self.store.read(self._manifest(name))
        return 0 if listed is None else steps_among(json.loads(listed))

    def fetch(self, name: str, into: Path) -> None:
        """Bring a directory here, and compare it with its manifest.

        Args:
            name: of the directory in the run, such as rounds/round_000.
            into: an empty directory to write it into.

        Raises:
            UserError: if a file there is not the one that was committed.
        """
        self.say(f"  fetch {name} from {self.place}")
        listed = self.store.read(self._manifest(name))
        if listed is None:
            raise UserError(f"{self.place} is damaged: its ledger names {name}, and {self._manifest(name)} is not there")
        wanted = {file: Digest(**digest) for file, digest in json.loads(listed).items()}
        came = self._fetch_files([f"{name}/{file}" for file in wanted], [_inside(into, file) for file in wanted])
        for (file, digest), there in zip(wanted.items(), came, strict=True):
            if there != digest and not cut_back(_inside(into, file), digest):
                raise UserError(
                    f"{self.place}/{name}/{file} is damaged: {there.size} bytes with SHA-256 {there.sha256} came, "
                    f"{digest.size} with {digest.sha256} were committed. Put the right file back, or choose another name"
                )

    def fetch_rest(self) -> None:
        """Bring all else that is there: numbers, logs, the report, as they were at the last commit."""
        names = [name for name in self.store.tree(self.folder) if name.split("/")[0] not in NOT_THE_REST]
        self._fetch_files(names, [_inside(self.path, name) for name in names])

    def _fetch_files(self, names: list[str], targets: list[Path]) -> list[Digest]:
        return list(self.hands.map(self.store.download, [self._key(name) for name in names], targets))

    def send(self, names: list[str], ledger: Ledger) -> None:
        """Copy committed directories there, then everything else, and the ledger last.

        Args:
            names: directories that the ledger in the store does not name.
            ledger: that names them.

        Raises:
            UserError: if the store does not take it, or another driver wrote to the run. Everything is intact in the working
                directory, and the next driver sends it.
        """
        assert self.claim is not None, "a mirror is written to while it is held"
        self.claim.check()
        if self.store.read(self._key(LEDGER)) != self.seen:
            raise UserError(
                f"{self.place}/{LEDGER} was written by another driver meanwhile; let it finish, or choose another name"
            )
        for name in names:
            self._send_directory(name)
        self.send_rest()
        self.claim.check()
        text = json.dumps(ledger, indent=1)
        self.store.write(self._key(LEDGER), text)
        self.seen = text

    def send_draft(self, name: str) -> None:
        """Copy what is new in the draft of a round under way, after the numbers that it goes on from; the manifest comes last.

        Args:
            name: of the draft in the run.

        Raises:
            UserError: as ``send``.
        """
        assert self.claim is not None, "a mirror is written to while it is held"
        self.claim.check()
        self.send_rest()
        listed = self.store.read(self._manifest(name))
        if listed is None:
            self.drop(name)
        known = {} if listed is None else json.loads(listed)
        began, files = (
            time.monotonic(),
            {file.relative_to(self.path / name).as_posix(): file for file in _files(self.path / name)},
        )
        stamps = {rest: (file.stat().st_size, file.stat().st_mtime_ns) for rest, file in files.items()}
        new = [
            rest
            for rest, file in files.items()
            if rest not in known or file not in self.drafted or self.drafted[file] != stamps[rest]
        ]
        sent = self.hands.map(self.store.upload, [files[rest] for rest in new], [self._key(f"{name}/{rest}") for rest in new])
        digests = dict(zip(new, map(asdict, sent), strict=True))
        manifest = {rest: digests[rest] if rest in digests else known[rest] for rest in files}
        self.store.write(self._manifest(name), json.dumps(manifest, indent=1))
        for rest in known.keys() - manifest.keys():
            self.store.remove(self._key(f"{name}/{rest}"))
        self.drafted = {files[rest]: stamp for rest, stamp in stamps.items()}
        megabytes = sum(stamps[rest][0] for rest in new) / 1e6
        self.say(f"  {name} is in {self.place}: {megabytes:,.1f} MB in {time.monotonic() - began:.1f} s")

    def drop(self, name: str) -> None:
        """Remove a directory, its manifest first."""
        self.store.remove(self._manifest(name))
        self.store.remove_folder(self._key(name))

    def _send_directory(self, name: str) -> None:
        self.drop(name)  # left there by a driver that did not come to its ledger
        began, files = time.monotonic(), _files(self.path / name)
        keys = [self._key(file.relative_to(self.path).as_posix()) for file in files]
        sent = self.hands.map(self.store.upload, files, keys)
        manifest = {
            file.relative_to(self.path / name).as_posix(): asdict(digest) for file, digest in zip(files, sent, strict=True)
        }
        self.store.write(self._manifest(name), json.dumps(manifest, indent=1))
        megabytes = sum(file.stat().st_size for file in files) / 1e6
        self.say(f"  {name} is in {self.place}: {megabytes:,.1f} MB in {time.monotonic() - began:.1f} s")

    def send_rest(self) -> None:
        """Copy what changed of all that is not committed: config, numbers, logs, the report."""
        entries = [entry for entry in self.path.iterdir() if entry.name not in NOT_THE_REST and entry.name[0] != "."]
        files = [file for entry in entries for file in ([entry] if entry.is_file() else _files(entry))]
        files += [card] if (card := self.path / BEST / CARD).is_file() else []
        stamps = {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
        changed = [file for file, stamp in stamps.items() if file not in self.sent or self.sent[file] != stamp]
        keys = [self._key(file.relative_to(self.path).as_posix()) for file in changed]
        for file, _ in zip(changed, self.hands.map(self._send_loose, changed, keys), strict=True):
            self.sent[file] = stamps[file]

    def _send_loose(self, file: Path, key: str) -> None:
        try:
            self.store.upload(file, key)
        except UserError:
            if file.exists():  # else it was removed meanwhile, as a log may be
                raise

    def _manifest(self, name: str) -> str:
        return self._key(f"manifests/{name.replace('/', '-')}.json")

    def _key(self, name: str) -> str:
        return f"{self.folder}/{name}"


def cut_back(file: Path, digest: Digest) -> bool:
    """Undo what was appended to a file after it was listed, as to a journal whose next manifest did not come to be.

    Args:
        file: that came.
        digest: as it was listed.

    Returns:
        True if it is now what was listed.
    """
    with file.open("rb") as content:
        whole = hashlib.sha256(content.read(digest.size)).hexdigest() == digest.sha256
    if whole and file.stat().st_size > digest.size:
        os.truncate(file, digest.size)
    return whole and file.stat().st_size == digest.size


def _files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.is_symlink()]


def _inside(folder: Path, name: str) -> Path:
    if name.startswith("/") or ".." in name.split("/"):
        raise UserError(f"the store names a file {name!r}, which would lie outside {folder}: somebody else wrote it")
    return folder / name


def mirror_of(config: RunConfig, folder: str, path: Path, say: Callable[[str], None]) -> Mirror:
    """The mirror that a config asks for.

    Args:
        config: of the run.
        folder: of the run under the storage, such as runs/NAME.
        path: of its working directory.
        say: shows a line to the user.
    """
    name = storage_name(config)
    return StoreMirror(Store(name), folder, path, say) if is_store(name) else NoMirror()
