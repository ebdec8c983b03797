"""Outer steps: one reward model of many domains, descended along their hypergradients.

Letters: Q queries, K responses of the query that has most.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rm.batches import Encoded, draw_groups, scores_of
from rm.bilevel import NEVER, Distribution, table
from rm.bilevel_config import check_beta
from rm.config import RewardConfig
from rm.descent import adamw, check_weights, descend, within
from rm.hypergradient import Form
from rm.losses import difference_loss
from rm.metarm import metarm_gradient
from rm.model import RewardModel
from rm.ranked import score_responses
from rm.training import learning_rate_factor
from tokens.guards import ONLY_FINITE, BadNumber, Budget, GuardsConfig
from tokens.queries import Query

ADVICE = "reward.lr"
"""What to lower where numbers go wrong."""


@dataclass(frozen=True)
class ReferredQuery:
    """A query and what the domain's reference policy thinks of its responses.

    Args:
        query: with a comparison.
        reference: log pi_ref of each of its responses, nats. Per token, instead of per response, it is no policy's
            log-probability, and the upper loss that of a length-normalised score.

    Raises:
        ValueError: if there is not one for each, or one is not finite.
    """

    query: Query
    reference: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.reference) != len(self.query.responses) or not all(math.isfinite(value) for value in self.reference):
            raise ValueError(
                f"query {self.query.id!r}: expected a finite log-probability of each of {len(self.query.responses)} responses, "
                f"got {self.reference}"
            )


@dataclass(frozen=True)
class OuterStep:
    """One step.

    Args:
        step: from 1.
        upper: mean over the step's domains of their upper losses, nats per comparison, before the update.
        by_domain: the upper loss of each.
        gradient_norm: of the hypergradient, before clipping.
        lr: learning rate.
    """

    step: int
    upper: float
    by_domain: dict[str, float]
    gradient_norm: float
    lr: float


@dataclass(frozen=True)
class OuterLoop:
    """How long and on how much.

    Args:
        steps: outer steps.
        domains_per_step: domains of each; all where there are no more.
        queries_per_step: queries of each of them; all where there are no more.
        beta: reward factor, > 0.
        form: that differentiates.
    """

    steps: int
    domains_per_step: int
    queries_per_step: int
    beta: float
    form: Form


@dataclass(frozen=True)
class Shift:
    """MetaRM beside it: each step's hypergradient is taken at weights that tell the target's own samples apart.

    Args:
        groups: k >= 2 responses to each of some prompts, of the target's policy; equally many to each.
        eta: of the ascent.
        prompts_per_step: groups of an ascent.
    """

    groups: Sequence[Sequence[Encoded]]
    eta: float
    prompts_per_step: int


def distribution_of(name: str, queries: Sequence[ReferredQuery]) -> tuple[Distribution, Tensor]:
    """The lower level over each query's own responses, and where in its table each of them stands.

    Source: 2402.14760; our reconstruction: the policy is self-normalised over the responses at hand.

    Args:
        name: of the domain.
        queries: Q of them.

    Returns:
        The distribution, [Q, K]; and [R] int64, the places of all responses query by query.

    Raises:
        ValueError: if nothing is compared.

    Padding contract: a query with fewer responses has places of probability 0.
    """
    reference = table([each.reference for each in queries], NEVER)
    width = reference.shape[1]
    places = [row * width + column for row, each in enumerate(queries) for column in range(len(each.reference))]
    compared = [
        (row * width + better, row * width + worse)
        for row, each in enumerate(queries)
        for better, worse in each.query.comparisons
    ]
    index = torch.tensor(compared, dtype=torch.int64).reshape(-1, 2).T
    return Distribution.tabular(name, reference, index), torch.tensor(places)


def fit_general(
    model: RewardModel,
    domains: Mapping[str, Sequence[ReferredQuery]],
    loop: OuterLoop,
    reward: RewardConfig,
    seed: int,
    pad_id: int,
    on_step: Callable[[OuterStep], None],
    guards: GuardsConfig = ONLY_FINITE,
    shift: Shift | None = None,
) -> None:
    """Train ``model`` in place on the upper loss of policies that are optimised by it, over many domains.

        phi <- phi - AdamW( mean over some domains i of  dF_i(theta_i*(phi)) / dphi )

    Our reconstruction of 2402.14760. AdamW; the learning rate rises over the warm-up and then falls linearly to 0.

    Args:
        model: on its device.
        domains: two or more, by name; queries with a comparison each.
        loop: what is asked for.
        reward: learning rate, AdamW's settings, clipping, microbatches.
        seed: of which domains and queries come when.
        pad_id: id written at padding.
        on_step: called after each step.
        guards: how many steps whose numbers are not finite may be left out.
        shift: None = without MetaRM.

    Raises:
        ValueError: if there are fewer than two domains, one has no query, or beta is not positive.
        UserError: if a domain's inner optimisation diverges; names it.
        BadNumber: if too many losses or gradients are not finite; names the step.
    """
    check_beta(loop.beta)
    if len(domains) < 2 or not all(domains.values()):
        raise ValueError(f"expected two domains or more with queries each, got { ({k: len(v) for k, v in domains.items()}) }")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, budget = adamw(trained, reward.lr, reward), Budget.of(guards)
    gradient = _Plain(model, loop, reward, pad_id) if shift is None else _Shifted(model, loop, reward, pad_id, shift, seed)
    for number, batches in enumerate(_batches(domains, loop, seed), start=1):
        where = f"outer step {number} of {loop.steps}"
        lr = reward.lr * learning_rate_factor(number - 1, loop.steps, reward.warmup_ratio)

        def attempt(batches: dict[str, list[ReferredQuery]] = batches, number: int = number, lr: float = lr) -> OuterStep:
            by_domain = gradient(batches)
            norm = descend(optimizer, trained, reward.max_grad_norm, lr, "upper loss")
            return OuterStep(number, sum(by_domain.values()) / len(by_domain), by_domain, norm, lr)

        step = within(budget, attempt, optimizer, trained, where, ADVICE)
        if step is not None:
            on_step(step)
    check_weights(trained, f"outer step {loop.steps} of {loop.steps}", ADVICE)
    if budget.count == loop.steps:
        raise BadNumber("the number of steps with a finite gradient", 0, "1 or more", f"the end of {loop.steps} outer steps")


class _Plain:
    """Adds the mean hypergradient to ``.grad``, a domain at a time, and says the upper loss of each."""

    def __init__(self, model: RewardModel, loop: OuterLoop, reward: RewardConfig, pad_id: int) -> None:
        self.model, self.loop, self.reward, self.pad_id = model, loop, reward, pad_id

    def __call__(self, batches: dict[str, list[ReferredQuery]]) -> dict[str, float]:
        found = {}
        for name, queries in batches.items():
            loss = self.upper(name, queries)
            found[name] = float(loss.detach())
            torch.autograd.backward(loss / len(batches))
        return found

    def upper(self, name: str, queries: Sequence[ReferredQuery]) -> Tensor:
        """The upper loss of one domain's batch; its gradient is the hypergradient."""
        distribution, places = distribution_of(name, queries)
        scores = score_responses(self.model, [each.query for each in queries], self.pad_id, self.reward.microbatch_size)
        if not bool(torch.isfinite(scores).all()):
            raise BadNumber(f"a reward of the domain {name}", float(scores.detach().sum()))
        rewards = scores.new_zeros(distribution.reference.numel()).index_copy(0, places.to(scores.device), scores)
        loss = self.loop.form(rewards.view(distribution.reference.shape), _moved(distribution, scores.device), self.loop.beta)
        if not bool(torch.isfinite(loss)):
            raise BadNumber(f"the upper loss of the domain {name}", float(loss.detach()))
        return loss


