"""A task that a reward model learns in a few steps, and S_k for it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rm.batches import Encoded
from rm.config import MetaConfig, RewardConfig
from rm.model import RewardModel
from rm.records import RewardFit, RewardStep
from rm.shifted import ShiftedSamples
from rm.training import Watch, fit_reward_model
from tokens.ranks import ALONE
from tokens.records import Pair

MakeModel = Callable[..., RewardModel]
PAD, BOS, EOS = 0, 1, 2
GOOD, BAD = range(10, 25), range(25, 40)


def response(words: range, generator: torch.Generator) -> tuple[int, ...]:
    length = int(torch.randint(2, 7, (1,), generator=generator))
    return (*(words[int(i)] for i in torch.randint(len(words), (length,), generator=generator)), EOS)


def toy_pairs(n: int, seed: int = 0) -> list[Pair]:
    """Preferred responses are made of good words, the others of bad ones."""
    generator = torch.Generator().manual_seed(seed)
    return [Pair(f"p{i}", (BOS, 5 + i % 4), response(GOOD, generator), response(BAD, generator)) for i in range(n)]


def shifted(m: int = 6, k: int = 3, seed: int = 1) -> list[list[Encoded]]:
    generator = torch.Generator().manual_seed(seed)
    return [[((BOS, 5 + i % 4), response(range(10, 40), generator)) for _ in range(k)] for i in range(m)]


def fit(
    model: RewardModel,
    pairs: Sequence[Pair],
    meta: Sequence[Sequence[Encoded]] | None = None,
    eta: float = 0.0,
    epochs: int = 2,
    seed: int = 5,
    watch: Watch | None = None,
    reward: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[RewardFit, list[RewardStep]]:
    steps: list[RewardStep] = []
    reward_config = RewardConfig.model_validate({"lr": 3e-3, "batch_size": 8, "epochs": epochs, **(reward or {})})
    meta_config = MetaConfig.model_validate({"eta": eta, "prompts_per_step": 4, **options})
    return fit_reward_model(model, pairs, meta, reward_config, meta_config, seed, PAD, steps.append, watch=watch), steps


def ascended_on(meta: Sequence[Sequence[Encoded]], m: int = 4, seed: int = 5) -> list[Sequence[Encoded]]:
    """S_k without the prompts that a fit of this seed keeps back."""
    return ShiftedSamples(meta, None, RewardConfig(), m, seed, PAD, ALONE).groups  # type: ignore[arg-type]


def weights(model: RewardModel) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def count_rows(model: RewardModel) -> list[int]:
    """Filled with the number of sequences of each forward pass from now on."""
    rows: list[int] = []
    model.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    return rows
