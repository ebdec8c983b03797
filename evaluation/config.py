"""How a round is judged."""

from typing import Literal

from pydantic import Field, model_validator

from tokens.section import Section

Judge = Literal["gold", "held_out", "ensemble"]
AlarmName = Literal[
    "proxy_up_gold_down", "proxy_up_held_out_down", "reward_model_blind", "disagreement_grows", "length_hacking", "repetition",
    "truncation", "sameness", "kl_budget",
]  # fmt: skip
"""docs/monitor.md."""
NUM_HELD_OUT = 3
"""Held-out reward models where they are the judge and nobody says how many."""


class EvaluationConfig(Section):
    """One response per prompt from the round's policy, against one from the SFT policy."""

    num_prompts: int = Field(256, ge=8)
    """Validation prompts judged every round."""
    judge: Judge = "gold"
    """gold: the sandbox's truth. held_out: reward models that nothing is trained by (held_out_members). ensemble: the mean of the
    reward ensemble, which PPO is paid by, so that it can be fooled along with it. Where none is named: gold in the sandbox,
    held_out elsewhere. docs/best_round.md."""
    held_out_members: int | None = Field(None, ge=0, le=16)
    """Reward models that are fitted at the run's start, by seeds and pairs of their own, and only judge; null = 3 where judge is
    held_out, else none."""
    held_out_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of D's prompts whose pairs only held-out members learn from, where there are any: the reward model that pays PPO
    never sees them."""
    every_steps: int | None = Field(None, ge=1)
    """PPO steps between two looks at the signs of over-optimisation in a step's own rollouts; null = at the rounds' ends only.
    docs/monitor.md."""
    kl_budget: float | None = Field(None, gt=0)
    """KL from SFT, nats per response, beyond which a round's end raises the alarm kl_budget; null = never."""
    disqualify: tuple[AlarmName, ...] = ()
    """Alarms with which a round never counts as the best, nor as better for ``rounds.stop``: where the judge can be fooled with
    the policy, signs that need no judge. docs/best_round.md."""
    tie: float = Field(0.1, ge=0)
    """Judgements closer than this are ties; in units of the judge."""

    @model_validator(mode="after")
    def _what_disqualifies_can_happen(self) -> "EvaluationConfig":
        if "kl_budget" in self.disqualify and self.kl_budget is None:
            raise ValueError(
                "disqualify names kl_budget, and kl_budget is null, which never alarms: set kl_budget (nats per response), or "
                "leave it out of disqualify"
            )
        return self

    @property
    def num_held_out(self) -> int:
        """Held-out reward models of the run."""
        if self.held_out_members is None:
            return NUM_HELD_OUT if self.judge == "held_out" else 0
        return self.held_out_members
