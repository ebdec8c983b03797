"""A feature model that was opened to be asked about texts: what ``adapt`` and ``ask`` have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.feature_directory import model_directory
from rm.features_config import Towards
from tokens.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from preferences.raters import Answers
    from rm.batches import Encoded
    from rm.features import FeatureModel

BATCH_SIZE = 32
"""Sequences per forward pass."""


@dataclass(frozen=True)
class Compared:
    """Two responses to a prompt, as texts.

    Args:
        prompt: of both.
        first: the preferred one of an answer.
        second: the other.
        where: they come from, for messages.
    """

    prompt: str
    first: str
    second: str
    where: str


def compared_in(answers: Answers) -> list[Compared]:
    """What a person compared, the preferred response first.

    Args:
        answers: theirs, as read.
    """
    source = answers.pairs.source
    return [
        Compared(row["prompt"], row["chosen"], row["rejected"], f"{source}: answer {row['id']}") for row in answers.pairs.rows
    ]


@dataclass(frozen=True, eq=False)
class OpenFeatures:
    """A feature model, ready to be asked about texts.

    Args:
        path: its directory.
        model: on the CPU.
        tokenizer: its.
        fingerprint: see ``rm.features.fingerprint``.
    """

    path: Path
    model: FeatureModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str

    @classmethod
    def at(cls, path: Path) -> OpenFeatures:
        """Load a feature model.

        Args:
            path: a feature model, or the directory that `features` wrote it to.

        Raises:
            UserError: if it holds none.
        """
        from actors.process import import_transformers

        import_transformers()
        import torch
        from transformers import AutoTokenizer
        from transformers.utils import logging

        from rm.features import BACKBONE, FeatureModel, fingerprint

        logging.disable_progress_bar()  # a bar for one small file
        place = model_directory(path.expanduser())
        found = fingerprint(place)
        model = FeatureModel.load(place, torch.float32)
        return cls(place, model, AutoTokenizer.from_pretrained(place / BACKBONE, trust_remote_code=False), found)

    def adaptation(self, l2: float | None, towards: Towards | None) -> tuple[float, Towards]:
        """How a person is fitted on the model.

        Args:
            l2: asked for; None = what the model was measured with.
            towards: likewise.

        Raises:
            UserError: if no person can be, or ``l2`` is out of its range.
        """
        if self.model.shared:
            raise UserError(f"{self.path} is one reward for all raters (features.shared): it cannot be adapted to a person")
        l2 = self.model.l2 if l2 is None else l2
        if not 0 < l2 < math.inf:
            raise UserError(f"--l2 is {l2:g}: a number above 0 is expected, or weights of separable answers would be infinite")
        return l2, self.model.towards if towards is None else towards

    @property
    def pad_id(self) -> int:
        """Written at padding."""
        pad_id = self.tokenizer.pad_token_id
        assert isinstance(pad_id, int)  # the model was trained with it
        return pad_id

    def differences(self, compared: Sequence[Compared], templated: bool = False) -> Tensor:
        """phi(prompt, first) - phi(prompt, second), each text once through the model.

        Args:
            compared: N of them.
            templated: whether a chat template rendered the prompts.

        Returns:
            [N, d] float64.

        Raises:
            UserError: if the model cannot read one, or sees no difference between its responses.
        """
        from preferences.encode import encode_prompt, encode_response

        sides: list[Encoded] = []
        for each in compared:
            prompt = encode_prompt(self.tokenizer, each.prompt, templated)
            responses = [encode_response(self.tokenizer, text) for text in (each.first, each.second)]
            tokens = len(prompt) + max(map(len, responses))
            if tokens > self.longest:
                raise UserError(
                    f"{each.where}: prompt and response have {tokens} tokens, the model reads {self.longest} at most. Leave it "
                    "out"
                )
            if responses[0] == responses[1]:
                raise UserError(f"{each.where}: both responses have the same tokens, the model sees no difference. Leave it out")
            sides += [(prompt, response) for response in responses]
        distinct = list(dict.fromkeys(sides))
        place = {sequence: index for index, sequence in enumerate(distinct)}
        found = self.model.features(distinct, BATCH_SIZE, self.pad_id).double()
        first, second = found[[place[side] for side in sides]].reshape(len(compared), 2, self.model.d).unbind(1)
        return first - second

    @property
    def longest(self) -> int:
        """Tokens that the model reads at most, where its config says so."""
        config = self.model.backbone.model.config.get_text_config().to_dict()
        found = [config[name] for name in ("max_position_embeddings", "n_positions") if name in config]
        return int(min(found)) if found else 1 << 20
