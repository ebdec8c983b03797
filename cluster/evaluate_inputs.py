"""What two models are compared on: all that is known before a model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.endpoint_options import EndpointOptions
from cluster.evaluate_models import Contestant, Letter, Sampling, encode, open_contestant
from cluster.evaluate_prompts import Prompts, open_prompts
from evaluation.config import EvaluationConfig
from tokens.errors import UserError
from tokens.paths import check_path

HUMAN = "human"
KINDS = ("gold", "reward", "ensemble", "openai", HUMAN)
NEW_TOKENS, TEMPERATURE = 256, 1.0
"""Of prompts that are not the sandbox's, whose config says it."""


@dataclass(frozen=True)
class Evaluating:
    """What `evaluate` was told.

    Args:
        a: directory of model A.
        b: of model B.
        judges: names of judges.
        prompts: a data set of prompts, or sandbox:CONFIG.yaml.
        split: of the prompts.
        num_prompts: the first so many; None = all.
        out: directory to write; None = STORAGE/evaluations/COMPARISON.
        seed: of sampling.
        temperature: of sampling; None = the sandbox config's, else ``TEMPERATURE``.
        max_new_tokens: of a response; None = likewise, else ``NEW_TOKENS``.
        tie: scores closer than this are ties.
        allow_hub: whether the prompts may be fetched.
        options: of an endpoint.
    """

    a: Path
    b: Path
    judges: tuple[str, ...]
    prompts: str
    split: str | None = None
    num_prompts: int | None = None
    out: Path | None = None
    seed: int = 0
    temperature: float | None = None
    max_new_tokens: int | None = None
    tie: float = EvaluationConfig().tie
    allow_hub: bool = False
    options: EndpointOptions = field(default_factory=EndpointOptions)


@dataclass(frozen=True)
class Comparison:
    """The two models, and what they are asked.

    Args:
        a: model A.
        b: model B.
        prompts: of both.
        sampling: of both.
        ids: the prompts as each model's ids.
    """

    a: Contestant
    b: Contestant
    prompts: Prompts
    sampling: Sampling
    ids: Mapping[Letter, list[tuple[int, ...]]]

    @property
    def settings(self) -> dict[str, Any]:
        """What responses follow from."""
        models = {"A": self.a.digest, "B": self.b.digest}
        return {**models, "prompts": self.prompts.digest, "num_prompts": len(self.prompts.ids), **asdict(self.sampling)}

    @property
    def name(self) -> str:
        """Of the comparison: equal models, prompts and sampling have one."""
        return hashlib.sha256(json.dumps(self.settings).encode()).hexdigest()[:12]


def compare(asked: Evaluating) -> Comparison:
    """Check everything that needs no weights.

    Args:
        asked: what `evaluate` was told.

    Raises:
        UserError: if an input is wrong.
    """
    for name in (str(asked.a), str(asked.b), asked.prompts.removeprefix("sandbox:")):
        check_path(name)
    if not asked.tie >= 0 or asked.tie == float("inf"):
        raise UserError(f"--tie must be 0 or more, got {asked.tie:g}")
    for judge in asked.judges:
        if judge.partition(":")[0] not in KINDS:
            raise UserError(
                f"no such judge: {judge!r}; expected gold, gold:CONFIG.yaml, reward:DIR, ensemble:DIR, openai:BASE_URL#MODEL or "
                "human:FILE.jsonl"
            )
    twice = [judge for judge in asked.judges if asked.judges.count(judge) > 1]
    if twice:
        raise UserError(f"--judge {twice[0]} is given twice: a judge agrees with itself")
    a, b = open_contestant("A", asked.a), open_contestant("B", asked.b)
    prompts = open_prompts(asked.prompts, asked.split, asked.num_prompts, asked.allow_hub)
    sampling = _sampling(asked, prompts.sandbox)
    ids = {
        one.letter: encode(one, prompts.for_model(one.tokenizer), prompts.conversational, sampling.max_new_tokens)
        for one in (a, b)
    }
    return Comparison(a, b, prompts, sampling, ids)


def _sampling(asked: Evaluating, sandbox: RunConfig | None) -> Sampling:
    own = (TEMPERATURE, NEW_TOKENS) if sandbox is None else (sandbox.rollout.temperature, sandbox.rollout.max_new_tokens)
    temperature = own[0] if asked.temperature is None else asked.temperature
    longest = own[1] if asked.max_new_tokens is None else asked.max_new_tokens
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature must be 0 (the likeliest token) or more, got {temperature:g}")
    if longest < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {longest}")
    return Sampling(asked.seed, temperature, longest)
