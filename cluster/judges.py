"""Who can be asked which of two responses is better: the sandbox's gold reward, reward models; endpoints have their own file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cluster.failures import RoleFailed
from tokens.errors import UserError

if TYPE_CHECKING:
    from preferences.formats import Template
    from rm.model import RewardModel

FIRST, SECOND, NONE, TIE = 1, 0, -1, 2


@dataclass(frozen=True)
class NotAsked:
    """In the place of an answer: this one comparison is more than the judge can take, others are not.

    Args:
        reason: why, for a person.
    """

    reason: str


Answer = int | NotAsked
"""Which response is better: 1 = the first, 0 = the second, -1 = the judge does not say, 2 = it says that they are equal, where it
may; or why it could not be asked."""


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


def better(gap: float, tie: float | None) -> int:
    """The answer that two scores give.

    Args:
        gap: score of the first less that of the second.
        tie: gaps up to this, it included, are ties; None = there are none, and equal scores give no answer.
    """
    if tie is not None and abs(gap) <= tie:
        return TIE
    return NONE if gap == 0 else int(gap > 0)


class GoldJudge:
    """The sandbox's gold reward.

    Args:
        gold: gold(prompt, response).
        world: digest of the world's recipe.
        tie: see ``better``.
    """

    batch_size = 1024
    template = None

    def __init__(self, gold: Callable[[str, str], float], world: str, tie: float | None = None) -> None:
        self.gold, self.tie = gold, tie
        self.name = f"gold:{world}{_tied(tie)}"

    def compare(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[Answer]:
        """See ``Judge``."""
        return [better(self.gold(p, a) - self.gold(p, b), self.tie) for p, a, b in zip(prompts, firsts, seconds, strict=True)]


class RewardJudge:
    """A reward model: the response with the higher score is better. Both orders are the same to it.

    Args:
        path: a reward model's directory, with its tokenizer, or that of a reward run; weights are read when it is asked.
        templated: whether prompts were rendered with ``template``.
        tie: see ``better``.
        on_gpu: whether it may take a GPU where there is one.

    Raises:
        UserError: if it is not one.
    """

    batch_size = 256
    sequences_per_pass = 32

    def __init__(self, path: Path, templated: bool, tie: float | None = None, on_gpu: bool = True) -> None:
        from preferences.models import check_model_directory, read_tokenizer
        from rm.checkpoints import kind_of

        if (path / "card.json").is_file():
            path = path / "model"
        directory = check_model_directory(path, reward=True)
        kind = kind_of(path)
        if kind == "language model":
            raise UserError(f"{path} holds a {kind}, which gives no scores: a judge is a reward model")
        from preferences.formats import ChatTemplate

        self.path, self.context_length = path, directory.context_length
        self.tokenizer: Any = read_tokenizer(path)
        self.template = ChatTemplate(self.tokenizer) if directory.has_chat_template else None
        self.name = f"reward:{digest_of(path)}{_tied(tie)}"
        self.templated, self.tie, self.on_gpu = templated, tie, on_gpu
        self.scores: dict[tuple[str, str], float] = {}
        self.too_long: dict[tuple[str, str], str] = {}

    @cached_property
    def model(self) -> RewardModel:
        """The reward model, on the GPU if there is one and it may."""
        import torch

        from rm.model import RewardModel

        return RewardModel.from_pretrained(self.path, dtype=torch.float32).to(
            "cuda" if self.on_gpu and torch.cuda.is_available() else "cpu"
        )

    def compare(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[Answer]:
        """See ``Judge``."""
        return [gap if isinstance(gap, NotAsked) else better(gap, self.tie) for gap in self.gaps(prompts, firsts, seconds)]

    def gaps(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[float | NotAsked]:
        """Score of the first response less that of the second, for each of n comparisons."""
        both = [*zip(prompts, firsts, strict=True), *zip(prompts, seconds, strict=True)]
        self._score([key for key in dict.fromkeys(both) if key not in self.scores and key not in self.too_long])
        return [self._gap((p, a), (p, b)) for p, a, b in zip(prompts, firsts, seconds, strict=True)]

    def _gap(self, first: tuple[str, str], second: tuple[str, str]) -> float | NotAsked:
        for key in (first, second):
            if key in self.too_long:
                return NotAsked(self.too_long[key])
        return self.scores[first] - self.scores[second]

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


class EnsembleJudge:
    """Several reward models: the response is better that scores higher in the mean over them.

    Args:
        members: at least two, trained alike, so that their scores have one unit.
        tie: see ``better``.

    Raises:
        UserError: if there are fewer, one is there twice, or they differ in whether they have a chat template.
    """

    batch_size = 256

    def __init__(self, members: Sequence[RewardJudge], tie: float | None = None) -> None:
        names = [member.name for member in members]
        if len(members) < 2 or len(set(names)) < len(names):
            raise UserError(
                f"an ensemble is two different reward models or more, got {len(members)} of which {len(set(names))} differ: "
                f"{', '.join(str(member.path) for member in members)}"
            )
        if len({member.template is None for member in members}) > 1:
            raise UserError("some members of the ensemble have a chat template and some have none: they were not trained alike")
        self.members, self.tie, self.template = members, tie, members[0].template
        self.name = f"ensemble:{hashlib.sha256(' '.join(names).encode()).hexdigest()}{_tied(tie)}"

    def compare(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[Answer]:
        """See ``Judge``."""
        columns = [member.gaps(prompts, firsts, seconds) for member in self.members]
        return [self._answer(gaps) for gaps in zip(*columns, strict=True)]

    def _answer(self, gaps: Sequence[float | NotAsked]) -> Answer:
        numbers = [gap for gap in gaps if not isinstance(gap, NotAsked)]
        refused = [gap for gap in gaps if isinstance(gap, NotAsked)]
        return refused[0] if refused else better(sum(numbers) / len(numbers), self.tie)


def _tied(tie: float | None) -> str:
    """A judge with another margin is another judge."""
    return "" if tie is None else f":tie={tie!r}"


def digest_of(path: Path) -> str:
    """Of config, weights, tokenizer and chat template: a model that was trained again in the same directory is another judge."""
    from rm.checkpoints import is_part_of_model

    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if is_part_of_model(file):
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
_TIE_ALONE = re.compile(r"\W*(?:(?:answer|verdict|it is|it's)\W*)?(?:a\W+)?tie\W*", re.IGNORECASE)
_TIE_SAID = re.compile(r"\[\[(?:C|tie)\]\]|(?:answer|verdict|choice)(?: is)?\W*(?:a )?\W*tie\b", re.IGNORECASE)


def read_verdict(text: str | None, ties: bool = False) -> int:
    """What a chat model's reply says: 1 for A, 0 for B, 2 for a tie where that is allowed, -1 where it is none of them."""
    if text is None:
        return NONE
    alone = _ALONE.fullmatch(text)
    said = {alone[1].upper()} if alone else {(found[1] or found[2]).upper() for found in _SAID.finditer(text)}
    if ties and (_TIE_ALONE.fullmatch(text) or _TIE_SAID.search(text)):
        said.add("tie")
    return {"A": FIRST, "B": SECOND, "tie": TIE}[said.pop()] if len(said) == 1 else NONE
