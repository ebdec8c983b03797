"""A round laid down between two PPO steps, so that the next driver takes it up there.

The round's draft stays as it is, with its reward model, its new members and S_k. The learner's state and what the driver must
know go into a directory inside it, which appears whole or not at all, and only such a directory is trusted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from cluster.durable import commit_directory, sync_tree, write_file

PATTERN = "after_*_steps"
RECORD = "pause.json"


@dataclass(frozen=True)
class Pause:
    """A round as it stood between two PPO steps.

    Args:
        steps: PPO steps that were done.
        policy_version: that the engines held.
        reward: summary of the reward model's fit, as the ledger has it.
        validation_accuracy: of the reward model; None where there are no held-out pairs.
        seconds: of each phase so far.
        metrics_bytes: length of metrics.jsonl, which ended with the last step's rows.
        holds: names of what the draft held of the round.
    """

    steps: int
    policy_version: int
    reward: Mapping[str, float | None]
    validation_accuracy: float | None
    seconds: Mapping[str, float]
    metrics_bytes: int
    holds: tuple[str, ...] = ()

    def place(self, draft: Path) -> Path:
        """Where the learner's state lies."""
        return draft / PATTERN.replace("*", f"{self.steps:04d}")


def lay_down(draft: Path, pause: Pause, save_learner: Callable[[Path], None]) -> None:
    """Save a round as it stands; it may go on meanwhile as well as afterwards. An earlier pause of it is then dropped.

    Args:
        draft: of the round.
        pause: what to remember; ``holds`` is filled in here.
        save_learner: writes the learner's state into a directory.

    Raises:
        OSError: if the disk refuses. The earlier pause, if there is one, is intact.
    """
    earlier = [place for place in draft.glob(PATTERN) if place != pause.place(draft)]
    holds = tuple(sorted(entry.name for entry in draft.iterdir() if not entry.name.startswith(".") and entry not in earlier))
    partial = pause.place(draft).with_name(f".{pause.place(draft).name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_learner(partial)
    write_file(partial / RECORD, json.dumps(dataclasses.asdict(dataclasses.replace(pause, holds=holds)), indent=1))
    sync_tree(draft)
    commit_directory(partial, pause.place(draft))
    for place in earlier:
        shutil.rmtree(place)


def latest(draft: Path) -> Pause | None:
    """The last pause of a round.

    Args:
        draft: of the round; may be missing.

    Returns:
        It; None if the round was never laid down.
    """
    places = sorted(draft.glob(PATTERN), key=lambda place: _steps(place.name))
    if not places:
        return None
    stored = json.loads((places[-1] / RECORD).read_text())
    return Pause(**(stored | {"holds": tuple(stored["holds"])}))


def steps_among(files: Iterable[str]) -> int:
    """PPO steps of the last pause among a draft's files; 0 where there is none.

    Args:
        files: their names in the draft, such as after_0002_steps/pause.json.
    """
    places = [name.split("/")[0] for name in files if fnmatch(name, f"{PATTERN}/{RECORD}")]
    return max((_steps(place) for place in places), default=0)


def _steps(place: str) -> int:
    return int(place.split("_")[1])


def tidy(draft: Path, pause: Pause) -> None:
    """Take a draft back to what it held when it was laid down: what came later is made again."""
    for entry in draft.iterdir():
        if entry.name in pause.holds or entry == pause.place(draft):
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def drop(committed: Path) -> None:
    """Remove the pauses from a round that is committed, each in one step: until then the round can go on from them."""
    for place in committed.glob(PATTERN):
        os.replace(place, place.with_name(f".dropped_{place.name}"))
    for place in committed.glob(".dropped_*"):
        shutil.rmtree(place)
