"""Pairs to ask a person about: two responses to a prompt, of which nobody has said which is better."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from preferences.sources import shorten
from tokens.errors import UserError

POOL = "pool.jsonl"
"""Inside a feature model's directory: what it was trained on, without who preferred what."""
SHAPE = 'expected a JSON object a line: {"prompt": "...", "a": "...", "b": "..."}'


@dataclass(frozen=True)
class PoolPair:
    """Two responses to a prompt."""

    prompt: str
    a: str
    b: str


def pair_key(prompt: str, one: str, other: str) -> tuple[str, frozenset[str]]:
    """What equal pairs share, whichever response comes first.

    Args:
        prompt: of the pair.
        one: a response.
        other: the other one.
    """
    return prompt, frozenset((one, other))


def pool_of(rows: Iterable[Mapping[str, str]], number: int) -> tuple[PoolPair, ...]:
    """Some of the pairs that people judged, without what they said: the responses stand in the order of the alphabet.

    Args:
        rows: with prompt, chosen and rejected.
        number: of pairs at most; those with the smallest SHA-256 of their texts.

    Returns:
        Different pairs, in the order of that hash.
    """
    pairs = {PoolPair(row["prompt"], *sorted((row["chosen"], row["rejected"]))) for row in rows}
    return tuple(sorted(pairs, key=lambda pair: hashlib.sha256(_line(pair).encode()).digest())[:number])


def pool_text(pairs: Iterable[PoolPair]) -> str:
    """The content of a file that ``read_pool`` reads.

    Args:
        pairs: to write.
    """
    return "".join(f"{_line(pair)}\n" for pair in pairs)


def _line(pair: PoolPair) -> str:
    return json.dumps(vars(pair))


def read_pool(path: Path) -> tuple[PoolPair, ...]:
    """Pairs to ask about: lines {"prompt", "a", "b"}.

    Args:
        path: of the file.

    Returns:
        At least one pair; of pairs with equal texts, in either order, the first.

    Raises:
        UserError: naming file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the pairs to ask about, {path}, cannot be read ({error}): name others with --pairs, {SHAPE}") from error
    pairs: dict[tuple[str, frozenset[str]], PoolPair] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            pair = _pair(line, f"{path}, line {number}")
            if pair.a != pair.b:
                pairs.setdefault(pair_key(pair.prompt, pair.a, pair.b), pair)
    if not pairs:
        raise UserError(f"{path} holds no pair of two different responses: {SHAPE}")
    return tuple(pairs.values())


def _pair(line: str, where: str) -> PoolPair:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no JSON ({error}): {SHAPE}") from error
    if not isinstance(row, dict) or not {"prompt", "a", "b"} <= row.keys():
        raise UserError(f"{where}: got {shorten(line)}, {SHAPE}")
    texts = [row[key] for key in ("prompt", "a", "b")]
    if not all(isinstance(text, str) and text.strip() and _is_unicode(text) for text in texts):
        raise UserError(f"{where}: prompt, a and b must be texts that are not empty, got {shorten(line)}")
    return PoolPair(*texts)


def _is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, which JSON can spell and no tokenizer reads."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
