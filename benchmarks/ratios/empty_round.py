"""A round in which no role has anything to do: what the driver, its journal and the disk take of every round.

It is ``Theme.play`` itself, with one PPO step, committed to a run directory; its actors answer at once. Small files are written,
synced and renamed as in any round.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import ray

from actors.process import Identity
from benchmarks.ratios.engines import prompts
from benchmarks.sleepers import IdleLearner, IdleScorer, IdleTrainer, SleepingEngine
from cluster.config import RunConfig
from cluster.console import Console
from cluster.fixed_pool import FixedPool
from cluster.inputs import Inputs
from cluster.metrics import Metrics
from cluster.roles import Ensemble, LearnerHandle, RewardHandle, Roles, ScorerHandle
from cluster.rota import OwnDevices, Process
from cluster.rounds import Theme
from cluster.run_directory import RunDirectory
from cluster.sampling import sampling
from cluster.start import begin
from cluster.sync import DELIVERIES
from cluster.telemetry import Telemetry
from cluster.timeline import Timeline
from cluster.waiting import Waiter
from evaluation.timeline import Span
from preferences.sets import PreferenceSet

PROMPTS = 8


def config_of(storage: Path) -> RunConfig:
    """A round of one step of eight prompts."""
    return RunConfig.model_validate(
        {
            "name": "empty",
            "storage": str(storage),
            "data": {"preferences": "made up"},
            "rounds": {"num_rounds": 1000},
            "meta": {"num_prompts": PROMPTS, "prompts_per_step": PROMPTS, "samples_per_prompt": 4},
            "scorer": {"num_members": 1, "aggregate": "primary"},
            "policy": {
                "steps_per_round": 1, "prompts_per_step": PROMPTS, "samples_per_prompt": 4, "minibatch_size": 32,
                "critic_warmup_steps": 0,
            },
            "evaluation": {"num_prompts": PROMPTS, "judge": "ensemble"},
        }
    )  # fmt: skip


def inputs_of(sft_dir: Path) -> Inputs:
    """Eight prompts for everything, and no pairs."""
    from datasets import Dataset

    asked = tuple(prompts(PROMPTS, 16, 64))
    none = PreferenceSet(
        Dataset.from_dict({"id": ["p"], "prompt": ["p"], "chosen": ["a"], "rejected": ["b"]}), "none", "explicit"
    )
    return Inputs(sft_dir, sft_dir, (), (), asked, asked, asked, None, {}, {}, none, {}, ())


def roles_of(options: dict[str, Any], config: RunConfig) -> Roles:
    """Of actors that do nothing."""
    made = {
        "rollout": ray.remote(**options)(SleepingEngine).remote(0.0),
        "reward": ray.remote(**options)(IdleTrainer).remote(),
        "scorer": ray.remote(**options)(IdleScorer).remote(),
        "learner": ray.remote(**options)(IdleLearner).remote(0.0),
    }
    at = {role: Process(actor, Identity(f"{role}-0", 0, "")) for role, actor in made.items()}
    rota, timeout_s = OwnDevices(), config.resources.deadline_s
    scorer = ScorerHandle([at["scorer"]], rota, Ensemble(), config.scorer, config.guards)
    return Roles(
        FixedPool([at["rollout"]], rota), RewardHandle([at["reward"]], timeout_s, rota),
        scorer, LearnerHandle([at["learner"]], timeout_s, rota), tuple(at.values()), rota, DELIVERIES["store"],
    )  # fmt: skip


def calls(roles: Roles) -> None:
    """The calls of such a round, one after another."""
    engine, trainer, scorer, learner = (process.actor for process in roles.processes)
    asked, get = prompts(PROMPTS, 16, 64), ray.get
    with TemporaryDirectory() as name:
        for samples in (4, 4, 1):  # S_k, the step's, the evaluation's
            rollouts = get(engine.sample.remote(asked, samples, 0, 0, (0,) * PROMPTS))
            get(scorer.score.remote(rollouts, (0,)))
        get(scorer.score.remote(rollouts, (0,)))  # SFT's, against which it is judged
        get(trainer.fit.remote(Path(name) / "reward", 0, None, None, None, None))
        get(scorer.load.remote(0, Path(name)))
        get(learner.begin_round.remote(0, (), None, None, None))
        get(learner.update.remote(rollouts, (0.0,) * len(rollouts), None, 0))
        get(engine.load.remote(get(learner.send.remote()), 0))
        get(learner.save.remote(Path(name)))
        get(learner.statistics.remote(rollouts))


@contextlib.contextmanager
def empty_rounds(folder: Path, options: dict[str, Any]) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """What plays one more such round each time, and what makes a round's calls of Ray alone; Ray must run.

    Args:
        folder: where the run's directory is made; it must be there, and empty.
        options: of the actors.
    """
    config, console = config_of(folder), Quiet()
    sft_dir = folder / "sft"
    sft_dir.mkdir()
    (sft_dir / "config.json").write_text("{}")
    (sft_dir / "tokenizer.json").write_text("{}")
    inputs, directory = inputs_of(sft_dir), RunDirectory(config)
    directory.inspect()
    with directory.open(), contextlib.ExitStack() as closing:
        timeline = Timeline(directory.path)
        closing.callback(timeline.close)
        metrics = Metrics(directory.path, 1, Telemetry(config.name, {}), directory.hold.check)
        closing.callback(metrics.close)

        def record(span: Span) -> None:
            timeline(span)
            metrics.span(span)

        wait = Waiter(console, directory.logs, config.resources.deadline_s, record)
        roles, others = roles_of(options, config), roles_of(options, config)  # calls alone put the version back
        for process in (*roles.processes, *others.processes):
            closing.callback(ray.kill, process.actor)
        directory.begin_with(sft_dir)
        sft, version = begin(config, directory, inputs, roles, wait, console, metrics)
        batches = sampling(config, inputs.policy_prompts, roles.rollout, wait)
        nobody_leaves: Any = SimpleNamespace(moving=SimpleNamespace(saving_is_due=lambda: False))
        theme = Theme(
            config, directory, inputs, roles, batches, wait, console, metrics, sft, version, (0, None), nobody_leaves
        )  # fmt: skip
        yield lambda: theme.play(directory.num_committed), partial(calls, others)


class Quiet(Console):
    """A terminal that nobody looks at: what is drawn goes to no file."""

    def __init__(self) -> None:
        super().__init__()
        self.rich.quiet = True
