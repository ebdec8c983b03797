"""The picture of where roles spend their time, from stacks as py-spy writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.flames import ELSE, IMPORTS, draw, stacks, tree

LINES = [
    "<module> (ray/_private/workers/default_worker.py:1);Worker.main_loop (ray/_private/worker.py:1059) 40",
    "run (threading.py:1);Event.wait (threading.py:611);Condition.wait (threading.py:295) 9",
    " 3",
    "main (ray/x.py:1);update (actors/learner.py:9);_inject_tracing_into_class.<locals>.x (ray/t.py:1);step (policy/ppo.py:5) 6",
    "main (ray/x.py:1);update (actors/learner.py:9);loss (policy/losses.py:7);mm (torch/nn.py:3) 2",
    "update (actors/learner.py:9);_find (importlib/_bootstrap.py:1);<module> (transformers/x.py:1) 4",
    "flush (ray/worker.py:7) 1",
]


def test_stacks_begin_at_our_own_frames_and_who_waits_is_not_counted() -> None:
    assert list(stacks(LINES)) == [
        (["update (actors/learner.py:9)", "step (policy/ppo.py:5)"], 6),
        (["update (actors/learner.py:9)", "loss (policy/losses.py:7)", "mm (torch/nn.py:3)"], 2),
        ([IMPORTS], 4),
        ([ELSE], 1),
    ]
    root = tree(LINES)
    assert root.count == 13 and root.calls["update (actors/learner.py:9)"].count == 8
    assert root.calls["update (actors/learner.py:9)"].calls["step (policy/ppo.py:5)"].count == 6


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_picture_names_each_process_and_its_frames(tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"flames.{ending}"
    draw({"PolicyLearner": tree(LINES), "driver": tree(LINES[-1:])}, 60.0, out)
    assert out.stat().st_size > 1000
    if ending == "svg":
        text = out.read_text()
        assert (
            "PolicyLearner: 1 s of threads that compute, in 60 s" in text
            and "driver: 0 s of threads that compute, in 60 s" in text
        )
        assert "update (actors/learner.py:9)" in text
