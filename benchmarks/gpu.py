"""What one GPU makes of a PPO step and of a reward-model step: time, model FLOP utilisation, memory. Needs neither Ray nor vLLM.

    python -m benchmarks.gpu [--cases NAME ...] [--out FILE]

Models have random weights; prompts, response lengths and scores are drawn from a seed. Each case is warmed up once and then
timed ``REPETITIONS`` times; the median counts. Useful FLOPs are counted, whatever was recomputed or padded:

    policy and critic: 6 N T an epoch (4 N T with adapters: no gradient of frozen weights), and 2 N T to evaluate each of
    policy, critic and reference before
    reward model: 6 N T of the pairs, and 6 N T_S more for MetaRM's ascent on its samples
    scorer: 2 N T

N: parameters that multiply (embeddings left out), T: real tokens. Attention's own products are not counted. MFU is against the
datasheet's dense bfloat16 peak, and against a matrix product measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.distributed._composable import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.modeling_layers import GradientCheckpointingLayer

from policy.config import PolicyConfig
from policy.critic import Critic
from policy.lora import add_adapters
from policy.ppo import PPO
from rm.batches import score_sequences
from rm.config import MetaConfig, RewardConfig
from rm.model import RewardModel
from rm.training import fit_reward_model
from tokens.config import AdapterConfig
from tokens.lora import WithoutAdapters
from tokens.offload import move_module
from tokens.packing import PACKED
from tokens.ranks import ALONE
from tokens.records import Pair, Prompt, Rollout
from tokens.weights import cast, in_chunks

PEAK = 989e12
"""Dense bfloat16 FLOP/s of an H100 SXM and an H200, as their datasheets say."""
REPETITIONS = 3
PROMPT, LIMIT, ROLLOUTS = 256, 512, 32
SHAPES = {"0.1B": (768, 2048, 12, 12, 12), "1B": (2048, 8192, 16, 32, 8), "7B": (4096, 11008, 32, 32, 32)}
"""Hidden size, intermediate size, layers, heads, key-value heads; each over 32,000 ids."""
DEVICE = "cuda"


def shape(name: str) -> LlamaConfig:
    """A Llama of that size over 32,000 ids, with its own output head."""
    hidden, inner, layers, heads, kv_heads = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=32_000, max_position_embeddings=2048, pad_token_id=0, bos_token_id=None,
        eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    config.num_labels = 1
    return config


def make(kind: Any, size: str, dtype: torch.dtype, attention: str) -> Any:
    """A model of random weights, on the GPU."""
    config = shape(size)
    config._attn_implementation = attention
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


def multiplying(model: torch.nn.Module) -> int:
    """Parameters that take part in matrix products: all but the embedding and adapters."""
    return sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name and "lora_" not in name)


def draw_rollouts(seed: int) -> tuple[list[Rollout], torch.Tensor]:
    """Prompts of half to all of PROMPT tokens, log-normal response lengths up to LIMIT, and scores."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(PROMPT // 2, PROMPT + 1, (ROLLOUTS,), generator=generator).tolist()
    lengths = (200 * torch.randn(ROLLOUTS, generator=generator).mul(0.6).exp()).clamp(8, LIMIT).int().tolist()
    rollouts = []
    for number, (p, r) in enumerate(zip(prompts, lengths, strict=True)):
        ids = torch.randint(2, 32_000, (p + r,), generator=generator).tolist()
        record = Prompt(str(number), "", tuple(ids[:p]))
        rollouts.append(Rollout(record, 0, tuple(ids[p:]), "", (-10.4,) * r, 0, r < LIMIT))
    return rollouts, torch.randn(ROLLOUTS, generator=generator)


def recompute_layers(model: torch.nn.Module) -> None:
    """As ``actors.ranks.recompute_layers``, which cannot be imported where there is no Ray."""
    for layer in [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]:
        checkpoint(layer)


