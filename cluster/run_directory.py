"""The run directory: nothing half-written, nothing lost.

A round is written into a directory beside its place, synced, and renamed; then the ledger, which alone says what is
committed, is replaced in one step. The layout is in docs/run_directory.md.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.best_directory import BestDirectory
from cluster.config import RunConfig
from cluster.differences import flat, refuse_differences
from cluster.draft import Draft, Point, drop, point_of, remove, remove_partials, wrong_with
from cluster.hold import LOCK, Hold, TakenOver, locked
from cluster.ledger import FORMAT, REMEDY, read_ledger
from cluster.metrics_file import NONE, forget_rows
from cluster.mirror import IDENTITY, Ledger, entries, newer
from cluster.storage import storage_root
from cluster.store_mirror import mirror_of
from cluster.versions import versions
from evaluation.best import best_of, why_stopped
from tokens.durable import commit_directory, write_file
from tokens.errors import UserError

MAY_CHANGE = ("storage", "scratch", "report_to", "resources", "rounds", "guards", "faults")
"""Sections of the config that may differ when a run is continued: they change where, how long and what is put up with on the way,
not what is learned."""
WHAT_IS_PLAYED = {"baseline": "none", "best_of": None}
"""Keys of ``rounds`` that do change what is learned, with their defaults."""

HOW_ASKED = ("concurrency", "timeout_s", "retries", "max_tokens")
"""Keys of ``fresh`` that change no label."""


def now() -> str:
    """The time in UTC, ISO 8601; for people, nothing is decided by it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


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
    engines = {key: value for key, value in tree["rollout"].items() if key != "max_engines"}  # who samples changes no sample
    fresh = {"fresh": _who_labels(tree["fresh"])} if "fresh" in tree else {}
    return kept | {"rollout": engines} | fresh | ({"rounds": played} if played else {})


def _who_labels(fresh: dict[str, Any]) -> dict[str, Any]:
    """How an endpoint is asked, and where it stands, may change: its model says who labels."""
    kept = {key: value for key, value in fresh.items() if key not in HOW_ASKED}
    kind, _, place = str(fresh["judge"]).partition(":")
    return kept | ({"judge": f"{kind}:#{place.partition('#')[2]}"} if kind == "openai" else {})


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
def made_and_locked(path: Path) -> Iterator[Hold]:
    """Make a directory where it is missing, and keep other drivers out of it meanwhile.

    Args:
        path: of the directory.

    Raises:
        UserError: if another driver holds it, or the disk is full.
    """
    with contextlib.ExitStack() as stack:
        with space_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            hold = stack.enter_context(locked(path))
        yield hold


def _silent(line: str) -> None:
    """For those who look into a run and show nothing."""