class _Shifted(_Plain):
    """The same at theta' = theta + eta grad J: Algorithm 1 of Secrets of RLHF II with the upper loss in the place of L."""

    def __init__(self, model: RewardModel, loop: OuterLoop, reward: RewardConfig, pad_id: int, shift: Shift, seed: int) -> None:
        super().__init__(model, loop, reward, pad_id)
        self.eta, self.groups = shift.eta, draw_groups(shift.groups, shift.prompts_per_step, seed)

    def __call__(self, batches: dict[str, list[ReferredQuery]]) -> dict[str, float]:
        found: dict[str, float] = {}
        groups = next(self.groups)
        flat = [sequence for group in groups for sequence in group]

        def ascend() -> Tensor:
            scores = scores_of(self.model, flat, self.pad_id, self.reward.microbatch_size, share=True)
            return difference_loss(scores.view(len(groups), -1))

        def descend_on() -> Tensor:
            losses = {name: self.upper(name, queries) for name, queries in batches.items()}
            found.update({name: float(loss.detach()) for name, loss in losses.items()})
            return torch.stack(list(losses.values())).mean()

        metarm_gradient(self.model.parameters(), ascend, descend_on, self.eta)
        return found


def _moved(distribution: Distribution, device: torch.device) -> Distribution:
    reference, lead, contrast = (part.to(device) for part in (distribution.reference, distribution.lead, distribution.contrast))
    return Distribution(distribution.name, reference, None, lead, contrast)


def _batches(
    domains: Mapping[str, Sequence[ReferredQuery]], loop: OuterLoop, seed: int
) -> Iterator[dict[str, list[ReferredQuery]]]:
    """What each step sees: every domain comes up once before any comes up again, and so does every query of one."""
    rng = random.Random(seed)
    names: list[str] = []
    queues: dict[str, list[int]] = {name: [] for name in domains}
    for _ in range(loop.steps):
        step: dict[str, list[ReferredQuery]] = {}
        while len(step) < min(loop.domains_per_step, len(domains)):
            if not names:
                names = rng.sample(sorted(domains), len(domains))
            name = next((each for each in names if each not in step), None)
            if name is None:
                names += rng.sample(sorted(domains), len(domains))
                continue
            names.remove(name)
            queue, wanted = queues[name], min(loop.queries_per_step, len(domains[name]))
            while len(queue) < wanted:
                queue += rng.sample(range(len(domains[name])), len(domains[name]))
            step[name], queues[name] = [domains[name][i] for i in queue[:wanted]], queue[wanted:]
        yield step