def compute() -> Any:
    """The context that the actors compute in with ``dtype: bfloat16``."""
    return torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False)


def timed(work: Callable[[], Any]) -> tuple[float, float, float]:
    """Median seconds of a warmed-up piece of work, the spread over the median, and its peak memory in GiB."""
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    middle = statistics.median(seconds)
    return middle, (max(seconds) - min(seconds)) / middle, torch.cuda.max_memory_allocated() / 2**30


def gemm() -> float:
    """FLOP/s of an 8192^3 bfloat16 product of random numbers."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seconds, _, _ = timed(lambda: [a @ b for _ in range(20)])
    return float(20 * 2 * 8192**3 / seconds)


def learner_step(size: str, packed: bool, recompute: bool, rank: int, entropy: bool = False) -> dict[str, Any]:
    """One PPO update of 32 rollouts in one minibatch, one epoch: three evaluations, two backward passes, two optimizer steps."""
    attention = PACKED if packed else "sdpa"
    trained = torch.bfloat16 if rank else torch.float32
    policy = make(LlamaForCausalLM, size, trained, attention)
    value_model = make(LlamaForSequenceClassification, size, trained, attention)
    n_policy, n_critic = multiplying(policy), multiplying(value_model)
    if rank:
        adapters = AdapterConfig(rank=rank, alpha=2 * rank)
        add_adapters(policy, adapters, seed=0)
        add_adapters(value_model, adapters, seed=1, head="score")
        reference: Any = WithoutAdapters(policy)
    else:
        reference = make(LlamaForCausalLM, size, torch.bfloat16, attention)
    if recompute:
        recompute_layers(policy)
        recompute_layers(value_model)
    settings = {"microbatch_tokens": 4096, "packing": True} if packed else {"microbatch_size": 8}
    config = PolicyConfig.model_validate(
        {"prompts_per_step": ROLLOUTS, "minibatch_size": ROLLOUTS, "entropy_coef": 0.01 if entropy else 0.0,
         "importance_cap": None} | settings
    )  # fmt: skip
    ppo = PPO(policy, Critic(value_model), reference, config, temperature=1.0, pad_id=0, seed=0)
    rollouts, scores = draw_rollouts(0)
    tokens = sum(len(r.prompt.token_ids) + len(r.response_ids) for r in rollouts)

    def work() -> None:
        with compute():
            ppo.update(rollouts, scores)

    seconds, spread, memory = timed(work)
    training = 4 if rank else 6
    flops = tokens * ((training + 2) * n_policy + (training + 2) * n_critic + 2 * n_policy)
    return {"seconds": seconds, "spread": spread, "tokens": tokens, "tokens_per_s": tokens / seconds, "flops": flops,
            "peak_gib": memory, "parameters": n_policy}  # fmt: skip


def reward_step(size: str, packed: bool, recompute: bool, meta: bool) -> dict[str, Any]:
    """Steps of 16 pairs, with MetaRM on 4 prompts of 5 samples or without."""
    model = RewardModel(make(LlamaForSequenceClassification, size, torch.float32, "sdpa"), "last", (1,))
    if recompute:
        recompute_layers(model)
    steps, batch = 4, 16
    rollouts = [r for seed in range(2 * steps * batch // ROLLOUTS) for r in draw_rollouts(seed)[0]]
    pairs = [
        Pair(str(i), a.prompt.token_ids, (*a.response_ids, 1), (*b.response_ids, 1))
        for i, (a, b) in enumerate(zip(rollouts[::2], rollouts[1::2], strict=True))
    ]
    samples = draw_rollouts(99)[0] + draw_rollouts(98)[0]
    groups = [[(samples[5 * g].prompt.token_ids, s.response_ids) for s in samples[5 * g : 5 * g + 5]] for g in range(12)]
    config = RewardConfig(epochs=1, lr=1e-6, batch_size=batch, microbatch_size=8, packing=packed)
    meta_config = MetaConfig(enabled=meta, eta=1e-6, prompts_per_step=4, num_prompts=10, samples_per_prompt=5)
    moments: list[float] = []

    def work() -> None:
        moments.clear()
        with compute():
            fit_reward_model(
                model, pairs, groups if meta else None, config, meta_config, seed=0, pad_id=0,
                on_step=lambda step: moments.append(_now()),
            )  # fmt: skip

    work()
    torch.cuda.reset_peak_memory_stats()
    work()
    seconds = [b - a for a, b in zip(moments, moments[1:], strict=False)]
    tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs) / steps
    shifted = 4 * sum(len(p) + len(r) for group in groups for p, r in group) / len(groups) if meta else 0.0
    middle = statistics.median(seconds)
    return {"seconds": middle, "spread": (max(seconds) - min(seconds)) / middle, "tokens": tokens, "meta_tokens": shifted,
            "flops": 6 * multiplying(model) * (tokens + shifted), "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "parameters": multiplying(model)}  # fmt: skip


def scorer(size: str) -> dict[str, Any]:
    """One reward model scores 64 responses, as the scorer does it."""
    model = RewardModel(make(LlamaForSequenceClassification, size, torch.bfloat16, "sdpa"), "last", (1,))
    rollouts = draw_rollouts(0)[0] + draw_rollouts(1)[0]
    sequences = [(r.prompt.token_ids, r.response_ids) for r in rollouts]
    tokens = sum(len(p) + len(r) for p, r in sequences)

    def work() -> None:
        with compute():
            score_sequences(model, sequences, 16, 0, ALONE)

    seconds, spread, memory = timed(work)
    n = multiplying(model)
    return {"seconds": seconds, "spread": spread, "tokens": tokens, "tokens_per_s": tokens / seconds, "flops": 2 * n * tokens,
            "peak_gib": memory, "parameters": n}  # fmt: skip


def sync(size: str) -> dict[str, Any]:
    """Weights on their way, in bfloat16 and pieces of 256 MiB, without an engine at the other end.

    ``store``: gathered, cast and packed into host memory, the learner's part of ``rollout.sync: store``. ``ipc``: packed on
    the GPU and copied by another process from there, which is what passes between learner and engine with ``ipc``. ``rest`` and
    ``wake``: policy, critic, reference and both optimizers to pinned host memory and back, the first time and the second.
    """
    policy = make(LlamaForCausalLM, size, torch.float32, "sdpa")
    value_model = make(LlamaForSequenceClassification, size, torch.float32, "sdpa")
    reference = make(LlamaForCausalLM, size, torch.bfloat16, "sdpa")
    config = PolicyConfig.model_validate({"prompts_per_step": ROLLOUTS, "minibatch_size": ROLLOUTS, "microbatch_size": 8})
    ppo = PPO(policy, Critic(value_model), reference, config, temperature=1.0, pad_id=0, seed=0)
    rollouts, scores = draw_rollouts(0)
    with compute():
        ppo.update(rollouts, scores)

    def stream() -> Any:
        return in_chunks(cast(ALONE.stream(policy), torch.bfloat16), 256 << 20)

    num_bytes = sum(chunk.num_bytes for chunk in stream())
    store, spread, _ = timed(lambda: sum(chunk.num_bytes for chunk in stream()))
    row: dict[str, Any] = {"seconds": store, "spread": spread, "bytes": num_bytes, "store_gb_per_s": num_bytes / store / 1e9}
    row["ipc_gb_per_s"] = num_bytes / _ipc_seconds(policy) / 1e9
    trained = sum(4 * 3 * p.numel() for m in (policy, value_model) for p in m.parameters())
    held = trained + sum(2 * p.numel() for p in reference.parameters())
    for cycle in ("first", "second"):
        for name, device in (("rest", "cpu"), ("wake", DEVICE)):
            began = time.perf_counter()
            move_module(policy, device)
            ppo.move_training_state(device)
            row[f"{name}_{cycle}_gb_per_s"] = held / (time.perf_counter() - began) / 1e9
            row.setdefault(f"{name}_gib_allocated", torch.cuda.memory_allocated() / 2**30)
    return row


def _ipc_seconds(policy: torch.nn.Module) -> float:
    """Median seconds that another process takes to copy all weights from this one's memory."""
    context = torch.multiprocessing.get_context("spawn")
    pieces, taken = context.Queue(), context.Queue()
    child = context.Process(target=_take, args=(pieces, taken), daemon=True)
    child.start()

    last = len(policy.state_dict())

    def once() -> None:
        piece: list[torch.Tensor] = []
        for number, (_, tensor) in enumerate(ALONE.stream(policy), 1):
            piece.append(tensor.to(torch.bfloat16).flatten())
            if sum(x.numel() for x in piece) >= 128 << 20 or number == last:
                packed = torch.cat(piece)
                torch.cuda.synchronize()
                pieces.put(packed)
                taken.get()
                piece.clear()

    seconds, _, _ = timed(once)
    pieces.put(None)
    child.join(20)
    return seconds


