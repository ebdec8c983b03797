"""The language-modelling loss on preferred responses, beside the ranking loss of the same forward pass.

Letters: B sequences, T positions, H hidden size, V vocabulary, n tokens that are predicted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from rm.checkpoints import kind_of
from rm.model import RewardModel
from tokens.errors import UserError
from tokens.records import SequenceBatch
from tokens.softmax import chosen_logprobs

Imitated = Literal["sequence", "response"]
HEAD_FILE = Path("language_head") / "head.safetensors"
"""In a folder of its own: some programs load every safetensors file beside config.json as the model's."""
WIDEST_ERROR = 1e-3
"""Of a checkpoint's logits and ours, relative to the largest."""


class LanguageHead(nn.Module):
    """logits = W h + b over a reward model's hidden states; W is the embedding matrix itself where the checkpoint ties the two.

    Args:
        embeddings: of the reward model, where W is tied to them; None where it is not.
        weight: [V, H], where it is not tied.
        bias: [V], or None.
    """

    def __init__(self, embeddings: nn.Module | None, weight: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        if (embeddings is None) == (weight is None):
            raise ValueError("a language head has weights of its own, or the embeddings': give one of the two")
        self._embeddings = (embeddings,)  # a tuple, so that they are the model's parameters and not this module's too
        self.weight = None if weight is None else nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    @property
    def tied(self) -> bool:
        """Whether W is the model's embedding matrix."""
        return self.weight is None

    @classmethod
    def load(cls, path: Path, model: RewardModel) -> LanguageHead:
        """The head that a directory holds: a language model's own, or the one that a fit with imitation left beside its model.

        Args:
            path: of the directory that ``model`` was loaded from.
            model: on the CPU.

        Returns:
            The head, float32, on the CPU.

        Raises:
            UserError: if there is none (an encoder, another program's reward model), or the language model computes its logits
                by more than one linear layer on the last hidden states.
        """
        if (path / HEAD_FILE).is_file():
            return cls._saved(path, model)
        if not model.pooled_here or kind_of(path) != "language model":
            raise UserError(
                f"the imitation loss needs a model that predicts the next token, and {path} holds {_what(path)} without a "
                "language head. Start from a causal language model (reward.base), or set the imitation coefficients to 0"
            )
        language: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        ).eval()
        output = language.get_output_embeddings()
        if not isinstance(output, nn.Linear):
            raise UserError(f"{type(language).__name__} in {path} has no linear layer for its logits: set imitation to 0")
        weight, bias = output.weight.detach().clone(), None if output.bias is None else output.bias.detach().clone()
        shared = torch.equal(weight, cast(nn.Embedding, language.get_input_embeddings()).weight)
        tied = shared and bool(language.config.get_text_config().tie_word_embeddings)
        head = cls(model.model.get_input_embeddings(), None, bias) if tied else cls(None, weight, bias)
        _check_same(language, head, path)
        return head

    @classmethod
    def _saved(cls, path: Path, model: RewardModel) -> LanguageHead:
        try:
            with safe_open(path / HEAD_FILE, framework="pt") as file:
                metadata = file.metadata()
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {path / HEAD_FILE}: {error}. Train the general stage again") from error
        bias = found["bias"] if "bias" in found else None
        if metadata["tied"] == "true":
            return cls(model.model.get_input_embeddings(), None, bias)
        return cls(None, found["weight"], bias)

    def save(self, path: Path) -> None:
        """Write the head beside its model; where it is tied, only the fact.

        Args:
            path: the model's directory.
        """
        (path / HEAD_FILE).parent.mkdir(parents=True, exist_ok=True)
        own = {name: p.detach().cpu().contiguous() for name, p in self.named_parameters()}
        save_file(own, path / HEAD_FILE, metadata={"format": "pt", "tied": "true" if self.tied else "false"})

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of the next token.

        Args:
            hidden: [n, H] float.

        Returns:
            [n, V], dtype of ``hidden``.
        """
        weight = self.weight if self.weight is not None else cast(nn.Embedding, self._embeddings[0]).weight
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return functional.linear(hidden, weight.to(hidden.dtype), bias)


def imitation_loss(
    hidden: Tensor, batch: SequenceBatch, head: LanguageHead, imitated: Imitated, denominator: Tensor | float
) -> Tensor:
    """How badly a model predicts preferred responses, each by the mean over its own tokens.

        L = sum over sequences i of [ -1/n_i sum_t log p(x_it | x_i,<t) ] / denominator

    t runs over every token that something precedes, the prompt's too ("sequence", the official code), or over the response's.

    Source: Everyone Deserves A Reward (2309.03126), its imitation loss; the official code predicts the prompt as well.

    Args:
        hidden: [B, T, H] float, the backbone's last hidden states of the preferred sequences.
        batch: the B sequences, padding on the right.
        head: of the same model.
        imitated: which tokens count.
        denominator: sequences that the caller averages over: B, or the count over all microbatches.

    Returns:
        A float32 scalar, nats per token and sequence.

    Raises:
        ValueError: if there is no sequence, or one has no token to predict.

    Padding contract: equal for a batch with more padding.
    """
    counted = batch.attention_mask if imitated == "sequence" else batch.response_mask
    targets = counted[:, 1:] & batch.attention_mask[:, :-1]  # [B, T - 1]; hidden t predicts token t + 1
    lengths = targets.sum(-1)
    if not len(lengths) or bool((lengths == 0).any()):
        raise ValueError("imitation needs sequences with at least one token that another precedes")
    states, ids = hidden[:, :-1][targets], batch.input_ids[:, 1:][targets]  # [n, H], [n]
    logprobs = chosen_logprobs(head(states), ids, 1.0)
    rows = torch.arange(len(lengths), device=hidden.device).repeat_interleave(lengths)
    return -(logprobs / lengths[rows]).sum() / denominator


def _what(path: Path) -> str:
    kind = kind_of(path)
    return f"an {kind}" if kind == "encoder" else f"a {kind}"


@torch.no_grad()
def _check_same(language: PreTrainedModel, head: LanguageHead, path: Path) -> None:
    """Refuse logits that are capped, scaled or projected on the way: the loss would be of another model."""
    pad = language.config.get_text_config().pad_token_id
    one, other = [token for token in range(3) if token != pad][:2]
    ids = torch.tensor([[one, other, one, one, other]])
    logits = language(input_ids=ids).logits[0]
    ours = head(language.base_model(input_ids=ids).last_hidden_state[0])
    if not torch.allclose(ours, logits, rtol=0, atol=WIDEST_ERROR * float(logits.abs().max())):
        raise UserError(
            f"{type(language).__name__} in {path} computes its logits by more than one linear layer on the last hidden states "
            "(it scales or caps them): expected a plain language head. Set the imitation coefficients to 0"
        )
