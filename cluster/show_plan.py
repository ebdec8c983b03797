"""``plan``: where each process lands, what its memory is made of, how long the phases should take, and what is short."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actors.labels import in_words
from cluster import times
from cluster.cluster_file import node_for, node_types, nodes_of
from cluster.config import RunConfig
from cluster.memory import Cache, engine_cache
from cluster.model_sizes import ModelSize, model_size, reward_size
from cluster.node_types import kinds_in_words
from cluster.placement import placed
from cluster.plan import GIB, PROCESS, Bundle, Node, Plan, bundles, member_bundle, place, this_machine
from evaluation.best import JUDGE_NAMES
from tokens.errors import UserError

NUM_PAIRS = 10_000
"""Pairs that are assumed where neither the config nor the command line says how many there are: plan reads no data."""


def show_plan(config: RunConfig, options: Namespace) -> int:
    """Print what would run where, in how much memory and how fast; start nothing.

    Args:
        config: of the run.
        options: of the command line: nodes and what each has, speeds and lengths.

    Returns:
        0 if everything fits, 1 if something is short.

    Raises:
        UserError: if a speed or a length is out of its range.
    """
    size = model_size(config)
    asked = placed(config, bundles(config, size)).bundles
    nodes, machines = _nodes(options)
    node = node_for(asked[0], nodes)
    speeds, lengths = _speeds(options, node), _lengths(config, options)
    critic = reward_size(config, size)
    cache = engine_cache(config, size, node.gpu_memory)
    plan = place(asked, nodes)
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"{config.name}: {config.rounds.num_rounds} rounds, a policy of {size.parameters / 1e6:,.1f} M parameters, reward models "
        f"and critic of {critic.parameters / 1e6:,.1f} M, {escape(machines)}"
    )
    if config.rounds.stop is not None:
        console.print(
            f"It ends sooner once {config.rounds.stop.patience} round(s) in a row bring no better judgement by "
            f"{JUDGE_NAMES[config.evaluation.judge]} (rounds.stop)."
        )
    if config.evaluation.num_held_out:
        console.print(
            f"{config.evaluation.num_held_out} held-out reward models are fitted at the start, on the pairs of "
            f"{config.evaluation.held_out_fraction:.0%} of the prompts, and judge every round."
        )
    if config.rounds.baseline != "none":
        console.print(
            f"Memory and times are those of rounds of PPO with MetaRM; rounds.baseline {config.rounds.baseline} needs less."
        )
    _show_placement(config, plan, console)
    _show_memory(plan, console)
    _show_cache(cache, console)
    num_pairs = _num_pairs(config, options)
    across = frozenset(role for role in ("reward", "learner") if len(_nodes_of(plan, role)) > 1)
    clock = times.Clock(config, size, critic, speeds, lengths, num_pairs, cache, across)
    _show_times(clock, console)
    short = [*plan.shortfalls, *_show_members(config, critic, nodes, console), *_cache_shortfall(config, size, cache)]
    if short:
        console.print("[red]Does not fit:[/]")
        for shortfall in short:
            console.print(f"  {escape(shortfall)}")
        return 1
    console.print("[green]Everything fits.[/]")
    return 0


def _nodes(options: Namespace) -> tuple[tuple[Node, ...], str]:
    """The nodes to plan on, and what they are in words."""
    if options.cluster is not None:
        types = node_types(options.cluster)
        nodes = nodes_of(types, int(options.gpu_memory_gib * GIB))
        if not nodes:
            raise UserError(f"{options.cluster} allows no node but the head: raise max_workers of its node types")
        return nodes, f"the nodes that {options.cluster} allows: {kinds_in_words(types)}"
    node = _node(options)
    each = f"{node.num_cpus:g} CPU, {node.num_gpus:g} GPU, {node.memory / GIB:.0f} GiB"
    return (node,) * options.nodes, f"{options.nodes} node(s) of {each}"


def _node(options: Namespace) -> Node:
    here = this_machine()
    return replace(
        here,
        num_cpus=here.num_cpus if options.node_cpus is None else options.node_cpus,
        num_gpus=here.num_gpus if options.node_gpus is None else options.node_gpus,
        memory=here.memory if options.node_memory_gib is None else int(options.node_memory_gib * GIB),
        gpu_memory=int(options.gpu_memory_gib * GIB),
    )


def _speeds(options: Namespace, node: Node) -> times.Speeds:
    """The command line's speeds, or those of the GPU that has as much memory."""
    large = node.gpu_memory > 100 * GIB
    given = {
        "tflops": (options.gpu_tflops, "--gpu-tflops", times.TFLOPS),
        "bandwidth_tbs": (options.gpu_bandwidth_tbs, "--gpu-bandwidth-tbs", times.H200_TBS if large else times.H100_TBS),
        "link_gbs": (options.link_gbs, "--link-gbs", times.LINK_GBS),
        "nvlink_gbs": (options.nvlink_gbs, "--nvlink-gbs", times.NVLINK_GBS),
        "mfu": (options.mfu, "--mfu", times.TRAINING_MFU),
        "scoring_mfu": (options.scoring_mfu, "--scoring-mfu", times.SCORING_MFU),
    }
    for value, option, _ in given.values():
        if value is not None and (value <= 0 or ("mfu" in option and value > 1)):
            wanted = "a share above 0 and at most 1" if "mfu" in option else "a number above 0"
            raise UserError(f"{option} is {value:g}: {wanted} is expected")
    values = {name: usual if value is None else value for name, (value, _, usual) in given.items()}
    usual_gpu = options.gpu_tflops is None and options.gpu_bandwidth_tbs is None
    return times.Speeds(name=("an H200" if large else "an H100 SXM") if usual_gpu else "the GPU described", **values)


