"""Work that is done once: what a draft has recorded is read, what it has not is done and recorded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.fit_saves import FitSaves
from actors.reward_trainer import RewardReport
from actors.scorer import Scores
from cluster.config import RunConfig
from cluster.draft import FIT_SUFFIX, TRAINED, Draft, remove
from cluster.metrics import Metrics
from cluster.recorded import read_rollouts, read_scores, sample_ids, write_rollouts, write_scores
from cluster.waiting import Waiter
from evaluation.records import Row, write_rows
from tokens.records import Rollout


class Stages:
    """The stages of one round, or of ``start/``.

    Args:
        draft: that they are recorded in.
        wait: knows the seconds so far.
        metrics: knows how long its record is.
        config: of the run.
        index: of the round; -1 for ``start/``.
    """

    def __init__(self, draft: Draft, wait: Waiter, metrics: Metrics, config: RunConfig, index: int) -> None:
        self.draft, self.wait, self.metrics, self.config, self.index = draft, wait, metrics, config, index

    def record(self, key: str, outputs: Sequence[str], facts: Mapping[str, Any]) -> None:
        """A stage is done; its outputs lie at their ``partial`` places."""
        self.draft.record(key, outputs, facts, self.metrics.mark(), dict(self.wait.seconds))

    def rollouts(self, key: str, name: str, sample: Callable[[], list[Rollout]], step: int | None = None) -> list[Rollout]:
        """Rollouts, sampled once.

        Args:
            key: of the stage.
            name: of the file in the draft.
            sample: gives them.
            step: PPO step that they are for; None where it is none.
        """
        if self.draft.done(key) is None:
            rollouts = sample()
            ids = sample_ids(self.config.name, f"{self.index}/{key}", rollouts)
            write_rollouts(self.draft.partial(name), rollouts, ids)
            seconds = {} if step is None else {"sample_seconds": self.metrics.seconds_of(self.index, step)}
            self.record(key, [name], {"samples": ids, **seconds})
        return read_rollouts(self.draft / name)

    def batch(self, step: int, sample: Callable[[], list[Rollout]]) -> list[Rollout]:
        """The rollouts of a PPO step, sampled once; how long that took is told again where it was recorded.

        Args:
            step: of the round.
            sample: gives them.
        """
        done = self.draft.done(f"rollouts {step}")
        if done is not None:
            self.metrics.was_sampled(self.index, step, done.facts["sample_seconds"])
        return self.rollouts(f"rollouts {step}", f"steps/{step:04d}.parquet", sample, step)

    def first(self, step: int) -> bool:
        """Whether no step of the round before this one was learned from.

        Args:
            step: of the round.
        """
        return not any(self.draft.done(f"step {before}") for before in range(step))

    def rewards(self, step: int, score: Callable[[], Scores]) -> Scores:
        """The scores of a PPO step's rollouts, given once.

        Args:
            step: of the round.
            score: gives them.
        """
        return self.scores(f"scores {step}", f"steps/{step:04d}.json", score)

    def scores(self, key: str, name: str, score: Callable[[], Scores]) -> Scores:
        """Scores, given once.

        Args:
            key: of the stage.
            name: of the file in the draft.
            score: gives them.
        """
        if self.draft.done(key) is None:
            write_scores(self.draft.partial(name), score())
            self.record(key, [name], {})
        return read_scores(self.draft / name)

    def rows(self, name: str, rows: Sequence[Row]) -> None:
        """Rows of a Parquet file that the round keeps, written once; they follow from what was recorded before.

        Args:
            name: of the file in the draft, and of the stage.
            rows: to write.
        """
        if self.draft.done(name) is None:
            write_rows(self.draft.partial(name), rows)
            self.record(name, [name], {})

    def checkpoint(self, steps: int, version: int, save: Callable[[Path], None], keep: int) -> None:
        """Save all that the rest of the round rests on; the arguments are those of ``Draft.checkpoint``."""
        mark = self.metrics.mark()
        self.draft.checkpoint(steps, version, save, keep, mark, dict(self.wait.seconds))

    def fit(self, key: str, name: str, fit: Callable[[Path, FitSaves | None], RewardReport]) -> RewardReport:
        """A reward model, fitted once; a fit that a failure ended goes on from where it was saved.

        Args:
            key: of the stage.
            name: of the directory in the draft.
            fit: fits it into a directory, saving how far it has come in another.

        Returns:
            The report; without its steps and measurements where they have been written down already.
        """
        done, states = self.draft.done(key), (self.draft / name).with_name(f".{Path(name).name}{FIT_SUFFIX}")
        if done is not None:
            remove(states)
            return RewardReport(dict(done.facts["summary"]), (), (), done.facts["validation_accuracy"])
        place, every = self.draft.partial(name), self.config.rounds.save_fit_every
        report = fit(place, None if every is None else FitSaves(states, every))
        self.record(key, [name], {"summary": report.summary, "validation_accuracy": report.validation_accuracy})
        remove(states)
        return report

    def trained(self, steps: int, version: int, save: Callable[[Path], None]) -> None:
        """The policy as the round leaves it, saved once.

        Args:
            steps: PPO steps of the round.
            version: of the policy.
            save: writes it into a directory.
        """
        if self.draft.done(TRAINED) is not None:
            return
        partial = self.draft.partial("trained")
        partial.mkdir()
        save(partial)
        names = sorted(entry.name for entry in partial.iterdir())
        for name in names:
            os.replace(partial / name, self.draft.partial(name))
        partial.rmdir()
        self.record(TRAINED, names, {"steps": steps, "version": version, "place": "."})
