"""Preference sets and strengths small enough to read."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from preferences.sets import PreferenceSet
from preferences.strength import Strengths
from preferences.strength_files import text_key


def preference_set(number: int, extra: Mapping[str, Sequence[Any]] | None = None, domains: str = "") -> PreferenceSet:
    """Pairs a0 ... with a domain for each letter of ``domains``, repeated."""
    columns: dict[str, Any] = {
        "id": [f"a{i}" for i in range(number)],
        "prompt": [f"prompt {i}" for i in range(number)],
        "chosen": [f"good {i}" for i in range(number)],
        "rejected": [f"bad {i}" for i in range(number)],
        "domain": [domains[i % len(domains)] if domains else "" for i in range(number)],
    }
    return PreferenceSet(Dataset.from_dict(columns | dict(extra or {})), "here", "explicit")


def strengths_of(pairs: PreferenceSet, mean: Sequence[float], num_members: int = 2) -> Strengths:
    """Strengths with these means; members stand at equal steps around them, and rejected scores are never 0."""
    steps = np.arange(num_members) - (num_members - 1) / 2
    rejected = np.linspace(0.25, 1.25, len(mean))[:, None] + np.zeros(num_members)
    rows = pairs.rows
    texts = tuple(text_key(p, c, r) for p, c, r in zip(rows["prompt"], rows["chosen"], rows["rejected"], strict=True))
    return Strengths(
        tuple(rows["id"]),
        rejected + np.asarray(mean)[:, None] + steps,
        rejected,
        ("train",) * len(mean),
        "scores",
        pairs.fingerprint,
        texts,
    )
