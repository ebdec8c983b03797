"""Two models that are compared: checked from their files first, then each asked for one response to every prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.best_directory import FOLDER as BEST
from cluster.console import Console
from cluster.judges import digest_of
from cluster.seeds import derive
from cluster.signals import obey_termination
from preferences.models import check_model_directory, read_tokenizer
from preferences.sources import shorten
from tokens.durable import write_file
from tokens.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 32
"""Prompts that are answered and written down together, from a seed of their own: what is there is not sampled again."""
LEDGER = "ledger.json"
Letter = Literal["A", "B"]


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        seed: of both models, so that they differ by their weights alone.
        temperature: 0 takes the likeliest token each time.
        max_new_tokens: longest response.
    """

    seed: int
    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class Response:
    """One response.

    Args:
        prompt_id: of its prompt.
        text: without special tokens; may be empty.
        num_tokens: with EOS.
        finished: False if it was cut at ``max_new_tokens``.
    """

    prompt_id: str
    text: str
    num_tokens: int
    finished: bool


@dataclass(frozen=True)
class Contestant:
    """One of the two models.

    Args:
        letter: which.
        path: its directory.
        tokenizer: its own; the two may differ, since judges read text.
        context_length: None where its config does not say.
        digest: SHA-256 of config, tokenizer and weights.
        run: directory of the run that made it; None where that cannot be seen.
    """

    letter: Letter
    path: Path
    tokenizer: Any
    context_length: int | None
    digest: str
    run: Path | None


def open_contestant(letter: Letter, path: Path) -> Contestant:
    """Check a model directory; no weights are read but for their digest.

    Args:
        letter: which of the two.
        path: of the directory.

    Raises:
        UserError: if it is none, or no language model.
    """
    from rm.checkpoints import check_language_model

    path = path.expanduser()
    if (path / LEDGER).is_file():
        rounds = sorted(folder.name for folder in path.glob("rounds/round_*"))
        which = f"{path}/rounds/{rounds[-1]}/policy" if rounds else "it has no round yet"
        best = f"its best policy, {path / BEST}, or " if (path / BEST).is_dir() else ""
        raise UserError(f"{letter}: {path} is a whole run, expected a model directory: name {best}one of its rounds, as {which}")
    try:
        directory = check_model_directory(path)
        check_language_model(path)
    except UserError as error:
        raise UserError(f"{letter}: {error}") from error
    run = next((parent for parent in path.resolve().parents if (parent / LEDGER).is_file()), None)
    return Contestant(letter, path, read_tokenizer(path), directory.context_length, digest_of(path), run)


def encode(one: Contestant, texts: Sequence[str], templated: bool, max_new_tokens: int) -> list[tuple[int, ...]]:
    """Prompts as a model's ids.

    Args:
        one: the model.
        texts: the prompts.
        templated: whether its chat template rendered them.
        max_new_tokens: room to leave for the response.

    Raises:
        UserError: if one is too long for it, or it knows a word of none of them.
    """
    from preferences.encode import encode_prompt

    rows = [encode_prompt(one.tokenizer, text, templated) for text in texts]
    longest = max(range(len(rows)), key=lambda index: len(rows[index]))
    if one.context_length is not None and len(rows[longest]) + max_new_tokens > one.context_length:
        raise UserError(
            f"{one.letter}: {one.path} reads {one.context_length} tokens, and the prompt {shorten(texts[longest])} with its "
            f"response may take {len(rows[longest])} + {max_new_tokens}: lower --max-new-tokens, or leave the prompt out"
        )
    unknown = one.tokenizer.unk_token_id
    if unknown is not None and all(unknown in row for row in rows):
        raise UserError(
            f"{one.letter}: the tokenizer of {one.path} has no token for a part of every prompt, as {shorten(texts[0])}: it is "
            "another language than the model's. Give prompts that it was trained on"
        )
    return rows


def sample(
    one: Contestant, ids: Sequence[str], prompts: Sequence[tuple[int, ...]], sampling: Sampling, file: Path, console: Console
) -> list[Response]:
    """One response to each prompt, by transformers' ``generate``; each chunk is written down when it is there.

    Args:
        one: the model; read only if a response is missing.
        ids: of the prompts.
        prompts: as the model's ids.
        sampling: how.
        file: where responses are kept, and earlier ones found.
        console: shows how far it is.

    Returns:
        The responses, in the prompts' order: the same whether or not an earlier call was cut off.

    Raises:
        UserError: if the model gives numbers that nothing can be sampled from.
    """
    there = _read(file, ids)
    there = there if len(there) == len(ids) else there[: len(there) - len(there) % CHUNK]
    if len(there) < len(ids):
        write_file(file, "".join(map(_line, there)))
        model = _load(one)
        with console.bar(f"responses of {one.letter}", "responses") as bar:
            for start in range(len(there), len(ids), CHUNK):
                chunk = _draw(one, model, ids[start : start + CHUNK], prompts[start : start + CHUNK], sampling, start)
                with file.open("a", encoding="utf-8") as stream:
                    stream.write("".join(map(_line, chunk)))
                there += chunk
                bar.update(len(there), len(ids))
                obey_termination()
    return there


def is_whole(file: Path, ids: Sequence[str]) -> bool:
    """Whether every prompt has its response.

    Args:
        file: where responses are kept.
        ids: of the prompts.
    """
    return len(_read(file, ids)) == len(ids)


def _line(response: Response) -> str:
    return json.dumps(asdict(response), ensure_ascii=False) + "\n"


def _read(file: Path, ids: Sequence[str]) -> list[Response]:
    """Responses of an earlier call, as far as they are whole and in order."""
    found: list[Response] = []
    with suppress(FileNotFoundError, ValueError, TypeError):
        for line in file.read_bytes().split(b"\n")[:-1]:  # the last one may end within a character
            response = Response(**json.loads(line))
            if len(found) == len(ids) or response.prompt_id != ids[len(found)]:
                break
            found.append(response)
    return found


def _draw(
    one: Contestant,
    model: PreTrainedModel,
    ids: Sequence[str],
    prompts: Sequence[tuple[int, ...]],
    sampling: Sampling,
    start: int,
) -> list[Response]:
    from policy.reference import draw_responses

    seed = derive(sampling.seed, "evaluate", start)
    try:
        drawn = draw_responses(model, prompts, 1, sampling.max_new_tokens, sampling.temperature, seed)
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise UserError(
            f"{one.letter}: {one.path} gives NaN or infinity for the next token: its weights are damaged, or too large for their "
            "type. Nothing of this chunk is kept"
        ) from error
    config: Any = model.generation_config
    texts = [one.tokenizer.decode(response, skip_special_tokens=True) for (response,) in drawn]
    return [
        Response(id_, text, len(response), response[-1] in config.eos_token_id)
        for id_, text, (response,) in zip(ids, texts, drawn, strict=True)
    ]


def _load(one: Contestant) -> PreTrainedModel:
    """On the GPU in bfloat16 if there is one, else in float32."""
    import torch
    from transformers import GenerationConfig
    from transformers.utils import logging

    from policy.library import load

    logging.disable_progress_bar()  # a bar for one small file
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = load(one.path, dtype).to(device).eval()  # type: ignore[arg-type]
    stored = model.generation_config.eos_token_id
    ends = {one.tokenizer.eos_token_id, *([stored] if isinstance(stored, int) else stored or [])}
    pad = one.tokenizer.eos_token_id if one.tokenizer.pad_token_id is None else one.tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=pad)
    return model
