"""Typed handles of the five roles."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.process import Identity
from actors.ranks import Meeting
from actors.reward_trainer import Groups, RewardReport, Study
from actors.scorer import Scores
from actors.transfer import Parcels
from cluster.pool import RolloutPool
from cluster.rota import Process, Rota
from cluster.sync import Sync, together
from cluster.waiting import Pending, Waiter
from policy.config import DPOConfig
from tokens.records import Pair, Rollout


def only(answers: list[Any]) -> Any:
    """The answer of the first process, which is the role's."""
    return answers[0]


def _ask(process: Process, method: Any, *arguments: Any) -> Pending[Any]:
    return Pending((method.remote(*arguments),), (process.identity.name,), (process.identity.node,), only, (process.actor,))


def _ask_all(ranks: Sequence[Process], submit: Callable[[Any], Any]) -> Pending[Any]:
    """The same call to every rank; rank 0's answer is the role's."""
    return Pending(
        tuple(submit(rank.actor) for rank in ranks),
        tuple(rank.identity.name for rank in ranks),
        tuple(rank.identity.node for rank in ranks),
        only,
        (ranks[0].actor,),
    )


class Ranked:
    """Processes that share one model.

    Args:
        ranks: in order of their rank.
        timeout_s: longest wait of one rank for another.
        rota: of the devices.
    """

    def __init__(self, ranks: Sequence[Process], timeout_s: float, rota: Rota) -> None:
        self.ranks, self.timeout_s, self.rota = ranks, timeout_s, rota

    def open(self) -> Pending[Meeting]:
        """Ask rank 0 where to meet."""
        return _ask(self.ranks[0], self.ranks[0].actor.open, self.timeout_s)

    def join(self, meeting: Meeting) -> Pending[None]:
        """Bring the ranks together."""
        return _ask_all(self.ranks, lambda actor: actor.join.remote(meeting, self.timeout_s))


class RewardHandle(Ranked):
    """The reward trainer, one process or several ranks."""

    def fit(self, out_dir: Path, seed: int, previous: Path | None, shifted: Sequence[Rollout] | None) -> Pending[RewardReport]:
        """Train a reward model into ``out_dir``; with MetaRM where ``shifted`` (S_k) is given."""
        moves = self.rota.turn("reward")
        return moves.before(_ask_all(self.ranks, lambda actor: actor.fit.remote(out_dir, seed, previous, shifted)))

    def study(self, out_dir: Path | None, seed: int, shifted: Groups, meta: bool, num_featured: int) -> Pending[Study]:
        """Train a reward model and look at it closely; see ``RewardTrainer.study``."""
        return _ask_all(self.ranks, lambda actor: actor.study.remote(out_dir, seed, shifted, meta, num_featured))


class ScorerHandle:
    """The ensemble scorer."""

    def __init__(self, process: Process, rota: Rota) -> None:
        self.process, self.rota = process, rota

    def calibrate_on(self, rollouts: Sequence[Rollout]) -> Pending[None]:
        """Hand over the SFT policy's samples, before the members are loaded."""
        return _ask(self.process, self.process.actor.calibrate_on, rollouts)

    def load(self, member: int, model_dir: Path) -> Pending[None]:
        """Load or replace a member; 0 is r_k."""
        moves = self.rota.turn("scorer")
        return moves.before(_ask(self.process, self.process.actor.load, member, model_dir))

    def score(self, rollouts: Sequence[Rollout]) -> Pending[Scores]:
        """Score rollouts with every member."""
        moves = self.rota.turn("scorer")
        return moves.before(_ask(self.process, self.process.actor.score, rollouts))


class LearnerHandle(Ranked):
    """The policy learner, one process or several ranks."""

    def _all(self, submit: Callable[[Any], Any]) -> Pending[Any]:
        moves = self.rota.turn("learner")
        return moves.before(_ask_all(self.ranks, submit))

    def load(self, engines: RolloutPool) -> Pending[None]:
        """Load policy and SFT model, once the ranks are together, and meet the engines."""
        return self._all(lambda actor: actor.load.remote(engines.actors))

    def begin_round(
        self, index: int, calibration: Sequence[float] | None, critic: Path | None, policy: Path | None, reference: Path | None
    ) -> Pending[None]:
        """Set critic, policy, reference and the reward moments where they are given."""
        return self._all(lambda actor: actor.begin_round.remote(index, calibration, critic, policy, reference))

    def warm_up(self, rollouts: Sequence[Rollout], scores: Sequence[float], steps: int) -> Pending[float]:
        """Update the critic alone."""
        return self._all(lambda actor: actor.warm_up.remote(rollouts, scores, steps))

    def update(self, rollouts: Sequence[Rollout], scores: Sequence[float]) -> Pending[dict[str, float]]:
        """One PPO update."""
        return self._all(lambda actor: actor.update.remote(rollouts, scores))

    def prefer(self, pairs: Sequence[Pair], dpo: DPOConfig, out_dir: Path, seed: int) -> Pending[list[dict[str, float]]]:
        """Train the policy by DPO, from SFT, and save it."""
        return self._all(lambda actor: actor.prefer.remote(pairs, dpo, out_dir, seed))

    def send(self, after: Sequence[Any]) -> Pending[Parcels]:
        """Send the policy's weights, or lay them out; they go from learner to engines without passing the driver.

        Args:
            after: references that must be there first.
        """
        return _ask_all(self.ranks, lambda actor: actor.send.remote(*after))

    def statistics(self, rollouts: Sequence[Rollout]) -> Pending[tuple[tuple[float, ...], tuple[float, ...]]]:
        """Log-probability of each response under the policy and under SFT."""
        return self._all(lambda actor: actor.statistics.remote(rollouts))

    def save(self, out_dir: Path) -> Pending[None]:
        """Save policy, critic and state."""
        return self._all(lambda actor: actor.save.remote(out_dir))


@dataclass(frozen=True)
class Roles:
    """The five roles but the driver."""

    rollout: RolloutPool
    reward: RewardHandle
    scorer: ScorerHandle
    learner: LearnerHandle
    identities: tuple[Identity, ...]
    rota: Rota
    deliver: Callable[[Pending[Parcels]], Any]
    """What the engines are handed, from the learner's sending."""

    def sync(self, wait: Waiter, version: int) -> Sync:
        """Give the engines the learner's weights, as policy ``version``."""
        began = time.perf_counter()
        moves = self.rota.meet()
        sending = self.learner.send(moves.refs)
        loading = self.rollout.load(self.deliver(sending), version, moves.refs)
        parcels = wait("sync", moves.before(together(sending, loading)))
        return Sync(time.perf_counter() - began, parcels.num_bytes)
