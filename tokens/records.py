"""Records that travel between the roles. Each checks itself when it is made.

Letters: B sequences, T positions (prompt + response + padding).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """A prompt as the policy sees it.

    Args:
        id: unique in its data set; a sample's id is derived from it.
        text: what is shown to people and handed to models with another tokenizer.
        token_ids: the policy's own ids, any chat template and BOS included; not empty.
        domain: the domain it belongs to, or "" where there are none.

    Raises:
        ValueError: if ``token_ids`` is empty.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    domain: str = ""

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError(f"prompt {self.id!r} has no tokens")


@dataclass(frozen=True)
class Swap:
    """New weights that an engine took over in the middle of a response.

    Args:
        token: index of the first response token that they drew.
        version: of the policy.
    """

    token: int
    version: int


@dataclass(frozen=True)
class Rollout:
    """A prompt, a response sampled for it, and who sampled it.

    Args:
        prompt: the prompt.
        sample: index of this response among the k of its prompt.
        response_ids: sampled ids, EOS included when the response ended by itself; not empty.
        text: the response as text, special tokens left out.
        sampler_logprobs: log-probability of each id under the distribution it was drawn from (temperature applied), nats.
        policy_version: version of the weights that the engine held when it took the prompt: the oldest that had a part in it.
        finished: True if it ended with EOS, False if it was cut by the token limit.
        swaps: weights that came while it was sampled, oldest first; the tokens before the first are of ``policy_version``.
        engine: name of the engine that sampled it; "" where that is not known. Who sampled makes no rollout another one.

    Raises:
        ValueError: if ids and log-probabilities differ in number, are none, or are not finite, or the swaps do not rise.
    """

    prompt: Prompt
    sample: int
    response_ids: tuple[int, ...]
    text: str
    sampler_logprobs: tuple[float, ...]
    policy_version: int
    finished: bool
    swaps: tuple[Swap, ...] = ()
    engine: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.response_ids:
            raise ValueError(f"rollout {self.prompt.id}/{self.sample} has no tokens")
        if len(self.response_ids) != len(self.sampler_logprobs):
            raise ValueError(
                f"rollout {self.prompt.id}/{self.sample}: {len(self.response_ids)} ids, {len(self.sampler_logprobs)} log-probs"
            )
        if not all(math.isfinite(x) for x in self.sampler_logprobs):
            raise ValueError(f"rollout {self.prompt.id}/{self.sample}: a sampler log-prob is not finite")
        tokens = [*(swap.token for swap in self.swaps), len(self.response_ids)]
        versions = [self.policy_version, *(swap.version for swap in self.swaps)]
        if tokens[0] < 0 or any(a >= b for row in (tokens, versions) for a, b in itertools.pairwise(row)):
            raise ValueError(
                f"rollout {self.prompt.id}/{self.sample}: swaps must rise in token and version, from version "
                f"{self.policy_version} and within {len(self.response_ids)} tokens, got {self.swaps}"
            )

    def age(self, version: int) -> float:
        """How many versions the weights that drew its tokens are behind, on average over the tokens.

        age = mean over tokens of (version - version of the weights that drew the token)

        Source: none needed.

        Args:
            version: of the policy that learns from it.

        Returns:
            0.0 where all tokens are of ``version``.

        Padding contract: there is none.
        """
        starts = [0, *(swap.token for swap in self.swaps), len(self.response_ids)]
        versions = [self.policy_version, *(swap.version for swap in self.swaps)]
        behind = sum((b - a) * (version - v) for (a, b), v in zip(itertools.pairwise(starts), versions, strict=True))
        return behind / len(self.response_ids)


def newest(rollouts: Sequence[Rollout]) -> list[bool]:
    """Which rollouts the newest weights among them drew from start to end.

    Args:
        rollouts: B of them, at least one.

    Returns:
        B of it.
    """
    version = max(rollout.policy_version for rollout in rollouts)
    return [rollout.policy_version == version and not rollout.swaps for rollout in rollouts]


