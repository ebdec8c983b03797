"""Giving the engines the learner's weights: what they are handed, chosen at set-up, and what it took."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from actors.config import Backend
from actors.transfer import Live, Parcels
from cluster.waiting import Pending, shifted

T = TypeVar("T")


@dataclass(frozen=True)
class Sync:
    """What it took to give the engines new weights.

    Args:
        seconds: from asking the learner until the last engine had them.
        num_bytes: of the weights as they travelled; every engine got that many.
    """

    seconds: float
    num_bytes: int

    def as_dict(self) -> dict[str, float]:
        """As metrics."""
        rate = self.num_bytes / self.seconds
        return {"sync/seconds": self.seconds, "sync/bytes": float(self.num_bytes), "sync/bytes_per_second": rate}


def together(first: Pending[T], second: Pending[Any]) -> Pending[T]:
    """Both at once; the answer is the first one's."""
    number = len(first.refs)
    return Pending(
        (*first.refs, *second.refs),
        (*first.names, *second.names),
        (*first.nodes, *second.nodes),
        lambda answers: first.combine(answers[:number]),
        redo=lambda who, parts: {
            **first.redo(who, [part for part in parts if part < number]),
            **shifted(number, second.redo, who, parts),
        },
    )


DELIVERIES: Mapping[Backend, Callable[[Pending[Parcels]], Any]] = {
    "store": lambda sending: sending.refs[0],  # Ray hands rank 0's answer to the engines when it is there
    "nccl": lambda sending: Live(),
    "ipc": lambda sending: Live(),
}
