"""``python -m cluster ask``: asks one person which of two responses they prefer, and keeps their profile up to date.

Letters: N pairs of the pool, d reward features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from cluster.ask_page import AskServer
from cluster.ask_terminal import ask_in_terminal, sure
from cluster.console import Console
from cluster.interview import Given, Interview, Pool, PoolPair, signed
from preferences.encode import encode_prompt, encode_response
from preferences.raters import read_answers
from rm.asking import By, updated
from rm.batches import Encoded
from rm.features import BACKBONE, FeatureModel, fingerprint
from rm.features_config import Towards
from rm.person import Person, fit_person
from rm.profiles import Profile, read_profile
from tokens.durable import write_file
from tokens.errors import UserError
from tokens.paths import check_name, printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POOL = "pool.jsonl"
"""Inside a feature model's directory: pairs to ask about."""
BATCH = 32
"""Sequences of one forward pass."""


@dataclass(frozen=True)
class Asking:
    """What `ask` was told.

    Args:
        model: directory of the feature model.
        name: of the person.
        profile: file that holds theirs, or will.
        by: the way to choose the next pair.
        pairs: file of pairs to ask about; None = the model's own pool.
        answers: file that keeps the answers; None = they are not kept.
        l2: of a new profile.
        towards: of a new profile.
        seed: of the choice and of which response stands first.
    """

    model: Path
    name: str
    profile: Path
    by: By
    pairs: Path | None
    answers: Path | None
    l2: float
    towards: Towards
    seed: int


def ask(asking: Asking, terminal: bool, port: int, console: Console) -> Path:
    """Ask until the person is done; the same command again goes on.

    Args:
        asking: whom, about what.
        terminal: True asks on the terminal, False on a page.
        port: of the page; 0 = any free one.
        console: to say and ask on.

    Returns:
        The profile's file.

    Raises:
        UserError: if an input is wrong, or the port is taken.
    """
    interview = prepare(asking, console)
    console.say(f"[bold]{asking.name}[/]: {sure(interview)}")
    if terminal:
        ask_in_terminal(interview, console)
    else:
        kept = (
            "Your answers are not kept, only the profile is."
            if asking.answers is None
            else f"Answers are kept in {asking.answers}."
        )
        with AskServer(interview, asking.name, str(asking.profile), kept, port) as server:
            console.say(f"Open {server.link} in a browser on this machine. Ctrl-C stops; every answer is in the profile at once.")
            server.serve_forever()
    console.say(f"{sure(interview)}: {asking.profile}")
    return asking.profile


def prepare(asking: Asking, console: Console) -> Interview:
    """Read everything, compute the pool's features, and begin or go on.

    Args:
        asking: whom, about what.
        console: to show progress on.

    Raises:
        UserError: if an input is wrong.
    """
    if not (math.isfinite(asking.l2) and asking.l2 > 0):
        raise UserError(f"--l2 must be a number above 0, got {asking.l2}: without it weights of separable answers are infinite")
    mark = fingerprint(asking.model)
    pairs = read_pool(asking.model / POOL if asking.pairs is None else asking.pairs)
    before = read_profile(asking.profile, model=mark) if asking.profile.exists() else None
    kept = _Kept.read(asking.answers, mark, before) if asking.answers is not None else None
    asking.profile.parent.mkdir(parents=True, exist_ok=True)
    model = FeatureModel.load(asking.model, torch.float32)
    if before is not None and before.d != model.d:
        raise UserError(f"{asking.profile} is a profile of d = {before.d}, got a model of d = {model.d}: expected one")
    encoder = _Encoder(model, asking.model)
    with console.bar("features of the pool", "pairs") as bar:
        pool = Pool(pairs, encoder.differences([(pair.prompt, pair.a, pair.b) for pair in pairs]))
        bar.update(len(pairs), len(pairs))
    l2, towards = (asking.l2, asking.towards) if before is None else (before.l2, before.towards)
    w0 = model.mean_weights.double() if towards == "mean" else torch.zeros(model.d, dtype=torch.float64)
    old = encoder.differences(kept.texts) if kept is not None else pool.differences[:0]
    earlier = len(old) if before is None or kept is not None else before.num_answers

    def fit(differences: Tensor) -> Person:
        if before is None or kept is not None:
            return fit_person(torch.cat([old, differences]), l2, w0)
        return updated(before.person, differences)

    def keep(person: Person, given: Sequence[Given]) -> None:
        if kept is not None:
            kept.write([_answer(pool, each) for each in given if each.preferred is not None], mark)
        profile = Profile(asking.name, person, mark, earlier + len(signed(pool, given)), l2, towards)
        write_file(asking.profile, profile.text())

    return Interview(pool, _asked(pairs, kept), fit, asking.by, asking.seed, earlier, keep)


