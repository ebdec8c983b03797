"""What `customize` may be told: a general reward model, and one for each domain, by several strategies side by side.

Defaults are the paper's (Everyone Deserves A Reward, 2309.03126), as its code has them.
"""

import re
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from rm.config import LoraConfig
from tokens.paths import PathText
from tokens.section import Section

NAME = r"[A-Za-z0-9][A-Za-z0-9_+-]{0,39}"
"""Of domains, general sets and strategies: they become names of files and of adapters."""
ADAPTERS = "domains"
"""Folder of a backbone's directory that holds adapters by the domain's name."""


class GeneralStageConfig(Section):
    """How the general stage is fitted; ``reward`` says the rest (AdamW's betas, eps and weight decay, clipping, microbatches)."""

    lr: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    batch_size: int = Field(64, ge=1)
    """Queries per optimizer step."""
    epochs: int = Field(1, ge=1)
    """Passes over the queries."""
    warmup_ratio: float = Field(0.04, ge=0, lt=1)
    """Share of the steps over which the learning rate rises; it then falls linearly to 0."""


class DomainStageConfig(GeneralStageConfig):
    """How the domain stage is fitted, likewise."""

    lr: float = Field(1e-7, gt=0)
    """Peak learning rate."""
    batch_size: int = Field(256, ge=1)
    """Queries per optimizer step."""
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of the steps over which the learning rate rises; it then falls linearly to 0."""


class StrategyConfig(Section):
    """One way to come to a domain's reward model."""

    general: bool = True
    """False goes straight from ``reward.base`` to the domain, without general fine-tuning; the base may be a general reward model
    that is there already."""
    enrichment: float = Field(1.0, ge=1)
    """General queries of the general stage, in multiples of ``general_queries``."""
    general_imitation: float = Field(0.0, ge=0)
    """Weight of the imitation loss in the general stage (the paper's code: 0 or 0.1)."""
    domain_imitation: float = Field(0.0, ge=0)
    """Weight of the imitation loss in the domain stage."""
    rehearsal: float = Field(0.0, ge=0)
    """General queries that are mixed into the domain stage, for each query of the domain."""
    penalty: Literal["none", "l2", "ewc"] = "none"
    """Hold the weights near to where the domain stage starts: l2 each of them alike, ewc by their Fisher information on general
    queries. Outside comparisons, not the paper's."""
    penalty_coef: float = Field(1.0, gt=0)
    """lambda of ``penalty``."""

    @model_validator(mode="after")
    def _has_a_general_stage_to_shape(self) -> "StrategyConfig":
        if self.general:
            return self
        asked = {"enrichment": self.enrichment > 1, "general_imitation": self.general_imitation > 0}
        named = [key for key, given in asked.items() if given]
        if named:
            raise ValueError(
                f"general is false, and {', '.join(named)} is of the general stage: leave it out, or set general to true"
            )
        return self


class CustomizeConfig(Section):
    """Reward models for domains, in three stages: base model, general fine-tuning, domain fine-tuning (docs/domains.md)."""

    general: dict[str, PathText] = Field({})
    """General data sets by name: a preference data set (docs/data.md), scored responses, or ``sandbox``."""
    domains: dict[str, PathText] = Field({})
    """Domain data sets by the domain's name: as ``general``, or a file of DSP (``query`` and ``responses`` by domain)."""
    general_stage: GeneralStageConfig = GeneralStageConfig()
    domain_stage: DomainStageConfig = DomainStageConfig()
    imitated: Literal["sequence", "response"] = "sequence"
    """Tokens of a preferred response that the imitation loss predicts: the prompt's too (the official code), or its own."""
    lora: LoraConfig = LoraConfig()
    """Adapters of the domain stage on one general backbone; rank 0 trains a whole model for every domain, as the paper does."""
    strategies: dict[str, StrategyConfig] = Field({"grft-crft": StrategyConfig()}, min_length=1)
    """Ways to compare, by name. General stages that are the same are fitted once."""
    seeds: int = Field(1, ge=1)
    """Fits of each, of different seeds."""
    test_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the prompts of each data set, never of the pairs, that accuracy is measured on."""
    general_queries: int | None = Field(None, ge=1)
    """General queries that enrichment 1 means; null = all there are, which leaves none for a larger factor."""
    domain_queries: int | None = Field(None, ge=1)
    """Train on at most this many queries of a domain, chosen by a hash of the prompt; null = all there are."""
    measured_queries: int = Field(200, ge=1)
    """At most so many held-out queries of each set are measured on, chosen by a hash of the prompt."""
    measure_every: int | None = Field(None, ge=1)
    """Queries between two measurements, each of which is a checkpoint too; null = about ten in a stage."""
    fisher_queries: int = Field(128, ge=1)
    """General queries that the Fisher information of ewc is estimated on."""

    @field_validator("general", "domains", "strategies")
    @classmethod
    def _names_can_be_kept_apart(cls, named: dict[str, object], info: ValidationInfo) -> dict[str, object]:
        dots = info.field_name == "strategies"  # an adapter's name is part of its weights' names, which dots cut up
        for name in named:
            if not re.fullmatch(NAME, name.replace(".", "-") if dots else name):
                also = ", '.'" if dots else ""
                raise ValueError(f"a name has letters, digits{also}, '_', '+' and '-' only, 40 at most, got {name!r}")
        lower = [name.lower() for name in named]
        twice = sorted({name for name in named if lower.count(name.lower()) > 1})
        if twice:
            raise ValueError(
                f"the names {' and '.join(twice)} differ in case alone, and would be one adapter on some file systems: rename one"
            )
        return named

    @model_validator(mode="after")
    def _strategies_can_be_fitted(self) -> "CustomizeConfig":
        both = sorted(name for name in self.domains if name.lower() in {other.lower() for other in self.general})
        if both:
            raise ValueError(
                f"{', '.join(both)} is a domain and a general data set: their accuracies could not be told apart; rename one"
            )
        for name, strategy in self.strategies.items():
            if strategy.penalty != "none" and self.lora.rank:
                raise ValueError(
                    f"strategies.{name}.penalty is {strategy.penalty} and lora.rank {self.lora.rank}: adapters leave the "
                    "backbone as it was and start at 0, where no distance or Fisher information says anything. Set lora.rank to 0"
                )
            if strategy.enrichment > 1 and self.general_queries is None:
                raise ValueError(
                    f"strategies.{name}.enrichment is {strategy.enrichment:g} and general_queries null, which takes all "
                    "there are: set general_queries to what a factor of 1 means"
                )
        return self
