"""How the policy's weights get from the learner's ranks into the engines: one interface, three implementations for each end.

    store   chunks in Ray's object store, which each engine reads when it comes to it
    nccl    vLLM's own broadcast between GPUs, for engines that have GPUs of their own
    ipc     vLLM's own sharing of memory on one GPU, for engines that share the learner's

An engine is handed a ``Delivery`` and takes it in by vLLM's four phases: init, start, update (once for each chunk), finish.
The store's delivery holds all of it. The other two are a line on which rank 0 of the learner drives the phases while the
engine's ``load`` serves them.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray.exceptions import GetTimeoutError

from actors.config import Backend

if TYPE_CHECKING:
    from torch import Tensor

    from tokens.ranks import Ranks

Weights = Callable[[], Iterable[tuple[str, "Tensor"]]]
"""Makes a fresh pass over (name, whole tensor), in which all ranks take part."""
STORE = "rondo_store"
"""What vLLM calls the store's engine (``actors.store_engine``)."""


@dataclass(frozen=True)
class TransferSetup:
    """What both ends must agree on.

    Args:
        backend: ``store``, ``nccl`` or ``ipc``.
        dtype: of the engines, which the weights travel in.
        chunk_bytes: largest piece that travels at once.
        deadline_s: longest wait of one end for the other.
    """

    backend: Backend = "store"
    dtype: str = "float32"
    chunk_bytes: int = 256 << 20
    deadline_s: float = 3600.0

    def engine_arguments(self) -> dict[str, Any]:
        """What vLLM is told when the engine is made."""
        if self.backend == "store":
            return {"weight_transfer_config": {"backend": STORE}, "worker_extension_cls": "actors.store_engine.StoreExtension"}
        return {"weight_transfer_config": {"backend": self.backend}}


STORED = TransferSetup()
"""What an engine alone is told: float32 through the store."""


class Delivery(Protocol):
    """New weights as an engine is handed them."""

    def into(self, engine: Any, line: Line) -> None:
        """Put them into a vLLM engine; the thread that calls this is the one that they are loaded in."""


@dataclass(frozen=True)
class Parcels:
    """Weights in Ray's object store.

    Args:
        refs: of the chunks.
        num_bytes: of all of them.
    """

    refs: tuple[Any, ...]
    num_bytes: int

    def into(self, engine: Any, line: Line) -> None:
        """Start, one update for each chunk, finish; one chunk is held at a time."""
        engine.start_weight_update()
        try:
            for ref in self.refs:
                engine.update_weights({"update_info": {"chunk": ray.get(ref, timeout=line.deadline_s)}})
        finally:  # also where the learner has died, and its chunks with it: the next weights must find the engine ready
            engine.finish_weight_update()


@dataclass(frozen=True)
class Live:
    """Weights that the learner's rank 0 sends while ``into`` serves it."""

    def into(self, engine: Any, line: Line) -> None:
        """Do what the learner asks for, until it has finished."""
        line.serve(engine)


class Line:
    """Where calls that the learner makes to an engine wait for the thread that loads.

    Args:
        deadline_s: longest wait for the other end.
    """

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self._calls: queue.Queue[tuple[str, tuple[Any, ...], Future[None]]] = queue.Queue()

    def ask(self, method: str, *arguments: Any) -> None:
        """Have ``serve`` call a method of the engine, and wait until it has; raises what it raised."""
        future: Future[None] = Future()
        self._calls.put((method, arguments, future))
        future.result(timeout=self.deadline_s)

    def serve(self, engine: Any) -> None:
        """Call what is asked for, up to and with ``finish_weight_update``.

        Raises:
            TimeoutError: if the other end asks for nothing within the deadline.
            Exception: what a call raised; the caller of ``ask`` gets it too.
        """
        method = ""
        while method != "finish_weight_update":
            try:
                method, arguments, future = self._calls.get(timeout=self.deadline_s)
            except queue.Empty:
                raise TimeoutError(f"the learner sent no weights for {self.deadline_s:g} s (resources.deadline_s)") from None
            try:
                getattr(engine, method)(*arguments)
            except BaseException as error:
                future.set_exception(error)
                raise
            future.set_result(None)


