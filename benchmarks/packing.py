"""What packing, and log-probs of response positions only, save on one GPU: `python -m benchmarks.packing OUT.json`.

A Llama of about a billion random weights over 128,256 tokens (four queries share a key), bfloat16, layers recomputed: one forward
and backward pass of the log-probs of 64 sequences, whose lengths are log-normal and cut at 1,024. Needs no Ray.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._composable import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from tokens.logprobs import position_ids, response_logprobs
from tokens.packing import PACKED, token_groups
from tokens.records import SequenceBatch

VOCABULARY, LONGEST, SEQUENCES, PROMPT, TOKENS, ROWS = 128_256, 1024, 64, 64, 8192, 8


def batch() -> SequenceBatch:
    """64 sequences of a prompt of 64 tokens and a response of about 200."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(SEQUENCES, generator=generator) * 0.8 + 5.2).exp().long().clamp(8, LONGEST - PROMPT).tolist()
    ids = torch.randint(10, VOCABULARY, (SEQUENCES, LONGEST), generator=generator).tolist()
    return SequenceBatch.from_ids(
        [row[:PROMPT] for row in ids], [row[PROMPT : PROMPT + n] for row, n in zip(ids, lengths, strict=True)], 0
    )


def model(attention: str | None) -> LlamaForCausalLM:
    """The model on the GPU."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=2048, intermediate_size=8192, num_hidden_layers=12, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    shape._attn_implementation = attention or "sdpa"
    with torch.device("cuda"):
        made = LlamaForCausalLM(shape).train(False)
        made.bfloat16()
    for layer in made.model.layers:
        checkpoint(layer)
    return made


def plain(language_model: LlamaForCausalLM, part: SequenceBatch) -> Tensor:
    """Log-probs through the logits of all positions in float32, as one would write them."""
    logits = language_model(
        input_ids=part.input_ids,
        attention_mask=part.attention_mask.long(),
        position_ids=position_ids(part.attention_mask),
        use_cache=False,
    ).logits
    logprobs = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, part.input_ids[:, 1:, None]).squeeze(-1)
    return torch.where(part.response_mask[:, 1:], logprobs, 0.0)


def measured(language_model: LlamaForCausalLM, parts: list[SequenceBatch], of: Callable[..., Tensor]) -> dict[str, float]:
    """Seconds of a pass over all parts (best of three), and the most memory beyond weights and gradients."""
    seconds = []
    for _ in range(4):
        language_model.zero_grad()
        for part in parts[:1]:
            of(language_model, part).sum().backward()  # type: ignore[no-untyped-call]
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for part in parts:
            of(language_model, part).sum().backward()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds[1:]), "peak_gib": (torch.cuda.max_memory_allocated() - held) / 2**30, "passes": len(parts)}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    whole = batch()
    lengths: list[int] = whole.lengths().tolist()
    order = sorted(range(SEQUENCES), key=lambda i: lengths[i])
    rows = [order[start : start + ROWS] for start in range(0, SEQUENCES, ROWS)]
    by_rows = [whole.rows(torch.tensor(group)).to("cuda") for group in rows]
    by_tokens = [whole.rows(torch.tensor(group)).to("cuda") for group in token_groups(lengths, TOKENS)]
    padded, result = model(None), {}
    cases: list[tuple[str, Any, Any, Any]] = [
        ("padded, all positions in float32", None, by_rows, plain),
        ("padded", None, by_rows, response_logprobs),
        ("packed", PACKED, by_rows, response_logprobs),
        ("packed, 8192 tokens", PACKED, by_tokens, response_logprobs),
    ]
    packed = model(PACKED)
    for name, attention, parts, of in cases:
        result[name] = measured(packed if attention else padded, parts, of)
        print(name, result[name], flush=True)
    with torch.no_grad():
        left, right = (response_logprobs(each, by_rows[3]) for each in (packed, padded))
    out.write_text(
        json.dumps(
            {
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "tokens": sum(lengths),
                "padded_tokens": sum(part.input_ids.numel() for part in by_rows),
                "largest_difference_nats": float((left - right).abs().max()),
                "cases": result,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
