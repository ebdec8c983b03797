"""For whom a policy is better than SFT, and for whom worse: told with every evaluation, where people's rewards are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.baselines import BestOfN
from cluster.config import RunConfig
from cluster.console import Console
from cluster.inputs import SANDBOX
from cluster.judging import Judgement
from cluster.rounds import Theme
from cluster.stages import Stages
from evaluation.for_whom import PersonRow, person_rows, who_gains
from evaluation.records import PEOPLE
from rm.people import People
from sandbox.world import World
from tokens.records import Rollout


class ForPeople(Theme):
    """A theme whose reward is that of people: each evaluation says what it is worth to everybody."""

    def evaluate(self, index: int, work: Stages) -> Judgement:
        """As ever, and everybody's own reward of the responses, and of SFT's to the same prompts."""
        judgement = super().evaluate(index, work)
        ours, theirs = (self.wait("evaluate", self.roles.scorer.by_person(each.rollouts)) for each in (judgement, self.sft))
        people = People.load(Path(str(self.config.reward.base)))
        gold, sft_gold = (golds_of(self.config, people, ours.names, each.rollouts) for each in (judgement, self.sft))
        whose = [rollout.prompt.domain for rollout in judgement.rollouts] if people.group == "own" else None
        rows = person_rows(ours.names, ours.scores, theirs.scores, gold, sft_gold, whose)
        work.rows(PEOPLE, rows)
        tell(self.console, rows)
        return judgement


class BestOfNForPeople(ForPeople, BestOfN):
    """Best of n by people's reward."""


def golds_of(config: RunConfig, people: People, names: Sequence[str], rollouts: Sequence[Rollout]) -> list[list[float]] | None:
    """What everybody truly thinks of responses, where the raters are users of the run's own sandbox.

    Users of another sandbox have the same names and other tastes, and a profile may have any name: neither has a gold reward.

    Args:
        config: of the run.
        people: whose reward counts.
        names: of m of them.
        rollouts: B responses.

    Returns:
        B rows of m, NaN for somebody who is no user; None without a sandbox, or with another than the raters'.
    """
    if config.data.preferences != SANDBOX or people.truth != config.world.truth:
        return None
    world = World(config.world)
    known = {*world.users} & {*people.names[: people.num_raters]}

    def of(name: str) -> Callable[[Rollout], float]:
        return lambda rollout: world.gold(rollout.prompt.text, rollout.text, user=name) if name in known else float("nan")

    judges = [of(name) for name in names]
    return [[judge(rollout) for judge in judges] for rollout in rollouts]


def tell(console: Console, rows: Sequence[PersonRow]) -> None:
    """One line: how many gain, how many lose, and who is worst off."""
    console.say(f"  {who_gains(rows)}")


def theme_for(config: RunConfig, theme: type[Theme]) -> type[Theme]:
    """The theme that also tells for whom the policy is better, where people's reward is what counts.

    Args:
        config: of the run.
        theme: that the config plays otherwise.
    """
    if not config.people.chosen:
        return theme
    return BestOfNForPeople if issubclass(theme, BestOfN) else ForPeople
