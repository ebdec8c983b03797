"""How a round is judged."""

from typing import Literal

from pydantic import Field

from tokens.section import Section


class EvaluationConfig(Section):
    """One response per prompt from the round's policy, against one from the SFT policy."""

    num_prompts: int = Field(256, ge=8)
    """Validation prompts judged every round."""
    judge: Literal["gold", "ensemble"] = "gold"
    """The sandbox's truth, or the mean of the reward ensemble (not independent of training: the report says so)."""
    tie: float = Field(0.1, ge=0)
    """Judgements closer than this are ties; in units of the judge."""
