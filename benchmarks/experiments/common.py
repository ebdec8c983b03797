"""What the experiments share: a small world with a known truth, fits on its pairs, paired differences, resumable results.

Everything runs in this process (no Ray), on one thread; a second worker is a second process.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from cluster.config import RunConfig
from cluster.load_config import load_config
from cluster.seeds import derive
from cluster.storage import storage_root
from evaluation.compare import mean_interval
from rm.batches import Encoded, pair_sequences, score_sequences
from rm.config import MetaConfig, RewardConfig
from rm.losses import bradley_terry_loss, calibration_error, pair_accuracy
from rm.model import RewardModel
from rm.records import RewardFit
from rm.training import fit_reward_model
from sandbox.world import Split, World
from tokens.durable import commit_directory
from tokens.records import Pair, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from sandbox.build import WorldFiles

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
RECIPE = ROOT / "configs" / "experiments.yaml"
CALIBRATION_BINS = 10
_Job = TypeVar("_Job")
_Row = dict[str, Any]


@dataclass(frozen=True)
class KnownPair:
    """A pair and the truth about it.

    Args:
        pair: as the reward model sees it.
        gold_chosen: gold reward of the chosen response.
        gold_rejected: of the other.
        flipped: the annotator's answer was turned round.
    """

    pair: Pair
    gold_chosen: float
    gold_rejected: float
    flipped: bool

    @property
    def wrong(self) -> bool:
        """The label contradicts gold: it was flipped, or the annotator erred, or both in a way that does not cancel."""
        return self.gold_chosen < self.gold_rejected

    def swapped(self) -> KnownPair:
        """The same pair with the other response chosen."""
        pair = replace(self.pair, chosen_ids=self.pair.rejected_ids, rejected_ids=self.pair.chosen_ids)
        return KnownPair(pair, self.gold_rejected, self.gold_chosen, not self.flipped)


@dataclass(frozen=True)
class Lab:
    """A built world: its files, its truth, its tokenizer.

    Args:
        config: the recipe.
        files: of the world, in the cache of the storage root.
    """

    config: RunConfig
    files: WorldFiles

    @cached_property
    def world(self) -> World:
        return World(self.config.world)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        from transformers import AutoTokenizer

        return cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(self.files.sft_dir))

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def cache(self) -> Path:
        """A directory for what an experiment makes once from this world."""
        return self.files.root.parent / f"{self.files.root.name}-experiments"

    def pairs(self, split: str) -> list[KnownPair]:
        """train (labels of a noisy annotator), validation or validation_held_out (labels are the truth)."""
        from preferences.encode import encode_prompt, encode_response

        return [
            KnownPair(
                Pair(
                    row.id,
                    encode_prompt(self.tokenizer, row.prompt),
                    encode_response(self.tokenizer, row.chosen),
                    encode_response(self.tokenizer, row.rejected),
                    row.domain,
                ),
                row.gold_chosen,
                row.gold_rejected,
                row.flipped,
            )
            for row in self.files.pairs(split)
        ]

    def prompts(self, split: Split) -> list[Prompt]:
        """The prompts of the domains that have preference pairs."""
        from preferences.encode import encode_prompt

        return [
            Prompt(row.id, row.text, encode_prompt(self.tokenizer, row.text), row.domain)
            for row in self.world.prompts(split)
            if row.domain in self.world.train_domains
        ]


def open_lab(recipe: Path = RECIPE, overrides: Sequence[str] = ()) -> Lab:
    """Build the recipe's world and its SFT policy, or find them in the cache.

    Args:
        recipe: a YAML file.
        overrides: as on the command line of ``python -m cluster run``.
    """
    config = load_config(recipe, overrides)
    from policy.sft import fit_language_model
    from sandbox.build import build

    cache = storage_root(config) / "cache"
    return Lab(config, build(config.world, config.sft, cache, fit_language_model, lambda phase, done, total: None))


def relabelled(pairs: Sequence[KnownPair], flip_rate: float, seed: int) -> list[KnownPair]:
    """The annotator's answers with exactly ``flip_rate`` of them turned round; which ones is the seed's.

    Args:
        pairs: whose stored flips are undone first.
        flip_rate: share, in [0, 1].
        seed: of the choice.
    """
    answered = [pair.swapped() if pair.flipped else pair for pair in pairs]
    flips = set(random.Random(derive(seed, "flips")).sample(range(len(pairs)), round(flip_rate * len(pairs))))
    return [pair.swapped() if index in flips else pair for index, pair in enumerate(answered)]


def of_width(lab: Lab, hidden_size: int) -> Path:
    """A language model of another width, trained on the same texts with the same settings; made once."""
    shape = lab.config.sft.shape
    if hidden_size == shape.hidden_size:
        return lab.files.sft_dir
    root = lab.cache / f"sft-{hidden_size}"
    if not root.is_dir():
        from policy.sft import fit_language_model

        eos = [lab.tokenizer.eos_token_id]
        examples = [
            ([lab.tokenizer.bos_token_id, *prompt], response + eos)
            for prompt, response in (lab.tokenizer(list(text), add_special_tokens=False).input_ids for text in lab.world.corpus())
        ]
        scaled = {"hidden_size": hidden_size, "intermediate_size": shape.intermediate_size * hidden_size // shape.hidden_size}
        config = lab.config.sft.model_copy(update={"shape": shape.model_copy(update=scaled)})
        partial = root.with_name(f".{root.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        fit_language_model(examples, lab.tokenizer, partial, config, lab.config.world.seed)
        commit_directory(partial, root)
    return root


def drawn(rows: Sequence[Any], number: int, seed: int, name: str) -> list[Any]:
    """``number`` of the rows, in an order of the seed's own; all of them where there are no more."""
    return random.Random(derive(seed, name)).sample(list(rows), min(number, len(rows)))


