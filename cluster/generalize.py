"""`generalize`: one reward model from labelled domains, for domains that nobody labelled.

    texts of each domain    --fine-tuning-->    its reference policy; log-probabilities of its pairs; samples of a target's
    pairs and those         --outer steps-->    a reward model for each beta and seed
    both, of a target       --------------->    the best of n samples, and where asked for a policy fine-tuned on the tilt

All three are Ray tasks, side by side as far as there is room. What is finished is not made again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from actors.board import Board
from actors.generalize import PICKS, REPORT, DomainPart, Task, do_task
from cluster.config import RunConfig
from cluster.console import Console
from cluster.differences import flat, refuse_differences
from cluster.domain_directory import CARD, DomainDirectory
from cluster.domain_models import GENERAL
from cluster.generalize_data import GeneralizeData, check_settings, load_data
from cluster.run import connected
from cluster.run_directory import now, space_errors
from cluster.seeds import derive
from cluster.storage import storage_root
from cluster.tasks import Work, finish, setup_of, share_of_a_fit, suited, task_options
from tokens.durable import commit_directory, write_file

KIND = "generalize"


def generalize(config: RunConfig, console: Console) -> Path:
    """Make every reference policy and reward model that the config describes, and use them on the targets; the same command again
    continues.

    Args:
        config: of the command.
        console: to show progress on.

    Returns:
        STORAGE/generalize/NAME.

    Raises:
        UserError: if an input is wrong or there is no room; before any process starts where that can be known.
        RoleFailed: if a task failed; the finished ones are there, the same command continues.
    """
    check_settings(config)
    root = storage_root(config)
    directory = DomainDirectory(config, GENERAL)
    console.say(f"[bold]Rondo[/] generalize over {', '.join(config.generalize.domains)} in {directory.path}")
    data = load_data(config, root, console)
    with space_errors(directory.path), directory.open():
        directory.refuse_other_inputs(data.fingerprint(), data.base)
        tasks = Tasks(config, directory.path, data)
        stages = (("reference policies", tasks.references()), ("reward models", tasks.rewards()), ("targets", tasks.targets()))
        missing = [task for _, stage in stages for task in stage if not is_done(task)]
        directory.keep_config()
        if missing:
            with connected(config, console) as fixed:
                config = suited(config, console, directory.logs, fixed)
                for title, stage in stages:
                    _do(config, console, directory, tasks, title, [task for task in stage if task in missing])
        else:
            console.say("All of it is there; nothing to do.")
        directory.hold.check()
        _remove_partials(directory.path)
        _write(directory.path, config, tasks, console)
    return directory.path


def _remove_partials(path: Path) -> None:
    """Remove what processes that died had begun, or one that was given up and is at it still."""
    for stage in ("references", "rewards", "targets"):
        for partial in (path / stage).glob("**/.*.partial"):
            shutil.rmtree(partial, ignore_errors=True)


def is_done(task: Task) -> bool:
    """Whether a task's result is there.

    Args:
        task: of it.

    Raises:
        UserError: if it is, by other settings.
    """
    if not task.directory.is_dir():
        return False
    there = json.loads((task.directory / REPORT).read_text())["settings"]
    refuse_differences(task.directory, flat(there), flat(json.loads(json.dumps(task.settings()))))
    return True


class Tasks:
    """All that is to be done.

    Args:
        config: of the command.
        path: of its directory.
        data: read.
    """

    def __init__(self, config: RunConfig, path: Path, data: GeneralizeData) -> None:
        self.config, self.path, self.data = config, path, data

    def references(self) -> list[Task]:
        """A reference policy for each domain and target."""
        return [
            self._task("reference", f"reference policy of {part.name}", self._reference(part.name), 0)
            for part in (*self.data.labelled, *self.data.targets)
        ]

    def rewards(self) -> list[Task]:
        """A reward model for each beta and seed."""
        of = tuple(self._reference(part.name) for part in self.data.labelled)
        return [
            self._task("reward", f"reward model, beta {beta:g}, seed {seed}", self.reward(beta, seed), seed, beta, of)
            for beta in self.config.generalize.betas
            for seed in range(self.config.generalize.seeds)
        ]

    def targets(self) -> list[Task]:
        """Each target by each reward model."""
        return [
            self._task(
                "target",
                f"{part.name}, beta {beta:g}, seed {seed}",
                self.path / "targets" / part.name / f"beta_{beta:g}" / f"seed_{seed}",
                seed,
                beta,
                (self._reference(part.name), self.reward(beta, seed)),
            )
            for part in self.data.targets
            for beta in self.config.generalize.betas
            for seed in range(self.config.generalize.seeds)
        ]

    def parts(self, task: Task) -> tuple[DomainPart, ...]:
        """The domains that a task is about."""
        if task.kind == "reward":
            return self.data.labelled
        name = task.directory.name if task.kind == "reference" else task.directory.parents[1].name
        return tuple(part for part in (*self.data.labelled, *self.data.targets) if part.name == name)

    def reward(self, beta: float, seed: int) -> Path:
        """Where a reward model lies."""
        return self.path / "rewards" / f"beta_{beta:g}" / f"seed_{seed}"

    def _reference(self, name: str) -> Path:
        return self.path / "references" / name

    def _task(
        self, kind: str, name: str, directory: Path, seed: int, beta: float | None = None, of: tuple[Path, ...] = ()
    ) -> Task:
        config = self.config
        return Task(
            kind=kind,
            name=name,
            directory=directory,
            base=self.data.base,
            generalize=config.generalize,
            reward=config.reward,
            seed=derive(config.seed, "generalize", seed),
            beta=config.generalize.beta if beta is None else beta,
            max_tokens=config.rollout.max_new_tokens,
            guards=config.guards,
            of=of,
        )


def _do(
    config: RunConfig, console: Console, directory: DomainDirectory, tasks: Tasks, title: str, missing: Sequence[Task]
) -> None:
    """Hand tasks to Ray, and wait for all of them."""
    if not missing:
        return
    share = share_of_a_fit(config.resources.reward)
    setup = setup_of(share, "generalize", directory.logs)
    steps = config.generalize.steps if missing[0].kind == "reward" else 1
    sizes = {task.name: steps for task in missing}
    board = cast(Any, Board).remote(sizes, "steps")
    remote = do_task.options(**task_options(config, share, setup))
    refs = tuple(remote.remote(setup, task, tasks.parts(task), commit_directory, board) for task in missing)

    def say(report: dict[str, Any]) -> None:
        console.say(f"  {report['name']}: {report['seconds']:.1f} s")

    what = f"make {len(missing)} {title}"
    work = Work("generalize", "generalize", what, "steps", refs, tuple(sizes), board, share, "a task", say, setup.name)
    finish(config, console, directory.logs, work)


def _write(path: Path, config: RunConfig, tasks: Tasks, console: Console) -> None:
    """Write the card, last of all."""
    stages = (tasks.references(), tasks.rewards(), tasks.targets())
    references, rewards, targets = (
        [(task, json.loads((task.directory / REPORT).read_text())) for task in stage] for stage in stages
    )
    card = {
        "kind": KIND,
        "name": config.name,
        "finished_at": now(),
        "form": config.generalize.form,
        "reference_per": "token" if config.generalize.length_normalised else "response",
        "beta": config.generalize.beta,
        "rewards": [
            {"beta": task.beta, "seed": task.directory.name, "steps": report["steps"], "accuracy": report["accuracy"]}
            for task, report in rewards
        ],
        "targets": [
            {
                "target": task.directory.parents[1].name,
                "beta": task.beta,
                "seed": task.directory.name,
                "accuracy": report["accuracy"],
                "reward_gain": report["reward_gain"],
                "picks": str((task.directory / PICKS).relative_to(path)),
            }
            for task, report in targets
        ],
        "cpu_seconds": {task.name: round(report["cpu_seconds"], 3) for task, report in (*references, *rewards, *targets)},
    }
    write_file(path / CARD, json.dumps(card, indent=1))
    console.say(f"Reward model: {tasks.reward(config.generalize.beta, 0) / 'model'}")
