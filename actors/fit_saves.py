"""Where a fit saves how far it has come, and what it goes on from."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rm.resume import Saves
    from tokens.saved_state import SavedState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitSaves:
    """Where a fit saves how far it has come.

    Args:
        folder: of its states.
        every: optimizer steps between two of them.
    """

    folder: Path
    every: int

    def of(self, inputs: object, name: str, more: Callable[[], Mapping[str, Any]] = dict, writes: bool = True) -> Saves:
        """Saving one fit, and what is saved of this very fit already.

        Args:
            inputs: what the fit is of: a state that was saved of other inputs is not gone on from.
            name: of the process, for its log.
            more: asked at each save; kept with the state.
            writes: False on ranks that have no tensors.
        """
        from rm.resume import Saves
        from tokens.saved_state import SavedState, latest_state, save_state

        identity = hashlib.sha256(repr(inputs).encode()).hexdigest()

        def write(done: int, state: SavedState) -> None:
            if writes:
                save_state(self.folder, done, SavedState(state.tensors, {**state.values, "fit": identity, **more()}))

        begin = latest_state(self.folder)
        if begin is not None and begin.values["fit"] != identity:
            begin = None
        if begin is not None:
            log.info("%s: goes on after step %d of a fit", name, begin.values["done"])
        return Saves(self.every, write, begin)
