"""The context that models are computed in, and the environment of a role's process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from actors.process import ProcessSetup, Role, engine_environment, environment


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_within_the_context_is_seen_by_the_next_forward_pass(dtype: str, tmp_path: Path) -> None:
    """A whole update runs in one context: weights that the optimizer moved must not be read from a copy made before."""
    role = Role(ProcessSetup("learner-0", tmp_path / "log", torch.get_num_threads(), "cpu", dtype, 0, 1, False))
    model, x = nn.Linear(4, 1, bias=False), torch.ones(1, 4)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with role.compute():
        with torch.no_grad():
            model(x)  # as old log-probs are computed before the first minibatch
        seen = []
        for _ in range(3):
            y = model(x)
            seen.append(y.item())
            optimizer.zero_grad()
            torch.autograd.backward(y)
            optimizer.step()
    assert seen == [4.0, 2.0, 0.0]


def test_threads_of_every_role_sleep_soon_and_the_hub_is_asked_only_where_that_is_allowed(tmp_path: Path) -> None:
    setup = ProcessSetup("learner-0", tmp_path / "log", 3, "cpu", "float32", 0, 1, False)
    for of in (environment, engine_environment):
        closed, opened = of(setup, False), of(setup, True)
        assert (closed["OMP_NUM_THREADS"], closed["GOMP_SPINCOUNT"]) == ("3", "10000")
        assert closed.items() - opened.items() == {("HF_HUB_OFFLINE", "1")}
