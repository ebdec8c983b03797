"""Text to token ids, by the one convention that policy and reward models share.

prompt = [bos, if the tokenizer has one] + ids of the text; response = ids of the text + [eos].
"<eos>" written inside a text stays five characters: special tokens come from us, or from a chat template, never from data.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from preferences.formats import special_tokens
from preferences.sets import DroppedRow, PreferenceSet, PromptSet, refuse
from preferences.sources import shorten
from tokens.errors import UserError
from tokens.pair_store import PairStore, PairStoreBuilder
from tokens.records import Pair, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEFT_OUT = "left out by denoise"
"""Reason given for rows whose column ``keep`` is False."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, templated: bool = False) -> tuple[int, ...]:
    """Ids of a prompt.

    Args:
        tokenizer: the model's.
        text: the prompt; not empty.
        templated: True for a text that a chat template rendered: its special tokens are read as such, and no BOS is added
            beside what the template wrote.

    Returns:
        The ids, a beginning-of-sequence token first if the tokenizer has one.

    Raises:
        UserError: if the text has no tokens, or plain text would become a special token.
    """
    if templated:
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        bos = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
        ids = (*bos, *_plain_ids(tokenizer, text))
    if not ids:
        raise UserError(f"the prompt {shorten(text)} has no tokens")
    return ids


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Ids of a finished response, the end-of-sequence token last.

    Args:
        tokenizer: the model's.
        text: the response, without special tokens.

    Raises:
        UserError: if the tokenizer has no EOS, or plain text would become a special token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no eos_token; set one in its tokenizer_config.json")
    return (*_plain_ids(tokenizer, text), tokenizer.eos_token_id)


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    special = special_tokens(tokenizer)
    found = sorted(set(ids).intersection(special) - {tokenizer.unk_token_id})
    if found:
        names = ", ".join(special[id_] for id_ in found)
        raise UserError(
            f"the text {shorten(text)} becomes the special token(s) {names} under the tokenizer {tokenizer.name_or_path!r}"
        )
    return ids


def encode_pairs(
    pairs: PreferenceSet, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, max_response_tokens: int, drop: bool
) -> tuple[PairStore, tuple[DroppedRow, ...]]:
    """Every pair as token ids; each is put away in the store as soon as it is encoded.

    Args:
        pairs: the pairs.
        tokenizer: the model's.
        max_prompt_tokens: a longer prompt does not fit.
        max_response_tokens: a longer chosen or rejected response (EOS included) does not fit.
        drop: leave out pairs that do not fit, and list them, instead of stopping.

    Returns:
        The pairs that fit, in order, with their margin and smoothing where there are such columns; and those that were left
        out, among them (whatever ``drop`` says) the rows whose column ``keep`` is False.

    Raises:
        UserError: if a pair does not fit and ``drop`` is False, or if none fits.
    """
    fitting = PairStoreBuilder()
    bad: list[DroppedRow] = []
    denoised: list[DroppedRow] = []
    columns = ("id", "prompt", "chosen", "rejected", "domain")
    extra = [name for name in ("keep", "margin", "smoothing") if name in pairs.rows.column_names]
    for row in pairs.rows.select_columns([*columns, *extra]):
        if "keep" in row and row["keep"] is False:
            denoised.append(DroppedRow(f"pair {row['id']}", LEFT_OUT))
            continue
        prompt = encode_prompt(tokenizer, row["prompt"], pairs.templated)
        chosen, rejected = (encode_response(tokenizer, row[side]) for side in ("chosen", "rejected"))
        reason, detail = "", ""
        if len(prompt) > max_prompt_tokens:
            reason, detail = "prompt too long", f"{len(prompt)} tokens, limit {max_prompt_tokens}"
        elif max(len(chosen), len(rejected)) > max_response_tokens:
            reason = "response too long"
            detail = f"{len(chosen)} and {len(rejected)} tokens, limit {max_response_tokens}"
        elif chosen == rejected:
            reason, detail = "chosen and rejected have the same tokens", shorten(row["chosen"])
        margin, smoothing = (row[name] if name in row else 0.0 for name in ("margin", "smoothing"))
        if not _is_number(margin):
            reason, detail = "margin is not a finite number", shorten(margin)
        elif not _is_number(smoothing) or not 0 <= smoothing <= 1:
            reason, detail = "smoothing is not a number from 0 to 1", shorten(smoothing)
        if reason:
            bad.append(DroppedRow(f"pair {row['id']}", reason, detail))
        else:
            fitting.add(Pair(row["id"], prompt, chosen, rejected, row["domain"], float(margin), float(smoothing)))
    _check_left(pairs.source, bad, len(pairs), len(fitting), columns, drop)
    return fitting.build(), (*denoised, *bad)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def encode_prompts(
    prompts: PromptSet, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, drop: bool
) -> tuple[list[Prompt], tuple[DroppedRow, ...]]:
    """Every distinct prompt as token ids; ``PreferenceSet.prompts()`` gives those of preference pairs.

    Args:
        prompts: the prompts.
        tokenizer: the policy's.
        max_prompt_tokens: a longer prompt does not fit.
        drop: leave out prompts that do not fit, and list them, instead of stopping.

    Returns:
        The prompts that fit, in order, and those that were left out.

    Raises:
        UserError: if a prompt does not fit and ``drop`` is False, or if none fits.
    """
    fitting: list[Prompt] = []
    bad: list[DroppedRow] = []
    columns = ("id", "prompt", "domain")
    for row in prompts.rows.select_columns(list(columns)):
        ids = encode_prompt(tokenizer, row["prompt"], prompts.templated)
        if len(ids) > max_prompt_tokens:
            detail = f"{len(ids)} tokens, limit {max_prompt_tokens}: {shorten(row['prompt'])}"
            bad.append(DroppedRow(f"prompt {row['id']}", "prompt too long", detail))
        else:
            fitting.append(Prompt(row["id"], row["prompt"], ids, row["domain"]))
    _check_left(prompts.source, bad, len(prompts), len(fitting), columns, drop)
    return fitting, tuple(bad)


def _check_left(source: str, bad: list[DroppedRow], total: int, left: int, columns: tuple[str, ...], drop: bool) -> None:
    if bad and not drop:
        raise refuse(source, bad, total, columns)
    if not left:
        first = f"; first: {bad[0].where}: {bad[0].reason}: {bad[0].detail}" if bad else ""
        raise UserError(f"{source}: no row is left of {total}{first}. Raise data.max_prompt_tokens or data.max_response_tokens")
