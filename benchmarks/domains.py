"""What it costs to score texts of ten domains from one process, against one model on the same texts.

    python -m benchmarks.domains                               # a small decoder on this machine's CPU
    python -m benchmarks.domains --hidden 512 --layers 8 --rank 16
    python -m benchmarks.domains --responses 8                 # to each prompt, which is then computed once
    python -m benchmarks.domains --backbone PATH               # a decoder whose layers see a row a text (OPT's do not)

A backbone with random weights (or PATH's) and ten adapters, as `customize` stores them. Passes are interleaved: one model, the
mixed batch, one model, ... so that whatever slows the machine slows both; a ratio is the median over the rounds of a pass against
the one model's pass of the same round. Three numbers, in wall and in CPU seconds (on a busy machine only the latter mean much):

    mixed / one     a batch in which each text belongs to one of the domains, against the backbone alone on the same texts
    grouped / one   the same texts, the adapters set one after another (what the mixed batch saves)
    all / one       every domain's score of every text

Appends to benchmarks/results/domains.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.versions import versions
from rm.batches import Encoded, score_sequences
from rm.config import LoraConfig
from rm.domain_bank import GroupedBank, MixedBank, open_bank
from rm.lora import add_lora, save_adapter
from rm.model import RewardModel
from tokens.errors import UserError

RESULTS = Path(__file__).parent / "results" / "domains.jsonl"
PAD = 0


def backbone(folder: Path, hidden: int, layers: int, length: int) -> Path:
    """A random decoder as a directory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=max(1, hidden // 32),
        vocab_size=1000, max_position_embeddings=2 * length, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "backbone")
    return folder / "backbone"


def adapters(path: Path, folder: Path, number: int, rank: int) -> list[tuple[str, Path]]:
    """Adapters that change scores, as files."""
    found = []
    for i in range(number):
        model = _model(path)
        add_lora(model, LoraConfig(rank=rank, alpha=rank), seed=i)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        save_adapter(model, folder / f"domain-{i}")
        found.append((f"domain-{i}", folder / f"domain-{i}"))
    return found


def texts(number: int, length: int, responses: int = 1) -> list[Encoded]:
    """Of lengths between half and whole, so many to a prompt, those of one prompt beside each other."""
    generator = torch.Generator().manual_seed(1)
    found: list[Encoded] = []
    for i, size in enumerate(torch.randint(length // 2, length + 1, (number,), generator=generator).tolist()):
        ids = torch.randint(3, 1000, (size,), generator=generator).tolist()
        prompt = found[-1][0] if i % responses else tuple(ids[: size // 3])
        found.append((prompt, tuple(ids[size // 3 :])))
    return found


@dataclass(frozen=True)
class Timing:
    """Seconds of a pass: median over the rounds, and the median of its ratios to the one model's of the same round."""

    wall: float
    cpu: float
    wall_ratio: float
    cpu_ratio: float


def interleaved(passes: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Each pass's timing, taken turn by turn; one untimed round comes first."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in passes}
    for turn in range(rounds + 1):
        for name, run in passes.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if turn:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    one = seconds["one"]
    return {
        name: Timing(
            statistics.median(wall for wall, _ in of),
            statistics.median(cpu for _, cpu in of),
            statistics.median(wall / other for (wall, _), (other, _) in zip(of, one, strict=True)),
            statistics.median(cpu / other for (_, cpu), (_, other) in zip(of, one, strict=True)),
        )
        for name, of in seconds.items()
    }


def _model(path: Path) -> RewardModel:
    return RewardModel.from_any(path, pooling="last", seed=0, dtype=torch.float32, pad_id=PAD)


def main(arguments: Sequence[str] | None = None, results: Path = RESULTS) -> dict[str, Any]:
    """Measure, print and append.

    Args:
        arguments: None takes the process's own.
        results: JSON lines to append to.

    Returns:
        The row.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, default=None, help="a decoder's directory (default: random weights)")
    parser.add_argument("--hidden", type=int, default=192, help="of the random one (default 192)")
    parser.add_argument("--layers", type=int, default=4, help="of the random one (default 4)")
    parser.add_argument("--domains", type=int, default=10, help="adapters (default 10)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default 8)")
    parser.add_argument("--texts", type=int, default=256, help="to score (default 256)")
    parser.add_argument("--tokens", type=int, default=64, help="of the longest (default 64)")
    parser.add_argument("--batch-size", type=int, default=64, help="texts per forward pass (default 64)")
    parser.add_argument("--rounds", type=int, default=9, help="of interleaved passes (default 9)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--responses", type=int, default=1, help="texts to a prompt, all of one domain (default 1)")
    chosen = parser.parse_args(arguments)
    if chosen.responses < 1:
        parser.error(f"--responses must be at least 1, got {chosen.responses}")
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = chosen.backbone or backbone(folder, chosen.hidden, chosen.layers, chosen.tokens)
        made = adapters(path, folder, chosen.domains, chosen.rank)
        one, bank, grouped = _model(path), open_bank(_model(path), made), GroupedBank(_model(path), made)
        if not isinstance(bank, MixedBank):
            raise UserError(
                f"--backbone {path} cannot mix domains in a batch, so that there is nothing to compare: its adapters are set one "
                "after another. Expected a decoder whose linear layers are all given a row for each text; give another"
            )
        sequences = texts(chosen.texts, chosen.tokens, chosen.responses)
        domains = [made[i // chosen.responses % len(made)][0] for i in range(len(sequences))]
        size = chosen.batch_size
        passes: dict[str, Callable[[], object]] = {
            "one": lambda: score_sequences(one, sequences, size, PAD),
            "mixed": lambda: bank.scores(sequences, domains, size, PAD),
            "grouped": lambda: grouped.scores(sequences, domains, size, PAD),
            "all": lambda: bank.all_scores(sequences, size, PAD),
        }
        found = interleaved(passes, chosen.rounds)
        parameters = sum(p.numel() for p in one.parameters())
    row: dict[str, Any] = {
        "id": "domains", "parameters": parameters, "domains": chosen.domains, "rank": chosen.rank, "texts": chosen.texts,
        "tokens": chosen.tokens, "batch_size": size, "threads": chosen.threads, "rounds": chosen.rounds,
        "responses": chosen.responses,
    }  # fmt: skip
    for name, timing in found.items():
        row |= {f"{name}_seconds": round(timing.wall, 5), f"{name}_cpu_seconds": round(timing.cpu, 5)}
        if name != "one":
            row |= {f"{name}_ratio": round(timing.wall_ratio, 3), f"{name}_cpu_ratio": round(timing.cpu_ratio, 3)}
    print(", ".join(f"{key} {value}" for key, value in row.items() if key != "id"))
    results.parent.mkdir(exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps({**row, "backbone": str(chosen.backbone or "random"), "versions": versions()}) + "\n")
    return row


if __name__ == "__main__":
    main()
