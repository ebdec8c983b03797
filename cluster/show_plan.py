"""``plan``: the placement as a table, the shortfalls in words."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from cluster.config import RunConfig
from cluster.placement import placed
from cluster.plan import GIB, PROCESS, Node, bundles, member_bundle, model_size, place, reward_size, this_machine


def show_plan(config: RunConfig, options: Namespace) -> int:
    """Print what would run where; start nothing.

    Args:
        config: of the run.
        options: of the command line: nodes, node_cpus, node_gpus, node_memory_gib, gpu_memory_gib.

    Returns:
        0 if everything fits, 1 if something is short.
    """
    here = this_machine()
    node = replace(
        here,
        num_cpus=here.num_cpus if options.node_cpus is None else options.node_cpus,
        num_gpus=here.num_gpus if options.node_gpus is None else options.node_gpus,
        memory=here.memory if options.node_memory_gib is None else int(options.node_memory_gib * GIB),
        gpu_memory=int(options.gpu_memory_gib * GIB),
    )
    nodes: tuple[Node, ...] = (node,) * options.nodes
    size = model_size(config)
    plan = place(placed(config, bundles(config, size)).bundles, nodes)
    console = Console(soft_wrap=True)
    console.print(
        f"{config.name}: {config.rounds.num_rounds} rounds, a model of {size.parameters / 1e6:,.1f} M parameters, "
        f"{options.nodes} node(s) of {node.num_cpus:g} CPU, {node.num_gpus:g} GPU, {node.memory / GIB:.0f} GiB",
        highlight=False,
    )
    table = Table("process", "node", "CPU", "GPU", "threads", "memory (GiB)", "for")
    threads = {"rollout": config.resources.rollout, "reward": config.resources.reward,
               "scorer": config.resources.scorer, "learner": config.resources.learner,
               "shared": config.resources.learner}  # fmt: skip
    for bundle, place_ in zip(plan.bundles, plan.placed, strict=True):
        where = "[red]none[/]" if place_ is None else str(place_)
        memory = f"{bundle.memory / GIB:.2f}" + (" on GPU" if bundle.num_gpus else "")
        table.add_row(
            bundle.name,
            where,
            f"{bundle.num_cpus:g}",
            f"{bundle.num_gpus:g}",
            str(threads[bundle.role].threads),
            memory,
            bundle.why,
        )
    console.print(table)
    asked = sum(b.num_cpus for b in plan.bundles), sum(b.num_gpus for b in plan.bundles)
    console.print(f"Asked of Ray: {asked[0]:g} CPU, {asked[1]:g} GPU.", highlight=False)
    console.print(
        "Memory is an upper estimate: weights, gradients, optimizer, and activations of the longest sequences; "
        f"each process holds {PROCESS / GIB:g} GiB of its machine's memory besides.",
        highlight=False,
    )
    member = member_bundle(config, reward_size(config, size))
    first = () if member is None else place([member], nodes).shortfalls
    if member is not None:
        fits = config.strength.folds * (1 if config.strength.members == "heads" else config.strength.num_members)
        cores = config.resources.reward.threads  # as cluster.strength_work.share_of_a_fit has it
        busy = "" if member.num_gpus or cores <= member.num_cpus else f"up to {cores} CPU where so many are free, at least "
        console.print(
            f"Before that, for data.denoise, where the strengths are missing: {fits} fits of the ensemble, as many at once as "
            f"there is room for, each in one process of {busy}{member.num_cpus:g} CPU, {member.num_gpus:g} GPU, "
            f"{member.memory / GIB:.2f} GiB.",
            highlight=False,
        )
    if plan.shortfalls or first:
        console.print("[red]Does not fit:[/]")
        for shortfall in (*plan.shortfalls, *first):
            console.print(f"  {shortfall}", highlight=False)
        return 1
    console.print("[green]Everything fits.[/]")
    return 0
