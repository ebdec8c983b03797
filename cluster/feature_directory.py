"""The directory of reward features: STORAGE/features/NAME, complete once it has a card, and then never written to again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.differences import flat
from cluster.reward_directory import RewardDirectory
from rm.features import RATERS

MODEL, ROWS = "model", "raters.jsonl"
"""Inside the directory: the feature model, and every rater's accuracy."""
PROFILES = "profiles"
"""Inside a feature model's directory: people's profiles, unless they are written elsewhere."""


class FeatureDirectory(RewardDirectory):
    """As a reward run's.

    Args:
        config: of the command.
    """

    kind, folder, sections = "features", "features", ("seed", "world", "data", "sft", "reward", "features")

    def learnt_from(self) -> dict[str, Any]:
        tree = self.config.model_dump(mode="json")
        return flat({section: tree[section] for section in self.sections})


def model_directory(path: Path) -> Path:
    """Where a feature model lies.

    Args:
        path: a feature model, or the directory that `features` wrote it to.
    """
    return path / MODEL if (path / MODEL / RATERS).is_file() else path
