"""A small language model that is told a person's answers in its prompt, and then says how much they would like a response.

It is the sandbox's SFT model, fine-tuned on the raters' labels in the format in which it is asked:

    prompt <better> response <worse> response      for every answer, one after another
    prompt response <which>                        for a text that is asked about; next comes <better> or <worse>

A text's score is the log-odds of the two marks, and the difference of two scores is the log-odds that A is called better and B
worse rather than the other way round, which is what the fit makes likely. Each step takes one rater, tells some of their labels
and asks about others. A new person changes no weight. The context is lengthened to what 50 answers need.

Source: in-context personalisation is among the adaptive counterparts of 2503.17338, there by a large model that follows
instructions and is not trained for it; here by a small one that is.

Letters: T texts, N labels, n answers, L tokens, S sequences.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks.experiments.people_arms import Adapt, Material
from benchmarks.experiments.people_data import ANSWERS, Texts
from cluster.seeds import derive
from rm.descent import adamw, descend
from rm.training import learning_rate_factor
from sandbox.world import Split

RATE = 3e-3
ASKED = 10
"""Labels that a step asks about; of the rater's other 40 some are told."""
TOLD = (0, 3, 10, 30, 40)
AT_ONCE = 16
"""Texts in a forward pass."""


@dataclass(frozen=True, eq=False)
class Reader:
    """The language model and its marks.

    Args:
        model: with room for what it is told and asked.
        texts: that people judge.
        better: id of the mark before a preferred response.
        worse: of the mark before the other.
        which: of the mark after a response that is asked about.
    """

    model: LlamaForCausalLM
    texts: Texts
    better: int
    worse: int
    which: int

    def told(self, answers: np.ndarray) -> DynamicCache | None:
        """What the model keeps of answers that it has read; None for none.

        Args:
            answers: [n, 2] int, the preferred text first.
        """
        encoded = self.texts.encoded
        ids = [
            token
            for one, other in answers.tolist()
            for token in (*encoded[one][0], self.better, *encoded[one][1], self.worse, *encoded[other][1])
        ]
        if not ids:
            return None
        read: DynamicCache = self.model.model(torch.tensor([ids]), use_cache=True).past_key_values
        return read

    def scores(self, read: DynamicCache | None, texts: Sequence[int]) -> Tensor:
        """[S] log-odds that the person whose answers were read calls a text better, with gradient.

        Args:
            read: see ``told``.
            texts: indices of S of them.
        """
        rows = [torch.tensor([*prompt, *response, self.which]) for prompt, response in (self.texts.encoded[i] for i in texts)]
        ids, mask = (pad_sequence(each, batch_first=True) for each in (rows, [torch.ones_like(row) for row in rows]))
        length = 0 if read is None else read.get_seq_length()
        memory = DynamicCache([tuple(part.expand(len(ids), -1, -1, -1) for part in each[:2]) for each in read or ()])
        seen = torch.cat([torch.ones(len(ids), length, dtype=torch.long), mask], 1)
        states = self.model.model(ids, attention_mask=seen, past_key_values=memory, use_cache=True).last_hidden_state
        logits: Tensor = self.model.lm_head(states[torch.arange(len(ids)), mask.sum(1) - 1])
        return logits[:, self.better] - logits[:, self.worse]


def start_reader(material: Material) -> Reader:
    """The SFT model with three new tokens and a longer context.

    Args:
        material: of the seed.
    """
    model = LlamaForCausalLM.from_pretrained(material.lab.files.sft_dir, use_safetensors=True, dtype=torch.float32)
    known, texts = model.config.vocab_size, material.people.texts
    torch.manual_seed(derive(material.people.seed, "marks"))
    model.resize_token_embeddings(known + 3, mean_resizing=False)
    longest = max(len(prompt) + 2 * len(response) + 2 for prompt, response in texts.encoded)
    model.config.max_position_embeddings = (max(ANSWERS) + 1) * longest
    return Reader(model, texts, known, known + 1, known + 2)


def fit_reader(reader: Reader, material: Material) -> None:
    """AdamW; every rater is asked about every label once an epoch, after being told as many others as chance says.

    Args:
        reader: changed in place.
        material: labels, epochs and settings.
    """
    rng = random.Random(derive(material.people.seed, "contexts"))
    steps = [step for _ in range(material.epochs) for step in _epoch(material, rng)]
    trained = list(reader.model.parameters())
    optimizer = adamw(trained, RATE, material.reward)
    for number, (told, asked) in enumerate(steps):
        better, worse = reader.scores(reader.told(told), [*asked[:, 0], *asked[:, 1]]).chunk(2)
        torch.autograd.backward(-functional.logsigmoid(better - worse).mean())
        lr = RATE * learning_rate_factor(number, len(steps), material.reward.warmup_ratio)
        descend(optimizer, trained, material.reward.max_grad_norm, [lr], "loss")
    reader.model.eval()


def _epoch(material: Material, rng: random.Random) -> list[tuple[np.ndarray, np.ndarray]]:
    """Labels of one rater that are told, and others that are asked about, step by step."""
    places, steps = np.array(material.places), []
    for place in range(len(material.raters)):
        rows = material.rows[places == place]
        order = rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(order), ASKED):
            others = order[:start] + order[start + ASKED :]
            told = rng.sample(others, min(len(others), rng.choice(TOLD)))
            steps.append((rows[told], rows[order[start : start + ASKED]]))
    rng.shuffle(steps)
    return steps


def in_context(material: Material, split: Split = "test") -> Adapt:
    """The language model, fitted to the raters; a person's answers are put before what it is asked about.

    Args:
        material: of the seed.
        split: whose texts are scored; others get no number.
    """
    reader = start_reader(material)
    fit_reader(reader, material)
    wanted = sorted(material.people.texts.split(split).ravel().tolist(), key=lambda i: sum(map(len, reader.texts.encoded[i])))

    @cache
    def scored(answers: tuple[int, ...]) -> np.ndarray:
        found = np.full(len(reader.texts.encoded), np.nan)
        with torch.no_grad():
            read = reader.told(np.array(answers, dtype=int).reshape(-1, 2))
            for start in range(0, len(wanted), AT_ONCE):
                texts = wanted[start : start + AT_ONCE]
                found[texts] = reader.scores(read, texts).double().numpy()
        return found

    return lambda answers: scored(tuple(answers.ravel().tolist()))
