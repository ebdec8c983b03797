"""What is compared with what, and what is aimed at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Args:
        id: C1 to C11.
        name: of the case, unique in its id.
        against: what one would do instead.
        limit: what the limit is, in words.
        aim: at most this ratio; None = it is shown, and nothing is aimed at.
        of_limit: the aim is how many times the limit may be taken, not the ratio.
        aim_seconds: ours may take at most this; None = no such aim.
        unit: of what is measured.
    """

    id: str
    name: str
    against: str
    limit: str
    aim: float | None = None
    of_limit: bool = False
    aim_seconds: float | None = None
    unit: str = "s"

    @property
    def place(self) -> tuple[str, str]:
        """Id and name."""
        return self.id, self.name


HEADS, LORA = "1 / M: one backbone for all", "1: every member's activations are its own"
SHARED = "(P + k R) / (k (P + R)): the prompt once"
REAL = "as fast a pass over the tokens that are needed, a prompt once"
PPO = "the matrix products of its linear layers alone"
MEMCPY, COPY = "a copy in memory", "a copy in memory, which a write in the background would need"
CASES = (
    Case("C1", "4 heads on one backbone score", "4 models, one after another", HEADS, 1.1 / 4),
    Case("C1", "10 heads on one backbone score", "10 models, one after another", HEADS, 1.1 / 10),
    Case("C1", "4 heads, against batches as they come", "the same, batches not sorted by length", "1 / M, sorted"),
    Case("C1", "4 LoRA members score", "4 models, one after another", LORA, 0.6),
    Case("C1", "10 LoRA members score", "10 models, one after another", LORA, 0.6),
    Case("C2", "scoring 8 responses to each prompt", "every sequence from its first token", SHARED, 1.15, of_limit=True),
    Case("C3", "a reward model's epoch", "TRL's RewardTrainer at its defaults", REAL, 0.6),
    Case("C3", "a reward model's epoch, against TRL's best", "the same, float32, by length, no recomputation", REAL, 0.6),
    Case("C4", "MetaRM step, m = 1", "vanilla step", "1 + m", 1.05, of_limit=True),
    Case("C4", "MetaRM step, m = 1/4", "vanilla step", "1 + m", 1.05, of_limit=True),
    Case("C4", "MetaRM step, m = 1, against a deep copy", "MetaRM by a deep copy of the model", "1: as many passes"),
    Case("C4", "MetaRM step, m = 1, against second order", "through theta' as well (meta.order 2)", "(1 + m) / 4"),
    Case(
        "C4",
        "memory of a MetaRM step, m = 1",
        "memory of a vanilla step",
        "theta's copy and one more gradient",
        1.05,
        True,
        unit="MiB",
    ),
    Case("C5", "rollouts", "transformers' generate, at its better batch", "none computed", 1 / 3, unit="s per 1,000 tokens"),
    Case("C5", "rollouts, against bare vLLM", "vLLM without Ray", "1", 1 / 0.95, unit="s per 1,000 tokens"),
    Case("C6", "new weights into a running engine", "one call per tensor", MEMCPY, 0.1),
    Case("C6", "new weights, against a restart", "saving them and starting an engine", MEMCPY),
    Case("C6", "new weights, against memcpy", "copying them once in memory", "1", 5.0),
    Case("C7", "PPO step", "TRL 1.12.0's PPOTrainer at its defaults", PPO, 0.5),
    Case("C7", "PPO step, against TRL's best", "the same, microbatches as large as ours", PPO, 0.5),
    Case("C8", "a round of the quickstart", "its phases alone, one after another", "1", 1.5),
    Case("C9", "checkpoint", "torch.save in place", COPY, 0.2),
    Case("C9", "checkpoint, against one that is synced", "torch.save in place, and fsync", COPY),
    Case("C10", "strengths of all pairs", "a plain loop over the members", "1", 1 / 0.9),
    Case("C10", "memory of 100,000 pairs", "after the first tenth", "1", 1.1, unit="MiB"),
    Case("C11", "64 rollout actors", "the time that they sleep", "1", 1 / 0.95),
    Case("C11", "16 rollout actors", "the time that they sleep", "1", 1 / 0.95),
    Case("C11", "4 rollout actors", "the time that they sleep", "1", 1 / 0.95),
    Case("C11", "1 rollout actor", "the time that it sleeps", "1", 1 / 0.95),
    Case("C11", "empty step", "as many calls of Ray and nothing else", "1", aim_seconds=0.1),
    Case("C11", "empty round", "as many calls of Ray and nothing else", "1", aim_seconds=0.1),
    Case("C11", "a round's prompts from a million", "shuffling a million once", "none computed", 1.5),
    Case("C11", "a late step of a million samples", "an early one", "1", 1.1),
    Case("C11", "memory after a million samples", "after some ten thousand", "1", 1.1, unit="MiB"),
)
NUMBERS = tuple(dict.fromkeys(case.id for case in CASES))
"""All ids, in order."""