def _take(pieces: Any, taken: Any) -> None:
    while (piece := pieces.get()) is not None:
        torch.empty_like(piece).copy_(piece)
        torch.cuda.synchronize()
        del piece
        taken.put(True)


def _now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "learner-0.1B": lambda: learner_step("0.1B", False, False, 0),
    "learner-0.1B-packed": lambda: learner_step("0.1B", True, False, 0),
    "learner-1B": lambda: learner_step("1B", False, False, 0),
    "learner-1B-recompute": lambda: learner_step("1B", False, True, 0),
    "learner-1B-packed": lambda: learner_step("1B", True, False, 0),
    "learner-1B-packed-recompute": lambda: learner_step("1B", True, True, 0),
    "learner-1B-packed-entropy": lambda: learner_step("1B", True, False, 0, entropy=True),
    "learner-1B-packed-lora": lambda: learner_step("1B", True, False, 16),
    "learner-7B-packed-recompute-lora": lambda: learner_step("7B", True, True, 16),
    "scorer-1B": lambda: scorer("1B"),
    "sync-1B": lambda: sync("1B"),
    "reward-1B": lambda: reward_step("1B", False, False, False),
    "reward-1B-packed": lambda: reward_step("1B", True, False, False),
    "reward-1B-metarm": lambda: reward_step("1B", False, False, True),
    "reward-1B-packed-metarm": lambda: reward_step("1B", True, False, True),
}


