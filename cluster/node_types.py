"""Nodes that are there and kinds that may come: what is short, and what none can ever hold. Arithmetic without Ray."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from actors.labels import in_words, satisfies
from cluster.plan import Bundle

ORDINARY = ("CPU", "GPU", "memory", "object_store_memory")
MARK = 0.001
"""How much of a node type's own resource a bundle takes: no more than tells the types apart."""


@dataclass(frozen=True)
class NodeType:
    """A kind of node.

    Args:
        name: of the kind.
        resources: of one node, as Ray counts them.
        labels: of each of them; None where they are not known.
        max_count: how many of them there may be at most.
    """

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] | None
    max_count: int

    def may_hold(self, bundle: Bundle) -> int:
        """How many such bundles all its nodes hold, with nothing else on them."""
        if self.labels is not None and not satisfies(self.labels, bundle.labels):
            return 0
        return self.max_count * _times(bundle.resources, self.resources)


@dataclass(frozen=True)
class LiveNode:
    """A node that is there: its labels, what it has and what of that is free."""

    labels: Mapping[str, str]
    total: Mapping[str, float]
    free: Mapping[str, float]


def _times(asked: Mapping[str, float], there: Mapping[str, float]) -> int:
    """How often ``asked`` fits into ``there``."""
    wanted = {key: amount for key, amount in asked.items() if amount}
    return min(math.floor((there[key] if key in there else 0.0) / amount + 1e-9) for key, amount in wanted.items())


def of_cluster_file(tree: Mapping[str, Any]) -> tuple[NodeType, ...]:
    """The node types of a cluster file, the head left out: it is there already, and no second comes.

    Args:
        tree: of the file, in Ray's schema.
    """
    types = []
    for name, kind in tree["available_node_types"].items():
        if name != tree["head_node_type"]:
            count = min(kind["max_workers"] if "max_workers" in kind else tree["max_workers"], tree["max_workers"])
            labels = kind["labels"] if "labels" in kind else {}
            types.append(NodeType(name, {key: float(value) for key, value in kind["resources"].items()}, labels, count))
    return tuple(types)


def impossible(bundles: Sequence[Bundle], types: Sequence[NodeType]) -> tuple[str, ...]:
    """What no growth of a cluster ever makes room for, in words.

    Args:
        bundles: that a run asks for.
        types: of the nodes that may come, and of those that stay.

    Returns:
        A sentence for each kind of bundle that cannot be placed, or for all of them together; empty if nothing stands in the
        way, which is no promise that everything fits.
    """
    found = []
    for names, bundle, number in _alike(bundles):
        most = sum(kind.may_hold(bundle) for kind in types)
        if most >= number:
            continue
        each = f"{names} need{'' if number > 1 else 's'} {in_resources(bundle.resources)}{_where(bundle)}"
        kinds = [kind for kind in types if kind.labels is None or satisfies(kind.labels, bundle.labels)]
        if not kinds:
            found.append(f"{each}, and no node type has these labels ({kinds_in_words(types)})")
        elif most:
            found.append(f"{each} each, and there may be room for {most} of them at most ({kinds_in_words(kinds)})")
        else:
            found.append(f"{each}, and no node type can hold that ({kinds_in_words(kinds)})")
    return tuple(found) or tuple(_too_much(bundles, types))


def _too_much(bundles: Sequence[Bundle], types: Sequence[NodeType]) -> Iterator[str]:
    """Sums that exceed all nodes of a kind together."""
    for labels in ({}, *(bundle.labels for bundle in _first_of_labels(bundles))):
        asking = [bundle for bundle in bundles if not labels or bundle.labels == labels]
        holding = [kind for kind in types if kind.labels is None or satisfies(kind.labels, labels)]
        for key in ("CPU", "GPU"):
            asked = sum(bundle.resources[key] for bundle in asking if key in bundle.resources)
            held = sum(kind.max_count * kind.resources[key] for kind in holding if key in kind.resources)
            if asked > held + 1e-9:
                names = ", ".join(names for names, _, _ in _alike(asking))
                where = f" on {in_words(labels)}" if labels else ""
                most = f"there may be {held:g} at most ({kinds_in_words(holding)})"
                yield f"{names} need {asked:g} {key}{where} together, and {most}"