def default_profile(model: Path, name: str) -> Path:
    """Where a person's profile is, if nobody says otherwise.

    Args:
        model: directory of the feature model.
        name: of the person.

    Raises:
        UserError: if the name cannot be a file's.
    """
    check_name(name)
    if "/" in name or name.startswith("."):
        raise UserError(f"--name {name!a} cannot be the name of a file: leave out / and a leading dot, or give --profile")
    return model / "profiles" / f"{name}.json"


def read_pool(path: Path) -> tuple[PoolPair, ...]:
    """Pairs to ask about: lines {"prompt", "a", "b"}.

    Args:
        path: of the file.

    Returns:
        At least one pair; of pairs with equal texts, in either order, the first.

    Raises:
        UserError: naming file and line.
    """
    shape = 'expected a JSON object a line: {"prompt": "...", "a": "...", "b": "..."}'
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the pool of pairs {path} cannot be read ({error}): name another with --pairs, {shape}") from error
    pairs: dict[tuple[str, frozenset[str]], PoolPair] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: no JSON ({error}): {shape}") from error
        if not isinstance(row, dict) or not {"prompt", "a", "b"} <= row.keys():
            raise UserError(f"{path}, line {number}: got {printable(line)[:80]!a}, {shape}")
        texts = [row[key] for key in ("prompt", "a", "b")]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"{path}, line {number}: prompt, a and b must be texts that are not empty: {shape}")
        pair = PoolPair(*texts)
        if pair.a != pair.b:
            pairs.setdefault(_key(pair.prompt, pair.a, pair.b), pair)
    if not pairs:
        raise UserError(f"{path} holds no pair of two different responses: {shape}")
    return tuple(pairs.values())


def _key(prompt: str, one: str, other: str) -> tuple[str, frozenset[str]]:
    return prompt, frozenset((one, other))


def _asked(pairs: Sequence[PoolPair], kept: _Kept | None) -> Tensor:
    answered = set() if kept is None else {_key(*texts) for texts in kept.texts}
    return torch.tensor([_key(pair.prompt, pair.a, pair.b) in answered for pair in pairs])


def _answer(pool: Pool, given: Given) -> tuple[str, str, str]:
    """Prompt, chosen and rejected."""
    pair = pool.pairs[given.pair]
    return (pair.prompt, pair.a, pair.b) if given.preferred == "a" else (pair.prompt, pair.b, pair.a)


@dataclass(frozen=True)
class _Kept:
    """The file of answers, where the person wants one.

    Args:
        path: of it.
        lines: that it held at the beginning.
        texts: prompt, chosen and rejected of each.
    """

    path: Path
    lines: tuple[str, ...]
    texts: tuple[tuple[str, str, str], ...]

    @classmethod
    def read(cls, path: Path, mark: str, before: Profile | None) -> _Kept:
        """What is in it; it must hold what the profile was fitted to.

        Raises:
            UserError: if it does not, or belongs to another model.
        """
        if path.suffix != ".jsonl":
            raise UserError(f"--answers {path}: expected a name that ends in .jsonl")
        lines: tuple[str, ...] = ()
        texts: tuple[tuple[str, str, str], ...] = ()
        if path.exists() and path.stat().st_size:
            answers = read_answers(path)
            answers.check_model(mark)
            lines = tuple(line for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
            texts = tuple((row["prompt"], row["chosen"], row["rejected"]) for row in answers.pairs.rows)
        if before is not None and before.num_answers > len(texts):
            raise UserError(
                f"{path} holds {len(texts)} answers, and the profile was fitted to {before.num_answers}, some of which were not "
                "kept. Go on without --answers, or remove the profile to begin again"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        return cls(path, lines, texts)

    def write(self, added: Sequence[tuple[str, str, str]], mark: str) -> None:
        """What was there, and what came."""
        keys = ("prompt", "chosen", "rejected", "model")
        new = [json.dumps(dict(zip(keys, (*texts, mark), strict=True)), ensure_ascii=False) for texts in added]
        write_file(self.path, "".join(f"{line}\n" for line in (*self.lines, *new)))


class _Encoder:
    """phi of texts, each computed once."""

    def __init__(self, model: FeatureModel, directory: Path) -> None:
        from transformers import AutoTokenizer

        self._model = model
        self._tokenizer = cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(directory / BACKBONE))

    def differences(self, texts: Sequence[tuple[str, str, str]]) -> Tensor:
        """phi(prompt, first) - phi(prompt, second), [N, d] float64."""
        sides = [self._encoded(prompt, side) for prompt, *both in texts for side in both]
        distinct = list(dict.fromkeys(sides))
        place = {sequence: index for index, sequence in enumerate(distinct)}
        features = self._model.features(distinct, BATCH, int(self._tokenizer.pad_token_id)).double()
        first, second = features[[place[side] for side in sides]].reshape(len(texts), 2, self._model.d).unbind(1)
        return first - second

    def _encoded(self, prompt: str, response: str) -> Encoded:
        return encode_prompt(self._tokenizer, prompt), encode_response(self._tokenizer, response)
