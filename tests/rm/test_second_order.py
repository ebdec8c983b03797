"""The gradient through theta' against float64 references that differentiate the whole of L(theta + eta grad J)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.func import functional_call, grad

import rm.second_order
from rm.config import Order
from rm.losses import bradley_terry_loss, difference_loss
from rm.metarm import metarm_gradient
from rm.model import RewardModel
from rm.second_order import hessian_product
from tokens.errors import UserError
from tokens.ranks import Ranks
from tokens.records import SequenceBatch

Parameters = dict[str, Tensor]


class Problem:
    """A smooth float64 model on feature vectors, pairs and shifted samples."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        self.chosen, self.rejected = torch.randn(2, 7, 4, dtype=torch.float64)
        self.shifted = torch.randn(4, 3, 4, dtype=torch.float64)
        self.theta = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def ascend(self) -> Tensor:
        return difference_loss(self.model(self.shifted).squeeze(-1))

    def descend(self) -> Tensor:
        return bradley_terry_loss(self.model(self.chosen).squeeze(-1), self.model(self.rejected).squeeze(-1), 7)

    def gradient(self, eta: float) -> Tensor:
        """What ``metarm_gradient`` leaves behind."""
        metarm_gradient(self.model.parameters(), self.ascend, self.descend, eta, order=2)
        return torch.cat([p.grad.reshape(-1) for p in self.model.parameters() if p.grad is not None])

    def j(self, at: Parameters) -> Tensor:
        scores = functional_call(self.model, at, (self.shifted,)).squeeze(-1)
        gaps = (scores[:, :, None] - scores[:, None, :]).abs()
        return (torch.sigmoid(gaps).sum((1, 2)) - 1.5).mean() / 9

    def loss(self, at: Parameters) -> Tensor:
        chosen, rejected = (functional_call(self.model, at, (x,)).squeeze(-1) for x in (self.chosen, self.rejected))
        return torch.log1p(torch.exp(rejected - chosen)).mean()

    def through(self, at: Parameters, eta: float) -> Tensor:
        """L(theta + eta grad J(theta)), a function of theta."""
        ascent = grad(self.j)(at)
        return self.loss({name: value + eta * ascent[name] for name, value in at.items()})


def flat(parameters: Parameters) -> Tensor:
    return torch.cat([value.reshape(-1) for value in parameters.values()])


@pytest.mark.parametrize("eta", [0.0, 0.1, 3.0])
def test_it_is_the_total_derivative(eta: float) -> None:
    problem = Problem()
    expected = flat(grad(lambda at: problem.through(at, eta))(problem.theta))
    torch.testing.assert_close(problem.gradient(eta), expected, rtol=0, atol=1e-12)
    for name, parameter in problem.model.named_parameters():
        assert torch.equal(parameter, problem.theta[name])


def test_it_equals_finite_differences() -> None:
    problem, eta, h = Problem(), 0.5, 1e-5
    got, slopes = problem.gradient(eta), []
    for name, value in problem.theta.items():
        for index in range(value.numel()):
            ends = []
            for sign in (1, -1):
                at = {n: v.clone() for n, v in problem.theta.items()}
                at[name].view(-1)[index] += sign * h
                ends.append(problem.through(at, eta))
            slopes.append((ends[0] - ends[1]) / (2 * h))
    torch.testing.assert_close(got, torch.stack(slopes), rtol=0, atol=1e-8)


def test_it_is_the_expansion_with_both_hessians_up_to_eta_squared() -> None:
    problem = Problem()
    gl, gj = grad(problem.loss)(problem.theta), grad(problem.j)(problem.theta)
    of_l = flat(grad(lambda at: flat(grad(problem.loss)(at)) @ flat(gj))(problem.theta))  # H_L gJ
    of_j = flat(grad(lambda at: flat(grad(problem.j)(at)) @ flat(gl))(problem.theta))  # H_J gL
    etas = [0.1, 0.03, 0.01, 0.003]
    errors, without = [], []
    for eta in etas:
        got = problem.gradient(eta)
        errors.append(float((got - flat(gl) - eta * (of_l + of_j)).norm()))
        without.append(float((got - flat(gl) - eta * of_l).norm()))  # the expansion of order 1

    def exponent(values: list[float]) -> float:
        x, y = torch.tensor(etas).log(), torch.tensor(values).log()
        return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())

    assert 1.9 < exponent(errors) < 2.1
    assert 0.9 < exponent(without) < 1.1


