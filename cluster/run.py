"""From a config to a finished run: check, connect, prepare, start the roles, play the rounds, report."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import RunConfig
from cluster.console import Console
from cluster.denoising import check_strengths, ensure_strengths, in_words
from cluster.disk import check_space
from cluster.domain_models import with_domain_reward
from cluster.fresh import open_labeller
from cluster.inputs import Source, check_batches, check_domains, check_judges, check_stopping, open_source
from cluster.judging import comparable
from cluster.model_sizes import model_size
from cluster.plan import Bundle, bundles
from cluster.rounds_config import PPO
from cluster.run_directory import RunDirectory, space_errors
from cluster.signals import listen
from cluster.storage import storage_root
from cluster.trackers import check_trackers
from evaluation.best import JUDGE_NAMES, best_of
from evaluation.timeline import Span
from tokens.errors import UserError

if TYPE_CHECKING:
    from cluster.judges import Judge
    from cluster.rounds import Theme
    from cluster.telemetry import Telemetry


def run(config: RunConfig, console: Console) -> Path:
    """Run every round that is not committed yet, and write the report.

    Args:
        config: of the run.
        console: to show progress on.

    Returns:
        The report.

    Raises:
        UserError: if an input is wrong, or there is no room; before any process starts where that can be known.
        RoleFailed: if a role failed; committed rounds are intact, the same command continues.
    """
    from evaluation.report import write_report

    if config.meta.samples is not None:
        raise UserError(
            f"meta.samples is {config.meta.samples!r}: recorded samples are for `reward`; `run` samples S_k from its policy each "
            "round. Set meta.samples to null"
        )
    if config.reward.patience is not None and config.reward.evaluate_every is None:
        raise UserError(
            f"reward.patience is {config.reward.patience} and reward.evaluate_every null: `run` measures only every "
            "reward.evaluate_every steps. Set it, or reward.patience to null"
        )
    check_trackers(config)
    root = storage_root(config)
    config = with_domain_reward(config, root)
    directory = RunDirectory(config, console.say)
    directory.inspect()
    source = None if directory.finished else open_source(config, root)
    if source is not None:
        check_batches(config, source)
        check_stopping(config, source)
        check_judges(config, source)
        check_domains(config, source)
        check_strengths(config, source)
        there = config.sft if config.sft.model is None else config.sft.model_copy(update={"model": str(source.sft_dir)})
        size = model_size(config.model_copy(update={"sft": there}))
        check_space(config, directory.root, size, directory.num_committed, directory.ledger["start"] is not None)
        asked = bundles(config, size)
    with contextlib.ExitStack() as closing, directory.open():
        console.say(f"[bold]Rondo[/] run {config.name} in {directory.path}")
        if source is None:
            console.say(nothing_to_do(directory))
        else:
            for warning in warnings(config):
                console.say(f"[yellow]note[/] {warning}")
            labeller = open_labeller(config, source, closing)
            strengths = ensure_strengths(config, console)
            with (
                connected(config, console) as fixed,
                space_errors(directory.path),
                opened(config, console, directory, source, strengths, asked, fixed, labeller) as theme,
            ):
                theme.run()
        report = write_report(directory.path)
        if directory.best.is_kept(directory.ledger):
            tell_best(directory, console)
    console.say(f"Report: {report}")
    return report


def nothing_to_do(directory: RunDirectory) -> str:
    """What is told of a run that has no further round to play."""
    if directory.num_committed >= directory.config.rounds.num_rounds:
        return f"All {directory.num_committed} rounds are done; nothing to do."
    return (
        f"The run has stopped after round {directory.num_committed - 1}: {directory.why_stopped(directory.ledger)}. To go on, "
        "raise rounds.stop.patience, or set rounds.stop to null."
    )


def tell_best(directory: RunDirectory, console: Console) -> None:
    """Where the best policy lies, and which one it is."""
    best = best_of(directory.ledger)
    if not directory.best.path.is_dir():
        console.say(f"Best: {best.words()}. It is not in {directory.path}: take the model that the run began with")
        return
    dependent = "" if best.independent else f". {JUDGE_NAMES[best.judge]} is what PPO was trained by: do not trust it alone"
    console.say(f"Best: {directory.best.path}: {best.words()}{dependent}")


@contextlib.contextmanager
def connected(config: RunConfig, console: Console) -> Iterator[bool]:
    """A Ray cluster: the one that RAY_ADDRESS names (a job's own), else one on this machine that ends with the run.

    Args:
        config: of the command.
        console: to say what should be known of the cluster.

    Returns:
        True if the cluster is this machine alone and cannot grow.

    Raises:
        UserError: if RAY_ADDRESS names a cluster that cannot be used; see ``cluster.preflight``; or if none can be started here.
    """
    import ray

    from cluster.local_ray import start_local_ray
    from cluster.preflight import connect

    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address:
        connect(address, config.resources.allow_open_dashboard, console.say)
    else:
        start_local_ray(console.say)
    listen()
    try:
        yield not address
    finally:
        ray.shutdown()


def warnings(config: RunConfig) -> list[str]:
    """What the config asks for and a user should know before hours have passed."""
    from cluster.baselines import note

    said = note(config)
    found = [] if said is None else [said]
    reshaped, policy = config.rollout.reshaped(), config.policy
    if reshaped:
        found.append(
            f"{', '.join(reshaped)}: the engine draws from another distribution than the one that the learner computes. Tokens "
            f"weigh by how much likelier the learner finds them, up to policy.importance_cap = {policy.importance_cap}; what the "
            "engine never draws, no weight brings back. policy/importance_mean should stay near 1; policy/sampler_gap is large "
            "by nature and does not prove that a sync arrived"
        )
    elif not comparable(config):
        found.append("engine and learner do not both compute in float32: their log-probs are compared in policy/sampler_gap only")
    if policy.max_lag and config.rounds.baseline in PPO:
        found.append(
            f"policy.max_lag is {policy.max_lag}: batches are sampled by weights that may be as many updates old, and which "
            "tokens new weights draw depends on the clock, so the same seed does not give the same run. Look at policy/lag and "
            "policy/importance_mean; the last sync is proved by a round's first batch and its evaluation"
        )
    return found


def telemetry_of(config: RunConfig, directory: RunDirectory, asked: Sequence[Bundle]) -> Telemetry:
    """The run's metrics for the dashboard, and what they say from the start."""
    from cluster.telemetry import Telemetry

    gpus = {bundle.role: bundle.num_gpus for bundle in asked}
    telemetry = Telemetry(config.name, gpus | {"preparer": gpus["learner"]})
    telemetry.set("rondo_rounds", config.rounds.num_rounds)
    telemetry.set("rondo_steps_per_round", config.policy.steps_per_round)
    telemetry.follow("rondo_rounds_committed", lambda: directory.num_committed)
    return telemetry


@contextlib.contextmanager
def opened(
    config: RunConfig,
    console: Console,
    directory: RunDirectory,
    source: Source,
    strengths: str | None,
    asked: Sequence[Bundle],
    fixed: bool,
    labeller: Judge | None = None,
) -> Iterator[Theme]:
    """Place the roles, make what must be made first, and put everything where the next round begins.

    Args:
        config: of the run.
        console: shows it.
        directory: of the run, locked.
        source: what it learns from.
        strengths: what ``data.denoise`` goes by; None where it does nothing.
        asked: the processes, and what each needs.
        fixed: as ``connected`` gives it.
        labeller: who labels fresh pairs; None where nobody does.

    Returns:
        The run under way, for as long as the context lasts; then every process ends.
    """
    from cluster.baselines import theme_of
    from cluster.failures import RoleFailed
    from cluster.for_people import theme_for
    from cluster.metrics import Metrics
    from cluster.preflight import check_nodes
    from cluster.sampling import sampling
    from cluster.stage import Stage
    from cluster.start import begin, refuse_other_data
    from cluster.survival import survival
    from cluster.timeline import Timeline
    from cluster.trackers import open_trackers
    from cluster.waiting import Pending, Waiter
    from rm.config import ORIGINAL

    timeline, telemetry = Timeline(directory.path), telemetry_of(config, directory, asked)
    trackers = open_trackers(config, directory.path, directory.root, console.say)
    metrics = Metrics(directory.path, config.policy.steps_per_round, telemetry, directory.hold.check, trackers)

    def record(span: Span) -> None:
        timeline(span)
        metrics.span(span)

    wait = Waiter(console, directory.logs, config.resources.deadline_s, record)
    stage = Stage(config, asked, directory.logs, console.say, fixed)
    try:
        with telemetry.room(stage.num_gpus):
            stage.wait_for_room()
        check_nodes(stage.nodes(), directory.root, wait)
        if source.recipe is not None and not source.prepared:
            with console.bar("prepare the SFT policy") as bar:
                actor, pending = stage.prepare(source.recipe)
                wait("prepare", pending, bar)
                stage.release(actor)
        inputs = source.load(strengths)
        refuse_other_data(directory, inputs)
        directory.begin_with(inputs.sft_dir)
        if strengths is not None:
            console.say(in_words(inputs.denoised, strengths))
        with console.bar("start the five roles") as bar:
            longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
            validation = {ORIGINAL: inputs.validation} | inputs.stopping
            given = (inputs.sft_dir, inputs.base_dir, inputs.pairs, validation, inputs.ptx)
            roles = wait("start_roles", stage.start(*given, longest), bar)
            for ranked in (roles.reward, roles.learner):
                if len(ranked.ranks) > 1:
                    wait("start_roles", ranked.join(wait("start_roles", ranked.open())))

            def load_learner() -> Pending[None]:
                return roles.learner.load(roles.rollout, directory.learner_path, directory.critic_base(inputs.sft_dir))

            wait("start_roles", load_learner(), bar)
        telemetry.serve(config.rollout.num_engines)
        roles.rollout.report_to(wait, metrics)
        telemetry.set("rondo_pairs", len(inputs.pairs))
        recover = survival(config, directory, stage, roles, load_learner, wait, console, metrics)
        sft, version = recover(lambda: begin(config, directory, inputs, roles, wait, console, metrics))
        stands = (directory.num_committed, None if directory.point is None else directory.point.place)
        batches = sampling(config, inputs.policy_prompts, roles.rollout, wait)
        theme = theme_for(config, theme_of(config))
        yield theme(config, directory, inputs, roles, batches, wait, console, metrics, sft, version, stands, recover, labeller)
    except RoleFailed as failure:
        telemetry.failed(failure.who)
        raise
    finally:
        with contextlib.ExitStack() as closing:
            closing.callback(metrics.close)
            closing.callback(timeline.close)
            closing.callback(stage.close)
