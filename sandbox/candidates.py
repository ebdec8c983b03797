"""Draws responses from a saved language model, many at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 512


def sample_responses(
    model_dir: Path,
    prompts: Sequence[str],
    temperature: float,
    max_tokens: int,
    seed: int,
    on_progress: Callable[[int, int], None],
) -> list[str]:
    """One response to each prompt, in order.

    Args:
        model_dir: a Hugging Face directory with a tokenizer that has pad, bos and eos.
        prompts: texts; a text may stand here several times.
        temperature: of the sampling, over the whole vocabulary.
        max_tokens: longest response; longer ones are cut.
        seed: of the sampling; the caller's generator is left as it was.
        on_progress: called with (responses so far, responses in all).

    Returns:
        Texts without special tokens; one may be empty.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, use_safetensors=True).eval()
    texts: list[str] = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), BATCH):
            encoded = tokenizer(list(prompts[start : start + BATCH]), add_special_tokens=False).input_ids
            ids = [[tokenizer.bos_token_id, *row] for row in encoded]
            input_ids, attention_mask = _pad_left(ids, tokenizer.pad_token_id)
            sampled = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_tokens,
            )
            texts += tokenizer.batch_decode(sampled[:, input_ids.shape[1] :], skip_special_tokens=True)
            on_progress(len(texts), len(prompts))
    return texts


def _pad_left(ids: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, [B, T] int64, so that every prompt ends where its response begins."""
    import torch

    width = max(map(len, ids))
    input_ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in ids])
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    return input_ids, attention_mask