def _lengths(config: RunConfig, options: Namespace) -> times.Lengths:
    limits = {
        "--mean-prompt": (options.mean_prompt, config.data.max_prompt_tokens, "data.max_prompt_tokens"),
        "--mean-response": (options.mean_response, config.rollout.max_new_tokens, "rollout.max_new_tokens"),
    }
    for option, (value, limit, key) in limits.items():
        if value is not None and not 0 < value <= limit:
            raise UserError(f"{option} is {value:g}: a number above 0 and at most {key} ({limit}) is expected")
    prompt, response = (limit if value is None else value for value, limit, _ in limits.values())
    return times.Lengths(prompt, response)


def _num_pairs(config: RunConfig, options: Namespace) -> int:
    if options.num_pairs is not None:
        if options.num_pairs < 1:
            raise UserError(f"--num-pairs is {options.num_pairs}: 1 or more are expected")
        return int(options.num_pairs)
    if config.data.preferences == "sandbox":
        return config.world.num_pairs
    return NUM_PAIRS if config.data.max_pairs is None else config.data.max_pairs


def _nodes_of(plan: Plan, role: str) -> set[int | None]:
    return {node for bundle, node in zip(plan.bundles, plan.placed, strict=True) if bundle.role in (role, "shared")}


def _alike(bundles_: Sequence[Bundle], where: Sequence[int | None]) -> Iterator[tuple[str, Bundle, int | None]]:
    """Neighbours that differ by their number only, as one row."""
    rows = zip(bundles_, where, strict=True)
    for (_, node), same in groupby(rows, key=lambda row: (replace(row[0], name="", host=0), row[1])):
        each = [bundle for bundle, _ in same]
        name = each[0].name if len(each) == 1 else f"{each[0].name} to {each[-1].name.rpartition('-')[2]}"
        yield name, each[0], node


def _gib(number: float) -> str:
    """Bytes as GiB, with as many digits as a small model needs."""
    return f"{number / GIB:.2f}" if number >= GIB / 10 else f"{number / GIB:.4f}"


