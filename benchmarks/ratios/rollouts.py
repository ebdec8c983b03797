"""C5: k responses to each prompt, through the run's pool, against transformers' ``generate`` and against vLLM without Ray.

Same weights, prompts, temperature and token limit; responses end where they end, so lengths differ as a policy's do. A way draws
the same tokens in every turn; what is compared is seconds for a thousand tokens, up to and with EOS. ``generate`` has batches of
16 sequences or all in one; the faster of the two counts. vLLM runs in a process of its own with the engine's own arguments and
requests. Neither keeps keys and values of an earlier turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import ray
import torch

from actors.config import RolloutConfig
from actors.process import Identity
from actors.rollout import prompt_seed
from actors.transfer import STORED, lay_out
from benchmarks.ratios.bare_vllm import BareEngine
from benchmarks.ratios.engines import gap, local_ray, prompts, saved_model, start_engine
from benchmarks.ratios.frame import Took, Turns, of_all_processes, take_turns
from benchmarks.ratios.rows import Row, Settings, row
from cluster.console import Console
from cluster.fixed_pool import FixedPool
from cluster.rota import OwnDevices, Process
from cluster.waiting import Waiter
from tokens.records import Prompt, Rollout
from tokens.shape import ModelShape

WORDS, SAMPLES, BATCH = 56, 4, 16
"""Few words, so that a random model ends a response after some sixty tokens; responses to each prompt."""
SIZES = {False: (16, 32, 128), True: (2, 4, 8)}
"""Prompts, tokens of each, and most tokens of a response; by whether it is to be small."""
SHAPES = {
    False: ModelShape(hidden_size=256, intermediate_size=704, num_layers=4, num_heads=4, context_length=160),
    True: ModelShape(hidden_size=64, intermediate_size=96, num_layers=1, num_heads=1, context_length=32),
}


def generate(model: Any, asked: Sequence[Prompt], limit: int, batch: int) -> list[int]:
    """Tokens of each response by transformers, up to and with EOS."""
    ids = torch.tensor([p.token_ids for p in asked for _ in range(SAMPLES)])
    torch.manual_seed(0)
    lengths: list[int] = []
    for part in ids.split(batch):
        with torch.no_grad():
            out = model.generate(
                input_ids=part,
                attention_mask=torch.ones_like(part),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=limit,
            )[:, ids.shape[1] :]
        ended = torch.eq(out, model.config.eos_token_id).int().cumsum(1)
        lengths += ((ended == 0) | ((ended == 1) & torch.eq(out, model.config.eos_token_id))).sum(1).tolist()
    return lengths


def measure(settings: Settings) -> Iterator[Row]:
    """Against both."""
    (number, length, limit), shape = SIZES[settings.small], SHAPES[settings.small]
    asked = prompts(number, length, WORDS)
    with saved_model(shape, WORDS) as saved, local_ray(), contextlib.ExitStack() as stack:
        config = RolloutConfig(temperature=1.0, max_new_tokens=limit)
        engine = start_engine(saved, config, shape.context_length, settings.threads)
        pool = FixedPool([Process(engine, Identity("rollout-0", 0, ""))], OwnDevices())
        wait = Waiter(Console(), saved.folder, 600.0, lambda span: None)
        wait.begin("round 0", 0)
        bare = BareEngine(saved.folder, saved.folder, shape.context_length, config, settings.threads)
        stack.callback(bare.end)
        requests = [(prompt.token_ids, prompt_seed(0, prompt.id)) for prompt in asked]
        weights = lay_out(saved.model.state_dict().items(), STORED.chunk_bytes)

        def sample() -> list[Rollout]:
            return wait("sample", pool.sample(asked, SAMPLES, 0, 0))

        def prepare(way: str) -> None:
            if way == "ours":
                ray.get(engine.load.remote(weights, 0))  # which empties the prefix cache
            elif way == "bare":
                bare.forget()

        ways: dict[str, Callable[[], object]] = {
            "ours": sample,
            "bare": partial(bare.sample, requests, SAMPLES),
            "whole": partial(generate, saved.model, asked, limit, number * SAMPLES),
            "batches": partial(generate, saved.model, asked, limit, BATCH),
        }
        turns = take_turns(ways, settings.repetitions, of_all_processes, prepare)
        rollouts, theirs = sample(), bare.sample(requests, SAMPLES)
        lengths = {
            "ours": [len(r.response_ids) for r in rollouts],
            "bare": [len(ids) for ids in theirs],
            "whole": generate(saved.model, asked, limit, number * SAMPLES),
            "batches": generate(saved.model, asked, limit, BATCH),
        }
        differing = gap(saved.model, rollouts)
    same = sum(r.response_ids == tuple(ids) for r, ids in zip(rollouts, theirs, strict=True))
    equality = f"log-probs as transformers' to {differing:.0e} nats; {same} of {len(theirs)} responses as bare vLLM's"
    turns = per_thousand(turns, {way: sum(found) for way, found in lengths.items()})
    best = min(("whole", "batches"), key=turns.seconds)
    useful = sum(lengths["whole"]) / (len(lengths["whole"]) * max(lengths["whole"]))
    speeds = {f"{way}_tokens_per_second": round(1000 / turns.seconds(way)) for way in ways}
    yield row(("C5", "rollouts"), turns, ("ours", best), settings, None, equality, **speeds, useful_of_generated=round(useful, 3))
    yield row(("C5", "rollouts, against bare vLLM"), turns, ("ours", "bare"), settings, 1.0, equality, **speeds)


def per_thousand(turns: Turns, tokens: dict[str, int]) -> Turns:
    """Seconds for a thousand tokens instead of seconds."""
    scaled: dict[str, tuple[Took, ...]] = {}
    for way, took in turns.took.items():
        share = 1000 / tokens[way]
        scaled[way] = tuple(Took(share * each.wall, share * each.cpu) for each in took)
    return Turns(scaled, turns.load)
