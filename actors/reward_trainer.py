"""The reward trainer: fits a reward model on D, with MetaRM on S_k where it is given."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from actors.process import STATUS_GROUP, ProcessSetup
from actors.ranks import Rank
from rm.config import MetaConfig, RewardConfig
from tokens.records import Pair, Rollout

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardReport:
    """What a fit came to.

    Args:
        summary: means over its last quarter, by the ledger's names.
        steps: metrics of each step, by name.
        validation_accuracy: on held-out pairs; None where there are none.
    """

    summary: dict[str, float | None]
    steps: tuple[dict[str, float], ...]
    validation_accuracy: float | None


@ray.remote(concurrency_groups=STATUS_GROUP)
class RewardTrainer(Rank):
    """Holds the pairs; the model and its optimizer live for one fit. Several ranks share the model, and each holds all pairs."""

    def __init__(
        self,
        setup: ProcessSetup,
        pairs: Sequence[Pair],
        validation: Sequence[Pair],
        reward: RewardConfig,
        meta: MetaConfig,
        sft_dir: Path,
    ) -> None:
        super().__init__(setup)
        from transformers import AutoTokenizer

        self.pairs, self.validation = pairs, validation
        self.reward, self.meta = reward, meta
        self.sft_dir = sft_dir
        self.tokenizer = AutoTokenizer.from_pretrained(sft_dir)

    def fit(self, out_dir: Path, seed: int, previous: Path | None, shifted: Sequence[Rollout] | None) -> RewardReport:
        """Train one reward model and save it as a Hugging Face directory.

        Args:
            out_dir: to save to.
            seed: of the head and of the order of the data.
            previous: reward model to continue from; None = the SFT weights with a fresh head.
            shifted: S_k, k rollouts a prompt; None trains a vanilla model.

        Returns:
            The report.
        """
        import torch

        from rm.model import RewardModel
        from rm.records import RewardStep
        from rm.training import evaluate_pairs, fit_reward_model

        model = self.place(
            RewardModel.from_language_model(self.sft_dir, pooling=self.reward.pooling, seed=seed, dtype=torch.float32)
            if previous is None
            else RewardModel.from_pretrained(previous, dtype=torch.float32)
        )
        total = self.reward.epochs * -(-len(self.pairs) // self.reward.batch_size)
        steps: list[dict[str, float]] = []

        def on_step(step: RewardStep) -> None:
            steps.append(step.as_dict())
            self.tick(len(steps) * self.reward.batch_size, total * self.reward.batch_size, "pairs")

        with self.compute():
            fit = fit_reward_model(
                model,
                self.pairs,
                group_by_prompt(shifted) if shifted is not None else None,
                self.reward,
                self.meta,
                seed=seed,
                pad_id=self.tokenizer.pad_token_id,
                on_step=on_step,
                ranks=self.ranks,
            )
            accuracy = None
            if self.validation:
                pad_id = self.tokenizer.pad_token_id
                accuracy, _ = evaluate_pairs(model, self.validation, self.reward.batch_size, pad_id, self.ranks)
        model.save_pretrained(out_dir, self.ranks)
        if self.ranks.rank == 0:
            self.tokenizer.save_pretrained(out_dir)
        log.info("%s: fitted %s, validation accuracy %s", self.setup.name, out_dir, accuracy)
        return RewardReport(fit.as_dict(), tuple(steps), accuracy)


def group_by_prompt(rollouts: Sequence[Rollout]) -> list[list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """S_k as the trainer takes it: for each prompt its k (prompt ids, response ids).

    Args:
        rollouts: of several samples a prompt.

    Returns:
        One list per prompt, in first-seen order.
    """
    groups: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.prompt.id, []).append((rollout.prompt.token_ids, rollout.response_ids))
    return list(groups.values())
