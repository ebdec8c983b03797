"""A role whose model is shared by several processes: how they find each other."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any

import ray

from actors.process import ProcessSetup, Role


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of a role meet: rank 0's node and the port that its store listens on."""

    address: str
    port: int


class Rank(Role):
    """One of ``setup.num_ranks`` processes that share a role's model. ``join`` comes before anything that computes."""

    def __init__(self, setup: ProcessSetup) -> None:
        super().__init__(setup)
        from tokens.ranks import ALONE

        self.ranks = ALONE
        self._store: Any = None

    def open(self, timeout_s: float) -> Meeting:
        """Open the store that the ranks meet at; asked of rank 0 only.

        Args:
            timeout_s: longest wait of one rank for another.

        Returns:
            Where to meet.
        """
        from torch.distributed import TCPStore

        address = ray.util.get_node_ip_address()
        self._store = TCPStore(
            address, 0, self.setup.num_ranks, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
        )
        return Meeting(address, self._store.port)

    def join(self, meeting: Meeting, timeout_s: float) -> None:
        """Form the group of the role's ranks: gloo on the CPU, NCCL between GPUs. Returns when all are there.

        Args:
            meeting: what rank 0's ``open`` answered.
            timeout_s: longest wait of one rank for another, now and in every later exchange; then that rank raises.
        """
        from torch import distributed

        from tokens.ranks import Ranks

        setup, timeout = self.setup, timedelta(seconds=timeout_s)
        if self._store is None:
            self._store = distributed.TCPStore(meeting.address, meeting.port, setup.num_ranks, is_master=False, timeout=timeout)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if setup.device == "cuda" else "gloo",
            store=self._store,
            rank=setup.rank,
            world_size=setup.num_ranks,
            timeout=timeout,
        )
        self.ranks = Ranks(setup.rank, setup.num_ranks, distributed.init_device_mesh(setup.device, (setup.num_ranks,)))

    def place(self, model: Any) -> Any:
        """Put a model where it computes: on the device, or this rank's part of it there.

        With ``recompute_activations`` each layer keeps only its input for the backward pass, and computes the rest again.

        Args:
            model: on the CPU; equal on all ranks.

        Returns:
            The same model.
        """
        import torch

        if self.setup.recompute_activations:
            from tokens.recompute import recompute_layers

            recompute_layers(model)
        if self.ranks.size == 1:
            return model.to(self.setup.device)
        narrow = self.setup.device == "cuda" and self.setup.dtype == "bfloat16"
        self.ranks.shard(model, torch.bfloat16 if narrow else None)
        return model


@lru_cache(maxsize=1)
def own_rank(setup: ProcessSetup) -> Rank:
    """This process's threads and log file, made once: Ray hands one process many tasks.

    Args:
        setup: of the process; equal for all of its tasks.
    """
    return Rank(setup)