def fit(
    lab: Lab,
    pairs: Sequence[Pair],
    seed: int,
    reward: RewardConfig | None = None,
    meta: MetaConfig | None = None,
    groups: Sequence[Sequence[Encoded]] | None = None,
    base: Path | None = None,
) -> tuple[RewardModel, RewardFit]:
    """A reward model on pairs, from the lab's SFT model under the seed's head; equal seeds see the pairs in one order.

    Args:
        lab: gives the start, the tokenizer and the defaults.
        pairs: D.
        seed: of head and order.
        reward: instead of the recipe's.
        meta: instead of the recipe's; only counts with ``groups``.
        groups: S_k; None = vanilla.
        base: a language model to start from instead of the lab's SFT model.
    """
    reward, meta = reward or lab.config.reward, meta or lab.config.meta
    model = RewardModel.from_language_model(
        base or lab.files.sft_dir, pooling=reward.pooling, seed=derive(seed, "head"), dtype=torch.float32, pad_id=lab.pad_id
    )
    report = fit_reward_model(model, pairs, groups, reward, meta, derive(seed, "order"), lab.pad_id, lambda step: None)
    return model, report


@dataclass(frozen=True)
class CleanScores:
    """A reward model on pairs whose labels are the truth.

    Args:
        accuracy: share ranked as gold does; a tie counts one half.
        loss: Bradley-Terry loss, nats per pair.
        calibration_error: expected, of sigma(|difference|) as the probability of being right, in ten bins of equal width.
        scale: population standard deviation of all scores.
    """

    accuracy: float
    loss: float
    calibration_error: float
    scale: float


def clean_scores(lab: Lab, model: RewardModel, pairs: Sequence[KnownPair]) -> CleanScores:
    """Accuracy, loss and calibration against the truth."""
    scores = score_sequences(model, pair_sequences([pair.pair for pair in pairs]), 256, lab.pad_id).double()
    chosen, rejected = scores.chunk(2)
    margin = (chosen - rejected) * torch.tensor([pair.gold_chosen - pair.gold_rejected for pair in pairs]).sign()
    zero = torch.zeros_like(margin)
    return CleanScores(
        accuracy=float(pair_accuracy(margin, zero)),
        loss=float(bradley_terry_loss(margin, zero, len(pairs))),
        calibration_error=calibration_error(margin, zero, CALIBRATION_BINS).expected_error,
        scale=float(scores.std(correction=0)),
    )


