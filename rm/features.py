"""Reward features: phi(x, y) in R^d on any backbone, and each rater's weights on them.

    r_h(x, y) = <phi(x, y), w_h>        phi(x, y) = P f(x, y);  f = what the backbone's head reads, P [d, H]

phi and w are known only up to an invertible map: phi -> A phi with w -> A^-T w leaves every reward as it is. Predictions are
compared, never weights.

Letters: B sequences, N pairs, m raters, H hidden size, d reward features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rm.batches import Encoded
from rm.checkpoints import is_part_of_model
from rm.features_config import FeaturesConfig, Towards
from rm.heads import feature_differences, sequence_features
from rm.model import Batch, RewardModel
from tokens.durable import digest_of_file
from tokens.errors import UserError
from tokens.records import Pair

BACKBONE, TENSORS, RATERS = "backbone", "features.safetensors", "raters.json"
"""Inside a feature model's directory: an ordinary reward model that scores as the mean rater does, the rest of the weights, the
raters' names."""
USUAL = FeaturesConfig()


def scores(features: Tensor, weights: Tensor) -> Tensor:
    """r_b = <phi_b, w>.

    Source: Capturing Individual Human Preferences with Reward Features (2503.17338).

    Args:
        features: [B, d] float.
        weights: [d], a rater's.

    Returns:
        [B], dtype of ``features``.
    """
    return features @ weights.to(features.device, features.dtype)


class FeatureModel(nn.Module):
    """phi, and the weights of the raters that it was trained with.

    Args:
        backbone: its own head has no part in phi.
        projection: [d, H] float32, P.
        raters: m names, each once.
        weights: [m, d] float32; with ``shared`` every row is the same.
        shared: one reward for all raters, the non-adaptive baseline; d is 1.
        l2: how strongly a person's weights are drawn to ``towards``, where nobody says otherwise.
        towards: the mean rater or zero.

    Raises:
        ValueError: if shapes do not go together, a name comes twice or there is none, or ``shared`` has d above 1.
    """

    def __init__(
        self,
        backbone: RewardModel,
        projection: Tensor,
        raters: Sequence[str],
        weights: Tensor,
        shared: bool = False,
        l2: float = USUAL.l2,
        towards: Towards = USUAL.towards,
    ) -> None:
        super().__init__()
        hidden = backbone.head.in_features
        if projection.dim() != 2 or projection.shape[1] != hidden or weights.shape != (len(raters), projection.shape[0]):
            raise ValueError(
                f"need a projection [d, {hidden}] and weights [{len(raters)}, d], got {tuple(projection.shape)} and "
                f"{tuple(weights.shape)}"
            )
        if not raters or len(set(raters)) < len(raters):
            raise ValueError(f"need raters, each named once, got {len(raters)} names, {len(set(raters))} of them different")
        if shared and projection.shape[0] != 1:
            raise ValueError(f"one reward for all raters has one feature, got {projection.shape[0]}")
        self.backbone = backbone
        self.projection = nn.Parameter(projection.float())
        self.weights = nn.Parameter(weights.float())
        self.raters = tuple(raters)
        self.shared = shared
        self.l2, self.towards = l2, towards

    @property
    def d(self) -> int:
        """Reward features."""
        return self.projection.shape[0]

    @property
    def mean_weights(self) -> Tensor:
        """[d] float32 without gradient: the mean rater's, whom a person is before the first answer."""
        return self.weights.detach().mean(0)

    def weights_of(self, rater: str) -> Tensor:
        """A training rater's weights.

        Args:
            rater: one of ``raters``.

        Returns:
            [d] float32 without gradient.

        Raises:
            UserError: if there is no such rater.
        """
        return self.weights.detach()[rater_index(self.raters, rater)]

    def project(self, hidden: Tensor) -> Tensor:
        """phi = P f.

        Args:
            hidden: [B, H] float, what the backbone's head reads.

        Returns:
            [B, d], dtype of ``hidden``.
        """
        return hidden @ self.projection.to(hidden.dtype).T

    def forward(self, batch: Batch) -> Tensor:
        """phi of every sequence.

        Args:
            batch: B sequences of prompt and response, padded or packed.

        Returns:
            [B, d] float32 (float64 for a float64 model).

        Padding contract: as ``RewardModel.forward``.
        """
        return self.project(self.backbone.features(batch))

    def features(self, sequences: Sequence[Encoded], batch_size: int, pad_id: int) -> Tensor:
        """phi of many sequences without gradient, see ``rm.heads.sequence_features``.

        Args:
            sequences: B of (prompt ids, response ids).
            batch_size: sequences per forward pass.
            pad_id: id written at padding.

        Returns:
            [B, d] float32 on the CPU, in the order given.

        Padding contract: a sequence's features do not depend on those beside it.
        """
        if not sequences:
            return torch.zeros(0, self.d)
        return sequence_features(self.backbone, sequences, batch_size, pad_id) @ self.projection.detach().cpu().T

    def differences(self, pairs: Sequence[Pair], batch_size: int, pad_id: int) -> Tensor:
        """phi of the preferred response - phi of the other, without gradient, see ``rm.heads.feature_differences``.

        Args:
            pairs: N of them.
            batch_size: sequences per forward pass.
            pad_id: id written at padding.

        Returns:
            [N, d] float32 on the CPU.

        Padding contract: as ``features``.
        """
        return feature_differences(self.backbone, pairs, batch_size, pad_id) @ self.projection.detach().cpu().T

    @torch.no_grad()
    def reward_model(self, weights: Tensor) -> RewardModel:
        """The backbone with a head of these weights: an ordinary reward model that scores <phi, w>.

        Args:
            weights: [d] float, a rater's or a person's.

        Returns:
            ``backbone`` itself, its head replaced in place.
        """
        head = self.backbone.head
        head.weight.copy_((weights.to(self.projection.device, torch.float32) @ self.projection)[None])
        if head.bias is not None:
            head.bias.zero_()
        return self.backbone

    def save(self, path: Path) -> None:
        """Write the model. The tokenizer is the caller's to save, into ``path / BACKBONE``.

        Args:
            path: directory, made if needed.
        """
        path.mkdir(parents=True, exist_ok=True)
        self.reward_model(self.mean_weights).save_pretrained(path / BACKBONE)
        tensors = {"projection": self.projection, "weights": self.weights}
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path / TENSORS)
        named = {"raters": self.raters, "shared": self.shared, "l2": self.l2, "towards": self.towards}
        (path / RATERS).write_text(json.dumps(named, indent=1), "utf-8")

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype) -> FeatureModel:
        """A saved feature model.

        Args:
            path: directory; safetensors only, no code of its own is run.
            dtype: of the backbone's weights.

        Returns:
            The model, on the CPU.

        Raises:
            UserError: if there is no such model, or its files do not go together.
        """
        check_directory(path)
        try:
            named = json.loads((path / RATERS).read_text("utf-8"))
            tensors = load_file(path / TENSORS)
            backbone = RewardModel.from_pretrained(path / BACKBONE, dtype)
            adaptation = (bool(named["shared"]), float(named["l2"]), named["towards"])
            return cls(backbone, tensors["projection"], named["raters"], tensors["weights"], *adaptation)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"the feature model in {path} is damaged ({error}): train it again (python -m cluster features)"
            ) from error


