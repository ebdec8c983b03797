"""The engine's end of the store, as vLLM's workers load it: chunks arrive as arguments, layers are rebuilt as they are full.

Imported by vLLM's worker through ``StoreExtension``, which is how the name gets into the registry of every worker process.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from actors.transfer import STORE
from tokens.weights import Chunk


@dataclass
class StoreInit(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class StoreUpdate(WeightTransferUpdateInfo):
    """One chunk."""

    chunk: Chunk


class StoreEngine(WeightTransferEngine[StoreInit, StoreUpdate]):
    """Loads chunks through vLLM's layerwise reload: CPU kernels repack weights, which a copy in place would miss."""

    init_info_cls = StoreInit
    update_info_cls = StoreUpdate

    def init_transfer_engine(self, init_info: StoreInit) -> None:
        """Nothing to prepare."""

    def start_weight_update(self) -> None:
        """Open the reload."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: StoreUpdate) -> None:
        """Load one chunk."""
        self.model.load_weights((name, tensor.to(self.device)) for name, tensor in update_info.chunk.tensors())

    def finish_weight_update(self) -> None:
        """Close the reload: layers that wait for it are processed."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to release."""


if STORE not in WeightTransferEngineFactory._registry:  # several engines in one process
    WeightTransferEngineFactory.register_engine(STORE, StoreEngine)


class StoreExtension:
    """What ``worker_extension_cls`` names: importing it registers the engine. It adds nothing to the worker."""
