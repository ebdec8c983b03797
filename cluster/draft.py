"""A round that is being written: its stages, and the checkpoints within it.

What a stage leaves is written under another name, synced, renamed and hashed; then a line in the draft's journal says that it is
there. Whoever comes next, a new driver or the same one after a failure, goes on at the first stage that has no such line.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cluster.journal import NAME, Entry, Journal
from tokens.durable import digest_of_file, sync, sync_tree, write_file

PATTERN = "after_*_steps"
MANIFEST = "manifest.json"
BEGUN, TRAINED, CHECKPOINT = "begun", "trained", "checkpoint"
BAD = "bad"
"""A PPO step whose numbers went wrong; see ``cluster.guarding``."""
STEP_KEYS = ("rollouts", "scores", "step", BAD, CHECKPOINT)
"""Stages of which there is one for each PPO step."""
WORKING = ("steps", "shifted.parquet", "calibration.json", "evaluation_rollouts.parquet")
"""What only a round under way has a use for."""


@dataclass(frozen=True)
class Point:
    """Where a round goes on.

    Args:
        steps: PPO steps that are done.
        policy_version: that the engines held then.
        place: where the learner's state lies; None = as the round found it.
        metrics_bytes: length of metrics.jsonl then.
        seconds: of each phase until then.
    """

    steps: int
    policy_version: int
    place: Path | None
    metrics_bytes: int
    seconds: Mapping[str, float]


class Draft:
    """The directory of a round, or of ``start/``, until it is committed.

    Args:
        path: of it.
        may_write: called before anything is recorded; raises where another driver has the draft by now.

    Raises:
        UserError: if its journal is damaged.
    """

    def __init__(self, path: Path, may_write: Callable[[], None] = lambda: None) -> None:
        self.path, self.may_write = path, may_write
        self.journal = Journal(path, may_write)
        self.partials: dict[str, Path] = {}
        """Where each output is being written."""

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def done(self, key: str) -> Entry | None:
        """The entry of a stage that is done; None if it is to be done."""
        return self.journal.alive[key] if key in self.journal.alive else None

    def begin(self, version: int, metrics_bytes: int) -> None:
        """Note what the round began with, unless that is noted.

        Args:
            version: of the policy.
            metrics_bytes: length of metrics.jsonl.
        """
        if self.done(BEGUN) is None:
            self.journal.append(Entry(BEGUN, {"version": version}, metrics_bytes=metrics_bytes))

    def partial(self, name: str) -> Path:
        """Where an output is written before it is whole: a place that nobody else has, so that a process which was given up, of
        this driver or of one before it, writes into nothing that counts.

        Args:
            name: of the output in the draft.
        """
        final = self.path / name
        final.parent.mkdir(exist_ok=True)
        self.partials[name] = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.partial")
        return self.partials[name]

    def record(
        self, key: str, outputs: Sequence[str], facts: Mapping[str, Any], metrics_bytes: int, seconds: Mapping[str, float]
    ) -> None:
        """A stage is done: give its outputs their names, and write the line that says so.

        Args:
            key: of the stage.
            outputs: their names in the draft; each lies at its ``partial`` place.
            facts: what the stage came to.
            metrics_bytes: length of metrics.jsonl.
            seconds: of each phase so far.
        """
        self.may_write()
        for name in outputs:
            self._settle(name)
        self.journal.append(Entry(key, facts, self._digests(outputs), metrics_bytes, seconds))

    def _settle(self, name: str) -> None:
        """Give an output its name. Before whatever another driver could lose by it, and after what may take long, it is asked
        whether that is still allowed.
        """
        final, partial = self.path / name, self.partials[name]
        if partial.is_dir():
            sync_tree(partial)
        else:
            sync(partial)
        self._remove(final)
        self.may_write()
        os.replace(partial, final)
        sync(final.parent)
        del self.partials[name]

    def _remove(self, place: Path) -> None:
        self.may_write()
        remove(place)

    def _digests(self, outputs: Iterable[str]) -> dict[str, str]:
        return {
            file.relative_to(self.path).as_posix(): digest_of_file(file)
            for name in outputs
            for file in files_in(self.path / name)
        }

    def checkpoint(
        self, steps: int, version: int, save: Callable[[Path], None], keep: int, metrics_bytes: int, seconds: Mapping[str, float]
    ) -> None:
        """Save all that the rest of the round rests on; the oldest checkpoint beyond ``keep`` goes after that.

        Args:
            steps: PPO steps that are done.
            version: of the policy.
            save: writes the learner's state into a directory.
            keep: checkpoints to keep.
            metrics_bytes: length of metrics.jsonl.
            seconds: of each phase so far.

        Raises:
            OSError: if the disk refuses. The earlier checkpoints are intact.
        """
        place = self.path / PATTERN.replace("*", f"{steps:04d}")
        partial = self.partial(place.name)
        partial.mkdir()
        save(partial)
        manifest = {file.relative_to(partial).as_posix(): digest_of_file(file) for file in files_in(partial)}
        write_file(partial / MANIFEST, json.dumps({"steps": steps, "policy_version": version, "files": manifest}, indent=1))
        self._settle(place.name)
        outputs = {f"{place.name}/{name}": digest for name, digest in manifest.items()}
        older = [key for key in self.checkpoints() if key != f"{CHECKPOINT} {steps}"]
        gone = older[: max(0, len(older) + 1 - keep)]
        facts = {"steps": steps, "version": version, "place": place.name}
        self.journal.append(Entry(f"{CHECKPOINT} {steps}", facts, outputs, metrics_bytes, seconds, tuple(gone)))
        self.tidy()

    def checkpoints(self) -> list[str]:
        """Keys of the checkpoints that count, oldest first."""
        return [key for key in self.journal.alive if key.split()[0] == CHECKPOINT]

    @property
    def point(self) -> Point | None:
        """Where the round goes on; None if it has not begun."""
        begun = self.done(BEGUN)
        if begun is None:
            return None
        saved = [*self.checkpoints(), *([TRAINED] if self.done(TRAINED) else [])]
        if saved:
            entry = self.journal.alive[saved[-1]]
            place = self.path / entry.facts["place"]
            return Point(entry.facts["steps"], entry.facts["version"], place, entry.metrics_bytes, entry.seconds)
        last = [entry for key, entry in self.journal.alive.items() if key.split()[0] not in STEP_KEYS][-1]
        return Point(0, begun.facts["version"], None, last.metrics_bytes, last.seconds)

    def go_back(self) -> Point:
        """Let the PPO steps after ``point`` no longer count: they are done again, from what is recorded of them.

        Returns:
            ``point``.
        """
        point = self.point
        assert point is not None, "a round goes back to where it has been"
        steps = [key for key in self.journal.alive if key.split()[0] == "step" and int(key.split()[1]) >= point.steps]
        if steps:
            self.journal.undo(tuple(steps), f"goes on after step {point.steps}")
        return point

    def note(self, key: str, facts: Mapping[str, Any]) -> None:
        """Write down what leaves nothing but its line.

        Args:
            key: of what happened.
            facts: of it.
        """
        self.journal.append(Entry(key, facts))

    def undo(self, keys: Iterable[str], why: str) -> None:
        """Let stages no longer count, as far as they did: they are done again.

        Args:
            keys: of these.
            why: in words.
        """
        alive = tuple(key for key in keys if key in self.journal.alive)
        if alive:
            self.journal.undo(alive, why)

    def undo_steps(self, first: int, why: str) -> None:
        """Let all that was done for a PPO step and those after it no longer count, and the checkpoints that rest on them.

        Args:
            first: of these steps.
            why: in words.
        """
        numbered = [(key, *key.split()) for key in self.journal.alive if key.split()[0] in STEP_KEYS]
        self.undo([key for key, name, number in numbered if int(number) >= first + (name == CHECKPOINT)], why)

    def check(self, say: Callable[[str], None]) -> None:
        """Compare what is there with the journal; what is damaged is made again, and all that rests on it.

        Args:
            say: shows a line to the user.
        """
        if self.journal.cut is not None:
            say(f"[yellow]note[/] the last line of {self.journal.path} was cut short by a kill; that stage is done again")
        for key in reversed([*self.checkpoints(), *([TRAINED] if self.done(TRAINED) else [])]):
            damaged = self._damaged(self.journal.alive[key])
            if damaged is None:
                break
            self.journal.undo(self._from(key) if key == TRAINED else (key,), damaged)
            further = self.point
            where = f"step {further.steps}" if further is not None and further.place is not None else "the start of its policy"
            say(f"[yellow]note[/] {damaged}: the round goes on from an older state, {where}")
        point = self.point
        for key, entry in list(self.journal.alive.items()):
            name, _, number = key.partition(" ")
            if name in (CHECKPOINT, TRAINED) or (name in STEP_KEYS and point is not None and int(number) < point.steps):
                continue
            damaged = self._damaged(entry)
            if damaged is not None:
                self.journal.undo(self._from(key), damaged)
                say(f"[yellow]note[/] {damaged}: it is made again, and what rests on it")
                break

    def _from(self, key: str) -> tuple[str, ...]:
        keys = list(self.journal.alive)
        return tuple(keys[keys.index(key) :])

    def _damaged(self, entry: Entry) -> str | None:
        """What is wrong with a stage's outputs, in words; None if they are what was written."""
        for name, digest in entry.outputs.items():
            file = self.path / name
            if not file.is_file():
                return f"{file} is missing"
            if digest_of_file(file) != digest:
                return f"{file} is not what was written"
        return None

    def tidy(self) -> None:
        """Remove what no stage that is done has left: it is made again."""
        kept = {NAME} | {name for entry in self.journal.alive.values() for name in entry.outputs}
        kept |= {f"{place.name}/{MANIFEST}" for place in self.path.glob(PATTERN)}
        folders = {parent.as_posix() for name in kept for parent in Path(name).parents}
        counted = {self.journal.alive[key].facts["place"] for key in self.checkpoints()}
        for place in self.path.glob(PATTERN):
            if place.name not in counted:
                self._remove(place)
        for file in files_in(self.path):
            if file.relative_to(self.path).as_posix() not in kept and not is_fit(file.relative_to(self.path)):
                self._remove(file)  # which may be gone: a process of a driver that is dead may be at it still
        for folder in sorted((entry for entry in self.path.rglob("*") if entry.is_dir()), reverse=True):
            if folder.relative_to(self.path).as_posix() not in folders and not any(folder.iterdir()):
                self.may_write()
                folder.rmdir()