@dataclass(frozen=True)
class Pair:
    """A preference pair, as ids of the model that will score it.

    Args:
        id: unique in its data set.
        prompt_ids: ids of the prompt; not empty.
        chosen_ids: ids of the preferred response, EOS included; not empty.
        rejected_ids: ids of the other response, EOS included; not empty.
        domain: the domain it belongs to, or "".
        margin: by how much chosen should score above rejected before the loss is content; units of the score, any sign.
        smoothing: alpha of label smoothing: the probability that the label is wrong; in [0, 1].

    Raises:
        ValueError: if any of the three is empty, the margin is not finite, or the smoothing is not in [0, 1].
    """

    id: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    domain: str = ""
    margin: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not (self.prompt_ids and self.chosen_ids and self.rejected_ids):
            raise ValueError(f"pair {self.id!r}: prompt, chosen and rejected must all have tokens")
        if not math.isfinite(self.margin):
            raise ValueError(f"pair {self.id!r}: the margin must be finite, got {self.margin}")
        if not 0 <= self.smoothing <= 1:
            raise ValueError(f"pair {self.id!r}: the label smoothing must lie in [0, 1], got {self.smoothing}")


@dataclass(frozen=True)
class SequenceBatch:
    """Prompt and response side by side, padded.

    Args:
        input_ids: [B, T] int64.
        attention_mask: [B, T] bool, True = a real token.
        response_mask: [B, T] bool, True = a token of the response (counts in losses); a subset of ``attention_mask``.

    Padding contract: made with padding on the right; nothing downstream may read a position outside ``attention_mask``.

    Raises:
        ValueError: if shapes or dtypes differ, or a response position is not attended to.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        if len(shape) != 2 or self.attention_mask.shape != shape or self.response_mask.shape != shape:
            raise ValueError(
                f"a sequence batch needs three [B, T] tensors, got {tuple(shape)}, "
                f"{tuple(self.attention_mask.shape)}, {tuple(self.response_mask.shape)}"
            )
        masks = (self.attention_mask.dtype, self.response_mask.dtype)
        if self.input_ids.dtype != torch.int64 or masks != (torch.bool, torch.bool):
            raise ValueError(
                "a sequence batch needs int64 ids and bool masks, got "
                f"{self.input_ids.dtype}, {self.attention_mask.dtype}, {self.response_mask.dtype}"
            )
        if bool((self.response_mask & ~self.attention_mask).any()):
            raise ValueError("a response position lies outside the attention mask")

    @classmethod
    def from_ids(cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int) -> SequenceBatch:
        """Pad prompt + response on the right to the longest of the batch.

        Args:
            prompts: B sequences of ids.
            responses: B sequences of ids, EOS included where there is one.
            pad_id: id written at padding.

        Returns:
            The batch, T = longest prompt + response.

        Raises:
            ValueError: if there are no sequences, or not as many prompts as responses.
        """
        if not prompts or len(prompts) != len(responses):
            raise ValueError(f"need as many prompts as responses and at least one, got {len(prompts)} and {len(responses)}")
        lengths = [(len(p), len(p) + len(r)) for p, r in zip(prompts, responses, strict=True)]
        width = max(end for _, end in lengths)
        rows = zip(prompts, responses, lengths, strict=True)
        input_ids = torch.tensor([[*p, *r, *[pad_id] * (width - end)] for p, r, (_, end) in rows], dtype=torch.int64)
        positions = torch.arange(width)
        starts = torch.tensor([start for start, _ in lengths])[:, None]
        ends = torch.tensor([end for _, end in lengths])[:, None]
        return cls(input_ids, positions < ends, (positions >= starts) & (positions < ends))

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def lengths(self) -> Tensor:
        """[B] int64, real tokens of each sequence."""
        return self.attention_mask.sum(-1)

    def to(self, device: torch.device | str) -> SequenceBatch:
        """The same batch on ``device``."""
        return SequenceBatch(self.input_ids.to(device), self.attention_mask.to(device), self.response_mask.to(device))

    def rows(self, index: Tensor) -> SequenceBatch:
        """The rows that ``index`` ([b] int64 or [B] bool) names, without columns on the right that are padding in all of them."""
        attention = self.attention_mask[index]
        width = int(attention.any(0).nonzero().max().item()) + 1
        return SequenceBatch(self.input_ids[index, :width], attention[:, :width], self.response_mask[index, :width])
