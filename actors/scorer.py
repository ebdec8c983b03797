"""The ensemble scorer: M reward models that vote on rollouts, in one process or in several that share the rollouts out."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from actors.process import STATUS_GROUP, ProcessSetup, Role
from rm.config import Aggregate, ScorerConfig
from tokens.guards import GuardsConfig
from tokens.records import Rollout

if TYPE_CHECKING:
    import torch

    from rm.domain_bank import DomainBank
    from rm.ensemble import Moments
    from rm.model import RewardModel
    from rm.people import People

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Raw:
    """What the members in one process say of its share of a batch, before they vote.

    Args:
        ids: M members, ascending.
        scores: a row of M for each rollout, in each member's own units; may be NaN or infinite.
        moments: of each member on the calibration samples.
        reloaded: members whose weights were found broken, and read again from their files.
    """

    ids: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]
    moments: tuple[Moments, ...]
    reloaded: int = 0


@dataclass(frozen=True)
class Scores:
    """Scores of B rollouts, each member's in units of its own standard deviation on the SFT policy's samples.

    Args:
        ids: which members these are; a member with a score that is not finite is left out where the config allows it.
        members: B rows of a score for each of ``ids``; member 0 is r_k. Where a score did not count, the mean of its
            row's others.
        mean: of the members.
        std: population standard deviation over the members.
        aggregated: what PPO is given.
        dropped: scores that were not finite and do not count.
        reloaded: members whose weights were found broken, and read again from their files.
    """

    ids: tuple[int, ...]
    members: tuple[tuple[float, ...], ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    aggregated: tuple[float, ...]
    dropped: int = 0
    reloaded: int = 0


@dataclass(frozen=True)
class ByPerson:
    """What everybody says of B rollouts, each in standard deviations of their own on the SFT policy's samples.

    Args:
        names: m people.
        scores: B rows of m.
    """

    names: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]


@ray.remote(concurrency_groups=STATUS_GROUP)
class EnsembleScorer(Role):
    """Holds M reward models and the moments of each on the calibration samples."""

    about = "scores responses with the reward ensemble"

    def __init__(self, setup: ProcessSetup, config: ScorerConfig) -> None:
        super().__init__(setup)
        self.config = config
        self.calibration: Sequence[Rollout] = ()
        self.members: dict[int, RewardModel] = {}
        self.moments: dict[int, Moments] = {}
        self.pads: dict[int, int] = {}
        self.places: dict[int, Path] = {}
        self.reloaded = 0
        self.banks: dict[int, DomainBank] = {}
        self.units: dict[int, dict[str, Moments]] = {}
        self.people: dict[int, People] = {}
        self.tastes: dict[int, tuple[Moments | None, ...]] = {}

    def move(self, part: str, device: str) -> None:
        """Move the members."""
        from tokens.offload import move_module

        for model in self.members.values():
            move_module(model, device)

    def calibrate_on(self, rollouts: Sequence[Rollout]) -> None:
        """Keep the SFT policy's samples, whose scores set each member's zero and unit."""
        self.calibration = list(rollouts)

    def hold(self, rollouts: Sequence[Rollout] | None, members: Mapping[int, Path]) -> None:
        """Take over from another scorer: all that it held, or an error.

        Args:
            rollouts: as of ``calibrate_on``; None = it had none yet.
            members: directories of the members, in the order in which they were loaded.
        """
        if rollouts is not None:
            self.calibrate_on(rollouts)
        for member, model_dir in members.items():
            self.load(member, model_dir)

    def load(self, member: int, model_dir: Path) -> None:
        """Load or replace one member and measure its moments.

        Args:
            member: its index; 0 is r_k, and those below 0 are held out.
            model_dir: a reward model that started from the SFT model, and so shares the policy's tokens. With a folder of
                adapters by domain in it, each text is scored by its prompt's, in units of that domain's calibration samples; with
                people's heads in it, as those who count say, each in units of their own.
        """
        from transformers import AutoTokenizer

        from rm.ensemble import Moments

        self.places[member] = model_dir
        for held in (self.banks, self.units, self.people, self.tastes):
            held.pop(member, None)
        self._read(member)
        self.pads[member] = AutoTokenizer.from_pretrained(model_dir).pad_token_id
        self.moments[member] = Moments.of(self._raw(member, self.calibration))
        log.info("%s: member %d is %s, %s", self.setup.name, member, model_dir, self.moments[member])

    def _read(self, member: int) -> None:
        from rm.domain_bank import open_bank
        from rm.domain_config import ADAPTERS
        from rm.model import RewardModel
        from rm.people import WHO, People

        model = RewardModel.from_pretrained(self.places[member], dtype=self.dtype())
        self.members[member] = model.to(self.setup.device).eval()
        adapters = self.places[member] / ADAPTERS
        if adapters.is_dir():
            self.banks[member] = open_bank(self.members[member], [(path.name, path) for path in sorted(adapters.iterdir())])
        if (self.places[member] / WHO).is_file():
            self.people[member] = People.load(self.places[member])

    def _raw(self, member: int, rollouts: Sequence[Rollout]) -> torch.Tensor:
        """Scores of one member; where some are not finite since its weights are broken, those in its files are taken instead."""
        from rm.domain_bank import weights_of
        from tokens.ranks import weights_norm

        found = self._score(member, rollouts)
        if found.isfinite().all() or math.isfinite(weights_norm(weights_of(self.members[member]))):
            return found
        log.warning("%s: the weights of member %d are broken; they are read again", self.setup.name, member)
        self._read(member)
        self.reloaded += 1
        return self._score(member, rollouts)

    def _score(self, member: int, rollouts: Sequence[Rollout]) -> torch.Tensor:
        from rm.batches import score_sequences
        from rm.domain_bank import in_units, moments_by_domain

        if member in self.people:
            return self.people[member].reward(self._everybody(member, rollouts), [r.prompt.domain for r in rollouts])
        sequences = [(r.prompt.token_ids, r.response_ids) for r in rollouts]
        if member not in self.banks:
            return score_sequences(self.members[member], sequences, self.config.batch_size, self.pads[member])
        domains = [r.prompt.domain for r in rollouts]
        found = self.banks[member].scores(sequences, domains, self.config.batch_size, self.pads[member])
        if member not in self.units:  # the first call scores the calibration samples
            self.units[member] = moments_by_domain(found, domains)
        return in_units(found, domains, self.units[member])

    def _everybody(self, member: int, rollouts: Sequence[Rollout]) -> torch.Tensor:
        """What everybody whose heads a member holds says of rollouts, in units of their own: [B, m]."""
        from rm.heads import sequence_features
        from rm.people import in_own_units

        sequences = [(r.prompt.token_ids, r.response_ids) for r in rollouts]
        features = sequence_features(self.members[member], sequences, self.config.batch_size, self.pads[member])
        found = self.people[member].scores(features)
        if member not in self.tastes:  # the first call scores the calibration samples
            self.tastes[member] = self.people[member].moments(found)
        return in_own_units(found, self.tastes[member])

    def by_person(self, rollouts: Sequence[Rollout]) -> ByPerson:
        """What everybody says whose head r_k holds, but for those whose reward never varies.

        Args:
            rollouts: B of them.
        """
        scores = self._everybody(0, rollouts)
        self.tick(len(rollouts), len(rollouts), "scores")
        told = [place for place, moments in enumerate(self.tastes[0]) if moments is not None]
        names = tuple(self.people[0].names[place] for place in told)
        return ByPerson(names, tuple(tuple(row) for row in scores[:, told].tolist()))

    def score(self, rollouts: Sequence[Rollout], ids: Sequence[int]) -> Raw:
        """Score rollouts with every member, or with every one that is held out.

        Args:
            rollouts: B of them.
            ids: the members that there should be: all at or above 0, or all below.

        Returns:
            What each says.

        Raises:
            RuntimeError: if there are others.
        """
        import torch

        held_out, before = min(ids, default=0) < 0, self.reloaded
        order = sorted(member for member in self.members if (member < 0) == held_out)
        if order != sorted(ids):
            raise RuntimeError(f"{self.setup.name} holds members {order} of the ensemble, expected {sorted(ids)}")
        raw = torch.stack([self._raw(member, rollouts) for member in order], dim=1)  # [B, M]
        self.tick(len(rollouts), len(rollouts), "scores")
        moments = tuple(self.moments[member] for member in order)
        return Raw(tuple(order), tuple(tuple(row) for row in raw.tolist()), moments, self.reloaded - before)


def vote(shares: Sequence[Raw], config: ScorerConfig, guards: GuardsConfig, rule: Aggregate) -> Scores:
    """The members' scores of a whole batch, normalised and made into one.

    Args:
        shares: of the batch, in its order; B rollouts in all.
        config: of the scorer.
        guards: of the run.
        rule: what PPO is given: of ``rm.ensemble.aggregate``.

    Returns:
        The scores.

    Raises:
        BadNumber: if more scores than ``guards.bad_scores`` allows are NaN or infinite, and ``scorer.min_members`` does not
            allow to go on without their members.
    """
    import torch

    from rm.ensemble import aggregate, disagreement, fill, finite_members, normalise

    ids, moments = shares[0].ids, shares[0].moments
    raw = torch.tensor([row for share in shares for row in share.scores])  # [B, M]
    fewest = None if config.min_members is None else min(config.min_members, len(ids))
    kept = finite_members(raw, fewest, guards.bad_scores, rule)
    units = [moments[member] for member in kept]
    scores = normalise(raw[:, list(kept)], torch.tensor([m.mean for m in units]), torch.tensor([m.std for m in units]))
    filled = fill(scores)
    return Scores(
        tuple(ids[member] for member in kept),
        tuple(tuple(row) for row in filled.tolist()),
        tuple(filled.mean(1).tolist()),
        tuple(disagreement(scores).tolist()),
        tuple(aggregate(scores, rule, config.std_coef).tolist()),
        int((~raw.isfinite()).sum()),
        sum(share.reloaded for share in shares),
    )
