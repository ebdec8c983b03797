"""The MetaRM step on parameters sharded by FSDP2 over two processes equals the step on one."""

import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

from rm.losses import bradley_terry_loss, difference_loss
from rm.metarm import metarm_gradient
from rm.records import MetaStep

ETA = 0.3


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    return model, torch.randn(2, 8, 6, dtype=torch.float64), torch.randn(4, 3, 6, dtype=torch.float64)


def step(model: nn.Module, pairs: Tensor, shifted: Tensor, num_pairs: int, num_prompts: int) -> MetaStep:
    return metarm_gradient(
        model.parameters(),
        lambda: difference_loss(model(shifted).squeeze(-1), num_prompts),
        lambda: bradley_terry_loss(model(pairs[0]).squeeze(-1), model(pairs[1]).squeeze(-1), num_pairs),
        ETA,
    )


def on_rank(rank: int, port: int, folder: str) -> None:
    """Half of the pairs and of the prompts each; FSDP2 averages the two gradients."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, pairs, shifted = problem()
    fully_shard(model)
    before = [p.detach().full_tensor() for p in model.parameters()]  # type: ignore[attr-defined]
    got = step(model, pairs[:, rank * 4 : rank * 4 + 4], shifted[rank * 2 : rank * 2 + 2], 4, 2)
    gradient = [p.grad.full_tensor() for p in model.parameters()]  # type: ignore[union-attr]
    after = [p.detach().full_tensor() for p in model.parameters()]  # type: ignore[attr-defined]
    if rank == 0:
        norms = torch.tensor([got.displacement, got.ascent_norm, got.gradient_norm, got.alignment_cos], dtype=torch.float64)
        restored = torch.tensor([torch.equal(a, b) for a, b in zip(before, after, strict=True)])
        torch.save([*gradient, norms, restored], Path(folder) / "rank0.pt")
    distributed.destroy_process_group()


@pytest.mark.slow  # two processes that import torch: seconds on a free machine, a minute on a busy one
def test_two_shards_equal_one_process(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(on_rank, args=(port, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    *gradient, norms, restored = torch.load(tmp_path / "rank0.pt", weights_only=True)
    model, pairs, shifted = problem()
    expected = step(model, pairs, shifted, 8, 4)
    for got, parameter in zip(gradient, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=0, atol=1e-12)
    wanted = [expected.displacement, expected.ascent_norm, expected.gradient_norm, expected.alignment_cos]
    torch.testing.assert_close(norms, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-10)
    assert bool(restored.all())
