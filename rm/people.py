"""Rewards of many people on one backbone, and what a group of them is paid.

    s_ih = <f(x_i, y_i), v_h>,  v_h = P^T w_h        f = what the backbone's head reads;  P, w_h: see ``rm.features``
    z_ih = (s_ih - mean_h) / std_h                   over the SFT policy's samples, so that nobody's unit outweighs another's
    reward_i = mean, minimum or quantile of z_ih over the people who count

Letters: B sequences, m people, H hidden size, C sequences of the calibration set.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rm.ensemble import Moments, normalise
from rm.people_config import Group, Paid
from tokens.errors import UserError

HEADS, WHO = "people.safetensors", "people.json"
"""Beside a reward model's weights: everybody's heads, and whose count how."""


@dataclass(frozen=True, eq=False)
class People:
    """Everybody whose reward is known, and whose counts.

    Args:
        names: [m], each once.
        heads: [m, H] float32, v.
        counting: indices of those whose reward counts.
        group: how their rewards are made one, all the same for a single person; "own" = each prompt's own person's.
        quantile: of group "quantile".
        truth: digest of the sandbox whose users the raters are; None where they are not, or it is not known.
        num_raters: of the names, the first ones: raters of the feature model, not people of a profile.

    Raises:
        ValueError: if shapes do not go together, a name comes twice, or nobody counts.
    """

    names: tuple[str, ...]
    heads: Tensor
    counting: tuple[int, ...]
    group: Paid
    quantile: float | None = None
    truth: str | None = None
    num_raters: int = 0

    def __post_init__(self) -> None:
        if self.heads.dim() != 2 or len(self.heads) != len(self.names) or len(set(self.names)) < len(self.names):
            raise ValueError(
                f"need heads [m, H] of m people, each named once; got {tuple(self.heads.shape)} and {len(set(self.names))} names"
            )
        if not self.counting or not all(0 <= index < len(self.names) for index in self.counting):
            raise ValueError(f"somebody of {len(self.names)} people must count, got the indices {list(self.counting)}")
        if (self.quantile is None) == (self.group == "quantile"):
            raise ValueError(f"a quantile belongs to group 'quantile', got {self.group!r} and {self.quantile}")

    def scores(self, features: Tensor) -> Tensor:
        """Everybody's own reward.

        Args:
            features: [B, H] float.

        Returns:
            [B, m] float32, s.
        """
        return features.float() @ self.heads.T

    def moments(self, scores: Tensor) -> tuple[Moments | None, ...]:
        """Everybody's zero and unit.

        Args:
            scores: [C, m] float, of the calibration set.

        Returns:
            [m]; None for somebody who does not count and whose reward is the same for all of them: it has no unit.

        Raises:
            UserError: if that is so of somebody who counts.
        """
        found: list[Moments | None] = []
        for place, (name, column) in enumerate(zip(self.names, scores.unbind(1), strict=True)):
            try:
                found.append(Moments.of(column))
            except ValueError as error:
                if place not in self.counting:
                    found.append(None)
                    continue
                raise UserError(
                    f"the reward of {name} does not vary over the SFT policy's samples ({error}): it says nothing. Train the "
                    "feature model on more of their labels, or leave them out"
                ) from error
        return tuple(found)

    def reward(self, scores: Tensor, whose: Sequence[str]) -> Tensor:
        """What the people who count are paid together, see ``group_reward``; or each by itself.

        Args:
            scores: [B, m] float, z of everybody.
            whose: B names, whom each response is written for; read by "own" only.

        Returns:
            [B] float.

        Raises:
            UserError: for "own", if somebody does not count.
        """
        if self.group != "own":
            return group_reward(scores[:, list(self.counting)], self.group, self.quantile)
        self.check_names(whose)
        return scores[torch.arange(len(scores)), torch.tensor([self.names.index(name) for name in whose], dtype=torch.long)]

    def check_names(self, whose: Sequence[str]) -> None:
        """Refuse prompts that are written for somebody who does not count; asked where each is paid by its own person's reward.

        Args:
            whose: names.

        Raises:
            UserError: naming the first.
        """
        members = [self.names[index] for index in self.counting]
        unknown = [name for name in whose if name not in members]
        if unknown:
            raise UserError(
                f"people.group is own and a prompt's domain is {unknown[0]!r}, which names none of the {len(members)} members "
                f"({', '.join(members[:3])} ...): each prompt's column domain must name whom it is written for"
            )

    def save(self, directory: Path) -> None:
        """Write beside a reward model's weights.

        Args:
            directory: that exists.
        """
        save_file({"heads": self.heads.contiguous()}, directory / HEADS)
        who = {name: value for name, value in vars(self).items() if name != "heads"}
        (directory / WHO).write_text(json.dumps(who, indent=1))

    @classmethod
    def load(cls, directory: Path) -> People:
        """What ``save`` wrote.

        Args:
            directory: of the reward model.

        Returns:
            The people.

        Raises:
            UserError: if the files are damaged.
        """
        try:
            who = json.loads((directory / WHO).read_text())
            heads = load_file(directory / HEADS)["heads"]
            return cls(names=tuple(who.pop("names")), heads=heads, counting=tuple(who.pop("counting")), **who)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{directory / WHO} or {HEADS} beside it is damaged ({error}): remove the directory") from error


def in_own_units(scores: Tensor, moments: Sequence[Moments | None]) -> Tensor:
    """z: everybody's reward in standard deviations of their own.

    Args:
        scores: [B, m] float.
        moments: [m].

    Returns:
        [B, m] float; NaN for somebody without a unit.
    """
    units = [(math.nan, 1.0) if m is None else (m.mean, m.std) for m in moments]
    return normalise(scores, *torch.tensor(units, dtype=scores.dtype).unbind(1))


def group_reward(scores: Tensor, group: Group, quantile: float | None) -> Tensor:
    """What a group is paid for each response.

    mean_h z, min_h z, or the quantile of z over h with straight lines between the members.

    Args:
        scores: [B, m] float, z of those who count.
        group: how.
        quantile: of "quantile", in [0, 1]: 0 is the minimum, 1 the maximum.

    Returns:
        [B] float; NaN where a score is.

    Raises:
        ValueError: if there is nobody, or no quantile is given for "quantile".
    """
    if scores.dim() != 2 or scores.shape[1] < 1:
        raise ValueError(f"a group's reward needs scores [B, m] with m >= 1, got {tuple(scores.shape)}")
    match group:
        case "mean":
            return scores.mean(1)
        case "min":
            return scores.amin(1)
        case "quantile":
            if quantile is None:
                raise ValueError("group 'quantile' needs a quantile, got None")
            return scores.quantile(quantile, dim=1)
        case _:
            assert_never(group)
