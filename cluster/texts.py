"""The texts of supervised learning, as token ids: what ``sft`` trains on, and what PPO's ``ptx_coef`` is about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.given_model import model_directory
from cluster.inputs import SANDBOX
from preferences.models import read_tokenizer
from preferences.sets import count_reasons
from preferences.texts import Example, TextRow, TextSet, encode_texts, load_texts
from sandbox.world import World
from tokens.errors import UserError


@dataclass(frozen=True)
class Texts:
    """What ``sft`` is given.

    Args:
        start: directory of the model to start from; None = a fresh one.
        tokenizer: the model's.
        examples: to train on.
        held_out: to measure on; may be none.
        source: where they came from, in words.
        dropped: texts left out, counted by reason.
    """

    start: Path | None
    tokenizer: Any
    examples: tuple[Example, ...]
    held_out: tuple[Example, ...]
    source: str
    dropped: dict[str, int]


def sft_texts(config: RunConfig, cache: Path) -> Texts:
    """Check and encode what ``sft`` learns from.

    Args:
        config: of the command.
        cache: directory of trained tokenizers.

    Raises:
        UserError: if the data or the model are missing or wrong, or a text is longer than the model's context.
    """
    if config.sft.data is not None:
        return _own_data(config, config.sft.data, cache)
    return _sandbox(config) if config.data.preferences == SANDBOX else _chosen(config, cache)


def _own_data(config: RunConfig, name: str, cache: Path) -> Texts:
    from cluster.data_source import made_tokenizer

    data, start, tokenizer = config.data, None, None
    context: int | None = config.sft.shape.context_length
    if config.sft.model is not None:
        found = model_directory("sft.model", config.sft.model, data)
        start, tokenizer, context = found.path, read_tokenizer(found.path), found.context_length
    texts = load_texts(name, data.split, data.allow_hub, data.drop_bad, tokenizer)
    if tokenizer is None:
        words = [text for row in texts.rows for text in (row.prompt, row.response)]
        _, tokenizer = made_tokenizer(words, config.sft.shape.vocab_size, cache)
    return _encoded(config, start, tokenizer, texts, context)


def _sandbox(config: RunConfig) -> Texts:
    from cluster.sandbox_source import given_sft
    from sandbox.tokenizer import make_tokenizer

    world = World(config.world)
    given = given_sft(config, world)
    if given is None:
        return _encoded(config, None, make_tokenizer(world.vocabulary), _corpus(world), config.sft.shape.context_length)
    context = model_directory("sft.model", str(given.path), config.data).context_length
    return _encoded(config, given.path, given.tokenizer, _corpus(world), context)


def _corpus(world: World) -> TextSet:
    rows = tuple(TextRow(f"text {number}", *text) for number, text in enumerate(world.corpus(), start=1))
    return TextSet(rows, "the sandbox's texts", False)


def _encoded(config: RunConfig, start: Path | None, tokenizer: Any, texts: TextSet, context: int | None) -> Texts:
    data = config.data
    train, other = texts.split(data.validation_fraction, config.seed)
    examples, dropped = encode_texts(train, tokenizer, context, data.drop_bad)
    held_out, also_dropped = encode_texts(other, tokenizer, context, data.drop_bad)
    reasons = count_reasons((*texts.dropped, *dropped, *also_dropped))
    return Texts(start, tokenizer, examples, held_out, texts.source, reasons)


def _chosen(config: RunConfig, cache: Path) -> Texts:
    """The chosen responses, as ``run`` learns them; those of held-out prompts are held out."""
    from cluster.data_source import DataSource

    plain = config.reward.model_copy(update={"base": None})
    source = DataSource(config.model_copy(update={"reward": plain}), cache, policy=False)
    examples, held_out = (
        tuple((pair.prompt_ids, pair.chosen_ids) for pair in pairs) for pairs in (source.pairs, source.validation)
    )
    start = None if config.sft.model is None else source.sft_dir
    name = f"the chosen responses of {config.data.preferences}"
    return Texts(start, source.tokenizer, examples, held_out, name, source.dropped["preferences"])


def ptx_texts(config: RunConfig, tokenizer: Any, usual: Callable[[], Sequence[Example]]) -> tuple[Example, ...]:
    """The texts of PPO's language-modelling loss.

    Args:
        config: of the run.
        tokenizer: the policy's.
        usual: gives the texts that SFT learns from.

    Returns:
        The examples; none where ``policy.ptx_coef`` is 0.

    Raises:
        UserError: if there are none, or one is longer than ``longest_text``.
    """
    policy, data = config.policy, config.data
    if not policy.ptx_coef:
        return ()
    if policy.ptx_data is None:
        examples: Sequence[Example] = usual()
    else:
        texts = load_texts(policy.ptx_data, data.split, data.allow_hub, data.drop_bad, tokenizer)
        examples, _ = encode_texts(texts, tokenizer, longest_text(config), data.drop_bad)
    if not examples:
        raise UserError(
            f"policy.ptx_coef is {policy.ptx_coef:g} and there is no text for it: name some in policy.ptx_data, or set "
            "policy.ptx_coef to 0"
        )
    return tuple(examples)


def longest_text(config: RunConfig) -> int:
    """Most tokens of a text beside PPO's: as many as a rollout or a pair may have, for which every model has room."""
    data = config.data
    return data.max_prompt_tokens + max(data.max_response_tokens, config.rollout.max_new_tokens)


def sandbox_texts(world: World, tokenizer: Any, context: int) -> tuple[Example, ...]:
    """The sandbox's texts, as its own SFT policy learnt them.

    Args:
        world: the sandbox's.
        tokenizer: the policy's.
        context: most tokens of prompt and response together.

    Raises:
        UserError: if one is longer.
    """
    return encode_texts(_corpus(world), tokenizer, context, drop=False)[0]
