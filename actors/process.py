"""What every role's process does first: take its threads, open its log file, and be ready to say how far it is."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ray


@dataclass(frozen=True)
class ProcessSetup:
    """What the driver tells a new process.

    Args:
        name: the role's readable name, e.g. ``rollout-0``; the dashboard and the log file carry it.
        log_path: file that the process logs to.
        threads: torch threads.
        device: ``cpu`` or ``cuda``.
        dtype: ``float32`` or ``bfloat16``: of frozen weights and of the arithmetic; trained weights are always float32.
        rank: of this process among those that share the role's model.
        num_ranks: how many they are.
        recompute_activations: True keeps only each layer's input for the backward pass.
        offload: True keeps frozen models in host memory but while they compute.
        shares_device: True where other roles compute on the same device, and this one rests in between.
        incarnation: how many processes there have been in this place, with this one.
    """

    name: str
    log_path: Path
    threads: int
    device: str
    dtype: str
    rank: int
    num_ranks: int
    recompute_activations: bool
    offload: bool = False
    shares_device: bool = False
    incarnation: int = 1


@dataclass(frozen=True)
class Progress:
    """How far the current call is.

    Args:
        done: units.
        total: units.
        unit: what is counted.
        tokens: sampled; 0 where nothing is.
        beats: signs of life so far, also where nothing is counted.
        waiting: True while the work waits for room on the cluster: no part of it runs.
    """

    done: int
    total: int
    unit: str
    tokens: int = 0
    beats: int = 0
    waiting: bool = False


@dataclass(frozen=True)
class Identity:
    """Where a role runs, and which process in its place that is, counted from 1."""

    name: str
    pid: int
    node: str
    incarnation: int = 1


UNUSED = ("sklearn", "scipy")
"""What transformers imports where it is installed, for assisted decoding and the losses of image models: with pandas, which the
first of them imports, about a quarter of the CPU time that a learner's process spends before it can work."""


def import_transformers() -> None:
    """Import transformers' models without what neither a role nor the driver needs of it; both may import it themselves after."""
    absent = [name for name in UNUSED if name not in sys.modules]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to say that a module is not to be found
    try:
        import transformers.models.auto.auto_factory  # noqa: F401
    finally:
        for name in absent:
            del sys.modules[name]


def log_to(path: Path) -> None:
    """Have this process log to a file; what is there already stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)


class Role:
    """Base of the five roles: a log file of its own, and two questions answered while work goes on.

    ``about`` says in a few words what the process does; Ray's dashboard shows it with the name, as the actor's repr.
    """

    about: ClassVar[str] = "works for a role"

    def __init__(self, setup: ProcessSetup) -> None:
        import torch

        self.setup = setup
        self._progress = Progress(0, 0, "")
        log_to(setup.log_path)
        torch.set_num_threads(setup.threads)
        import_transformers()
        logging.getLogger(__name__).info("%s: process %d, %d threads, %s", setup.name, os.getpid(), setup.threads, setup.device)

    def __repr__(self) -> str:
        place = f", rank {self.setup.rank} of {self.setup.num_ranks}" if self.setup.num_ranks > 1 else ""
        return f"{self.setup.name} ({self.about}{place})"

    def tick(self, done: int, total: int, unit: str, tokens: int = 0) -> None:
        """Note how far the current call is."""
        self._progress = Progress(done, total, unit, tokens)

    def dtype(self) -> Any:
        """The torch type of frozen weights."""
        import torch

        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.setup.dtype]

    def compute(self) -> AbstractContextManager[Any]:
        """Context in which models run: trained weights stay float32, bfloat16 is what their products are computed in.

        Autocast would keep the bfloat16 copy of each weight until the context ends. Whole updates and fits run in one context, so
        every step after the first would compute with the weights that the first one began with: nothing is kept.
        """
        import torch

        if self.setup.dtype != "bfloat16":
            return nullcontext()
        return torch.autocast(self.setup.device, torch.bfloat16, cache_enabled=False)

    def rest(self, parts: Sequence[str]) -> None:
        """Leave the device to others: move parts of what is held there to host memory.

        Args:
            parts: by name; which a role has stands in ``cluster.rota``.
        """
        for part in parts:
            self.move(part, "cpu")

    def wake(self, parts: Sequence[str], *rested: None) -> None:
        """Take parts back to the device.

        Args:
            parts: by name.
            rested: the answers of those that left it; Ray waits for them.
        """
        for part in parts:
            self.move(part, self.setup.device)

    def move(self, part: str, device: str) -> None:
        """Move one part; roles that hold models between calls do it. Here: give the device's free memory to others."""
        import torch

        if device == "cpu" and torch.cuda.is_available():
            torch.cuda.empty_cache()

    @ray.method(concurrency_group="status")
    def progress(self) -> Progress:
        """How far the current call is; answered while it runs."""
        return self._progress

    @ray.method(concurrency_group="status")
    def identity(self) -> Identity:
        """Name, process and node."""
        return Identity(self.setup.name, os.getpid(), ray.get_runtime_context().get_node_id(), self.setup.incarnation)

    @ray.method(concurrency_group="vigil")
    def vigil(self) -> None:
        """Never answers: whoever has asked learns of this process's death at once, whatever else is asked of it."""
        threading.Event().wait()


STATUS_GROUP = {"status": 1, "vigil": 1}
"""The concurrency groups that answer ``progress`` and ``identity``, and hold ``vigil``, beside the working thread."""


SPINS = "10000"
"""How often a thread of torch looks for the others before it sleeps. By default it looks for milliseconds, and takes a busy
machine's cores from those that it waits for: a small training step with two threads beside two busy processes took 914 ms, so
197 ms; on an idle machine it takes as long as before (8 to 12 ms), where sleeping at once (OMP_WAIT_POLICY=PASSIVE) took 16 to
40."""


def environment(setup: ProcessSetup, allow_hub: bool) -> dict[str, str]:
    """Environment variables of a role's process, set before it imports torch or vLLM.

    Args:
        setup: the process's set-up.
        allow_hub: False keeps Hugging Face libraries off the network.

    Returns:
        The variables.
    """
    variables = {
        "OMP_NUM_THREADS": str(setup.threads),
        "GOMP_SPINCOUNT": SPINS,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    if not allow_hub:
        variables["HF_HUB_OFFLINE"] = "1"
    return variables


def engine_environment(setup: ProcessSetup, allow_hub: bool) -> dict[str, str]:
    """The same for a vLLM engine, which also must neither compile, bind cores, nor report home.

    Args:
        setup: the process's set-up.
        allow_hub: False keeps Hugging Face libraries off the network.

    Returns:
        The variables.
    """
    variables = environment(setup, allow_hub) | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_CONFIGURE_LOGGING": "0",
    }
    if setup.device == "cpu":
        # The CPU back end would otherwise compile C++ at the first call, and bind every engine of a node to the same cores.
        variables |= {"TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return variables