FIT_SUFFIX = ".fit"
FIT = f".*{FIT_SUFFIX}"
"""Directories in which the reward trainer keeps how far a fit has come."""


def is_fit(path: Path) -> bool:
    """Whether a file of a draft belongs to a reward model's fit under way.

    Args:
        path: in the draft.
    """
    return any(fnmatch(part, FIT) for part in path.parts[:-1])


def files_in(place: Path) -> list[Path]:
    """A file itself, or all files of a directory, sorted."""
    return [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())


def remove(place: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def remove_partials(draft: Path) -> None:
    """Remove what was begun in a draft by attempts that came to nothing.

    Args:
        draft: its directory; nothing that counts is being written in it.
    """
    for left in list(draft.rglob(".*.partial")):
        remove(left)


def point_of(draft: Path) -> Point | None:
    """Where the round of a draft goes on; None if it is not there or has not begun.

    Args:
        draft: its directory.
    """
    return Draft(draft).point


def steps_among(files: Iterable[str]) -> int:
    """PPO steps of the last checkpoint among a draft's files; 0 where there is none.

    Args:
        files: their names in the draft, such as after_0002_steps/manifest.json.
    """
    places = [name.split("/")[0] for name in files if fnmatch(name, f"{PATTERN}/{MANIFEST}")]
    return max((int(place.split("_")[1]) for place in places), default=0)


def wrong_with(committed: Path) -> str | None:
    """What of a committed round, or of ``start/``, is not what its journal says, in words; None if all of it is.

    Args:
        committed: its directory; without a journal nothing is known of it.

    Raises:
        UserError: if the journal itself is damaged.
    """
    draft = Draft(committed)
    for key, entry in draft.journal.alive.items():
        working = key.split()[0] in STEP_KEYS or any(name.split("/")[0] in WORKING for name in entry.outputs)
        if not working and (damaged := draft._damaged(entry)) is not None:
            return damaged
    return None


def drop(committed: Path, keep_rollouts: bool) -> None:
    """Remove from a round that is committed what only a round under way has a use for, each in one step.

    Args:
        committed: its directory.
        keep_rollouts: whether the rollouts of the PPO steps stay.
    """
    for name in WORKING if not keep_rollouts else WORKING[1:]:
        if (committed / name).exists():
            os.replace(committed / name, committed / f".dropped_{name}")
    for place in committed.glob(PATTERN):
        os.replace(place, place.with_name(f".dropped_{place.name}"))
    for place in committed.rglob(FIT):
        remove(place)
    for place in committed.glob(".dropped_*"):
        remove(place)
