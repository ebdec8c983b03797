"""The line between a learner that drives and an engine that loads, and what vLLM is shown of weights. No process is started."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.transfer import Line, Live, TransferSetup
from actors.vllm_sender import PolicySource


class Engine:
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, request: dict[str, Any]) -> None:
        if request["update_info"] == "broken":
            raise ValueError("no such weight")
        self.calls.append(request["update_info"])

    def finish_weight_update(self) -> None:
        self.calls.append("finish")


def drive(line: Line, *infos: str) -> None:
    line.ask("start_weight_update")
    for info in infos:
        line.ask("update_weights", {"update_info": info})
    line.ask("finish_weight_update")


def test_a_load_serves_one_update_from_start_to_finish() -> None:
    line, engine = Line(20.0), Engine()
    with ThreadPoolExecutor(1) as learner:
        for infos in (("a", "b"), ("c",)):
            driving = learner.submit(drive, line, *infos)
            Live().into(engine, line)
            driving.result()
    assert engine.calls == ["start", "a", "b", "finish", "start", "c", "finish"]


def test_what_an_engine_raises_both_ends_hear() -> None:
    line = Line(20.0)
    with ThreadPoolExecutor(1) as learner:
        driving = learner.submit(drive, line, "broken")
        with pytest.raises(ValueError, match="no such weight"):
            line.serve(Engine())
        with pytest.raises(ValueError, match="no such weight"):
            driving.result()


def test_neither_end_waits_for_ever() -> None:
    with pytest.raises(TimeoutError, match=r"sent no weights for 0\.1 s \(resources\.deadline_s\)"):
        Line(0.1).serve(Engine())
    with pytest.raises(TimeoutError):
        Line(0.1).ask("start_weight_update")


def test_metadata_is_what_the_passes_give_and_takes_one_of_its_own() -> None:
    passes: list[int] = []

    def weights() -> Iterator[tuple[str, Tensor]]:
        passes.append(1)
        yield from (("a", torch.ones(2, 3)), ("b", torch.ones(4)))

    source = PolicySource(weights, TransferSetup("nccl", "bfloat16"), lambda *meta: meta)
    for _ in range(2):
        assert source.metadata() == [("a", torch.bfloat16, (2, 3)), ("b", torch.bfloat16, (4,))]
        assert [(name, x.dtype, tuple(x.shape)) for name, x in source] == source.metadata()
    assert len(passes) == 3 and source.num_bytes == 20
