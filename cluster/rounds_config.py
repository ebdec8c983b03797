"""How many rounds, when they end, and what is played in their place."""

from typing import Literal

from pydantic import Field, model_validator

from tokens.section import Section

Baseline = Literal["none", "vanilla_ppo", "ensemble_ppo", "best_of_n", "dpo"]
PPO: tuple[Baseline, ...] = ("none", "vanilla_ppo", "ensemble_ppo")
"""Those in which PPO trains the policy."""


class StopConfig(Section):
    """When a run ends before its last round: docs/best_round.md."""

    patience: int = Field(2, ge=1, le=1000)
    """Rounds without a better judgement on the held-out prompts (``evaluation.judge``) before the run ends; SFT counts as the
    first judgement."""
    min_delta: float = Field(0.0, ge=0)
    """By how much a judgement must be better to count as such, in units of the judge."""


class RoundsConfig(Section):
    """How many times the theme returns, or what is played in its place to compare with."""

    num_rounds: int = Field(3, ge=1, le=1000)
    baseline: Baseline = "none"
    """vanilla_ppo: PPO against one reward model that is never retrained. ensemble_ppo: against an ensemble that never is, by
    ``scorer.aggregate``. best_of_n: the SFT policy, and the ensemble picks
    among its samples. dpo: TRL's DPO on D. The last two are one round. docs/baselines.md."""
    best_of: int | None = Field(None, ge=2)
    """n of best_of_n: samples of each evaluation prompt."""
    softness: float | None = Field(None, gt=0)
    """lambda of soft best of n: of the n samples one is drawn with probability proportional to exp(score / lambda), scores in
    standard deviations over the SFT policy's samples; null = the best."""
    checkpoint_every: int | None = Field(20, ge=1)
    """PPO steps between two checkpoints within a round; null saves at a stop and at the round's end only. What came after the
    last one is learned again from its recorded rollouts. docs/run_directory.md."""
    keep_checkpoints: int = Field(2, ge=1, le=100)
    """Checkpoints of the round under way that are kept; each is a policy, a critic and both optimizers' moments. If the newest is
    damaged, the round goes on from the one before."""
    save_fit_every: int | None = Field(100, ge=1)
    """Optimizer steps of a reward model's fit between two saves of how far it has come; null = a fit that is cut short begins
    again."""
    keep_rollouts: bool = False
    """Keep the rollouts of every PPO step, with the scores they got, when their round is committed."""
    stop: StopConfig | None = None
    """When to end before num_rounds; null = never."""

    @model_validator(mode="after")
    def _baseline_is_whole(self) -> "RoundsConfig":
        if (self.best_of is not None) != (self.baseline == "best_of_n"):
            raise ValueError(
                f"best_of is {self.best_of} and baseline {self.baseline}: best_of is the n of baseline best_of_n, which needs "
                "it; set both or neither"
            )
        if self.softness is not None and self.baseline != "best_of_n":
            raise ValueError(
                f"softness is {self.softness:g} and baseline {self.baseline}: only best_of_n picks among samples; set it to null"
            )
        if self.baseline in ("best_of_n", "dpo") and self.stop is not None:
            raise ValueError(
                f"stop.patience is {self.stop.patience} and baseline {self.baseline}, which is one round: set stop to null, or "
                f"baseline to one of {', '.join(PPO)}"
            )
        if self.baseline in ("best_of_n", "dpo") and self.num_rounds != 1:
            raise ValueError(
                f"baseline {self.baseline} is one round, its second would be the first again, and num_rounds is "
                f"{self.num_rounds}: set it to 1"
            )
        return self