class RunDirectory:
    """One run's directory, locked to one driver while it is open; with an object store as storage, mirrored there.

    Args:
        config: of the run.
        say: shows a line to the user.

    Raises:
        UserError: if the directory belongs to another config, is not a run directory, or another driver holds it.
    """

    def __init__(self, config: RunConfig, say: Callable[[str], None] = _silent) -> None:
        self.config = config
        self.root = storage_root(config)
        self.path = self.root / "runs" / config.name
        self.say = say
        self.mirror = mirror_of(config, f"runs/{config.name}", self.path, say)
        self.ledger: Ledger = {"format": FORMAT, "config_sha256": config_sha256(config), "start": None, "rounds": []}
        self.here = self.there = self.ledger
        self.hold = Hold(self.path, 0)  # nobody's: what is not open is not written to
        self.best = BestDirectory(self.path, config.rounds.baseline)

    def inspect(self) -> None:
        """Read the ledger if there is one, and its mirror; write nothing.

        Raises:
            UserError: if the directory or its mirror belongs to another config, is not a run's, or they contradict each other.
        """
        if is_there(self.path):
            if (self.path / "ledger.json").exists():
                stored = read_ledger(self.path)
                if stored["start"] is not None:  # else nothing was committed: nothing belongs to the old config
                    self._refuse_others(self.path, stored, (self.path / "config.yaml").read_text())
                    self.ledger = self.here = stored
            elif any(entry.name not in (LOCK, IDENTITY) for entry in self.path.iterdir()):
                raise UserError(f"{self.path} is not empty and not a run directory; choose another name or storage root")
        mirrored = self.mirror.read()
        if mirrored is not None:
            self._refuse_others(mirrored.place, mirrored.ledger, mirrored.config)
            self.there, self.ledger = mirrored.ledger, newer(self.here, mirrored.ledger, self.path, mirrored.place)

    def _refuse_others(self, place: Path | str, ledger: Ledger, config: str) -> None:
        if ledger["config_sha256"] != config_sha256(self.config):
            there, here = yaml.safe_load(config), self.config.model_dump(mode="json")
            refuse_differences(place, flat(_kept(there)), flat(_kept(here)))

    @property
    def finished(self) -> bool:
        """True if no further round is to be played."""
        return self.why_stopped(self.ledger) is not None

    def why_stopped(self, ledger: Ledger) -> str | None:
        """Why no further round is played after those of a ledger, in words; None where the run goes on."""
        if ledger["start"] is None:
            return None
        rounds, best = self.config.rounds, best_of(ledger)
        patience, min_delta = (None, 0.0) if rounds.stop is None else (rounds.stop.patience, rounds.stop.min_delta)
        return why_stopped(best, patience, min_delta, rounds.num_rounds)

    def begin_with(self, sft_dir: Path) -> None:
        """Know where SFT's policy lies, which is the best until a round beats it.

        Args:
            sft_dir: the SFT model, with its tokenizer.
        """
        self.best.sft_dir = sft_dir
        self._keep_best()

    def _keep_best(self) -> None:
        self.best.keep(self.ledger, self.why_stopped(self.ledger), self.hold.check)

    @contextlib.contextmanager
    def open(self) -> Iterator[RunDirectory]:
        """Make or continue the run; what an earlier driver left uncommitted is removed, what only the mirror has is fetched.

        Raises:
            UserError: as ``inspect``, or if another driver holds the directory, or the disk is full.
        """
        with made_and_locked(self.path) as self.hold, self.mirror.held():
            self.inspect()
            with space_errors(self.path):
                write_file(self.path / "config.yaml", config_text(self.config))
                write_file(self.path / "ledger.json", json.dumps(self.here, indent=1))  # from now on the directory is known
                self._take_back()
                self._fetch()
                write_file(self.path / "ledger.json", json.dumps(self.ledger, indent=1))
                write_file(self.path / "versions.json", json.dumps(versions(), indent=1))
                (self.path / "rounds").mkdir(exist_ok=True)
                self._discard_uncommitted()
            self._refuse_damaged()
            with space_errors(self.path):
                self._keep_best()
            if unsent := self._units(self.ledger)[len(entries(self.there)) :]:
                self.mirror.send([self._name(unit) for unit in unsent], self.ledger)
                self.there = self.ledger
            if self.saved_steps and self.mirror.saved_steps(self._name(self.draft_path)) != self.saved_steps:
                self.keep_draft()
            try:
                yield self
            except RuntimeError:  # a role failed: the first thing that somebody wants to read is its log
                with contextlib.suppress(UserError):  # the role's failure is what is told
                    self.hold.check()
                    self.mirror.send_rest()
                raise
            if self.hold.lasts:
                self.mirror.send_rest()

    def _refuse_damaged(self) -> None:
        """What the run goes on from must be what was written: ``start/`` and the last committed round."""
        units = [] if self.finished else self._units(self.ledger)
        for unit in dict.fromkeys((*units[:1], *units[-1:])):
            if (wrong := wrong_with(unit)) is not None:
                raise UserError(f"{wrong}, and the run goes on from it: {REMEDY}")

    def _units(self, ledger: Ledger) -> list[Path]:
        """Directories that a ledger names, in the order of its entries."""
        return [*([self.start_path] if ledger["start"] else []), *(self.round_path(entry["round"]) for entry in ledger["rounds"])]

    def look_again(self) -> int:
        """See what is committed, after an error that may have come before a commit was in its place, or after.

        Returns:
            Rounds that are.
        """
        self.ledger = read_ledger(self.path)
        self._take_back()
        for unit in self._units(self.ledger)[-1:]:
            self.hold.check()
            drop(unit, self.config.rounds.keep_rollouts)
        self._keep_best()
        return self.num_committed

    def _take_back(self) -> None:
        """What has its place, and was cut off before the ledger named it, goes on as a draft."""
        cut_off = self.round_path(self.num_committed) if self.ledger["start"] else self.start_path
        if point_of(cut_off) is not None:
            self.hold.check()
            remove(_draft_of(cut_off))
            self.hold.check()
            os.replace(cut_off, _draft_of(cut_off))

    def _fetch(self) -> None:
        missing = self._units(self.ledger)[len(entries(self.here)) :]
        (self.path / "rounds").mkdir(exist_ok=True)
        further = self.mirror.saved_steps(self._name(self.draft_path)) > (0 if missing else self.saved_steps)
        for unit in [*missing, *([self.draft_path] if further else [])]:
            partial = unit.with_name(f".fetched{unit.name}")
            for left in (partial, unit, _draft_of(unit)):
                remove(left)
            partial.mkdir()
            try:
                self.mirror.fetch(self._name(unit), partial)
                commit_directory(partial, unit)
            finally:
                remove(partial)
        if missing or further:
            self.mirror.fetch_rest()

    def _name(self, place: Path) -> str:
        return place.relative_to(self.path).as_posix()

    def _discard_uncommitted(self) -> None:
        kept = {self.round_path(entry["round"]).name for entry in self.ledger["rounds"]}
        for name in kept:
            drop(self.path / "rounds" / name, self.config.rounds.keep_rollouts)
        under_way = _draft_of(self.start_path) if self.ledger["start"] is None else self.draft_path
        if point_of(under_way) is not None:
            kept.add(under_way.name)
            draft = Draft(under_way, self.hold.check)
            draft.check(self.say)
            draft.tidy()
        for folder in (self.path / "rounds").iterdir():
            if folder.name not in kept:
                shutil.rmtree(folder)
        for name in (".fetchedstart", ".start.partial", *(() if self.ledger["start"] else ("start",))):
            if name not in kept:
                remove(self.path / name)
        timeline = self.path / "timeline.jsonl"
        if timeline.exists() and not (text := timeline.read_text()).endswith("\n"):  # a kill cut its last line
            write_file(timeline, text[: text.rfind("\n") + 1])
        point = point_of(under_way)
        if point is None:
            forget_rows(self.path / "metrics.jsonl", 0, self.num_committed if self.ledger["start"] else NONE)
        else:
            forget_rows(self.path / "metrics.jsonl", point.metrics_bytes)

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

    @property
    def draft_path(self) -> Path:
        """Where the next round to be committed is written."""
        return _draft_of(self.round_path(self.num_committed))

    @property
    def point(self) -> Point | None:
        """Where the next round to be committed goes on; None = it has not begun."""
        return point_of(self.draft_path)

    @property
    def saved_steps(self) -> int:
        """PPO steps of the next round to be committed that its checkpoint has; 0 where there is none."""
        return 0 if (point := self.point) is None else point.steps

    @property
    def policy_version(self) -> int:
        """That of the weights that the run goes on from."""
        if (point := self.point) is not None:
            return point.policy_version
        return int(self.ledger["rounds"][-1]["policy_version"]) if self.num_committed else 0

    @property
    def learner_path(self) -> Path | None:
        """What the learner goes on from: a checkpoint of a round under way, else the last one; None = it begins with SFT."""
        if (point := self.point) is not None and point.place is not None:
            return point.place
        return self.round_path(self.num_committed - 1) if self.num_committed else None

    def critic_base(self, sft_dir: Path) -> Path:
        """What the critic that ``learner_path`` holds began from.

        Args:
            sft_dir: the SFT model.
        """
        if self.config.policy.critic_start == "sft":
            return sft_dir
        begins_each_round = self.config.policy.critic_start == "reward" and (self.draft_path / "reward").exists()
        saved = (point := self.point) is not None and point.place is not None
        if saved and (begins_each_round or not self.num_committed):
            return self.draft_path / "reward"
        return self.round_path(0) / "reward"

    @contextlib.contextmanager
    def draft(self, final: Path) -> Iterator[Draft]:
        """A directory to write ``final``'s content into, beside it; if it is not committed, the stages that are done stay in it.

        Args:
            final: ``start_path`` or a ``round_path``.

        Raises:
            UserError: if the disk is full. What was committed before stays as it was, and so does every stage that was done.
        """
        partial = _draft_of(final)
        try:
            with space_errors(self.path):
                self.hold.check()
                if point_of(partial) is None:  # of an attempt that ended before its first line
                    shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(exist_ok=True)
                yield Draft(partial, self.hold.check)
        except TakenOver:
            raise
        except FileNotFoundError:
            self.hold.check()  # one that took over has cleared away what was begun here
            raise
        except UserError:
            if partial.exists():
                Draft(partial, self.hold.check).tidy()  # of a full disk, what is half-written
            raise
        finally:
            if partial.exists() and point_of(partial) is None and self.hold.lasts:
                shutil.rmtree(partial, ignore_errors=True)

    def keep_draft(self) -> None:
        """Give the mirror the round under way.

        Raises:
            UserError: if it does not take it. It is saved here all the same.
        """
        self.mirror.send_draft(self._name(self.draft_path))

    def commit_start(self, draft: Draft, entry: dict[str, Any]) -> None:
        """Commit ``start/`` and its ledger entry."""
        self._commit(draft.path, self.start_path, self.ledger | {"start": entry})

    def commit_round(self, draft: Draft, entry: dict[str, Any]) -> None:
        """Commit the next round and its ledger entry; ``entry["round"]`` must be its index. The entry also says which round is
        the best by then, and why the run ends with it, if it does.
        """
        assert entry["round"] == self.num_committed
        ledger = self.ledger | {"rounds": [*self.ledger["rounds"], entry]}
        best = best_of(ledger)
        told = {"best": {"round": best.round, "gain": best.gain, "why": best.words()}, "ended": self.why_stopped(ledger)}
        self._commit(draft.path, self.round_path(entry["round"]), ledger | {"rounds": [*self.ledger["rounds"], entry | told]})

    def _commit(self, partial: Path, final: Path, ledger: dict[str, Any]) -> None:
        self.hold.check()
        remove_partials(partial)
        commit_directory(partial, final, self.hold.check)
        self.hold.check()
        write_file(self.path / "ledger.json", json.dumps(ledger, indent=1))
        self.ledger = ledger
        self.hold.check()
        drop(final, self.config.rounds.keep_rollouts)
        self._keep_best()
        self.mirror.send([self._name(unit) for unit in self._units(ledger)[len(entries(self.there)) :]], ledger)
        self.there = ledger
        self.mirror.drop(self._name(_draft_of(final)))


def _draft_of(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


@contextlib.contextmanager
def space_errors(path: Path) -> Iterator[None]:
    """Turn a disk that is full, or that may not be written to, into the user's error that it is."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS or (isinstance(error, PermissionError) and not _lies_in(error.filename, path)):
            raise
        what, remedy = REFUSALS[error.errno]
        raise UserError(
            f"{what} while writing to {path}: this round is not committed, what of it was done before and all earlier rounds are "
            f"intact. {remedy} and run the same command again"
        ) from error


def _lies_in(name: str | None, path: Path) -> bool:
    """Whether what an error is about is a directory, or lies in it."""
    return name is not None and Path(name).is_relative_to(path)


FULL = ("no space left", "Free some space")
REFUSALS = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EROFS: ("read-only file system", "Make it writable (mount it rw; a disk with errors turns read-only: look into dmesg)"),
    errno.EACCES: ("permission denied", "Give the directory and all in it back to your user"),
    errno.EPERM: ("not permitted", "Give the directory and all in it back to your user"),
}
"""What a disk says that takes nothing, and what to do."""
