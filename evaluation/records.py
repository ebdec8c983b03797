"""The Parquet files of a round: responses that were judged, what they are worth to whom, the rollouts of S_k, pairs of them that
somebody labelled, and those that PPO learns from.

Letters: N rows, M ensemble members, T response tokens.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tokens.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

PEOPLE = "people.parquet"
"""Of a round: a row for everybody whose reward is known."""


@dataclass(frozen=True)
class EvaluationRow:
    """One judged response.

    Args:
        prompt_id: unique in its file.
        prompt: the prompt as text.
        domain: or "".
        response: the response as text, special tokens left out.
        finished: True if it ended with EOS.
        num_tokens: its tokens, EOS included.
        gold: the sandbox's truth, None where there is none.
        proxy: score of r_k.
        ensemble_mean: mean of the members' scores.
        ensemble_std: their population standard deviation.
        member_scores: M scores.
        policy_logprob: log-probability of the response under the policy, nats, summed over its tokens.
        sft_logprob: likewise under the SFT policy.
        over_sft: what the judge says of it minus what it says of SFT's response to the same prompt; None in SFT's own rows, and
            in a file from before it was kept.
        held_out: mean of the held-out members' scores; None where there are none.
        held_out_std: their population standard deviation; None likewise.

    Raises:
        ValueError: if a number is not finite, there is no token, or no member.
    """

    prompt_id: str
    prompt: str
    domain: str
    response: str
    finished: bool
    num_tokens: int
    gold: float | None
    proxy: float
    ensemble_mean: float
    ensemble_std: float
    member_scores: tuple[float, ...]
    policy_logprob: float
    sft_logprob: float
    over_sft: float | None = None
    held_out: float | None = None
    held_out_std: float | None = None

    def __post_init__(self) -> None:
        if self.num_tokens < 1 or not self.member_scores:
            raise ValueError(
                f"evaluation of {self.prompt_id!r}: needs at least one token and one member score, "
                f"got {self.num_tokens} and {len(self.member_scores)}"
            )
        numbers = (self.proxy, self.ensemble_mean, self.ensemble_std, self.policy_logprob, self.sft_logprob, *self.member_scores)
        known = [value for value in (self.gold, self.over_sft, self.held_out, self.held_out_std) if value is not None]
        _all_finite(f"evaluation of {self.prompt_id!r}", (*numbers, *known))


@dataclass(frozen=True)
class MetaRow:
    """One rollout of S_k and what two reward models say of it.

    Args:
        prompt_id: k rows share it.
        prompt: the prompt as text.
        sample: index of the response among the k of its prompt.
        response: as text.
        token_ids: [T] ids of the response.
        sampler_logprobs: [T] log-probability of each id when it was drawn, nats.
        policy_version: version of the weights that drew it.
        finished: True if it ended with EOS.
        score_vanilla: score of a reward model trained without MetaRM, None where there is none.
        score_metarm: score of r_k. Both are normalised by their model's moments on SFT samples.
        members: [M] numbers of the ensemble's members; none in a file from before they were kept.
        member_scores: [M] score of each, normalised likewise.
        gold: the sandbox's truth, None where there is none or it was not kept.
        kept_back: True if its prompt is one that MetaRM's ascent never saw; False in a file from before that was kept.

    Raises:
        ValueError: if a number is not finite, ids and log-probabilities differ in number or are none, or members and their
            scores differ in number.
    """

    prompt_id: str
    prompt: str
    sample: int
    response: str
    token_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]
    policy_version: int
    finished: bool
    score_vanilla: float | None
    score_metarm: float
    members: tuple[int, ...] = ()
    member_scores: tuple[float, ...] = ()
    gold: float | None = None
    kept_back: bool = False

    def __post_init__(self) -> None:
        name = f"rollout {self.prompt_id}/{self.sample}"
        if not self.token_ids or len(self.token_ids) != len(self.sampler_logprobs):
            raise ValueError(f"{name}: {len(self.token_ids)} ids, {len(self.sampler_logprobs)} log-probs")
        if len(self.members) != len(self.member_scores):
            raise ValueError(f"{name}: {len(self.members)} members, {len(self.member_scores)} scores of members")
        known = [value for value in (self.score_vanilla, self.gold) if value is not None]
        _all_finite(name, (*self.sampler_logprobs, self.score_metarm, *self.member_scores, *known))


@dataclass(frozen=True)
class RolloutRow:
    """A rollout as it was sampled, whole enough to be learned from again.

    Args:
        sample_id: unique in its run.
        prompt_id: of the prompt.
        prompt: as text.
        domain: or "".
        prompt_ids: ids of the prompt.
        sample: index of the response among those of its prompt.
        response: as text.
        token_ids: [T] ids of the response.
        sampler_logprobs: [T] log-probability of each id when it was drawn, nats.
        policy_version: oldest version of the weights that had a part in it.
        finished: True if it ended with EOS.
        swap_tokens: response tokens at which newer weights took over.
        swap_versions: versions of these weights.
        engine: that sampled it.
    """

    sample_id: str
    prompt_id: str
    prompt: str
    domain: str
    prompt_ids: tuple[int, ...]
    sample: int
    response: str
    token_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]
    policy_version: int
    finished: bool
    swap_tokens: tuple[int, ...]
    swap_versions: tuple[int, ...]
    engine: str


@dataclass(frozen=True)
class PersonRow:
    """What a policy is worth to one person, beside the SFT policy's responses to the same prompts.

    Args:
        name: of the person.
        num_prompts: of the evaluation.
        score: mean of the person's reward, in standard deviations of it over the SFT policy's samples.
        gain: mean over the prompts of that minus the reward of SFT's response.
        low: lower end of the gain's 95% interval.
        high: upper end.
        gold: mean of the person's true reward; None where it is not known.
        gold_gain: the gain in it; None likewise.
        gold_low: lower end of its interval; None likewise.
        gold_high: upper end; None likewise.

    Raises:
        ValueError: if a number is not finite.
    """

    name: str
    num_prompts: int
    score: float
    gain: float
    low: float
    high: float
    gold: float | None
    gold_gain: float | None
    gold_low: float | None
    gold_high: float | None

    def __post_init__(self) -> None:
        given = (self.score, self.gain, self.low, self.high, self.gold, self.gold_gain, self.gold_low, self.gold_high)
        _all_finite(f"what {self.name!r} gains", [value for value in given if value is not None])


@dataclass(frozen=True)
class FreshRow:
    """Two samples of a round's policy that somebody compared: a preference pair, which every command reads as one.

    Args:
        id: unique in its run.
        prompt_id: of the prompt.
        prompt: as text.
        domain: or "".
        chosen: the better response, as text.
        rejected: the other.
        prompt_ids: ids of the prompt.
        chosen_ids: ids of the better response.
        rejected_ids: ids of the other.
        chosen_sample: index of the better response among the k of its prompt.
        rejected_sample: of the other.
        judge: who said so.
    """

    id: str
    prompt_id: str
    prompt: str
    domain: str
    chosen: str
    rejected: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    chosen_sample: int
    rejected_sample: int
    judge: str


Row = TypeVar("Row", EvaluationRow, MetaRow, RolloutRow, PersonRow, FreshRow)


def write_rows(path: Path, rows: Sequence[Row], kind: type[Row] | None = None) -> None:
    """Write rows of one kind to a zstd-compressed Parquet file, whole or not at all (a temporary file takes its name at the end).

    Source: the run directory's layout; the schema is ``_schema``.

    Args:
        path: the file; its directory exists.
        rows: N rows of one kind.
        kind: theirs; needed where there may be none.

    Raises:
        ValueError: if there are rows of two kinds, or none and no kind.
        OSError: if the disk refuses; nothing is left behind.

    Padding contract: token lists are stored without padding.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {type(row) for row in rows} or ({kind} if kind is not None else set())
    if len(kinds) != 1:
        raise ValueError(f"{path.name}: needs rows of one kind and at least one, got {len(rows)} of {len(kinds)} kinds")
    schema = _schema(kinds.pop())
    columns = [pa.array([row.__dict__[field.name] for row in rows], type=field.type) for field in schema]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), temporary, compression="zstd")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_rows(path: Path, kind: type[Row]) -> tuple[Row, ...]:
    """Read what ``write_rows`` wrote.

    Source: the run directory's layout; the schema is ``_schema``.

    Args:
        path: the file.
        kind: ``EvaluationRow``, ``MetaRow``, ``RolloutRow``, ``PersonRow`` or ``FreshRow``.

    Returns:
        N rows, in the order written; each has checked itself. A column that ``kind`` has a default for may be absent.

    Raises:
        UserError: if the file is missing, is no Parquet file, or lacks other columns of ``kind``.
        ValueError: if a row refuses its numbers.

    Padding contract: token lists come back without padding.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, defaults = _schema(kind), {field.name for field in fields(kind) if field.default is not MISSING}
    if not path.is_file():
        raise UserError(f"{path} is missing. It is written when a round is committed: has the run directory been copied whole?")
    try:
        with pq.ParquetFile(path) as file:
            found = set(file.schema_arrow.names)
            schema = pa.schema([field for field in schema if field.name in found or field.name not in defaults])
            missing = [name for name in schema.names if name not in found]
            if missing:
                raise UserError(f"{path} has no column {', '.join(missing)}; it has {', '.join(sorted(found))}")
            table = file.read(columns=schema.names).select(schema.names).cast(schema)
    except pa.ArrowException as error:
        raise UserError(f"{path} cannot be read as Parquet with the columns of a {kind.__name__}: {error}") from error
    lists = [field.name for field in schema if pa.types.is_list(field.type)]
    return tuple(kind(**(row | {name: tuple(row[name]) for name in lists})) for row in table.to_pylist())


def _schema(kind: type[EvaluationRow | MetaRow | RolloutRow | PersonRow | FreshRow]) -> "pa.Schema":
    """The Arrow schema of a kind of row: made of its annotations; only what may be None is nullable."""
    import pyarrow as pa

    arrow: dict[object, pa.DataType] = {
        str: pa.string(),
        bool: pa.bool_(),
        int: pa.int64(),
        float: pa.float64(),
        float | None: pa.float64(),
        tuple[int, ...]: pa.list_(pa.int64()),
        tuple[float, ...]: pa.list_(pa.float64()),
    }
    return pa.schema(
        [pa.field(f.name, arrow[f.type], nullable=f.type == float | None) for f in fields(kind)]
    )  # types, not strings


def _all_finite(name: str, values: Sequence[float]) -> None:
    bad = [value for value in values if not math.isfinite(value)]
    if bad:
        raise ValueError(f"{name}: {len(bad)} of its numbers are not finite, the first is {bad[0]}")
