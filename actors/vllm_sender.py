"""The learner's end of vLLM's own transfers, NCCL and IPC (vLLM 0.32; 0.33 changed ``WeightSource``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import ray

from actors.transfer import EngineClient, Parcels, TransferSetup, Weights, wire

if TYPE_CHECKING:
    from torch import Tensor

    from tokens.ranks import Ranks


class PolicySource:
    """The policy's weights as vLLM's trainer side reads them (its ``WeightSource``, which it uses by these two methods).

    Args:
        weights: makes a pass over (name, whole tensor).
        setup: of the transfer.
        describe: makes vLLM's ``ParamMeta`` of name, dtype and shape.
    """

    def __init__(self, weights: Weights, setup: TransferSetup, describe: Any) -> None:
        self.weights, self.setup, self.describe = weights, setup, describe
        self._metadata: list[Any] = []
        self.num_bytes = 0

    def metadata(self) -> list[Any]:
        """Name, dtype and shape of each weight; the first time by a pass over them, which all ranks make."""
        if not self._metadata:
            for name, tensor in self:
                self._metadata.append(self.describe(name, tensor.dtype, tuple(tensor.shape)))
                self.num_bytes += tensor.nbytes
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from wire(self.weights(), self.setup)


class VLLMSender:
    """Sends by NCCL or IPC; rank 0 drives the engines' phases, all ranks take part in gathering.

    Args:
        weights: makes a pass over (name, whole tensor).
        ranks: that share the model.
        client: of the engines.
        setup: of the transfer.
    """

    def __init__(self, weights: Weights, ranks: Ranks, client: EngineClient, setup: TransferSetup) -> None:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.base import ParamMeta

        self.source = PolicySource(weights, setup, ParamMeta)
        info = init_info(setup, ranks.rank, 0 if ranks.rank else sum(client.num_workers()))
        self.trainer = WeightTransferTrainerFactory.trainer_init(info, client=client, source=self.source)

    def send(self) -> Parcels:
        """Send; returns when the engines have finished."""
        self.source.metadata()
        self.trainer.send_weights()
        return Parcels((), self.source.num_bytes)


def init_info(setup: TransferSetup, rank: int, num_workers: int) -> Any:
    """What vLLM's trainer side is told.

    Args:
        setup: of the transfer.
        rank: of the learner.
        num_workers: of all engines; only rank 0 meets them.

    Returns:
        vLLM's ``NCCLTrainerInitInfo`` or ``IPCTrainerInitInfo``.
    """
    if setup.backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=setup.chunk_bytes, rank=rank)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    from vllm.utils.network_utils import get_open_port

    return NCCLTrainerInitInfo(
        master_address=ray.util.get_node_ip_address(),
        master_port=get_open_port(),
        world_size=1 + num_workers,
        packed=True,
        packed_buffer_size_bytes=setup.chunk_bytes,
        rank=rank,
    )
