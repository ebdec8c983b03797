"""Two processes that share a reward model fit what one process fits, also where a batch leaves one without rows."""

import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from rm.batches import Encoded, score_sequences
from rm.config import LoraConfig, MetaConfig, Pooling, RewardConfig
from rm.lora import add_lora
from rm.model import RewardModel
from rm.records import RewardStep
from rm.resume import Saves
from rm.training import Watch, fit_reward_model
from rm.validation import score_sets
from tokens.errors import UserError
from tokens.ranks import ALONE, Ranks
from tokens.records import Pair
from tokens.saved_state import SavedState, latest_state, save_state

PAD, BOS, EOS = 0, 1, 2
TOLERANCE = 1e-6
CASES: dict[str, tuple[Pooling, MetaConfig]] = {
    "metarm": ("last", MetaConfig(eta=0.05, prompts_per_step=3)),
    "metarm of one prompt": ("mean", MetaConfig(eta=0.05, prompts_per_step=1, deploy="theta_prime")),
    "random direction": ("mean", MetaConfig(eta=0.05, prompts_per_step=3, direction="random", deploy="theta_prime")),
    "descent": ("mean", MetaConfig(eta=0.05, prompts_per_step=3, direction="descent")),
    "metarm of adapters": ("mean", MetaConfig(eta=0.05, prompts_per_step=3, deploy="theta_prime")),
    "joint": ("mean", MetaConfig(objective="joint", prompts_per_step=3)),
    "vanilla": ("mean", MetaConfig(enabled=False)),
    "stopped early": ("mean", MetaConfig(enabled=False)),
}


def words(generator: torch.Generator) -> tuple[int, ...]:
    length = int(torch.randint(1, 8, (1,), generator=generator))
    return (*torch.randint(5, 50, (length,), generator=generator).tolist(), EOS)


def data() -> tuple[list[Pair], list[list[Encoded]]]:
    """17 pairs: the last batch of 8 is one pair, which leaves the second of two ranks without any. 6 prompts of 3 responses, one
    of which has a single distinct response: the ranks have unequally much to score.
    """
    generator = torch.Generator().manual_seed(3)
    pairs = [Pair(f"p{i}", (BOS, 5 + i % 4), words(generator), words(generator)) for i in range(17)]
    groups = [[((BOS, 5 + i), words(generator)) for _ in range(3)] for i in range(6)]
    groups[2] = groups[2][:1] * 3
    return pairs, groups


def fit(language_model: Path, case: str, out: Path, ranks: Ranks, saves: Saves | None = None) -> dict[str, Any]:
    """Fit, evaluate, save as the actor does; what was reported."""
    pooling, meta = CASES[case]
    pairs, shifted = data()
    model = RewardModel.from_language_model(language_model, pooling=pooling, seed=1, dtype=torch.float64)
    if case == "metarm of adapters":
        add_lora(model, LoraConfig(rank=2), seed=1)
    ranks.shard(model)
    steps: list[RewardStep] = []
    reward = RewardConfig(lr=1e-3, batch_size=8, microbatch_size=3, max_grad_norm=0.5)  # several passes, one backward
    watch = Watch(1, lambda step: -float(step), 1) if case == "stopped early" else None  # after step 2, for step 1
    result = fit_reward_model(model, pairs, shifted, reward, meta, 5, PAD, steps.append, ranks, watch, saves=saves)
    ranked = score_sets(model, {"all": pairs}, 4, PAD, ranks)["all"]
    scores = score_sequences(model, [sequence for group in shifted for sequence in group], 4, PAD, ranks)
    none = score_sequences(model, [], 4, PAD, ranks)
    model.save_pretrained(out, ranks)
    summary = {k: v for k, v in result.as_dict().items() if v is not None} | {
        "all/accuracy": ranked.accuracy,
        "all/loss": ranked.loss,
    }
    return {"summary": summary, "steps": [step.as_dict() for step in steps], "scores": torch.cat([scores, none])}


def check_resume(language_model: Path, case: str, folder: Path, ranks: Ranks) -> None:
    """A fit of both ranks that goes on after its first step comes to the same."""

    def write(done: int, state: SavedState) -> None:
        assert bool(state.tensors) == (ranks.rank == 0)
        if done == 1 and ranks.rank == 0:
            save_state(folder / "saved", done, state)

    whole = fit(language_model, case, folder / "whole", ranks, Saves(1, write))
    distributed.barrier()
    state = latest_state(folder / "saved")
    assert state is not None and state.values["done"] == 1
    again = fit(language_model, case, folder / "again", ranks, Saves(9, write, state))
    assert again["summary"] == whole["summary"] and again["steps"] == whole["steps"] and again["scores"].equal(whole["scores"])


def on_rank(rank: int, port: int, language_model: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    ranks = Ranks(rank, 2, distributed.init_device_mesh("cpu", (2,)))
    reports = {case: fit(language_model, case, folder / case, ranks) for case in CASES}
    torch.save(reports, folder / f"reports_{rank}.pt")
    for case in ("metarm", "metarm of adapters", "stopped early"):
        check_resume(language_model, case, folder / f"resumed {case}", ranks)
    model = RewardModel.from_language_model(language_model, pooling="last", seed=1, dtype=torch.float32)
    ranks.shard(model)
    if rank == 1:
        weight = next(p for name, p in model.named_parameters() if name.endswith("norm.weight"))
        torch.nn.init.constant_(weight.to_local(), float("nan"))  # type: ignore[operator]
    with pytest.raises(UserError, match=r"meta\.order is 2"):
        fit_reward_model(model, *data(), RewardConfig(), MetaConfig(order=2), 5, PAD, lambda step: None, ranks)
    with pytest.raises(FloatingPointError, match="preference loss"):  # the weights of rank 1 alone are broken: both notice
        fit_reward_model(model, data()[0], None, RewardConfig(), MetaConfig(), 5, PAD, lambda step: None, ranks)
    distributed.destroy_process_group()


def test_two_ranks_fit_what_one_process_fits(language_model: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(on_rank, args=(port, language_model, tmp_path), nprocs=2)  # type: ignore[no-untyped-call]
    of_0, of_1 = (torch.load(tmp_path / f"reports_{rank}.pt", weights_only=False) for rank in (0, 1))
    for case in CASES:
        one = fit(language_model, case, tmp_path / "one" / case, ALONE)
        two = of_0[case]
        assert two["steps"] == of_1[case]["steps"] and two["scores"].equal(of_1[case]["scores"])
        assert two["summary"] == pytest.approx(one["summary"], abs=TOLERANCE, rel=TOLERANCE)
        assert len(two["steps"]) == len(one["steps"]) == (2 if case == "stopped early" else 3)
        for got, wanted in zip(two["steps"], one["steps"], strict=True):
            assert got == pytest.approx(wanted, abs=TOLERANCE, rel=TOLERANCE), case
        torch.testing.assert_close(two["scores"], one["scores"], atol=TOLERANCE, rtol=0)
        left, right = (RewardModel.from_pretrained(path, torch.float64) for path in (tmp_path / case, tmp_path / "one" / case))
        assert left.pooling == right.pooling
        for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0, msg=f"{case}: {name}")
