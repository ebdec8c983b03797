"""What `generalize` may be told: one reward model from labelled domains, for domains that nobody labelled."""

import math
import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rm.domain_config import NAME
from tokens.paths import PathText
from tokens.section import Section

Solver = Literal["cg", "neumann"]


def check_beta(beta: float) -> None:
    """The reward factor is a positive number.

    Source: none needed.

    Args:
        beta: given.

    Raises:
        ValueError: if it is not: at 0 the policy would not see the reward, and below 0 it would flee it.
    """
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(
            f"beta multiplies the reward in the lower level and must be above 0, got {beta:g}: at 0 no reward reaches the "
            "policy, below 0 it is optimised away from it"
        )


class LabelledDomain(Section):
    """A domain to learn from."""

    preferences: PathText | None = None
    """Preference pairs or scored responses (docs/domains.md), or ``sandbox``."""
    texts: PathText | None = None
    """Texts that the domain's reference policy is fine-tuned on (docs/sft.md), or ``sandbox``. They need no labels, and no
    prompts in common with the preferences."""


class TargetDomain(Section):
    """A domain that the reward model is made for: nothing of its preferences is trained on."""

    texts: PathText | None = None
    """As for a labelled domain."""
    preferences: PathText | None = None
    """Measured on, where there are any; null = no accuracy is known."""


class ReferenceConfig(Section):
    """How a domain's reference policy is fine-tuned on its texts, from the SFT model."""

    epochs: float = Field(1.0, gt=0)
    """Passes over the texts."""
    lr: float = Field(2e-5, gt=0)
    """Peak learning rate."""
    batch_size: int = Field(32, ge=1)
    """Texts per optimizer step."""


class GeneralizeConfig(Section):
    """Bilevel meta-learning of a reward model over labelled domains (docs/generalize.md), and its test on others."""

    domains: dict[str, LabelledDomain] = Field({})
    """Domains to learn from, by name; two or more."""
    targets: dict[str, TargetDomain] = Field({})
    """Domains to use the reward model in, by name."""
    reference: ReferenceConfig = ReferenceConfig()
    beta: float = 1.0
    """Reward factor of the lower level: the policy is optimised for beta * reward - KL to its reference."""
    curves: tuple[float, ...] = ()
    """Further values of beta that a reward model is trained with, for the curves of the report."""
    form: Literal["closed", "unrolled", "first_order", "implicit"] = "closed"
    """How the upper loss is differentiated through the lower level. closed is exact and costs no more than pooled training; the
    others optimise a policy over each prompt's responses first."""
    inner_steps: int = Field(20, ge=1)
    """Gradient steps of the lower level (unrolled, first_order)."""
    inner_lr: float = Field(1.0, gt=0)
    """Their size."""
    solver: Solver = "cg"
    """Of the implicit form: conjugate gradient, or a Neumann series."""
    solver_iterations: int = Field(100, ge=1)
    """Products with the Hessian, at most."""
    neumann_step: float = Field(1.0, gt=0)
    """Step of the Neumann series."""
    damping: float = Field(0.0, ge=0)
    """Added to the Hessian (implicit)."""
    length_normalised: bool = True
    """The reference policy's log-probabilities per token instead of per response. What is trained then is the reward of a
    length-normalised score, of which no policy is the optimum; false is the paper's lower level, where sums of unlike long
    responses may differ by tens of nats that the reward has to make up for."""
    steps: int = Field(200, ge=1)
    """Outer steps."""
    domains_per_step: int = Field(4, ge=1)
    """Domains of a step; their hypergradients are averaged."""
    queries_per_step: int = Field(16, ge=1)
    """Queries of each of them."""
    seeds: int = Field(1, ge=1)
    """Reward models of each beta, of different seeds."""
    test_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of a labelled domain's prompts that is held out; of a target's preferences all are measured on."""
    measured_queries: int = Field(200, ge=1)
    """At most so many queries of a domain are measured on."""
    num_prompts: int = Field(64, ge=1)
    """Prompts of a target's texts that its policy is optimised on."""
    samples_per_prompt: int = Field(8, ge=2)
    """Responses to each, of the target's reference policy at temperature 1: n of best-of-n, and what reward-weighted fine-tuning
    draws from."""
    policy: Literal["best_of_n", "weighted_sft"] = "best_of_n"
    """What is made of a target in the end: the best response to each prompt, or also a policy that is fine-tuned on one response
    to each prompt, drawn among the samples with weights softmax(beta * reward); that policy is not measured."""

    @field_validator("beta")
    @classmethod
    def _beta_is_positive(cls, beta: float) -> float:
        check_beta(beta)
        return beta

    @field_validator("curves")
    @classmethod
    def _curves_are_of_betas(cls, curves: tuple[float, ...]) -> tuple[float, ...]:
        for beta in curves:
            check_beta(beta)
        return curves

    @field_validator("domains", "targets")
    @classmethod
    def _names_can_be_kept_apart(cls, named: dict[str, object]) -> dict[str, object]:
        for name in named:
            if not re.fullmatch(NAME, name):
                raise ValueError(f"a name has letters, digits, '_', '+' and '-' only, 40 at most, got {name!r}")
        return named

    @model_validator(mode="after")
    def _targets_are_unlabelled(self) -> "GeneralizeConfig":
        lower = [name.lower() for name in (*self.domains, *self.targets)]
        if twice := sorted({name for name in lower if lower.count(name) > 1}):
            raise ValueError(
                f"{', '.join(twice)} is named twice among domains and targets (case does not count): a target is a domain that "
                "nothing is learnt of; take it out of one"
            )
        return self

    @property
    def betas(self) -> tuple[float, ...]:
        """Every beta that a reward model is trained with, that of the targets first."""
        return tuple(dict.fromkeys((self.beta, *self.curves)))


def check_domains(config: GeneralizeConfig) -> None:
    """There is something to learn from and for.

    Source: none needed.

    Args:
        config: of the command.

    Raises:
        ValueError: naming the domain and what it lacks.
    """
    if len(config.domains) < 2:
        there = f"one, {next(iter(config.domains))}" if config.domains else "none"
        raise ValueError(
            f"generalize.domains names {there}: what holds across domains can be told only where there are two or more. Add a "
            "labelled domain, or train on its pairs alone with `python -m cluster reward`"
        )
    for name, domain in config.domains.items():
        if domain.preferences is None:
            raise ValueError(f"generalize.domains.{name} has no preferences: name some, or move it to generalize.targets")
    texts = {f"generalize.domains.{name}": domain.texts for name, domain in config.domains.items()}
    texts |= {f"generalize.targets.{name}": target.texts for name, target in config.targets.items()}
    for key, given in texts.items():
        if given is None:
            raise ValueError(
                f"{key} has no texts to fine-tune its reference policy on, which the lower level starts from: name some in "
                f"{key}.texts, or take it out"
            )