class Results:
    """Rows of an experiment in a JSON-lines file; what is there is not computed again.

    Args:
        path: of the file.
        key: names of the columns that say which job a row belongs to.
    """

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        self.path, self.key = path, tuple(key)

    def rows(self) -> list[_Row]:
        """All rows; of two with one key, the later."""
        return list({self.key_of(row): row for row in rows_of(self.path)}.values())

    def key_of(self, row: Mapping[str, Any]) -> tuple[Hashable, ...]:
        return tuple(row[name] for name in self.key)

    def missing(self, jobs: Sequence[_Job], key: Callable[[_Job], tuple[Hashable, ...]]) -> list[_Job]:
        """The jobs without a row."""
        done = {self.key_of(row) for row in self.rows()}
        return [job for job in jobs if key(job) not in done]

    def append(self, row: Mapping[str, Any]) -> None:
        """One line, written at once."""
        append_row(self.path, row)


def rows_of(path: Path) -> list[_Row]:
    """The rows of a JSON-lines file; a last line that was cut short as it was written is none.

    Args:
        path: of the file, which need not be there.
    """
    return [json.loads(line) for line in _whole(path).splitlines()]


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Write a line at the end of a file, over one that was cut short.

    Args:
        path: of the file.
        row: to be written as JSON.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and len(whole := _whole(path).encode()) < path.stat().st_size:
        os.truncate(path, len(whole))
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(row)) + "\n")


def _whole(path: Path) -> str:
    """The lines that have an end."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text[: text.rfind("\n") + 1]


def run_jobs(function: Callable[[_Job], list[_Row]], jobs: Sequence[_Job], workers: int) -> Iterator[list[_Row]]:
    """The rows of every job as they come; each worker is a fresh process with one thread.

    Args:
        function: at the top of a module, so that another process can find it.
        jobs: in the order in which they should begin.
        workers: 1 = in this process.
    """
    if workers <= 1:
        single_thread()
        for job in jobs:
            yield function(job)
        return
    with multiprocessing.get_context("spawn").Pool(workers, initializer=single_thread) as pool:
        yield from pool.imap_unordered(function, jobs)


def single_thread() -> None:
    """Two processes of one thread get more done here than one of two; and no bars for models of a megabyte."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)


def paired(rows: Sequence[Mapping[str, Any]], outcome: str, arm: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[float]:
    """arm - baseline of one outcome, seed by seed, over the seeds that have both.

    Args:
        rows: of the results, each with a ``seed``.
        outcome: the column.
        arm: columns and the values that they must have.
        baseline: likewise.
    """
    theirs = by_seed(rows, outcome, baseline)
    ours = by_seed(rows, outcome, arm)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def by_seed(rows: Sequence[Mapping[str, Any]], outcome: str, which: Mapping[str, Any]) -> dict[int, float]:
    """One outcome of the rows whose columns have the given values, by seed."""
    matching = [row for row in rows if all(row[name] == value for name, value in which.items())]
    return {row["seed"]: row[outcome] for row in matching if row[outcome] is not None}


def interval_text(values: Sequence[float], digits: int = 3) -> str:
    """Mean with its 95% t-interval over seeds, bold where the interval leaves zero out."""
    if len(values) < 2:
        return "-"
    mean, low, high = mean_interval(values)
    text = f"{mean:+.{digits}f} ± {high - mean:.{digits}f}"
    return f"**{text}**" if low > 0 or high < 0 else text


def level(values: Sequence[float], digits: int = 3) -> str:
    """Mean with its 95% t-interval over seeds."""
    if len(values) < 2:
        return "-"
    mean, _, high = mean_interval(values)
    return f"{mean:.{digits}f} ± {high - mean:.{digits}f}"
