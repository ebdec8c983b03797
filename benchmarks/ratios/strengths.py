"""C10: all pairs scored by all members of a strength ensemble: Ray Data's pool of processes against a plain loop.

The loop runs in this process: it reads the same file part by part, encodes, and has transformers score with one member after
another, in batches of like lengths, with all threads; the pool has as many processes, of one thread each. Its time is from the
first call to the last part, the start of its processes included.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

from actors.config import ResourcesConfig, Share
from actors.strength_scorer import ScoringJob
from benchmarks.ratios.engines import local_ray
from benchmarks.ratios.frame import of_all_processes, take_turns
from benchmarks.ratios.many_strengths import measure_memory
from benchmarks.ratios.rows import Row, Settings, row
from benchmarks.ratios.scenery import plain_scores
from benchmarks.strength_memory import WORDS, make_up
from cluster.config import RunConfig
from cluster.console import Console
from cluster.strength_parts import NUMBER, plan_parts, write_texts
from cluster.strength_scores import stream
from cluster.tasks import setup_of
from preferences.config import DataConfig
from rm.model import RewardModel

BATCH, PART, TURNS = 64, 500, 3
"""Sequences of a forward pass; pairs of a part; turns at most, for each starts a process."""
SIZES = {False: (5000, 10), True: (20, 2)}
"""Pairs and members."""


def save_members(folder: Path, number: int, hidden_size: int = 64) -> None:
    """Tiny reward models of random weights, each with the tokenizer beside it."""
    from sandbox.tokenizer import make_tokenizer

    tokenizer = make_tokenizer(WORDS)
    for member in range(number):
        torch.manual_seed(member)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        config.num_labels = 1
        RewardModel(LlamaForSequenceClassification(config), "last", (tokenizer.eos_token_id,)).save_pretrained(
            folder / str(member)
        )
        tokenizer.save_pretrained(folder / str(member))


def write_pairs(folder: Path, number: int) -> int:
    """A file of texts in parts, as a run writes it; how many parts."""
    from datasets import Dataset

    from preferences.sets import PreferenceSet

    make_up(number, folder / "pairs.parquet")
    pairs = PreferenceSet(
        Dataset.from_parquet(str(folder / "pairs.parquet"), cache_dir=str(folder / "cache")), "made up", "explicit"
    )
    parts = plan_parts([("train", pairs, np.zeros(number, dtype=np.int64), np.ones(number, dtype=bool))], PART)
    write_texts(folder / "texts.parquet", parts, {"train": pairs})
    return len(parts)


def pool(config: RunConfig, job: ScoringJob, num_parts: int, firsts: list[float]) -> Tensor:
    """[2 N, M], part by part: chosen, then rejected; ``firsts`` gets the seconds until the first part was there."""
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for each in stream(config, Console(), job, range(num_parts)):
        if not rows:
            firsts.append(time.perf_counter() - began)
        rows.append(each)
    rows.sort(key=lambda each: int(each["part"]))
    both = [np.asarray(each[side]).reshape(-1, job.num_members) for each in rows for side in ("chosen", "rejected")]
    return torch.from_numpy(np.concatenate(both))


def loop(job: ScoringJob, num_parts: int) -> Tensor:
    """The same, by hand."""
    from pyarrow import parquet
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from preferences.encode import encode_prompt, encode_response

    tokenizer = AutoTokenizer.from_pretrained(job.base)
    models = [AutoModelForSequenceClassification.from_pretrained(job.members / str(m)).eval() for m in range(job.num_members)]
    file, found = parquet.ParquetFile(job.texts), []
    for part in range(num_parts):
        rows = file.read_row_group(part).to_pydict()
        given = [
            (encode_prompt(tokenizer, prompt), encode_response(tokenizer, response))
            for side in ("chosen", "rejected")
            for prompt, response in zip(rows["prompt"], rows[side], strict=True)
        ]
        found.append(torch.stack([plain_scores(model, given, BATCH, True) for model in models], dim=1))
    return torch.cat(found)


def measure(settings: Settings) -> Iterator[Row]:
    """Two cases."""
    number, members = SIZES[settings.small]
    share = Share(num_cpus=1, threads=1)
    with TemporaryDirectory() as name, local_ray(settings.threads):
        folder = Path(name)
        save_members(folder, members)
        num_parts = write_pairs(folder, number)
        for each in ("logs", "attempts"):
            (folder / each).mkdir()
        data = DataConfig(preferences="made up")
        config = RunConfig(name="strengths", data=data, resources=ResourcesConfig(scorer=share))
        job = ScoringJob(
            setup=setup_of(share, "scorer", folder / "logs"), texts=folder / "texts.parquet", number=NUMBER, templated=False,
            kind="full", base=folder / "0", members=folder, num_members=members, pooling="last", batch_size=BATCH,
            attempts=folder / "attempts", num_workers=settings.threads,
        )  # fmt: skip
        few = Settings(min(TURNS, settings.repetitions), settings.threads, settings.small)
        firsts: list[float] = []
        differing = float((pool(config, job, num_parts, firsts) - loop(job, num_parts)).abs().max())
        ways = {"pool": partial(pool, config, job, num_parts, firsts), "loop": partial(loop, job, num_parts)}
        turns = take_turns(ways, few.repetitions, of_all_processes)
    figures = {
        "pairs": number, "members": members, "pairs_per_second": round(number / turns.seconds("pool")),
        "seconds_to_first_part": round(statistics.median(firsts[2:]), 1), "parts": num_parts,
    }  # fmt: skip
    yield row(("C10", "strengths of all pairs"), turns, ("pool", "loop"), few, 1.0, f"scores to {differing:.0e}", **figures)
    yield measure_memory(settings)
