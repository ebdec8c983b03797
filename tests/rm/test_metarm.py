"""The MetaRM step against float64 references that share no code with it."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from rm.config import Direction, Order
from rm.losses import bradley_terry_loss, difference_loss
from rm.metarm import ascend_in_place, joint_gradient, metarm_gradient
from rm.model import RewardModel
from rm.spread import Separation
from tokens.records import SequenceBatch

Parameters = dict[str, Tensor]
Objective = Callable[[Parameters], Tensor]


class Scorer(nn.Module):
    """A smooth float64 reward model on feature vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def forward(self, features: Tensor) -> Tensor:
        scores: Tensor = self.net(features).squeeze(-1)
        return scores


class Problem:
    """A model, pairs and shifted samples: once as closures for the step, once written out for the references."""

    def __init__(self) -> None:
        self.model: nn.Module = Scorer()
        self.chosen, self.rejected = torch.randn(2, 7, 6, dtype=torch.float64)
        self.shifted = torch.randn(4, 3, 6, dtype=torch.float64)  # [m, k, features]

    def ascend(self) -> Tensor:
        return difference_loss(self.model(self.shifted))

    def descend(self) -> Tensor:
        return bradley_terry_loss(self.model(self.chosen), self.model(self.rejected), 7)

    def reference_j(self, parameters: Parameters) -> Tensor:
        scores = functional_call(self.model, parameters, (self.shifted,))
        gaps = (scores[:, :, None] - scores[:, None, :]).abs()  # both orders of each pair, and the diagonal
        k = scores.shape[1]
        return (torch.sigmoid(gaps).sum((1, 2)) - k * 0.5).mean() / k**2

    def reference_l(self, parameters: Parameters) -> Tensor:
        chosen, rejected = (functional_call(self.model, parameters, (x,)) for x in (self.chosen, self.rejected))
        return torch.log1p(torch.exp(rejected - chosen)).mean()

    def theta(self) -> Parameters:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def reference_step(theta: Parameters, j: Objective, loss: Objective, eta: float) -> Parameters:
    """Algorithm 1 on dictionaries of tensors, by functional differentiation."""
    ascent = grad(j)(theta)
    moved = {name: value + eta * ascent[name] for name, value in theta.items()}
    return grad(loss)(moved)


def flat(parameters: Parameters) -> Tensor:
    return torch.cat([value.reshape(-1) for value in parameters.values()])


