"""How the members of a preference-strength ensemble are fitted, and where they lie. Nothing here imports torch: the driver needs
no model to know either."""

from __future__ import annotations

from pathlib import Path

from rm.config import ContrastiveConfig, LoraConfig, MemberKind, RewardConfig, StrengthConfig

TRUNK = "trunk"
LORA_LR_FACTOR = 10
"""What null of ``strength.lora_lr`` means, as a multiple of ``reward.lr``."""


def member_directories(kind: MemberKind, directory: Path, num_members: int) -> list[Path]:
    """What training leaves behind, one directory for each fit.

    Args:
        kind: of the members.
        directory: that holds them.
        num_members: M.

    Returns:
        M directories, or the one of the shared trunk.
    """
    return [directory / TRUNK] if kind == "heads" else [directory / str(member) for member in range(num_members)]


def member_settings(reward: RewardConfig, strength: StrengthConfig) -> RewardConfig:
    """How a member is fitted: the run's own settings, but by the plain preference loss on all steps.

    The strength of a pair is what models trained on the labels as given say of it, so contrastive loss and early stopping are
    off; low-rank adapters are used by members of kind "lora" only, and by those always, with a learning rate of their own.

    Args:
        reward: of the run.
        strength: of the run.

    Returns:
        The settings.
    """
    rank = strength.lora_rank if strength.members == "lora" else 0
    lora = LoraConfig.model_validate(reward.lora.model_dump() | {"rank": rank})
    changed: dict[str, object] = {"contrastive": ContrastiveConfig(), "lora": lora, "evaluate_every": None, "patience": None}
    if rank:
        changed["lr"] = LORA_LR_FACTOR * reward.lr if strength.lora_lr is None else strength.lora_lr
    return reward.model_copy(update=changed)