class Transformer:
    """A two-layer Llama in float64, four pairs, and two prompts of three responses."""

    def __init__(self, make_model: Callable[..., RewardModel]) -> None:
        self.model = make_model("mean", dtype=torch.float64)
        self.ids = torch.randint(3, 50, (14, 9))
        self.response = (torch.arange(9) >= 4).expand(14, 9)

    def scores(self, rows: slice, at: Parameters | None = None) -> Tensor:
        batch = SequenceBatch(self.ids[rows], torch.ones_like(self.response[rows]), self.response[rows])
        found: Tensor = self.model(batch) if at is None else functional_call(self.model, at, (batch,))
        return found

    def ascend(self, at: Parameters | None = None) -> Tensor:
        return difference_loss(self.scores(slice(8, 14), at).view(2, 3))

    def descend(self, at: Parameters | None = None) -> Tensor:
        return bradley_terry_loss(self.scores(slice(0, 4), at), self.scores(slice(4, 8), at), 4)


def test_through_a_transformer_with_fused_attention(make_model: Callable[..., RewardModel]) -> None:
    problem, eta = Transformer(make_model), 0.05
    theta = dict(problem.model.named_parameters())
    found: dict[Order, Tensor] = {}
    for order in (1, 2):
        metarm_gradient(theta.values(), problem.ascend, problem.descend, eta, order=order)
        found[order] = flat({name: p.grad.clone() for name, p in theta.items() if p.grad is not None})
    problem.model.model.set_attn_implementation("eager")  # the reference's own attention, which can be differentiated twice
    ascent = torch.autograd.grad(problem.ascend(), list(theta.values()), create_graph=True)
    moved = {name: p + eta * g for (name, p), g in zip(theta.items(), ascent, strict=True)}
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(problem.descend(moved), list(theta.values()))])
    torch.testing.assert_close(found[2], expected, rtol=0, atol=1e-6)
    assert float((found[1] - expected).abs().max()) > 1e-3  # what differentiating through theta' adds


def test_a_model_that_cannot_be_differentiated_twice_is_refused(
    make_model: Callable[..., RewardModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Transformer(make_model)
    monkeypatch.setattr(rm.second_order, "sdpa_kernel", lambda backend: contextlib.nullcontext())
    with pytest.raises(UserError, match=r"cannot be differentiated twice.*meta\.order to 1"):
        metarm_gradient(problem.model.parameters(), problem.ascend, problem.descend, 0.1, order=2)


def test_other_errors_are_passed_on() -> None:
    def fail() -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        hessian_product(fail, [nn.Parameter(torch.ones(2))], [torch.ones(2)])


def test_a_linear_function_has_no_hessian_and_an_unused_parameter_no_row() -> None:
    used, unused = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.ones(3))
    vectors = [torch.tensor([5.0, 7.0]), torch.ones(3)]
    linear = hessian_product(lambda: 3 * used.sum(), [used, unused], vectors)
    assert [h.tolist() for h in linear] == [[0.0, 0.0], [0.0, 0.0, 0.0]]
    square = hessian_product(lambda: (used**2).sum() + used[0] * used[1], [used, unused], vectors)
    assert [h.tolist() for h in square] == [[17.0, 19.0], [0.0, 0.0, 0.0]]  # [[2, 1], [1, 2]] v
    assert used.grad is None


def test_what_order_two_needs() -> None:
    class TwoProcesses:
        def size(self) -> int:
            return 2

    problem = Problem()
    closures = (problem.model.parameters(), problem.ascend, problem.descend, 0.1)
    with pytest.raises(UserError, match="2 ranks"):
        metarm_gradient(*closures, order=2, ranks=Ranks(0, 2, cast(DeviceMesh, TwoProcesses())))
    with pytest.raises(UserError, match="'random'"):
        metarm_gradient(*closures, order=2, direction="random", generator=torch.Generator())
