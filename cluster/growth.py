"""What Ray knows of the cluster: its nodes, the types that its autoscaler may add; and a wait that says what is short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import ray
import yaml

from actors.config import Share
from actors.labels import in_words, satisfies
from cluster.node_types import LiveNode, NodeType, impossible, marked, of_cluster_file, shortages
from cluster.plan import Bundle
from cluster.waiting import Room
from tokens.errors import UserError

NODE_TYPE = "ray.io/node-group"
"""Ray's label for the type that an autoscaler made a node of."""


@dataclass(frozen=True)
class Growth:
    """How the cluster may grow, as far as can be seen from here.

    Args:
        types: that an autoscaler may add; None where that cannot be seen.
        by_hand: True if it is certain that there is no autoscaler.
        reads_labels: False for Ray's autoscaler v1, which adds nodes by resources alone.
    """

    types: tuple[NodeType, ...] | None
    by_hand: bool
    reads_labels: bool

    def asked(self, bundle: Bundle) -> dict[str, float]:
        """What to ask Ray for."""
        return bundle.resources if self.types is None or self.reads_labels else marked(bundle, self.types)

    def refuse_what_cannot_fit(self, bundles: Sequence[Bundle]) -> None:
        """Stop where no node that may come makes room.

        Raises:
            UserError: naming the processes and the node types.
        """
        if self.types is None:
            return
        names = {kind.name for kind in self.types}
        stay = [
            NodeType(f"node {node['NodeID'][:8]}", node["Resources"], node["Labels"], 1)
            for node in ray.nodes()
            if node["Alive"] and (NODE_TYPE not in node["Labels"] or node["Labels"][NODE_TYPE] not in names)
        ]
        found = impossible(bundles, (*self.types, *(node for node in stay if node.resources.keys() & {"CPU", "GPU"})))
        if found:
            raise UserError(
                f"this cluster can never hold the run: {'; '.join(found)}. Lower resources.* or rollout.num_engines, change "
                "resources.*.labels, or raise max_workers and the node types of the cluster file"
            )

    def unseen(self, bundles: Sequence[Bundle]) -> str | None:
        """What a user should know of labels that the autoscaler does not read; None where all is well."""
        if self.types is None or self.reads_labels:
            return None
        for bundle in bundles:
            bare = replace(bundle, labels={})
            wrong = [kind for kind in self.types if not satisfies(kind.labels or {}, bundle.labels) and kind.may_hold(bare)]
            if wrong and self.asked(bundle) == bundle.resources:
                return (
                    f"Ray's autoscaler v1 does not read labels, and may add nodes of type {wrong[0].name} where {bundle.name} "
                    f"asks for {in_words(bundle.labels)}: give each node type a resource of its own, or start the head with "
                    "RAY_enable_autoscaler_v2=1"
                )
        return None


UNKNOWN = Growth(None, by_hand=False, reads_labels=True)
"""Nothing can be seen from here; what is asked for, is asked for as it is."""


def growth() -> Growth:
    """Look at the cluster that we are connected to.

    Ray tells the node types where its platform reports them. The open-source autoscaler does not: it was started with a cluster
    file, which can be read where it runs, on the head, and that is where a job's driver runs too unless told otherwise.
    """
    from ray._private.state import state

    reported = state.get_cluster_config()
    if reported is not None and reported.node_group_configs:
        groups = [
            NodeType(group.name, dict(group.resources), None, group.max_count if group.max_count >= 0 else 1_000_000)
            for group in reported.node_group_configs
        ]
        return Growth(tuple(groups), by_hand=False, reads_labels=True)
    monitor = _monitor()
    if monitor is None:
        return UNKNOWN
    file = next((word.partition("=")[2] for word in monitor if word.startswith("--autoscaling-config=")), None)
    if file is None:
        return Growth(None, by_hand=True, reads_labels=True)
    types = of_cluster_file(yaml.safe_load(Path(file).expanduser().read_text("utf-8")))
    return Growth(types, by_hand=False, reads_labels=any(word.endswith("autoscaler/v2/monitor.py") for word in monitor))


def _monitor() -> list[str] | None:
    """The command line of this cluster's autoscaler, if it runs on this machine."""
    port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
    for process in psutil.process_iter(["cmdline"]):
        words: list[str] = process.info["cmdline"] or []
        if any(word.endswith("/monitor.py") for word in words) and any(
            word.startswith("--gcs-address=") and word.endswith(f":{port}") for word in words
        ):
            return words
    return None


def live_nodes() -> list[LiveNode]:
    """The nodes that are there, the head among them, and what is free on each."""
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [
        LiveNode(node["Labels"], node["Resources"], free[node["NodeID"]] if node["NodeID"] in free else {})
        for node in ray.nodes()
        if node["Alive"]
    ]


def room_for_tasks(say: Callable[[str], None], name: str, share: Share, limit_s: float | None) -> RoomFor:
    """A wait for room for the first of many tasks of a share.

    Args:
        say: prints a line.
        name: of the task.
        share: of the machine that each takes.
        limit_s: longest wait; None = as long as it takes.
    """
    task = Bundle(name, name, share.num_cpus, share.num_gpus, 0, name, labels=share.labels)
    return RoomFor(say, [task], limit_s, growth())


class RoomFor(Room):
    """A wait for room that names the bundles that are short.

    Args:
        say: prints a line.
        bundles: that are waited for.
        limit_s: longest wait; None = as long as it takes.
        growth: of the cluster.
    """

    def __init__(self, say: Callable[[str], None], bundles: Sequence[Bundle], limit_s: float | None, growth: Growth) -> None:
        super().__init__(say, {}, limit_s)
        self.bundles, self.growth = bundles, growth

    def short(self) -> str:
        """What is short, bundle by bundle, and whether anything comes by itself."""
        found = "; ".join(shortages(self.bundles, live_nodes())) or "there is room, and Ray is about to give it"
        by_hand = ". This cluster has no autoscaler: it waits for nodes that somebody adds" if self.growth.by_hand else ""
        return found + by_hand