class EngineClient:
    """The engines as vLLM's trainer side calls them (its ``VLLMWeightSyncClient``): every call goes to all, and waits for all.

    Args:
        engines: handles of ``RolloutEngine``.
        deadline_s: longest wait for one call.
    """

    def __init__(self, engines: Sequence[Any], deadline_s: float) -> None:
        self.engines, self.deadline_s = engines, deadline_s

    def num_workers(self) -> list[int]:
        """How many of vLLM's workers each engine has."""
        answers: list[int] = self._wait([engine.num_workers.remote() for engine in self.engines])
        return answers

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Prepare both ends; where there is a group of workers, each engine is given a place of its own in it."""
        infos = [dict(init_info) for _ in self.engines]
        if "rank_offset" in init_info:  # vLLM's own clients give all engines the same
            offset = init_info["rank_offset"]
            for info, number in zip(infos, self.num_workers(), strict=True):
                info["rank_offset"] = offset
                offset += number
        self._wait([e.init_weight_transfer_engine.remote(info) for e, info in zip(self.engines, infos, strict=True)])

    def start_weight_update(self) -> None:
        """Open an update."""
        self._wait([engine.ask.remote("start_weight_update") for engine in self.engines])

    def update_weights(self, update_info: Any) -> None:
        """One chunk, or where it lies."""
        request = ray.put({"update_info": update_info})
        self._wait([engine.ask.remote("update_weights", request) for engine in self.engines])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close the update. ``load`` itself sets the version."""
        self._wait([engine.ask.remote("finish_weight_update") for engine in self.engines])

    def _wait(self, refs: list[Any]) -> list[Any]:
        try:
            return list(ray.get(refs, timeout=self.deadline_s))
        except GetTimeoutError:
            raise TimeoutError(f"an engine did not answer for {self.deadline_s:g} s (resources.deadline_s)") from None


class Sender(Protocol):
    """The learner's end, one on each of its ranks."""

    def send(self) -> Parcels:
        """Send the weights, or lay them out; all ranks call this. Returns what rank 0 laid out, and how many bytes it was."""


class StoreSender:
    """Lays the weights out in Ray's object store.

    Args:
        weights: makes a pass over them.
        ranks: that share the model.
        setup: of the transfer.
    """

    def __init__(self, weights: Weights, ranks: Ranks, setup: TransferSetup) -> None:
        self.weights, self.ranks, self.setup = weights, ranks, setup

    def send(self) -> Parcels:
        """Lay out; ranks other than 0 only take part in gathering."""
        weights = wire(self.weights(), self.setup)
        if self.ranks.rank:
            for _ in weights:
                pass
            return Parcels((), 0)
        return lay_out(weights, self.setup.chunk_bytes)


def lay_out(weights: Iterable[tuple[str, Tensor]], chunk_bytes: int) -> Parcels:
    """Put weights into Ray's object store, a chunk at a time; they are there as long as the answer is.

    Args:
        weights: (name, whole tensor), in the engines' type.
        chunk_bytes: largest chunk.
    """
    from tokens.weights import in_chunks

    refs, num_bytes = [], 0
    for chunk in in_chunks(weights, chunk_bytes):
        num_bytes += chunk.num_bytes
        refs.append(ray.put(chunk))
    return Parcels(tuple(refs), num_bytes)


def wire(weights: Iterable[tuple[str, Tensor]], setup: TransferSetup) -> Iterator[tuple[str, Tensor]]:
    """The weights as they travel."""
    import torch

    from tokens.weights import cast

    return cast(weights, {"float32": torch.float32, "bfloat16": torch.bfloat16}[setup.dtype])


def make_sender(weights: Weights, ranks: Ranks, engines: Sequence[Any], setup: TransferSetup) -> Sender:
    """The learner's end, ready to send; all ranks must call this, when the engines are up and idle.

    Args:
        weights: makes a pass over (name, whole tensor).
        ranks: that share the model.
        engines: handles of the engines.
        setup: of the transfer.
    """
    if setup.backend == "store":
        return StoreSender(weights, ranks, setup)
    from actors.vllm_sender import VLLMSender

    return VLLMSender(weights, ranks, EngineClient(engines, setup.deadline_s), setup)
