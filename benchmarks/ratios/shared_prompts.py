"""C2: scoring k = 8 responses to each prompt with the prompt's work done once, against every sequence from its first token.

The other way is transformers alone, in batches of like lengths. The limit is the share of the tokens that is left when each
prompt is computed once: (P + k R) / (k (P + R)) where all lengths are alike.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

from benchmarks.ratios.frame import take_turns
from benchmarks.ratios.rows import Row, Settings, row
from benchmarks.ratios.scenery import PAD, plain_scores, reward_model, tokens
from rm.batches import score_sequences

RESPONSES, BATCH = 8, 32
"""k; sequences of a forward pass."""
SIZES = {False: (8, 96), True: (2, 16)}
"""Prompts and tokens of each; a response has a quarter as many, up to a half more or less."""


def measure(settings: Settings) -> Iterator[Row]:
    """One case."""
    number, length = SIZES[settings.small]
    rng = random.Random(0)
    asked = [tokens(rng, length) for _ in range(number)]
    given = [(prompt, tokens(rng, rng.randint(length // 8, 3 * length // 8))) for prompt in asked for _ in range(RESPONSES)]
    rng.shuffle(given)
    model = reward_model(settings.small)
    ways = {
        "ours": partial(score_sequences, model, given, BATCH, PAD),
        "whole": partial(plain_scores, model.model, given, BATCH, True),
    }
    found, wanted = ways["ours"](), ways["whole"]()
    responses = sum(len(response) for _, response in given)
    limit = (number * length + responses) / (len(given) * length + responses)
    equality = f"scores to {float((found - wanted).abs().max()):.0e} of {float(wanted.abs().mean()):.1f}"
    turns = take_turns(ways, settings.repetitions)
    place = ("C2", "scoring 8 responses to each prompt")
    yield row(place, turns, ("ours", "whole"), settings, limit, equality)
