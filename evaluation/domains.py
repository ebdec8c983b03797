"""What a customisation measured: accuracy on general sets and domains over training, forgetting, and the Pareto front.

Letters: S seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from evaluation.groups import Estimate, over_seeds
from evaluation.json_node import JsonNode, json_lines, read_json

GENERAL_STAGE, DOMAIN_STAGE = "general", "domain"


@dataclass(frozen=True)
class DomainRow:
    """One measurement of one stage on one set.

    Args:
        strategy: by name.
        stage: ``GENERAL_STAGE`` or ``DOMAIN_STAGE``.
        domain: that the stage learns; "" for the general stage, which all domains share.
        seed: number of the seed.
        samples: queries that the stage has seen.
        set: that was measured on: a general set or a domain.
        accuracy: share of its comparisons ranked as scored.
        loss: nats per comparison.
    """

    strategy: str
    stage: str
    domain: str
    seed: int
    samples: int
    set: str
    accuracy: float
    loss: float


@dataclass(frozen=True)
class DomainRun:
    """A customisation as its directory says.

    Args:
        directory: of it.
        general: names of the general sets.
        domains: names of the domains.
        strategies: what each does, in words, by name; in the config's order.
        length_alone: accuracy by set of what looks at nothing but length.
        rows: every measurement.
        from_reward_model: whether what all strategies start from is a general reward model already.
    """

    directory: Path
    general: tuple[str, ...]
    domains: tuple[str, ...]
    strategies: dict[str, str]
    length_alone: dict[str, float]
    rows: tuple[DomainRow, ...]
    from_reward_model: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a strategy came to: means over domains, with an interval over the seeds.

    Args:
        strategy: by name.
        domain: accuracy of each domain's model on its own domain, at the end.
        general: accuracy of the same models on the general sets, at the end.
        forgotten: general accuracy before the domain stage minus after it; None where that began at no general reward model.
        best: whether no other strategy is better in one of the two and at least as good in the other (by the means).
        per_domain: own accuracy by domain, means over the seeds.
    """

    strategy: str
    domain: Estimate
    general: Estimate | None
    forgotten: Estimate | None
    best: bool
    per_domain: dict[str, float]


def read_domain_run(directory: Path) -> DomainRun:
    """Read a finished customisation.

    Source: the customisation directory's layout.

    Args:
        directory: STORAGE/domains/NAME.

    Returns:
        The run.

    Raises:
        UserError: if a file is missing or malformed.

    Padding contract: there is none.
    """
    path = directory / "card.json"
    card = JsonNode(read_json(path.read_text("utf-8"), str(path)), str(path))
    rows = tuple(
        DomainRow(
            strategy=node.string("strategy"),
            stage=node.one_of("stage", (GENERAL_STAGE, DOMAIN_STAGE)),
            domain=node.string("domain"),
            seed=int(node.number("seed")),
            samples=int(node.number("samples")),
            set=node.string("set"),
            accuracy=node.number("accuracy"),
            loss=node.number("loss"),
        )
        for node in json_lines(directory / "results.jsonl")
    )
    general, domains = (card.child(key).numbers() for key in ("general", "domains"))
    given = card.has("from_reward_model") and card.value("from_reward_model") is True  # older cards do not say
    strategies = card.child("strategies").strings()
    return DomainRun(directory, tuple(general), tuple(domains), strategies, {**general, **domains}, rows, given)


def outcomes(run: DomainRun) -> tuple[Outcome, ...]:
    """Every strategy in one line.

        forgotten = mean over general sets of accuracy at the start of the domain stage - accuracy at its end

    averaged over the domains within a seed, then over the seeds.

    Source: Everyone Deserves A Reward (2309.03126), section 4: what general accuracy costs a domain.

    Args:
        run: as read.

    Returns:
        In the order of the strategies; those without a finished domain are left out.

    Padding contract: there is none.
    """
    found = [_outcome(run, strategy) for strategy in run.strategies]
    there = [outcome for outcome in found if outcome is not None]
    return tuple(_marked(outcome, there) for outcome in there)


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other beats: at least as good in both, and better in one.

    Source: Pareto's efficiency; both coordinates are to be large.

    Args:
        points: (x, y) of each.

    Returns:
        True for the points on the front; equal points are all on it, or none.

    Padding contract: there is none.
    """
    return [not any(a >= x and b >= y and (a > x or b > y) for a, b in points) for x, y in points]


def _marked(outcome: Outcome, all_: Sequence[Outcome]) -> Outcome:
    if outcome.general is None:
        return outcome
    points = [(each.general.value, each.domain.value) for each in all_ if each.general is not None]
    place = (outcome.general.value, outcome.domain.value)
    best = dict(zip(points, pareto(points), strict=True))[place]
    return Outcome(outcome.strategy, outcome.domain, outcome.general, outcome.forgotten, best, outcome.per_domain)


def _outcome(run: DomainRun, strategy: str) -> Outcome | None:
    rows = [row for row in run.rows if row.strategy == strategy and row.stage == DOMAIN_STAGE]
    if not rows:
        return None
    staged = any(row.strategy == strategy and row.stage == GENERAL_STAGE for row in run.rows)
    had_general = staged or run.from_reward_model
    own: list[float] = []
    kept: list[float] = []
    lost: list[float] = []
    by_domain: dict[str, list[float]] = {}
    for seed in sorted({row.seed for row in rows}):
        domains = sorted({row.domain for row in rows if row.seed == seed})
        mine, left, gone = [], [], []
        for domain in domains:
            of = [row for row in rows if row.seed == seed and row.domain == domain]
            last = max(row.samples for row in of)
            end = {row.set: row.accuracy for row in of if row.samples == last}
            start = {row.set: row.accuracy for row in of if row.samples == 0}
            mine.append(end[domain])
            by_domain.setdefault(domain, []).append(end[domain])
            if run.general:
                left.append(fmean(end[name] for name in run.general))
                gone.append(fmean(start[name] - end[name] for name in run.general))
        own.append(fmean(mine))
        if run.general:
            kept.append(fmean(left))
            lost.append(fmean(gone))
    return Outcome(
        strategy,
        over_seeds(own),
        over_seeds(kept) if kept else None,
        over_seeds(lost) if lost and had_general else None,
        True,
        {domain: fmean(values) for domain, values in by_domain.items()},
    )
