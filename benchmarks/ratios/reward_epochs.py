"""C3: an epoch of a reward model on preference pairs, against TRL's ``RewardTrainer``.

Same start, pairs, batch size, AdamW, learning rate and schedule; tokens are ready on both sides, and the trainer is made before
the clock starts. TRL is run at its defaults (bfloat16 autocast, layers recomputed, batches as they come) and
at its best setting (float32 as ours, nothing recomputed, batches of like lengths). Orders of the pairs differ, so what must
agree is the loss on validation pairs. A pair's chosen response has more tokens of one kind, which is what there is to learn.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.ratios.frame import take_turns
from benchmarks.ratios.rows import Row, Settings, row
from benchmarks.ratios.scenery import PAD, VOCABULARY, classifier
from rm.batches import pair_sequences, score_sequences
from rm.config import MetaConfig, RewardConfig
from rm.losses import bradley_terry_loss
from rm.model import RewardModel
from rm.shared_prompts import row_width, shared_passes
from rm.training import fit_reward_model
from tokens.records import Pair

BATCH, LR = 8, 1e-4
"""TRL's defaults."""
PROMPT, SHORTEST, LONGEST = 16, 8, 112
"""Tokens of a prompt, and of the responses."""
NUM_PAIRS = {False: (64, 32), True: (8, 4)}
"""For training and validation."""


def drawn(number: int, seed: int) -> list[Pair]:
    """Pairs of log-uniform lengths; ids in the upper half come three times as often in a chosen response as in a rejected one."""
    rng = random.Random(seed)

    def response(upper: float) -> tuple[int, ...]:
        length = int(SHORTEST * (LONGEST / SHORTEST) ** rng.random())
        half = VOCABULARY // 2
        return (*(rng.randrange(half, VOCABULARY) if rng.random() < upper else rng.randrange(2, half) for _ in range(length)), 1)

    prompts = [tuple(rng.randrange(2, VOCABULARY) for _ in range(PROMPT)) for _ in range(number)]
    return [Pair(f"p{i}", prompt, response(0.6), response(0.2)) for i, prompt in enumerate(prompts)]


def ours(pairs: Sequence[Pair], start: RewardModel) -> RewardModel:
    """By the function that the reward trainer calls."""
    settings = RewardConfig(
        epochs=1, lr=LR, batch_size=BATCH, microbatch_size=BATCH, beta1=0.9, beta2=0.999, eps=1e-8, warmup_ratio=0.0
    )
    fit_reward_model(start, pairs, None, settings, MetaConfig(enabled=False), 0, PAD, lambda step: None)
    return start


def trainer(pairs: Sequence[Pair], model: Any, folder: Path, best: bool) -> Any:
    """TRL's, ready to train one epoch."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import RewardConfig as Arguments
    from trl import RewardTrainer

    from sandbox.tokenizer import make_tokenizer

    rows: list[dict[str, Any]] = []
    for pair in pairs:
        chosen, rejected = ([*pair.prompt_ids, *response] for response in (pair.chosen_ids, pair.rejected_ids))
        rows.append({"chosen_ids": chosen, "rejected_ids": rejected, "length": max(len(chosen), len(rejected))})
    settings: dict[str, Any] = {"output_dir": str(folder), "num_train_epochs": 1, "learning_rate": LR, "use_cpu": True}
    settings |= {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    if best:
        settings |= {"bf16": False, "gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}
        settings |= {"remove_unused_columns": False}  # the lengths are a column
    tokenizer: PreTrainedTokenizerFast = make_tokenizer([f"w{i}" for i in range(VOCABULARY - 4)])
    return RewardTrainer(model, Arguments(**settings), train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def validation_loss(model: RewardModel, pairs: Sequence[Pair]) -> float:
    """Bradley-Terry, nats a pair."""
    chosen, rejected = score_sequences(model, pair_sequences(pairs), 32, PAD).chunk(2)
    return float(bradley_terry_loss(chosen, rejected, len(pairs)))


def measure(settings: Settings) -> Iterator[Row]:
    """Against both."""
    train, validation = (drawn(number, seed) for seed, number in enumerate(NUM_PAIRS[settings.small]))
    start = classifier(settings.small)
    before = validation_loss(RewardModel(copy.deepcopy(start), "last", (1,)), validation)
    ready: dict[str, Any] = {}
    models: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:

        def prepare(way: str) -> None:
            models[way] = copy.deepcopy(start)
            if way == "ours":
                ready[way] = partial(ours, train, RewardModel(models[way], "last", (1,)))
            else:
                ready[way] = trainer(train, models[way], Path(name), way == "best").train

        ways: dict[str, Callable[[], object]] = {way: partial(_call, ready, way) for way in ("ours", "defaults", "best")}
        turns = take_turns(ways, settings.repetitions, prepare=prepare)
    losses = {way: validation_loss(RewardModel(model.eval(), "last", (1,)), validation) for way, model in models.items()}
    words = ", ".join(f"{way} {loss:.4f}" for way, loss in losses.items())
    needed, computed = work(train, BATCH)
    share = needed / computed
    for case, other in (("a reward model's epoch", "defaults"), ("a reward model's epoch, against TRL's best", "best")):
        limit = turns.ratio("ours", other).middle * share
        equality = f"validation loss {before:.4f} before; {words}"
        yield row(("C3", case), turns, ("ours", other), settings, limit, equality, needed_of_computed_tokens=round(share, 3))


def work(pairs: Sequence[Pair], batch: int) -> tuple[int, int]:
    """Tokens that an epoch of ours needs, a prompt once for its two responses, and those that its passes compute, in the mean.

    Args:
        pairs: of the epoch.
        batch: pairs of a step, and sequences of a forward pass.

    Returns:
        Both.
    """
    needed = computed = 0
    for start in range(0, len(pairs), batch):
        sequences = pair_sequences(pairs[start : start + batch])
        needed += sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs[start : start + batch])
        shared = shared_passes(sequences, batch)
        if shared is not None:
            passes = [[row_width([sequences[i] for i in row]) for row in rows] for rows in shared]
        else:
            lengths = sorted(len(prompt) + len(response) for prompt, response in sequences)
            passes = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
        computed += sum(max(widths) * len(widths) for widths in passes)
    return needed, computed


def _call(ready: dict[str, Callable[[], object]], way: str) -> object:
    return ready[way]()
