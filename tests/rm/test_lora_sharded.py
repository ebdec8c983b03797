"""Two processes that share a model with adapters: packed scores, gradients, export and adapter are those of one process."""

import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, multiprocessing

from rm.batches import Encoded, score_sequences, scores_and_features_of
from rm.config import LoraConfig
from rm.lora import add_lora, load_adapter, save_adapter
from rm.model import RewardModel
from tokens.ranks import ALONE, Ranks, full
from tokens.recompute import recompute_layers

PAD, BOS, EOS = 0, 1, 2


def sequences() -> list[Encoded]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 9, (6,), generator=generator).tolist()
    return [((BOS, 5 + i), (*torch.randint(5, 50, (n,), generator=generator).tolist(), EOS)) for i, n in enumerate(lengths)]


def train(path: Path, out: Path, ranks: Ranks) -> dict[str, Any]:
    model = RewardModel.from_any(path, pooling="mean", seed=1, dtype=torch.float32, pad_id=PAD)
    add_lora(model, LoraConfig(rank=2), seed=1)
    recompute_layers(model)
    ranks.shard(model)
    rows = sequences()
    own = [rows[i] for i in ranks.share(torch.arange(6)).tolist()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(2):
        optimizer.zero_grad()
        with model.dropout(0):
            scores, features = scores_and_features_of(model, own, PAD, 2, packing=True)
        (scores.square().sum() + 0.1 * features.square().sum()).backward()
        optimizer.step()
    model.save_pretrained(out / "merged", ranks)
    save_adapter(model, out / "adapter", ranks)
    scores = score_sequences(model, rows, 2, PAD, ranks, packing=True)
    slopes = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {"scores": scores, "slopes": slopes}


def on_rank(rank: int, port: int, path: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    torch.save(train(path, folder, Ranks(rank, 2, distributed.init_device_mesh("cpu", (2,)))), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_train_the_adapters_that_one_process_trains(language_model: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    multiprocessing.spawn(on_rank, args=(port, language_model, two), nprocs=2)  # type: ignore[no-untyped-call]
    wanted = train(language_model, one, ALONE)
    for rank in range(2):
        got = torch.load(two / f"{rank}.pt", weights_only=False)
        torch.testing.assert_close(got["scores"], wanted["scores"], rtol=0, atol=1e-5)
        assert got["slopes"].keys() == wanted["slopes"].keys()
        for name, slope in wanted["slopes"].items():
            torch.testing.assert_close(got["slopes"][name], slope, rtol=1e-3, atol=1e-4, msg=name)
    for file in ("merged/model.safetensors", "adapter/adapter_model.safetensors"):
        left, right = load_file(two / file), load_file(one / file)
        assert left.keys() == right.keys()
        for name, value in right.items():
            torch.testing.assert_close(left[name], value, rtol=0, atol=1e-5, msg=name)
    fresh = RewardModel.from_any(language_model, pooling="mean", seed=2, dtype=torch.float32)
    load_adapter(fresh, two / "adapter")
    torch.testing.assert_close(score_sequences(fresh, sequences(), 3, PAD), wanted["scores"], rtol=0, atol=1e-5)
