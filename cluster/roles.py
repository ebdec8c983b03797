"""Typed handles of the five roles."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from actors.fit_saves import FitSaves
from actors.ranks import Meeting
from actors.reward_trainer import Groups, RewardReport, Study
from actors.scorer import ByPerson, Raw, Scores, vote
from actors.transfer import Parcels
from cluster.parts import Again
from cluster.pool import RolloutPool
from cluster.rota import Process, Rota
from cluster.sync import Sync, together
from cluster.waiting import Pending, Waiter, nothing
from policy.config import DPOConfig
from rm.config import Aggregate, ScorerConfig
from tokens.guards import GuardsConfig
from tokens.records import Pair, Rollout

T = TypeVar("T")


def only(answers: list[Any]) -> Any:
    """The answer of the first process, which is the role's."""
    return answers[0]


Submit = Callable[[Any], Any]
"""Calls an actor; gives the reference of the answer."""


def _ask(process: Process, submit: Submit) -> Pending[Any]:
    """A call that may be made again, of whoever is in the place then."""
    return _ask_some([(process, submit)], only)


def _ask_some(calls: Sequence[tuple[Process, Submit]], combine: Callable[[list[Any]], T]) -> Pending[T]:
    """Calls that have nothing to do with each other: what a lost process had is asked again of whoever is in its place then.

    Args:
        calls: processes, and what each is asked for.
        combine: makes the answer of theirs.
    """

    def asked_again(part: int) -> Again:
        process, submit = calls[part]
        return Again(submit(process.actor), process.identity.name, process.identity.node, process.actor)

    def redo(who: str, parts: Collection[int]) -> dict[int, Again]:
        return {part: asked_again(part) for part in parts}

    return Pending(
        tuple(submit(process.actor) for process, submit in calls),
        tuple(process.identity.name for process, _ in calls),
        tuple(process.identity.node for process, _ in calls),
        combine,
        tuple(process.actor for process, _ in calls),
        redo=redo,
    )