def _show_placement(config: RunConfig, plan: Plan, console: Console) -> None:
    table = Table("process", "node", "CPU", "GPU", "threads", "memory (GiB)", "for")
    shares = config.resources
    threads = {"rollout": shares.rollout, "reward": shares.reward, "scorer": shares.scorer, "learner": shares.learner}
    threads["shared"] = shares.learner
    for name, bundle, node in _alike(plan.bundles, plan.placed):
        table.add_row(
            name,
            "[red]none[/]" if node is None else str(node),
            f"{bundle.num_cpus:g}",
            f"{bundle.num_gpus:g}",
            str(threads[bundle.role].threads),
            _gib(bundle.memory) + (" on GPU" if bundle.num_gpus else ""),
            escape(bundle.why),
        )
    console.print(table)
    asked = sum(b.num_cpus for b in plan.bundles), sum(b.num_gpus for b in plan.bundles)
    console.print(f"Asked of Ray: {asked[0]:g} CPU, {asked[1]:g} GPU. CPUs, GPUs, threads and memory are of each process.")
    _show_labels(plan, console)
    _show_more_engines(config, plan, console)


def _show_more_engines(config: RunConfig, plan: Plan, console: Console) -> None:
    """What an elastic pool asks for beyond the table."""
    rollout = config.rollout
    if rollout.max_engines is None or rollout.max_engines == rollout.num_engines:
        return
    engine = next(bundle for bundle in plan.bundles if bundle.role == "rollout")
    console.print(
        f"While it samples: up to {rollout.max_engines - rollout.num_engines} more engines (rollout.max_engines = "
        f"{rollout.max_engines}), each {engine.num_cpus:g} CPU, {engine.num_gpus:g} GPU, {_gib(engine.memory)} GiB, where the "
        "cluster has room or makes it. They need not fit for the run to begin."
    )


def _show_labels(plan: Plan, console: Console) -> None:
    """Which nodes the processes may run on, where that is said."""
    names: dict[str, list[str]] = {}
    for name, bundle, _ in _alike(plan.bundles, (None,) * len(plan.bundles)):
        if bundle.labels:
            names.setdefault(in_words(bundle.labels), []).append(name)
    if names:
        asked = "; ".join(f"{', '.join(of)} on {selector}" for selector, of in names.items())
        known = any(node.labels is not None for node in plan.nodes)
        console.print(escape(f"Labels: {asked}." + ("" if known else " These nodes' labels are not known, and not looked at.")))


def _show_memory(plan: Plan, console: Console) -> None:
    """The parts of one process of each role; ranks differ in nothing but the machine's memory."""
    table = Table("process", "memory of", "GiB", "what")
    for _, same in groupby(plan.bundles, key=lambda bundle: bundle.role):
        bundle = next(same)
        gpus = max(1.0, bundle.num_gpus)
        place_ = "" if not bundle.num_gpus else " a GPU"
        for number, part in enumerate(bundle.parts):
            table.add_row("" if number else bundle.name, part.name, _gib(part.bytes / gpus), part.why)
        share = f"{bundle.memory / gpus / node_for(bundle, plan.nodes).gpu_memory:.0%} of it" if bundle.num_gpus else ""
        table.add_row("", f"[bold]all{place_}[/]", f"[bold]{_gib(bundle.memory / gpus)}[/]", share, end_section=True)
    console.print(table)
    console.print(
        "Memory is an upper estimate (docs/planning.md): weights, gradients, optimizer, and activations of the longest "
        f"sequences; each process holds {PROCESS / GIB:g} GiB of its machine's memory besides."
    )
    loading = [bundle for bundle in plan.bundles if bundle.host]
    if loading:
        largest = max(loading, key=lambda bundle: bundle.host)
        console.print(
            f"Processes with GPUs load a model, and save it, through their machine's memory: {largest.name} needs up to "
            f"{largest.host / GIB:.1f} GiB there, all of them {sum(bundle.host for bundle in loading) / GIB:,.1f} GiB."
        )


def _show_cache(cache: Cache, console: Console) -> None:
    fit = "they fit at once" if cache.samples <= cache.sequences else "they are run in turns"
    console.print(
        f"KV cache of an engine: {cache.bytes / GIB:.2f} GiB, {cache.token_bytes / 1024:,.1f} KiB a token; {cache.tokens:,} "
        f"tokens, {cache.sequences:,} sequences of {cache.sequence_tokens} tokens. A step asks one engine for {cache.samples:,}: "
        f"{fit}."
    )


