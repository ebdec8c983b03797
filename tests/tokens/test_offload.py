"""Models and optimizers that go and come back: the same bits, the same objects, the same training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tokens.offload import move_module, move_optimizer

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


class Tied(nn.Module):
    """Embedding and head are one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor([0.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.middle(self.embedding(x)))) * self.scale
        return logits


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    device = next(model.parameters()).device
    x, losses = torch.arange(12, device=device), []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), x.roll(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_round_trip_changes_nothing(device: str) -> None:
    torch.manual_seed(0)
    model = Tied().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    train(model, optimizer, 3)
    other = copy.deepcopy(model)
    theirs = torch.optim.AdamW(other.parameters(), lr=0.05)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = list(model.parameters())
    bits = {name: x.detach().cpu().clone() for name, x in model.state_dict().items()}
    for target in ("cpu", device):
        move_module(model, target)
        move_optimizer(optimizer, target)
        assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {target}
        moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        assert len(moments) == 6 and {moment.device.type for moment in moments} == {target}
        assert all(state["step"].device.type == "cpu" for state in optimizer.state.values())
        assert all(a is b for a, b in zip(model.parameters(), before, strict=True)), "the optimizer holds these"
        assert model.head.weight is model.embedding.weight
    assert all(torch.equal(x.cpu(), bits[name]) for name, x in model.state_dict().items())
    assert train(model, optimizer, 4) == train(other, theirs, 4)


def test_an_optimizer_that_has_not_stepped_has_nothing_to_move() -> None:
    optimizer = torch.optim.AdamW(Tied().parameters())
    move_optimizer(optimizer, "cpu")
    assert not optimizer.state


@pytest.mark.gpu
def test_the_memory_of_a_gpu_is_free_and_the_hosts_is_pinned() -> None:
    model = nn.Linear(4096, 4096, bias=False, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4096, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    held = torch.cuda.memory_reserved()
    move_module(model, "cpu")
    move_optimizer(optimizer, "cpu")
    assert held - torch.cuda.memory_reserved() >= 3 * 4096 * 4096 * 4
    assert model.weight.is_pinned() and optimizer.state[model.weight]["exp_avg"].is_pinned()