def _ask_all(ranks: Sequence[Process], submit: Submit, again: bool) -> Pending[Any]:
    """The same call to every rank; rank 0's answer is the role's.

    Args:
        ranks: all of them.
        submit: the call.
        again: True if it may be made again, of all.
    """

    def redo(who: str, parts: Collection[int]) -> dict[int, Again]:
        return {
            at: Again(submit(rank.actor), rank.identity.name, rank.identity.node, rank.actor) for at, rank in enumerate(ranks)
        }

    return Pending(
        tuple(submit(rank.actor) for rank in ranks),
        tuple(rank.identity.name for rank in ranks),
        tuple(rank.identity.node for rank in ranks),
        only,
        (ranks[0].actor,),
        redo=redo if again else nothing,
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
        return _ask(self.ranks[0], lambda actor: actor.open.remote(self.timeout_s))

    def join(self, meeting: Meeting) -> Pending[None]:
        """Bring the ranks together."""
        return _ask_all(self.ranks, lambda actor: actor.join.remote(meeting, self.timeout_s), again=False)

    def regroup(self) -> list[tuple[Process, Any]]:
        """Bring ranks together that have just been asked for, all of them.

        Returns:
            Each with the reference of an answer that comes when it is ready to work.
        """
        if len(self.ranks) == 1:
            return [(rank, rank.actor.identity.remote()) for rank in self.ranks]
        meeting = self.ranks[0].actor.open.remote(self.timeout_s)
        return [(rank, rank.actor.join.remote(meeting, self.timeout_s)) for rank in self.ranks]


class RewardHandle(Ranked):
    """The reward trainer, one process or several ranks."""

    def fit(
        self,
        out_dir: Path,
        seed: int,
        previous: Path | None,
        shifted: Sequence[Rollout] | None,
        saves: FitSaves | None,
        pairs: Sequence[Pair] | None = None,
    ) -> Pending[RewardReport]:
        """Train a reward model into ``out_dir``; with MetaRM where ``shifted`` (S_k) is given, on ``pairs`` or else on D. A fit
        that was saved goes on."""
        moves = self.rota.turn("reward")
        asked = (out_dir, seed, previous, shifted, saves, pairs)
        return moves.before(_ask_all(self.ranks, lambda actor: actor.fit.remote(*asked), again=True))

    def study(
        self, out_dir: Path | None, seed: int, shifted: Groups, meta: bool, num_featured: int, saves: FitSaves | None
    ) -> Pending[Study]:
        """Train a reward model and look at it closely; see ``RewardTrainer.study``."""
        asked = (out_dir, seed, shifted, meta, num_featured, saves)
        return _ask_all(self.ranks, lambda actor: actor.study.remote(*asked), again=True)


@dataclass
class Ensemble:
    """What a scorer must hold: the samples that it is calibrated on, and its members; those below 0 are held out."""

    calibration: Sequence[Rollout] | None = None
    members: dict[int, Path] = field(default_factory=dict)

    def committed(self, draft: Path, place: Path) -> None:
        """What lay in a round's draft has another place now."""
        inside = {member: path for member, path in self.members.items() if path.is_relative_to(draft)}
        self.members |= {member: place / path.relative_to(draft) for member, path in inside.items()}


class ScorerHandle:
    """The ensemble scorer, in one process or several that hold the same members and share a batch out.

    Args:
        processes: of it.
        rota: of the devices.
        holds: what each was given; another process in its place is given the same.
        config: of the scorer.
        guards: of the run.
    """

    def __init__(
        self, processes: Sequence[Process], rota: Rota, holds: Ensemble, config: ScorerConfig, guards: GuardsConfig
    ) -> None:
        self.processes, self.rota, self.holds, self.config, self.guards = processes, rota, holds, config, guards

    def refit(self, process: Process) -> Any:
        """Give a process that has just come all that it must hold.

        Returns:
            Reference of an answer that comes when it holds it.
        """
        return process.actor.hold.remote(self.holds.calibration, dict(self.holds.members))

    def calibrate_on(self, rollouts: Sequence[Rollout]) -> Pending[None]:
        """Hand over the SFT policy's samples, before the members are loaded."""
        self.holds.calibration = rollouts
        return self._ask_each(lambda actor: actor.calibrate_on.remote(rollouts))

    def load(self, member: int, model_dir: Path) -> Pending[None]:
        """Load or replace a member; 0 is r_k, and what is below 0 is held out: it judges, and pays nobody."""
        self.holds.members[member] = model_dir
        moves = self.rota.turn("scorer")
        return moves.before(self._ask_each(lambda actor: actor.load.remote(member, model_dir)))

    def score(self, rollouts: Sequence[Rollout]) -> Pending[Scores]:
        """Score rollouts with every member that it was given, but for those held out.

        The answer raises ``BadNumber`` where too many scores are not finite; see ``actors.scorer.vote``.
        """
        return self._vote(rollouts, tuple(member for member in self.holds.members if member >= 0), self.config.aggregate)

    def judge(self, rollouts: Sequence[Rollout]) -> Pending[Scores]:
        """What the held-out members say of rollouts; there must be some. ``aggregated`` is their mean."""
        return self._vote(rollouts, tuple(member for member in self.holds.members if member < 0), "mean")

    def by_person(self, rollouts: Sequence[Rollout]) -> Pending[ByPerson]:
        """What everybody says whose reward the reward model holds; it must be one of people."""

        def combine(answers: list[ByPerson]) -> ByPerson:
            return ByPerson(answers[0].names, tuple(row for answer in answers for row in answer.scores))

        moves = self.rota.turn("scorer")
        return moves.before(self._ask_shares(rollouts, lambda share, actor: actor.by_person.remote(share), combine))

    def _vote(self, rollouts: Sequence[Rollout], ids: tuple[int, ...], rule: Aggregate) -> Pending[Scores]:
        def combine(answers: list[Raw]) -> Scores:
            return vote(answers, self.config, self.guards, rule)

        moves = self.rota.turn("scorer")
        return moves.before(self._ask_shares(rollouts, lambda share, actor: actor.score.remote(share, ids), combine))

    def _ask_each(self, submit: Submit) -> Pending[None]:
        """The same call to every process, made again of whoever is in a lost one's place."""
        return _ask_some([(process, submit) for process in self.processes], only)

    def _ask_shares(
        self, rollouts: Sequence[Rollout], submit: Callable[[Sequence[Rollout], Any], Any], combine: Callable[[list[Any]], T]
    ) -> Pending[T]:
        """A call for each process's share of a batch."""
        shares = zip(self.processes, shared_out(rollouts, len(self.processes)), strict=False)
        return _ask_some([(process, partial(submit, share)) for process, share in shares], combine)


def shared_out(rollouts: Sequence[Rollout], number: int) -> list[Sequence[Rollout]]:
    """Rollouts in order, cut into shares of about as many tokens; those of one prompt that lie side by side stay together.

    Args:
        rollouts: B of them.
        number: most shares.

    Returns:
        One to ``number`` shares, none of them empty unless there are no rollouts.
    """
    tokens = [len(rollout.prompt.token_ids) + len(rollout.response_ids) for rollout in rollouts]
    total, passed, shares = sum(tokens), 0, [list[Rollout]()]
    for at, rollout in enumerate(rollouts):
        apart = at > 0 and rollout.prompt.id != rollouts[at - 1].prompt.id
        if apart and passed * number >= total * len(shares) and len(shares) < number:
            shares.append([])
        shares[-1].append(rollout)
        passed += tokens[at]
    return list(shares)


class LearnerHandle(Ranked):
    """The policy learner, one process or several ranks.

    What it holds is in no other place, so a call is made again only of a process that was out of reach for a while; another one
    in its place must be given a checkpoint first.
    """

    def _all(self, submit: Submit, again: bool = False) -> Pending[Any]:
        moves = self.rota.turn("learner")
        return moves.before(_ask_all(self.ranks, submit, again and len(self.ranks) == 1))

    def load(self, engines: RolloutPool, saved: Path | None, critic_base: Path) -> Pending[None]:
        """Load the models, once the ranks are together, and meet the engines; see ``restore``."""
        return self._all(lambda actor: actor.load.remote(engines.actors, saved, critic_base))

    def restore(self, saved: Path | None, critic_base: Path) -> Pending[None]:
        """Be where a save left the learner (None: where it begins), in the process that there is.

        Args:
            saved: what ``save`` wrote.
            critic_base: with adapters, what those of a saved critic were trained on.
        """
        return self._all(lambda actor: actor.restore.remote(saved, critic_base))

    def begin_round(
        self, index: int, calibration: Sequence[float] | None, critic: Path | None, policy: Path | None, reference: Path | None
    ) -> Pending[None]:
        """Set critic, policy, reference and the reward moments where they are given."""
        return self._all(lambda actor: actor.begin_round.remote(index, calibration, critic, policy, reference))

    def warm_up(self, rollouts: Sequence[Rollout], scores: Sequence[float], steps: int) -> Pending[float]:
        """Update the critic alone."""
        return self._all(lambda actor: actor.warm_up.remote(rollouts, scores, steps))

    def update(
        self, rollouts: Sequence[Rollout], scores: Sequence[float], sampler_bound: float | None, number: int
    ) -> Pending[dict[str, float]]:
        """One PPO update.

        Args:
            rollouts: of the step.
            scores: of them.
            sampler_bound: how far the engines' log-probs may lie from the learner's; None = anywhere.
            number: of the update, over all rounds; each is made once however often it is asked for.
        """
        return self._all(lambda actor: actor.update.remote(rollouts, scores, sampler_bound, number), again=True)

    def prefer(self, pairs: Sequence[Pair], dpo: DPOConfig, out_dir: Path, seed: int) -> Pending[list[dict[str, float]]]:
        """Train the policy by DPO, from SFT, and save it."""
        return self._all(lambda actor: actor.prefer.remote(pairs, dpo, out_dir, seed))

    def send(self, after: Sequence[Any]) -> Pending[Parcels]:
        """Send the policy's weights, or lay them out; they go from learner to engines without passing the driver.

        Args:
            after: references that must be there first.
        """
        return _ask_all(self.ranks, lambda actor: actor.send.remote(*after), again=False)

    def statistics(self, rollouts: Sequence[Rollout]) -> Pending[tuple[tuple[float, ...], tuple[float, ...]]]:
        """Log-probability of each response under the policy and under SFT."""
        return self._all(lambda actor: actor.statistics.remote(rollouts), again=True)

    def save(self, out_dir: Path) -> Pending[None]:
        """Save policy, critic and state."""
        return self._all(lambda actor: actor.save.remote(out_dir), again=True)


@dataclass(frozen=True)
class Roles:
    """The five roles but the driver.

    Args:
        rollout: the engines.
        reward: trainer of reward models.
        scorer: the ensemble.
        learner: of the policy.
        processes: of all of them.
        rota: of the devices.
        deliver: what the engines are handed, from the learner's sending.
    """

    rollout: RolloutPool
    reward: RewardHandle
    scorer: ScorerHandle
    learner: LearnerHandle
    processes: tuple[Process, ...]
    rota: Rota
    deliver: Callable[[Pending[Parcels]], Any]

    def sync(self, wait: Waiter, version: int) -> Sync:
        """Give the engines the learner's weights, as policy ``version``."""
        began = time.perf_counter()
        moves = self.rota.meet()
        sending = self.learner.send(moves.refs)
        loading = self.rollout.load(self.deliver(sending), version, moves.refs)
        parcels = wait("sync", moves.before(together(sending, loading)))
        return Sync(time.perf_counter() - began, parcels.num_bytes)