def rater_index(raters: Sequence[str], rater: str) -> int:
    """A rater's place.

    Args:
        raters: the names.
        rater: the one looked for.

    Returns:
        Its index.

    Raises:
        UserError: if there is none of this name.
    """
    if rater not in raters:
        shown = ", ".join(raters[:3]) + (f" ... {raters[-1]}" if len(raters) > 3 else "")
        raise UserError(f"no rater is named {rater!r}: the model's {len(raters)} raters are {shown}. Name one of them")
    return list(raters).index(rater)


def check_directory(path: Path) -> None:
    """Refuse a directory that holds no feature model.

    Args:
        path: the directory.

    Raises:
        UserError: naming what is missing.
    """
    missing = [name for name in (RATERS, TENSORS, f"{BACKBONE}/config.json") if not (path / name).is_file()]
    if missing:
        raise UserError(
            f"{path} holds no feature model: {', '.join(missing)} is missing. Give the directory `model` that `python -m cluster "
            "features CONFIG` wrote"
        )


def fingerprint(path: Path) -> str:
    """What tells a feature model from every other: answers and profiles belong to one.

    Args:
        path: directory of the model.

    Returns:
        SHA-256 over the names and bytes of all that its scores depend on, 64 hexadecimal digits.

    Raises:
        UserError: if it holds no feature model.
    """
    check_directory(path)
    digest = hashlib.sha256()
    for name in [RATERS, TENSORS, *sorted(f"{BACKBONE}/{f.name}" for f in (path / BACKBONE).iterdir() if is_part_of_model(f))]:
        digest.update(f"{name} {digest_of_file(path / name)}\n".encode())
    return digest.hexdigest()
