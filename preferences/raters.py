"""Pairs that say who judged them, and a person's answers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from preferences.config import DataConfig
from preferences.load import load_preferences
from preferences.sets import PreferenceSet
from tokens.errors import UserError

RATER = "rater"
"""Column of a preference data set that names who judged a pair."""
MODEL = "model"
"""Key of an answer that holds the fingerprint of the model whose question it answers."""


@dataclass(frozen=True)
class Answers:
    """A person's answers.

    Args:
        pairs: columns prompt, chosen, rejected.
        models: fingerprints that answers carry; none for answers written by hand.
        without: answers that carry none.
    """

    pairs: PreferenceSet
    models: tuple[str, ...]
    without: int

    def check_model(self, fingerprint: str) -> None:
        """Refuse answers to another model's questions.

        Args:
            fingerprint: of the model that is to be fitted to them.

        Raises:
            UserError: naming the other.
        """
        others = [model for model in self.models if model != fingerprint]
        if others:
            raise UserError(
                f"{self.pairs.source} holds answers of the model {others[0][:12]}, got the model {fingerprint[:12]}: expected "
                f"one. Give the model that asked, or remove the key {MODEL!r} from the answers to fit them to this one"
            )


def read_answers(path: Path) -> Answers:
    """Answers as lines {"prompt", "chosen", "rejected", "model"}, the last optional.

    Args:
        path: a .jsonl file.

    Returns:
        At least one answer.

    Raises:
        UserError: naming file and line.
    """
    pairs = load_preferences(DataConfig(preferences=str(path)))
    if MODEL not in pairs.rows.column_names:
        return Answers(pairs, (), len(pairs))
    found = Counter(pairs.rows[MODEL])
    odd = [value for value in found if value is not None and not isinstance(value, str)]
    if odd:
        raise UserError(f"{path}: the key {MODEL!r} must be a fingerprint as text, got {json.dumps(odd[0])[:80]}")
    return Answers(pairs, tuple(sorted(value for value in found if value is not None)), found[None])
