"""Settings that several rooms share."""

from pydantic import Field

from tokens.section import Section


class AdapterConfig(Section):
    """Low-rank adapters on the backbone instead of training all of it (peft); the head is trained whole."""

    rank: int = Field(0, ge=0)
    """r of the adapters; 0 = none, all weights are trained."""
    alpha: float = Field(16.0, gt=0)
    """Scale of the adapters: their product is multiplied by alpha / rank."""
