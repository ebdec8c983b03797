"""Policies on the sandbox's test prompts, which no run and no setting saw: what they answer, and what the truth thinks of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from cluster.config import RunConfig
from cluster.seeds import derive
from evaluation.compare import win_tie_lose
from sandbox.world import World


@dataclass(frozen=True)
class Judged:
    """Responses of a policy, one to each prompt.

    Args:
        gold: mean gold reward.
        win: share of prompts on which the gold reward is above that of SFT's response, by more than a tie.
        tie: about the same.
        lose: below it.
    """

    gold: float
    win: float
    tie: float
    lose: float

    @property
    def margin(self) -> float:
        """win - lose."""
        return self.win - self.lose


def prompts_of(world: World, trained: bool = True) -> list[str]:
    """Test prompts of the domains that the preferences are from, or of the others."""
    return [prompt.text for prompt in world.prompts("test") if (prompt.domain in world.train_domains) == trained]


def policies_of(run: Path) -> list[Path]:
    """Where the policy of each round of a run lies."""
    rounds = json.loads((run / "ledger.json").read_text())["rounds"]
    return [run / "rounds" / f"round_{entry['round']:03d}" / "policy" for entry in rounds]


def answers(model_dir: Path, prompts: list[str], config: RunConfig) -> list[str]:
    """One response per prompt by transformers' ``generate`` at the run's temperature, sampled with a seed of its own."""
    from sandbox.candidates import sample_responses

    settings = (config.rollout.temperature, config.rollout.max_new_tokens, derive(config.seed, "test"))
    return sample_responses(model_dir, prompts, *settings, lambda done, total: None)


def golds(world: World, prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
    """What the sandbox thinks of each."""
    return [world.gold(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


def against_sft(
    world: World, prompts: Sequence[str], sft: Sequence[str], policies: Iterable[Sequence[str]], tie: float
) -> list[Judged]:
    """SFT, then each policy, by gold and against SFT's responses.

    Args:
        world: that knows the truth.
        prompts: P.
        sft: [P] its responses.
        policies: of each, [P] its responses.
        tie: gold rewards that lie no further apart are a tie.
    """
    theirs = golds(world, prompts, sft)
    found = [Judged(fmean(theirs), 0.0, 1.0, 0.0)]
    for texts in policies:
        ours = golds(world, prompts, texts)
        result = win_tie_lose(ours, theirs, tie)
        found.append(Judged(fmean(ours), result.win, result.tie, result.lose))
    return found
