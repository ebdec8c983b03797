"""Who can be asked which of two responses is better: the sandbox's gold reward, a reward model; endpoints have their own file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cluster.failures import RoleFailed
from tokens.errors import UserError

if TYPE_CHECKING:
    from preferences.formats import Template

FIRST, SECOND, NONE = 1, 0, -1


@dataclass(frozen=True)
class NotAsked:
    """In the place of an answer: this one comparison is more than the judge can take, others are not.

    Args:
        reason: why, for a person.
    """

    reason: str


Answer = int | NotAsked
"""Which response is better: 1 = the first, 0 = the second, -1 = the judge does not say; or why it could not be asked."""


class Judge(Protocol):
    """Compares two responses to a prompt."""

    @property
    def name(self) -> str:
        """Who answers; its answers are kept under this name."""

    @property
    def batch_size(self) -> int:
        """How many comparisons it likes to be given at once."""

    @property
    def template(self) -> Template | None:
        """Renders the prompt where the data is conversational; None = it cannot read such data."""

    def compare(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[Answer]:
        """Which response is better, for each of n comparisons.

        Raises:
            JudgeFailed: if it cannot go on; holds what was answered.
        """


class JudgeFailed(RoleFailed):
    """A judge could not go on.

    Args:
        message: why.
        answers: of the comparisons it was given; None where it has no answer yet.
    """

    def __init__(self, message: str, answers: Sequence[Answer | None]) -> None:
        super().__init__(message)
        self.answers = tuple(answers)


def better(first: float, second: float) -> int:
    """The answer that two scores give; equal scores give none."""
    return NONE if first == second else int(first > second)


class GoldJudge:
    """The sandbox's gold reward.

    Args:
        gold: gold(prompt, response).
        world: digest of the world's recipe.
    """

    batch_size = 1024
    template = None

    def __init__(self, gold: Callable[[str, str], float], world: str) -> None:
        self.gold = gold
        self.name = f"gold:{world}"

    def compare(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[Answer]:
        """See ``Judge``."""
        return [better(self.gold(p, a), self.gold(p, b)) for p, a, b in zip(prompts, firsts, seconds, strict=True)]


class RewardJudge:
    """A reward model: the response with the higher score is better. Both orders are the same to it.

    Args:
        path: a reward model's directory, with its tokenizer, or that of a reward run.
        templated: whether prompts were rendered with ``template``.

    Raises:
        UserError: if it is not one.
    """

    batch_size = 256
    sequences_per_pass = 32

    def __init__(self, path: Path, templated: bool) -> None:
        from preferences.models import check_model_directory, read_tokenizer

        if (path / "card.json").is_file():
            path = path / "model"
        directory = check_model_directory(path, reward=True)
        import torch

        from preferences.formats import ChatTemplate
        from rm.model import RewardModel

        self.context_length = directory.context_length
        self.tokenizer: Any = read_tokenizer(path)
        self.template = ChatTemplate(self.tokenizer) if directory.has_chat_template else None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = RewardModel.from_pretrained(path, dtype=torch.float32).to(device)
        self.name = f"reward:{_digest_of(path)}"
        self.templated = templated
        self.scores: dict[tuple[str, str], float] = {}
        self.too_long: dict[tuple[str, str], str] = {}

    def compare(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[Answer]:
        """See ``Judge``."""
        both = [*zip(prompts, firsts, strict=True), *zip(prompts, seconds, strict=True)]
        self._score([key for key in dict.fromkeys(both) if key not in self.scores and key not in self.too_long])
        return [self._better((p, a), (p, b)) for p, a, b in zip(prompts, firsts, seconds, strict=True)]

    def _better(self, first: tuple[str, str], second: tuple[str, str]) -> Answer:
        for key in (first, second):
            if key in self.too_long:
                return NotAsked(self.too_long[key])
        return better(self.scores[first], self.scores[second])

    def _score(self, keys: Sequence[tuple[str, str]]) -> None:
        import math

        from preferences.encode import encode_prompt, encode_response
        from preferences.sources import shorten
        from rm.batches import score_sequences

        encoded = {
            (prompt, response): (encode_prompt(self.tokenizer, prompt, self.templated), encode_response(self.tokenizer, response))
            for prompt, response in keys
        }
        for (prompt, response), (prompt_ids, response_ids) in list(encoded.items()):
            if self.context_length is not None and len(prompt_ids) + len(response_ids) > self.context_length:
                del encoded[prompt, response]
                self.too_long[prompt, response] = (
                    f"the prompt {shorten(prompt)} and a response have {len(prompt_ids)} + {len(response_ids)} tokens, the "
                    f"judge's context is {self.context_length}"
                )
        sequences = list(encoded.values())
        scores = score_sequences(self.model, sequences, self.sequences_per_pass, self.tokenizer.pad_token_id).tolist()
        for (prompt, response), score in zip(encoded, scores, strict=True):
            if not math.isfinite(score):
                raise UserError(f"the reward model gives {score} to {shorten(response)} after {shorten(prompt)}: it cannot judge")
            self.scores[prompt, response] = score


def _digest_of(path: Path) -> str:
    """Of config and weights: a model that was trained again in the same directory is another judge."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in (".json", ".safetensors"):
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


_ALONE = re.compile(r"\W*(?:(?:response|answer|option)\W*)?([ab])\W*", re.IGNORECASE)
_SAID = re.compile(
    r"\[\[([AB])\]\]|(?:answer|verdict|choice|better)(?: response)?(?: is)?\W*(?:response )?\W*(?-i:([AB]))\b(?! [a-z])",
    re.IGNORECASE,
)


def read_verdict(text: str | None) -> int:
    """What a chat model's reply says: 1 for A, 0 for B, -1 where it is not clearly one of the two."""
    if text is None:
        return NONE
    alone = _ALONE.fullmatch(text)
    letters = {alone[1].upper()} if alone else {found[1] or found[2] for found in _SAID.finditer(text)}
    return {"A": FIRST, "B": SECOND}[letters.pop()] if len(letters) == 1 else NONE
