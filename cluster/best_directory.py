"""``best/`` of a run: the policy of its best round, whole at every moment, and kept current as rounds are committed.

It is made beside its place, of links to the round's files where the file system has them, and takes its place in one step. What
it holds follows from the ledger alone, so a driver that finds another one there makes it again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.mirror import Ledger
from evaluation.best import RULE, Best, best_of
from tokens.durable import draft_directory, replace_directory, write_file
from tokens.errors import UserError

FOLDER, CARD = "best", "best.json"
FORMAT = 1
"""Of best.json."""


class BestDirectory:
    """``best/`` of a run under way, made what the ledger says.

    Args:
        run: directory of the run.
        baseline: ``rounds.baseline``.
    """

    def __init__(self, run: Path, baseline: str) -> None:
        self.run, self.baseline = run, baseline
        self.sft_dir: Path | None = None
        """Where SFT's policy lies, which is the best until a round beats it; None = that is not known yet."""

    @property
    def path(self) -> Path:
        """The policy of the best round; docs/best_round.md."""
        return self.run / FOLDER

    def is_kept(self, ledger: Ledger) -> bool:
        """Whether there is a best policy to export: best of n picks among samples, and has none of its own.

        Args:
            ledger: of the run.
        """
        return ledger["start"] is not None and self.baseline != "best_of_n"

    def keep(self, ledger: Ledger, stopped: str | None, may_move: Callable[[], None]) -> None:
        """Export the best by a ledger, where there is one; errors as ``export``.

        Args:
            ledger: of the run.
            stopped: as ``card_of``.
            may_move: as ``export``.
        """
        if not self.is_kept(ledger):
            return
        best = best_of(ledger)
        entry = ledger["start"] if best.round is None else ledger["rounds"][best.round]
        name = policy_of(best)
        policy = self.sft_dir if name is None else self.run / name
        export(self.run, card_of(best, entry["evaluation"], stopped), policy, may_move)


def policy_of(best: Best) -> str | None:
    """The directory in the run that ``best/`` is made of; None for SFT's policy, which lies outside.

    Args:
        best: of the run.
    """
    return None if best.round is None else f"rounds/round_{best.round:03d}/policy"


def card_of(best: Best, evaluation: dict[str, Any], stopped: str | None) -> dict[str, Any]:
    """What best.json says.

    Args:
        best: of the run.
        evaluation: the ledger's, of the round or of SFT.
        stopped: why no further round is played; None where the run goes on.
    """
    names = ("win", "tie", "lose", "margin", "margin_low", "margin_high")
    return {
        "format": FORMAT,
        "round": best.round,
        "policy": policy_of(best) or "SFT",
        "beats_sft": best.round is not None,
        "judge": best.judge,
        "independent": best.independent,
        "gain": best.gain,
        "gains": list(best.gains),
        "alarms": list(best.alarms),
        "not_counted": {str(index): list(names) for index, names in enumerate(best.out) if names},
        "against_sft": None if best.round is None else {name: evaluation[name] for name in names},
        "rule": RULE,
        "why": best.words(),
        "stopped": stopped,
    }


def export(run: Path, card: dict[str, Any], policy: Path | None, may_move: Callable[[], None]) -> None:
    """Make ``best/`` what a card says, unless it is.

    Args:
        run: directory of the run.
        card: as ``card_of`` gives it.
        policy: model directory with a tokenizer to make it of; None = it is not known where that lies, and what there is stays
            if it is another one.
        may_move: raises where another driver has the run by now.

    Raises:
        UserError: if the policy is not there.
        OSError: if the disk refuses; an earlier ``best/`` stays as it was.
    """
    final, text = run / FOLDER, json.dumps(card, indent=1)
    known = held_by(run)
    if known is not None and known["policy"] == card["policy"]:
        if known != card:
            may_move()
            write_file(final / CARD, text)
        return
    if policy is None:
        return
    if not policy.is_dir():
        raise UserError(f"{policy} is not there, and {final} is to be made of it: put back a copy of the directory")
    may_move()
    partial = draft_directory(final)
    for file in sorted(policy.iterdir()):
        if file.is_file():
            link_or_copy(file.resolve(), partial / file.name)
    write_file(partial / CARD, text)
    replace_directory(partial, final, may_move)


def held_by(run: Path) -> dict[str, Any] | None:
    """The card of what a run's ``best/`` holds; None if there is none that can be read.

    Args:
        run: directory of the run.
    """
    try:
        card = json.loads((run / FOLDER / CARD).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return card if isinstance(card, dict) and "policy" in card else None


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name; a copy of it on another file system, or where links are not allowed.

    Args:
        source: the file.
        target: its other name.

    Raises:
        OSError: if it cannot be copied either.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
