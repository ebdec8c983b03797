"""Supervised fine-tuning: where the SFT policy comes from when no model is given. The loop is TRL's ``SFTTrainer``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from policy.config import SFTConfig
from policy.held_out import held_out_loss
from policy.library import listen, load, save
from tokens.errors import UserError
from tokens.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Example = tuple[list[int], list[int]]
"""Ids of a prompt, and of its response with EOS."""
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")


def fit_language_model(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    out_dir: Path,
    config: SFTConfig,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    held_out: Sequence[Example] = (),
    bfloat16: bool | None = None,
    on_loss: Callable[[int, float], None] | None = None,
) -> dict[str, float]:
    """Train a causal language model on examples, and save it with its tokenizer as a Hugging Face directory.

    Minimises the mean negative log-likelihood ``-1/N sum_t log p(y_t | x, y_<t)`` over the N response tokens of a batch.
    A model made from scratch learns the prompt's tokens too (it has seen no text before, and what goes with what in a
    prompt teaches it which words belong together); one that is loaded learns the responses only.

    Source: Ouyang et al. 2022 (InstructGPT), section 3.1.

    Args:
        examples: (prompt ids, response ids with EOS); at least one. Longer than the context: refused.
        tokenizer: has pad, bos and eos tokens, pad and eos different; its size is the model's vocabulary.
        out_dir: where model, tokenizer and generation config are written (safetensors only).
        config: ``model`` names the weights to start from; null = a fresh Llama of ``shape``.
        seed: of the initial weights and of the order of the examples.
        on_progress: called with (steps done, steps in all).
        held_out: examples that are measured before and after, and never trained on.
        bfloat16: True computes products in bfloat16, weights staying float32; None = on a GPU.
        on_loss: called with (steps done, mean loss since the last call, nats per token), about twenty times.

    Returns:
        ``first_loss`` and ``loss`` (first and last logged mean, nats per token), ``steps``, ``tokens`` (trained on,
        prompts included), ``parameters``, ``seconds``; with ``held_out`` also ``held_out_before`` and ``held_out_after``,
        nats per response token.

    Raises:
        UserError: if there are no examples, one does not fit the context, or pad and eos are one token; a held-out one likewise.

    Padding contract: batches are padded on the right; padding neither is attended to nor counts in the loss.
    """
    import trl
    from datasets import Dataset
    from transformers.utils import logging as progress

    progress.disable_progress_bar()
    model = _load_or_make(tokenizer, config, seed)
    context = int(model.config.max_position_embeddings)
    _check(examples, tokenizer, context)
    if held_out:
        _check(held_out, tokenizer, context)
    began = time.monotonic()
    from_scratch = config.model is None
    data = Dataset.from_dict(
        {
            "input_ids": [[*prompt, *response] for prompt, response in examples],
            "labels": [[*(prompt if from_scratch else [-100] * len(prompt)), *response] for prompt, response in examples],
            "length": [len(prompt) + len(response) for prompt, response in examples],
        }
    )
    steps = max(1, round(config.epochs * len(examples) / config.batch_size))
    logging.getLogger("trl").setLevel(logging.ERROR)
    trainer = trl.SFTTrainer(
        model=model,
        args=_arguments(config, out_dir, steps, seed, torch.cuda.is_available() if bfloat16 is None else bfloat16),
        train_dataset=data,
        processing_class=tokenizer,
        data_collator=trl.trainer.sft_trainer.DataCollatorForLanguageModeling(int(tokenizer.pad_token_id)),
    )
    losses = listen(trainer, on_progress, "loss", on_loss)

    def measure(name: str) -> dict[str, float]:
        batch_size = config.microbatch_size or config.batch_size
        return {name: held_out_loss(trainer.model, held_out, int(tokenizer.pad_token_id), batch_size)} if held_out else {}

    measured = measure("held_out_before")
    trainer.train()
    measured |= measure("held_out_after")
    save(trainer.model, tokenizer, out_dir)
    return measured | {
        "first_loss": losses[0],
        "loss": losses[-1],
        "steps": float(steps),
        "tokens": config.epochs * sum(data["length"]),
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "seconds": time.monotonic() - began,
    }


def train_tokenizer(texts: Iterable[str], vocab_size: int, out_dir: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer from scratch: any text survives encode and decode unchanged.

    Source: Sennrich et al. 2016 (byte-pair encoding); bytes as in Radford et al. 2019 (GPT-2), section 2.2.

    Args:
        texts: to learn merges from.
        vocab_size: entries, the 4 special tokens and 256 bytes included; at least 260.
        out_dir: where it is saved; ``AutoTokenizer.from_pretrained`` loads it.

    Returns:
        The tokenizer; it adds no special token by itself.

    Raises:
        UserError: if ``vocab_size`` has no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    smallest = 256 + len(SPECIALS)
    if vocab_size < smallest:
        raise UserError(
            f"sft.shape.vocab_size must be at least {smallest} (256 bytes and {len(SPECIALS)} special tokens), got {vocab_size}"
        )
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIALS[0],
        bos_token=SPECIALS[1],
        eos_token=SPECIALS[2],
        unk_token=SPECIALS[3],
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
    tokenizer.save_pretrained(out_dir)
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, shape: ModelShape, seed: int) -> PreTrainedModel:
    """A fresh Llama-shaped model with tied embeddings, float32.

    Args:
        tokenizer: gives vocabulary size and special ids.
        shape: sizes; ``vocab_size`` is not used.
        seed: of the weights; the caller's generator is left as it was.

    Returns:
        The model, in training mode.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=shape.hidden_size,
                intermediate_size=shape.intermediate_size,
                num_hidden_layers=shape.num_layers,
                num_attention_heads=shape.num_heads,
                num_key_value_heads=shape.key_value_heads,
                max_position_embeddings=shape.context_length,
                rms_norm_eps=1e-5,
                initializer_range=shape.hidden_size**-0.5,  # tied embeddings of a small model: 0.02 is too faint to learn fast
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                dtype="float32",
            )
        )


def _load_or_make(tokenizer: PreTrainedTokenizerFast, config: SFTConfig, seed: int) -> PreTrainedModel:
    if config.model is None:
        return make_model(tokenizer, config.shape, seed)
    return load(config.model, torch.float32)


def _check(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, context: int) -> None:
    if not examples:
        raise UserError("no texts to train the SFT policy on: got 0 examples, expected at least one")
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            "the tokenizer needs a pad and an eos token that differ, "
            f"got pad {tokenizer.pad_token!r} and eos {tokenizer.eos_token!r}"
        )
    for index, (prompt, response) in enumerate(examples):
        if not prompt or not response or len(prompt) + len(response) > context:
            raise UserError(
                f"example {index}: got {len(prompt)} + {len(response)} tokens of prompt and response, expected both and at most "
                f"{context} together (sft.shape.context_length, or the model's own); cut it or leave it out"
            )


def _arguments(config: SFTConfig, out_dir: Path, steps: int, seed: int, bfloat16: bool) -> object:
    """TRL's arguments: quiet, no checkpoints, batches of like length."""
    import trl

    at_once = config.microbatch_size or config.batch_size
    accelerated = torch.cuda.is_available()
    return trl.SFTConfig(
        output_dir=str(out_dir),
        max_steps=steps,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=config.batch_size // at_once,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup_ratio * steps),
        adam_beta2=0.98,
        weight_decay=0.0,
        seed=seed,
        bf16=bfloat16,
        use_cpu=not accelerated,
        gradient_checkpointing=config.model is not None,
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        dataloader_pin_memory=accelerated,
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