def gradients(model: nn.Module) -> Tensor:
    return flat({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def bits(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().view(torch.int64).reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("eta", [1e-3, 0.1, 3.0])
def test_gradient_equals_functional_reference(eta: float) -> None:
    problem = Problem()
    expected = reference_step(problem.theta(), problem.reference_j, problem.reference_l, eta)
    step = metarm_gradient(problem.model.parameters(), problem.ascend, problem.descend, eta, measure=True)
    torch.testing.assert_close(gradients(problem.model), flat(expected), rtol=0, atol=1e-12)

    theta = problem.theta()
    ascent = grad(problem.reference_j)(theta)
    moved = {name: value + eta * ascent[name] for name, value in theta.items()}
    g, gj = flat(expected), flat(ascent)
    assert step.loss == pytest.approx(float(problem.reference_l(moved)), abs=1e-12)
    assert step.difference == pytest.approx(float(problem.reference_j(theta)), abs=1e-12)
    assert step.difference_ascended == pytest.approx(float(problem.reference_j(moved)), abs=1e-12)
    assert step.displacement == pytest.approx(eta * float(gj.norm()), rel=1e-9)
    assert step.relative_displacement == pytest.approx(eta * float(gj.norm() / flat(theta).norm()), rel=1e-9)
    assert step.ascent_norm == pytest.approx(float(gj.norm()), rel=1e-12)
    assert step.gradient_norm == pytest.approx(float(g.norm()), rel=1e-12)
    assert step.alignment_cos == pytest.approx(float(-g @ gj / (g.norm() * gj.norm())), abs=1e-12)


def test_gradient_equals_finite_differences() -> None:
    problem, eta, h = Problem(), 0.5, 1e-5
    metarm_gradient(problem.model.parameters(), problem.ascend, problem.descend, eta)
    got = gradients(problem.model)
    theta = problem.theta()

    def slope(objective: Objective, at: Parameters) -> Parameters:
        """Central differences, one number at a time."""
        result = {name: torch.zeros_like(value) for name, value in at.items()}
        for name, value in at.items():
            for index in range(value.numel()):
                up, down = ({n: v.clone() for n, v in at.items()} for _ in range(2))
                up[name].view(-1)[index] += h
                down[name].view(-1)[index] -= h
                result[name].view(-1)[index] = (objective(up) - objective(down)) / (2 * h)
        return result

    with torch.no_grad():
        ascent = slope(problem.reference_j, theta)
        expected = slope(problem.reference_l, {name: value + eta * ascent[name] for name, value in theta.items()})
    torch.testing.assert_close(got, flat(expected), rtol=0, atol=1e-8)


def test_gradient_of_a_transformer_equals_functional_reference(make_model: Callable[..., RewardModel]) -> None:
    model = make_model("mean", dtype=torch.float64)
    ids = torch.randint(3, 50, (14, 9))
    response = (torch.arange(9) >= 4).expand(14, 9)

    def batch(rows: slice) -> SequenceBatch:
        return SequenceBatch(ids[rows], torch.ones_like(response[rows]), response[rows])

    # the reference calls the backbone and the head itself
    def scores(parameters: Parameters, rows: slice) -> Tensor:
        backbone = {n.removeprefix("model.model."): p for n, p in parameters.items() if n.startswith("model.model.")}
        hidden = functional_call(model.model.base_model, backbone, (), {"input_ids": ids[rows]}).last_hidden_state
        return hidden[:, 4:].mean(1) @ parameters["model.score.weight"][0]

    def reference_j(parameters: Parameters) -> Tensor:
        s = scores(parameters, slice(8, 14)).view(2, 3)
        return sum((torch.sigmoid((s[:, i] - s[:, j]).abs()).sum() for i, j in [(0, 1), (0, 2), (1, 2)]), torch.zeros(())) / 9

    def reference_l(parameters: Parameters) -> Tensor:
        return torch.log1p(torch.exp(scores(parameters, slice(4, 8)) - scores(parameters, slice(0, 4)))).mean()

    eta = 0.05
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = reference_step(theta, reference_j, reference_l, eta)
    metarm_gradient(
        model.parameters(),
        lambda: difference_loss(model(batch(slice(8, 14))).view(2, 3)),
        lambda: bradley_terry_loss(model(batch(slice(0, 4))), model(batch(slice(4, 8))), 4),
        eta,
    )
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    vanilla = grad(reference_l)(theta)
    assert float((flat(expected) - flat(vanilla)).abs().max()) > 1e-4  # the ascent matters here
    torch.testing.assert_close(flat(got), flat(expected), rtol=0, atol=1e-8)


def test_difference_from_the_first_order_expansion_shrinks_as_eta_squared() -> None:
    problem = Problem()
    theta = problem.theta()
    ascent = grad(problem.reference_j)(theta)
    gradient = grad(problem.reference_l)(theta)  # gL
    curvature = grad(lambda at: flat(grad(problem.reference_l)(at)) @ flat(ascent))(theta)  # H_L gJ
    etas = [0.1, 0.03, 0.01, 0.003]
    errors, without_curvature = [], []
    for eta in etas:
        metarm_gradient(problem.model.parameters(), problem.ascend, problem.descend, eta)
        got = gradients(problem.model)
        errors.append(float((got - flat(gradient) - eta * flat(curvature)).norm()))
        without_curvature.append(float((got - flat(gradient)).norm()))

    def exponent(values: list[float]) -> float:
        x, y = torch.tensor(etas).log(), torch.tensor(values).log()
        return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())

    assert 1.9 < exponent(errors) < 2.1
    assert 0.9 < exponent(without_curvature) < 1.1


def test_theta_comes_back_bit_for_bit() -> None:
    problem = Problem()
    with torch.no_grad():  # values that adding and subtracting again would not restore
        next(problem.model.parameters()).view(-1)[:3] = torch.tensor([1e-300, -0.0, 1e16], dtype=torch.float64)
    before = bits(problem.model)
    metarm_gradient(problem.model.parameters(), problem.ascend, problem.descend, 0.7, measure=True)
    assert torch.equal(bits(problem.model), before)


@pytest.mark.parametrize("measure", [False, True])
def test_an_error_at_the_ascended_parameters_restores_theta(measure: bool) -> None:
    problem = Problem()
    before = bits(problem.model)
    seen: list[Tensor] = []

    def fail() -> Tensor:
        seen.append(bits(problem.model))
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        metarm_gradient(problem.model.parameters(), problem.ascend, fail, 0.7, measure=measure)
    assert not torch.equal(seen[0], before)
    assert torch.equal(bits(problem.model), before)
    assert all(p.grad is None for p in problem.model.parameters())


def test_eta_zero_gives_the_vanilla_gradient_exactly() -> None:
    problem = Problem()
    vanilla = copy.deepcopy(problem.model)
    bradley_terry_loss(vanilla(problem.chosen), vanilla(problem.rejected), 7).backward()
    step = metarm_gradient(problem.model.parameters(), problem.ascend, problem.descend, 0.0, measure=True)
    assert torch.equal(gradients(problem.model), gradients(vanilla))
    assert step.displacement == 0.0
    assert step.difference_ascended == step.difference


def test_ascent_raises_j_and_old_gradients_do_not_leak_in() -> None:
    problem = Problem()
    clean = metarm_gradient(problem.model.parameters(), problem.ascend, problem.descend, 0.1, measure=True)
    expected = gradients(problem.model)
    for parameter in problem.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    again = metarm_gradient(problem.model.parameters(), problem.ascend, problem.descend, 0.1, measure=True)
    assert clean.difference_ascended is not None
    assert clean.difference_ascended > clean.difference
    assert again == clean
    assert torch.equal(gradients(problem.model), expected)


def test_frozen_and_unused_parameters() -> None:
    problem = Problem()
    frozen, unused = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(3))
    metarm_gradient([*problem.model.parameters(), frozen, unused], problem.ascend, problem.descend, 0.1)
    assert frozen.grad is None
    assert unused.grad is not None
    assert not bool(unused.grad.any())


def test_all_ties_leave_nothing_to_ascend() -> None:
    problem = Problem()
    problem.shifted[:] = problem.shifted[0, 0]
    step = metarm_gradient(problem.model.parameters(), problem.ascend, problem.descend, 0.1)
    assert (step.displacement, step.alignment_cos, step.difference_ascended) == (0.0, 0.0, None)


@pytest.mark.parametrize("eta", [-0.1, math.nan, math.inf])
def test_bad_eta_is_refused(eta: float) -> None:
    problem = Problem()
    with pytest.raises(ValueError, match="eta"):
        metarm_gradient(problem.model.parameters(), problem.ascend, problem.descend, eta)


def test_nothing_to_train_is_refused() -> None:
    problem = Problem()
    with pytest.raises(ValueError, match="trainable"):
        metarm_gradient([], problem.ascend, problem.descend, 0.1)


@pytest.mark.parametrize(("name", "spoil"), [("J", "shifted"), ("L at theta'", "chosen")])
def test_a_loss_that_is_not_finite_is_named_and_theta_kept(name: str, spoil: str) -> None:
    problem = Problem()
    before = bits(problem.model)
    {"shifted": problem.shifted, "chosen": problem.chosen}[spoil].fill_(math.nan)
    with pytest.raises(FloatingPointError, match=f"{name} is nan"):
        metarm_gradient(problem.model.parameters(), problem.ascend, problem.descend, 0.1)
    assert torch.equal(bits(problem.model), before)


def test_descent_moves_the_other_way() -> None:
    problem, eta = Problem(), 0.3
    expected = reference_step(problem.theta(), problem.reference_j, problem.reference_l, -eta)
    step = metarm_gradient(problem.model.parameters(), problem.ascend, problem.descend, eta, direction="descent", measure=True)
    torch.testing.assert_close(gradients(problem.model), flat(expected), rtol=0, atol=1e-12)
    assert step.difference_ascended is not None
    assert step.difference_ascended < step.difference
    assert step.displacement == pytest.approx(eta * step.ascent_norm, rel=1e-9)


def test_a_random_direction_goes_as_far_as_the_ascent_and_elsewhere_each_time() -> None:
    problem, eta = Problem(), 0.3
    theta = flat(problem.theta())
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(1)
    seen: list[Tensor] = []

    def descend() -> Tensor:
        seen.append(flat(problem.theta()))
        return problem.descend()

    def step(generator: torch.Generator | None) -> Tensor:
        parameters = problem.model.parameters()
        found = metarm_gradient(parameters, problem.ascend, descend, eta, direction="random", generator=generator)
        assert found.displacement == pytest.approx(eta * found.ascent_norm, rel=1e-9)
        return gradients(problem.model)

    first = step(generator)
    step(generator)
    assert torch.equal(step(torch.Generator().manual_seed(1)), first)
    moves = [moved - theta for moved in seen]
    ascent = flat(grad(problem.reference_j)(problem.theta()))
    for move in moves:  # 65 coordinates: two independent directions have |cos| of about 1 / sqrt(65)
        assert abs(float(move @ ascent / (move.norm() * ascent.norm()))) < 0.5
    assert abs(float(moves[0] @ moves[1] / (moves[0].norm() * moves[1].norm()))) < 0.5
    moved = {name: p.detach() for name, p in problem.model.named_parameters()}
    place = 0
    for name, value in moved.items():
        moved[name] = value + moves[2][place : place + value.numel()].view_as(value)
        place += value.numel()
    torch.testing.assert_close(first, flat(grad(problem.reference_l)(moved)), rtol=0, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="generator"):
        step(None)


@pytest.mark.parametrize("order", [1, 2])
def test_losses_may_come_as_terms(order: Order) -> None:
    problem = Problem()
    whole = metarm_gradient(problem.model.parameters(), problem.ascend, problem.descend, 0.7, order=order, measure=True)
    expected = gradients(problem.model)
    ascend = [lambda rows=rows: difference_loss(problem.model(rows), 4) for rows in problem.shifted.split(1)]
    pairs = zip(problem.chosen.split(3), problem.rejected.split(3), strict=True)
    descend = [lambda c=c, r=r: bradley_terry_loss(problem.model(c), problem.model(r), 7) for c, r in pairs]
    step = metarm_gradient(problem.model.parameters(), ascend, descend, 0.7, order=order, measure=True)
    torch.testing.assert_close(gradients(problem.model), expected, rtol=0, atol=1e-12)
    for name in ("loss", "difference", "difference_ascended", "displacement", "gradient_norm", "alignment_cos"):
        assert getattr(step, name) == pytest.approx(getattr(whole, name), abs=1e-12), name
    joint_gradient(problem.model.parameters(), problem.ascend, problem.descend, 0.7)
    expected = gradients(problem.model)
    joint_gradient(problem.model.parameters(), ascend, descend, 0.7)
    torch.testing.assert_close(gradients(problem.model), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("coef", [0.0, 0.7])
def test_the_joint_gradient_equals_the_functional_reference(coef: float) -> None:
    problem = Problem()
    theta, before = problem.theta(), bits(problem.model)
    expected = grad(lambda at: problem.reference_l(at) - coef * problem.reference_j(at))(theta)
    step = joint_gradient(problem.model.parameters(), problem.ascend, problem.descend, coef)
    torch.testing.assert_close(gradients(problem.model), flat(expected), rtol=0, atol=1e-12)
    gl, gj = flat(grad(problem.reference_l)(theta)), flat(grad(problem.reference_j)(theta))
    assert step.loss == pytest.approx(float(problem.reference_l(theta)), abs=1e-12)
    assert step.difference == pytest.approx(float(problem.reference_j(theta)), abs=1e-12)
    assert step.ascent_norm == pytest.approx(float(gj.norm()), rel=1e-12)
    assert step.gradient_norm == pytest.approx(float(flat(expected).norm()), rel=1e-12)
    assert step.alignment_cos == pytest.approx(float(-gl @ gj / (gl.norm() * gj.norm())), abs=1e-12)
    assert (step.displacement, step.relative_displacement, step.difference_ascended) == (0.0, 0.0, None)
    assert torch.equal(bits(problem.model), before)


@pytest.mark.parametrize(("direction", "sign"), [("ascent", 1.0), ("descent", -1.0)])
def test_theta_prime_for_good_is_exact_in_parts(direction: Direction, sign: float) -> None:
    problem, eta = Problem(), 0.3
    theta = problem.theta()
    ascent = grad(problem.reference_j)(theta)
    parts = [lambda rows=rows: difference_loss(problem.model(problem.shifted[rows]), 4) for rows in ([0], [1, 2], [3])]
    moved = ascend_in_place(problem.model.parameters(), parts, eta, direction=direction)
    for name, value in problem.theta().items():
        torch.testing.assert_close(value, theta[name] + sign * eta * ascent[name], rtol=0, atol=1e-14)
    assert moved == pytest.approx(eta * float(flat(ascent).norm()), rel=1e-12)
    assert all(p.grad is None for p in problem.model.parameters())


def test_theta_prime_for_good_is_refused_where_j_is_not_finite() -> None:
    problem = Problem()
    before = bits(problem.model)
    problem.shifted[3] = math.nan
    parts = [lambda rows=rows: difference_loss(problem.model(problem.shifted[rows]), 4) for rows in ([0, 1], [2, 3])]
    with pytest.raises(FloatingPointError, match="all shifted samples is nan"):
        ascend_in_place(problem.model.parameters(), parts, 0.3)
    with pytest.raises(ValueError, match="eta"):
        ascend_in_place(problem.model.parameters(), parts, -1.0)
    assert torch.equal(bits(problem.model), before)


def test_held_out_samples_are_measured_at_theta_and_at_theta_prime() -> None:
    problem, eta = Problem(), 0.3
    others = torch.randn(2, 3, 6, dtype=torch.float64)
    theta = problem.theta()
    ascent = grad(problem.reference_j)(theta)
    moved = {name: value + eta * ascent[name] for name, value in theta.items()}

    def measure() -> Separation:
        return Separation.of(problem.model(others))

    step = metarm_gradient(problem.model.parameters(), problem.ascend, problem.descend, eta, heldout=measure)
    joint = joint_gradient(problem.model.parameters(), problem.ascend, problem.descend, eta, heldout=measure)
    problem.shifted = others
    assert step.heldout is not None and step.heldout_ascended is not None
    assert step.heldout.difference == pytest.approx(float(problem.reference_j(theta)), abs=1e-12)
    assert step.heldout_ascended.difference == pytest.approx(float(problem.reference_j(moved)), abs=1e-12)
    assert step.heldout == joint.heldout
    assert joint.heldout_ascended is None
