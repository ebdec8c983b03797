"""What ``reward`` trains on and is measured on, as token ids of the model's own tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import RunConfig
from cluster.inputs import Source
from evaluation.records import MetaRow, read_rows
from tokens.errors import UserError
from tokens.records import Pair

if TYPE_CHECKING:
    from preferences.sets import PreferenceSet
    from rm.batches import Encoded

SAMPLES_FILE = "meta_rollouts.parquet"
OTHER_DOMAINS = "held_out"


@dataclass(frozen=True)
class RewardInputs:
    """What a reward model is made of.

    Args:
        pairs: D, after ``data.denoise``.
        validation: held-out pairs by the name of their set, "original" first; sets without pairs are left out.
        samples: S_k as recorded, prompt by prompt; none where it is not given.
        groups: S_k as ids: for each prompt its k (prompt ids, response ids), in the order of ``samples``.
        training: the pairs of D as text, with what was done to them.
        fingerprint: of the training pairs as they were given.
        pairs_sha256: see ``pairs_sha256``.
        dropped: rows left out, counted by reason.
        denoised: pairs counted by what ``data.denoise`` did; empty where it does nothing.
    """

    pairs: tuple[Pair, ...]
    validation: dict[str, tuple[Pair, ...]]
    samples: tuple[MetaRow, ...]
    groups: tuple[tuple[Encoded, ...], ...]
    training: PreferenceSet
    fingerprint: str
    pairs_sha256: str
    dropped: dict[str, int]
    denoised: dict[str, int]


def load_inputs(config: RunConfig, source: Source, strengths: str | None, samples: Sequence[MetaRow]) -> RewardInputs:
    """Everything that ``reward`` needs, once the source's recipe has been followed.

    Args:
        config: of the command.
        source: of the pairs.
        strengths: what ``data.denoise`` goes by; None where it does nothing.
        samples: as ``read_samples`` gave them.

    Returns:
        The inputs.

    Raises:
        UserError: if the strengths are of other pairs, or a pair or sample does not fit.
    """
    from preferences.denoise import count_actions
    from preferences.sets import count_reasons
    from rm.config import ORIGINAL

    train = source.training(strengths)
    given, held_out = source.preferences()
    pairs, dropped = source.encode_listing(train)
    sets, others = source.validation_sets(), source.other_domains()
    if others is not None:
        sets[OTHER_DOMAINS] = others
    validation = {}
    for name, pairs_of_set in sets.items():
        if len(pairs_of_set):
            validation[name], left_out = source.encode_listing(pairs_of_set)
            dropped = (*dropped, *(left_out if name == ORIGINAL else ()))  # the other sets are parts of it
    return RewardInputs(
        pairs=pairs,
        validation=validation,
        samples=tuple(samples),
        groups=_groups(config, source.tokenizer, samples, train.templated),
        training=train,
        fingerprint=given.fingerprint,
        pairs_sha256=pairs_sha256(source),
        dropped=count_reasons((*train.dropped, *held_out.dropped, *dropped)),
        denoised={} if strengths is None else count_actions(train),
    )


def pairs_sha256(source: Source) -> str:
    """SHA-256 of all that a reward model is made of and measured on, as it was given: texts of both splits, and the columns that
    count beside them.

    Args:
        source: of the pairs; they can be read already.
    """
    from preferences.denoise import KEEP, MARGIN, SMOOTHING
    from preferences.labels import LABEL, PUBLIC_LABEL

    digest = hashlib.sha256()
    for pairs in source.preferences():
        digest.update(pairs.digest((KEEP, MARGIN, SMOOTHING, LABEL, PUBLIC_LABEL)).encode())
    return digest.hexdigest()


def read_samples(config: RunConfig) -> tuple[MetaRow, ...]:
    """The recorded samples that ``meta.samples`` names, those of one prompt together.

    Args:
        config: of the command.

    Returns:
        The samples; none where it is null.

    Raises:
        UserError: if they are not there, cannot be read, or a prompt has other than k >= 2 responses.
    """
    if config.meta.samples is None:
        return ()
    path = Path(config.meta.samples).expanduser()
    path = path / SAMPLES_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"meta.samples: there is no file {path.absolute()}. Give the {SAMPLES_FILE} of a committed round, "
            "e.g. ~/rondo/runs/NAME/rounds/round_000"
        )
    try:
        rows = read_rows(path, MetaRow)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"meta.samples {path}: {error}") from error
    by_prompt: dict[str, list[MetaRow]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt_id, []).append(row)
    sizes = sorted({len(of_prompt) for of_prompt in by_prompt.values()})
    if len(sizes) != 1 or sizes[0] < 2:
        raise UserError(
            f"meta.samples {path}: MetaRM needs the same number k >= 2 of responses to every prompt, got {sizes or 'no row'}"
        )
    return tuple(row for of_prompt in by_prompt.values() for row in of_prompt)


def _groups(config: RunConfig, tokenizer: Any, samples: Sequence[MetaRow], templated: bool) -> tuple[tuple[Encoded, ...], ...]:
    from preferences.encode import encode_prompt

    limit = max(config.data.max_response_tokens, config.rollout.max_new_tokens)
    prompts: dict[str, tuple[int, ...]] = {}
    groups: dict[str, list[Encoded]] = {}
    for row in samples:
        if row.prompt_id not in prompts:
            prompts[row.prompt_id] = encode_prompt(tokenizer, row.prompt, templated)
        prompt, response = prompts[row.prompt_id], _response_ids(tokenizer, row)
        if len(prompt) > config.data.max_prompt_tokens or len(response) > limit:
            raise UserError(
                f"meta.samples: sample {row.prompt_id}/{row.sample} has {len(prompt)} + {len(response)} tokens, allowed are "
                f"data.max_prompt_tokens = {config.data.max_prompt_tokens} and the larger of data.max_response_tokens and "
                f"rollout.max_new_tokens = {limit}"
            )
        groups.setdefault(row.prompt_id, []).append((prompt, response))
    return tuple(tuple(group) for group in groups.values())


def _response_ids(tokenizer: Any, row: MetaRow) -> tuple[int, ...]:
    """The recorded ids where they say the recorded text in our tokenizer too; else the text in our ids."""
    from preferences.encode import encode_response

    ids = list(row.token_ids)
    if max(ids) < len(tokenizer) and tokenizer.decode(ids, skip_special_tokens=True) == row.response:
        return row.token_ids
    encoded = encode_response(tokenizer, row.response)
    return encoded if row.finished or len(encoded) == 1 else encoded[:-1]