def main() -> None:
    """Run the cases, print a line for each, and append it to the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.jsonl")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this benchmark measures a GPU")
    import transformers

    roof = gemm()
    common = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"), "device": torch.cuda.get_device_name(),
        "torch": torch.__version__, "transformers": transformers.__version__, "gemm_flops": roof, "peak_flops": PEAK,
    }  # fmt: skip
    print(f"{common['device']}: {roof / 1e12:.0f} TFLOP/s in a bfloat16 product of 8192^3", flush=True)
    for name in options.cases:
        torch.cuda.empty_cache()
        try:
            row = CASES[name]()
        except torch.cuda.OutOfMemoryError as error:
            print(f"{name}: out of memory ({str(error).splitlines()[0]})", flush=True)
            continue
        if "flops" in row:
            row |= {"mfu": row["flops"] / row["seconds"] / PEAK, "mfu_of_gemm": row["flops"] / row["seconds"] / roof}
        with options.out.open("a") as file:
            file.write(json.dumps({"case": name, **row, **common}) + "\n")
        if "mfu" not in row:
            print(f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in row.items() if "_per_s" in key), flush=True)
            continue
        print(
            f"{name}: {row['seconds']:.3f} s (spread {row['spread']:.0%}), MFU {row['mfu']:.1%} ({row['mfu_of_gemm']:.1%} of the "
            f"product), peak {row['peak_gib']:.1f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