def _show_times(clock: times.Clock, console: Console) -> None:
    shares = clock.config.resources
    roles = {"rollout": shares.rollout, "reward": shares.reward, "scorer": shares.scorer, "learner": shares.learner}
    on_cpus = [role for role, share in roles.items() if not share.num_gpus]
    if on_cpus:
        console.print(f"Times are planned for GPUs only, and {', '.join(on_cpus)} would compute on CPUs: none are given.")
        return
    planned = clock.times()
    console.print(_times_table(planned))
    speeds, lengths = clock.speeds, clock.lengths
    chosen = "what this config asks for" if planned.max_lag else "with policy.max_lag 1 or more"
    console.print(
        f"Overlapped ({chosen}): the longer of sampling ({planned.sampling:,.2f} s) and of all else. Each time is a lower bound "
        f"at the assumed efficiency: {speeds.name}, {speeds.tflops:g} TFLOP/s in bfloat16 of which training reaches "
        f"{speeds.mfu:.0%} and forward passes {speeds.scoring_mfu:.0%}, {speeds.bandwidth_tbs:g} TB/s; links of "
        f"{speeds.link_gbs:g} GB/s a GPU between nodes and {speeds.nvlink_gbs:g} within one. Prompts of {lengths.prompt:g} and "
        f"responses of {lengths.response:g} tokens, {clock.num_pairs:,} pairs. `plan --help` says how to change each."
    )


def _times_table(planned: times.Times) -> Table:
    table = Table("phase", "bound by", "seconds", "share")
    step, whole = planned.synchronous, planned.per_round
    for phase in planned.step:
        table.add_row(phase.name, phase.bound, f"{phase.seconds:,.2f}", f"{phase.seconds / step:.0%}")
    table.add_row("[bold]a step[/]", "", f"[bold]{step:,.2f}[/]", "100%")
    overlapped = planned.overlapped
    table.add_row("a step, overlapped", "", f"{overlapped:,.2f}", f"{overlapped / step:.0%}", end_section=True)
    for phase in planned.round:
        table.add_row(phase.name, phase.bound, f"{phase.seconds:,.0f}", f"{phase.seconds / whole:.0%}")
    steps = planned.steps * (overlapped if planned.max_lag else step)
    table.add_row(f"{planned.steps} steps", "", f"{steps:,.0f}", f"{steps / whole:.0%}")
    table.add_row("[bold]a round[/]", "", f"[bold]{whole:,.0f}[/]", f"{whole / 3600:,.1f} h")
    return table


def _show_members(config: RunConfig, critic: ModelSize, nodes: Sequence[Node], console: Console) -> tuple[str, ...]:
    """What the strength ensemble needs first, and what is short for it."""
    member = member_bundle(config, critic)
    if member is None:
        return ()
    fits = config.strength.folds * (1 if config.strength.members == "heads" else config.strength.num_members)
    cores = config.resources.reward.threads  # as cluster.tasks.share_of_a_fit has it
    busy = "" if member.num_gpus or cores <= member.num_cpus else f"up to {cores} CPU where so many are free, at least "
    console.print(
        f"Before that, for data.denoise, where the strengths are missing: {fits} fits of the ensemble, as many at once as "
        f"there is room for, each in one process of {busy}{member.num_cpus:g} CPU, {member.num_gpus:g} GPU, "
        f"{member.memory / GIB:.2f} GiB."
    )
    return place([member], nodes).shortfalls


def _cache_shortfall(config: RunConfig, size: ModelSize, cache: Cache) -> tuple[str, ...]:
    if cache.sequences:
        return ()
    more = "raise rollout.tensor_parallel" if config.resources.rollout.num_gpus else "raise rollout.kv_cache_mib"
    return (
        f"an engine's KV cache of {cache.bytes / GIB:.2f} GiB does not hold one sequence of {cache.sequence_tokens} tokens "
        f"({cache.sequence_tokens * cache.token_bytes / GIB:.2f} GiB); {more}",
    )
