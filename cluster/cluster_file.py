"""A cluster file as nodes to plan on: `ray up`'s YAML, or KubeRay's RayCluster and RayJob."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actors.labels import satisfies
from cluster.load_config import read_yaml
from cluster.node_types import NodeType, of_cluster_file
from cluster.plan import GIB, Bundle, Node
from tokens.errors import UserError

ACCELERATOR = "ray.io/accelerator-type"
"""Ray's label for the kind of GPU."""
GPU_GIB = {"T4": 16, "L4": 24, "A10G": 24, "L40S": 48, "A100": 40, "A100-80G": 80, "H100": 80, "H200": 141, "B200": 180}
"""Memory of one, GiB, as its maker gives it."""


def node_types(path: Path) -> tuple[NodeType, ...]:
    """The node types that a cluster file allows.

    Args:
        path: of the file.

    Raises:
        UserError: if it is no cluster file.
    """
    tree = read_yaml(path)
    if "kind" in tree:
        tree = _of_kubernetes(tree, path)
    for key in ("available_node_types", "head_node_type", "max_workers"):
        if key not in tree:
            raise UserError(f"{path} is no cluster file: {key} is missing; give a file such as ray_config.yaml")
    for name, kind in tree["available_node_types"].items():
        if name != tree["head_node_type"] and "resources" not in kind:
            raise UserError(
                f"{path}: available_node_types.{name} says nothing of its resources, and only its cloud knows them: add them, as "
                "ray_config.yaml does"
            )
    return of_cluster_file(tree)


def _of_kubernetes(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    kinds = {"RayCluster": ("spec",), "RayJob": ("spec", "rayClusterSpec")}
    if tree["kind"] not in kinds:
        raise UserError(f"{path} is a {tree['kind']}: a RayCluster or RayJob is expected")
    spec: Any = tree
    for key in kinds[tree["kind"]]:
        if not isinstance(spec, dict) or key not in spec:
            raise UserError(f"{path} is no whole {tree['kind']}: {'.'.join(kinds[tree['kind']])} is missing")
        spec = spec[key]
    if "metadata" not in tree:
        raise UserError(f"{path} is no whole {tree['kind']}: metadata is missing")
    derived: dict[str, Any] = _derive_autoscaling_config_from_ray_cr({"metadata": tree["metadata"], "spec": spec})
    return derived


def nodes_of(types: tuple[NodeType, ...], gpu_memory: int) -> tuple[Node, ...]:
    """All nodes that there may be.

    Args:
        types: of the nodes.
        gpu_memory: of a GPU whose kind no label tells, bytes.
    """
    nodes: list[Node] = []
    for kind in types:
        has = {"CPU": 0.0, "GPU": 0.0, "memory": float(1 << 60)} | dict(kind.resources)
        labels = kind.labels or {}
        known = ACCELERATOR in labels and labels[ACCELERATOR] in GPU_GIB
        memory = GPU_GIB[labels[ACCELERATOR]] * GIB if known else gpu_memory
        nodes += [Node(has["CPU"], has["GPU"], int(has["memory"]), memory, labels)] * kind.max_count
    return tuple(nodes)


def node_for(bundle: Bundle, nodes: tuple[Node, ...]) -> Node:
    """A node that a bundle's labels allow, with GPUs where it asks for some; any where there is none."""
    allowed = [node for node in nodes if satisfies(node.labels or {}, bundle.labels) and node.num_gpus >= bundle.num_gpus]
    return (allowed or list(nodes))[0]
