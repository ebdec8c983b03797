"""Direct preference optimisation, as an outside comparison: TRL's ``DPOTrainer`` on pairs that are token ids already."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from policy.config import DPOConfig
from policy.library import listen, load, save
from tokens.records import Pair

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


def fit_dpo(
    sft_dir: Path,
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    out_dir: Path,
    config: DPOConfig,
    seed: int,
    bfloat16: bool,
    recompute: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, float]]:
    """Train a policy on preference pairs without a reward model, and save it with its tokenizer.

        loss = -log sigmoid(beta * [log pi(y_c|x)/pi_sft(y_c|x) - log pi(y_r|x)/pi_sft(y_r|x)])

    The SFT model is the start and, by log-probs computed before the first step, the reference. Margins and label smoothing of
    the pairs are not read.

    Source: Rafailov et al. 2023 (arXiv:2305.18290), equation 7.

    Args:
        sft_dir: the SFT model.
        pairs: N pairs as ids of ``tokenizer``, at least one.
        tokenizer: the SFT model's.
        out_dir: where the policy is written (safetensors only).
        config: how.
        seed: of the order of the pairs.
        bfloat16: True computes products in bfloat16, weights staying float32.
        recompute: True keeps only each layer's input for the backward pass.
        on_progress: called with (steps done, steps in all).

    Returns:
        A dict each time that TRL logs, about twenty times: ``step``, ``dpo/loss``, ``dpo/accuracy`` (share of pairs whose
        implicit reward prefers the chosen response), ``dpo/margin`` (its mean lead, in units of reward).

    Raises:
        ValueError: if there are no pairs.

    Padding contract: batches are padded on the right; padding neither is attended to nor counts in the loss.
    """
    if not pairs:
        raise ValueError("no pairs to train on, got 0, expected at least one")
    import trl
    from datasets import Dataset
    from transformers.utils import logging as progress

    progress.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)

    class Encoded(trl.DPOTrainer):  # type: ignore[misc]
        """Takes ids as they are: our convention of BOS and EOS (or of the chat template) is in them."""

        def _prepare_dataset(self, dataset: datasets.Dataset, *others: object) -> datasets.Dataset:
            return dataset

    trainer = Encoded(
        model=load(sft_dir, torch.float32),
        args=_arguments(config, out_dir, len(pairs), seed, bfloat16, recompute),
        train_dataset=Dataset.from_dict(
            {
                "prompt_ids": [list(pair.prompt_ids) for pair in pairs],
                "chosen_ids": [list(pair.chosen_ids) for pair in pairs],
                "rejected_ids": [list(pair.rejected_ids) for pair in pairs],
            }
        ),
        processing_class=tokenizer,
    )
    listen(trainer, on_progress, "loss")
    trainer.train()
    save(trainer.model, tokenizer, out_dir)
    return [
        {
            "step": float(row["step"]),
            "dpo/loss": float(row["loss"]),
            "dpo/accuracy": float(row["rewards/accuracies"]),
            "dpo/margin": float(row["rewards/margins"]),
        }
        for row in trainer.state.log_history
        if "loss" in row
    ]


def _arguments(config: DPOConfig, out_dir: Path, num_pairs: int, seed: int, bfloat16: bool, recompute: bool) -> object:
    """TRL's arguments: quiet, no checkpoints, nothing truncated, the reference's log-probs computed once."""
    import trl

    at_once = config.microbatch_size or config.batch_size
    steps = max(1, round(config.epochs * num_pairs / config.batch_size))
    return trl.DPOConfig(
        output_dir=str(out_dir),
        beta=config.beta,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.1 * steps),
        weight_decay=0.0,
        max_steps=steps,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=config.batch_size // at_once,
        precompute_ref_log_probs=True,
        max_length=None,
        seed=seed,
        bf16=bfloat16,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=recompute,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