def _first_of_labels(bundles: Iterable[Bundle]) -> list[Bundle]:
    return list({in_words(bundle.labels): bundle for bundle in bundles if bundle.labels}.values())


def shortages(bundles: Sequence[Bundle], nodes: Sequence[LiveNode]) -> tuple[str, ...]:
    """Which bundles find no room on the nodes that are there, and what is free for them, in words.

    Args:
        bundles: that a run asks for.
        nodes: that are there.

    Returns:
        A sentence for each kind of bundle; empty if all of them fit.
    """
    free = [dict(node.free) for node in nodes]
    without: list[Bundle] = []
    for bundle in sorted(bundles, key=lambda one: (-one.num_gpus, -one.num_cpus)):
        allowed = [n for n, node in enumerate(nodes) if satisfies(node.labels, bundle.labels)]
        place = [n for n in allowed if _times(bundle.resources, free[n])]
        if not place:
            without.append(bundle)
            continue
        for key, amount in bundle.resources.items():
            free[place[0]][key] -= amount
    said = []
    for names, bundle, number in _alike(sorted(without, key=bundles.index)):
        each = f"{names} need{'' if number > 1 else 's'} {in_resources(bundle.resources)}{_where(bundle)}"
        kin = [n for n, node in enumerate(nodes) if satisfies(node.labels, bundle.labels)]
        if not kin:
            said.append(f"{each}; " + ("no node has these labels" if nodes else "there is no node"))
            continue
        keys = tuple(bundle.resources)
        best = max(kin, key=lambda n: [free[n][key] if key in free[n] else 0.0 for key in reversed(keys)])
        left = {key: free[best][key] if key in free[best] else 0.0 for key in keys}
        of = {key: nodes[best].total[key] if key in nodes[best].total else 0.0 for key in keys}
        kind = " of that kind" if bundle.labels else ""
        said.append(f"{each}; the largest free node{kind} has {in_resources(left)} left of {in_resources(of)}")
    return tuple(said)


def marked(bundle: Bundle, types: Sequence[NodeType]) -> dict[str, float]:
    """What to ask for where the autoscaler does not look at labels (Ray's v1): a trace of what only the right types have.

    Args:
        bundle: with labels.
        types: that the autoscaler may add.

    Returns:
        The bundle's resources, and that resource where there is one.
    """
    right = [kind for kind in types if satisfies(kind.labels or {}, bundle.labels)]
    wrong = [kind for kind in types if kind not in right]
    if not bundle.labels or not right or not wrong:
        return bundle.resources
    own = set.intersection(*(set(kind.resources) for kind in right)).difference(ORDINARY, *(kind.resources for kind in wrong))
    return bundle.resources | dict.fromkeys(sorted(own)[:1], MARK)


def in_resources(resources: Mapping[str, float]) -> str:
    """Resources as people write them, e.g. ``8 CPU, 1 GPU``."""
    return ", ".join(f"{amount:g} {key}" for key, amount in resources.items())


def _where(bundle: Bundle) -> str:
    return f" on {in_words(bundle.labels)}" if bundle.labels else ""


def kinds_in_words(types: Iterable[NodeType]) -> str:
    """Node types and what they have of CPUs and GPUs."""
    said = []
    for kind in types:
        has = {key: kind.resources[key] for key in ("CPU", "GPU") if key in kind.resources}
        said.append(f"{kind.max_count} x {kind.name}: {in_resources(has)}")
    return "; ".join(said) or "there is none"


def _alike(bundles: Iterable[Bundle]) -> Iterator[tuple[str, Bundle, int]]:
    """Neighbours that ask for the same, by their common name: ``learner-0 to 3``, one of them, and how many they are."""
    for _, same in groupby(bundles, key=lambda one: (one.role, one.resources, one.labels)):
        each = list(same)
        name = each[0].name if len(each) == 1 else f"{each[0].name} to {each[-1].name.rpartition('-')[2]}"
        yield name, each[0], len(each)
