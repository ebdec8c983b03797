"""A run that is cut off at every line of its journal, before the line and after it, comes to the bits of one that never was.

One real Ray with one real engine plays both. At every second cut the next driver begins; at the others the same processes go on.
"""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.console import Console
from cluster.fresh import AnnotatorJudge
from cluster.inputs import Inputs, open_source
from cluster.journal import Entry, Journal
from cluster.load_config import load_config
from cluster.metrics import Metrics
from cluster.model_sizes import model_size
from cluster.plan import bundles
from cluster.recorded import learned_from
from cluster.roles import Roles
from cluster.rounds import Theme
from cluster.run import connected, telemetry_of
from cluster.run_directory import RunDirectory
from cluster.sampling import sampling
from cluster.stage import Stage
from cluster.start import begin
from cluster.waiting import Waiter
from sandbox.world import World
from tests.cluster.command import TINY, Command
from tests.cluster.straight import Straight

OPTIONS = [
    "--name", "resumed", "--rounds.checkpoint_every", "2", "--rounds.keep_rollouts", "true", "--rounds.save_fit_every", "3",
    "--policy.steps_per_round", "3", "--policy.kl.controller", "adaptive", "--policy.kl.target", "0.5",
    "--policy.kl.horizon", "100", "--policy.reference", "previous", "--policy.critic_start", "previous",
    "--reward.start", "previous", "--scorer.refresh", "each_round", "--policy.prompts_per_step", "8",
    "--meta.num_prompts", "8", "--evaluation.num_prompts", "8", "--fresh.num_pairs", "6", "--fresh.judge", "annotators",
]  # fmt: skip
"""Two rounds in which as much as can be goes on from round to round."""
CLOCKS = ("time", "sample/seconds", "sample/tokens_per_second", "sync/seconds", "sync/bytes_per_second")


class CutOffError(RuntimeError):
    """Stands for the end of the driver."""


@dataclass
class Cuts:
    """Cuts the driver off at each line of a journal once: before it is written at odd lines, after it at even ones."""

    seen: set[tuple[str, str]] = field(default_factory=set)

    def append(self, journal: Journal, entry: Entry) -> None:
        line = (journal.path.parent.name, entry.key)
        if entry.key == "undone" or line in self.seen:
            WRITE(journal, entry)
            return
        self.seen.add(line)
        if len(self.seen) % 2 == 0:
            WRITE(journal, entry)
        raise CutOffError(entry.key)


WRITE = Journal.append


@dataclass
class Scene:
    """Processes that play one run after another."""

    inputs: Inputs
    roles: Roles
    asked: Any

    def play(self, storage: Path, attempts: int) -> int:
        """Play the run; an attempt that is cut off is followed by another one, of a new driver or of the same.

        Returns:
            How often it was cut off.
        """
        config = load_config(TINY, ["--storage", str(storage), *OPTIONS])
        self.empty_scorer()
        cut = 0
        while True:
            wait, console = Waiter(Console(), storage / "logs", config.resources.deadline_s), Console()
            with RunDirectory(config).open() as directory:
                metrics = Metrics(directory.path, config.policy.steps_per_round, telemetry_of(config, directory, self.asked))
                wait.record = metrics.span
                with closing(metrics):
                    saved = (directory.learner_path, directory.critic_base(self.inputs.sft_dir))
                    wait("start", self.roles.learner.restore(*saved))
                    try:
                        sft, version = begin(config, directory, self.inputs, self.roles, wait, console, metrics)
                    except CutOffError:
                        cut += 1
                        continue
                    point = directory.point
                    stands = (directory.num_committed, None if point is None else point.place)
                    batches = sampling(config, self.inputs.policy_prompts, self.roles.rollout, wait)
                    given = (config, directory, self.inputs, self.roles, batches, wait, console, metrics, sft, version, stands)
                    theme = Theme(*given, Straight(), AnnotatorJudge(World(config.world), config.seed))  # type: ignore[arg-type]
                    for _ in range(2):
                        try:
                            theme.run()
                            return cut
                        except CutOffError:
                            cut += 1
            assert cut < attempts

    def empty_scorer(self) -> None:
        """As it comes to a run: without the members of another one."""
        self.roles.scorer.holds.members.clear()
        ray.get(self.roles.scorer.processes[0].actor.__ray_call__.remote(lambda scorer: scorer.members.clear()))


@pytest.fixture(scope="module")
def runs(command: Command, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Cuts]:
    storage, console = tmp_path_factory.mktemp("resumed"), Console()
    if (command.storage / "cache").is_dir():  # another test may have built the world
        shutil.copytree(command.storage / "cache", storage / "cache")
    config = load_config(TINY, ["--storage", str(storage), *OPTIONS])
    cuts = Cuts()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected(config, console) as fixed:
            source = open_source(config, storage)
            if source.recipe is not None and not source.prepared:
                source.recipe(lambda unit, done, total: None)
            inputs, asked = source.load(), bundles(config, model_size(config))
            stage = Stage(config, asked, storage / "logs", console.say, fixed)
            wait = Waiter(console, storage / "logs", config.resources.deadline_s)
            try:
                stage.wait_for_room()
                given = (inputs.sft_dir, inputs.base_dir, inputs.pairs, {"original": inputs.validation}, inputs.ptx)
                roles = wait("start", stage.start(*given, 56))
                wait("start", roles.learner.load(roles.rollout, None, inputs.sft_dir))
                scene = Scene(inputs, roles, asked)
                assert scene.play(storage / "whole", 1) == 0
                patch.setattr(Journal, "append", lambda journal, entry: cuts.append(journal, entry))
                cut = scene.play(storage / "cut", 200)
            finally:
                stage.close()
    assert cut == len(cuts.seen)
    return storage / "whole" / "runs" / "resumed", storage / "cut" / "runs" / "resumed", cuts


def rows(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in json.loads(line).items() if key not in CLOCKS}
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


def files(run: Path) -> dict[str, bytes]:
    there = [file for part in ("start", "rounds") for file in (run / part).rglob("*") if file.is_file()]
    return {file.relative_to(run).as_posix(): file.read_bytes() for file in there if file.name != "journal.jsonl"}


def test_it_was_cut_off_at_every_stage(runs: tuple[Path, Path, Cuts]) -> None:
    for index in (0, 1):
        keys = {key for draft, key in runs[2].seen if draft == f".round_{index:03d}.partial"}
        stages = {
            "begun",
            "shifted",
            "fresh.parquet",
            "reward",
            "member 1",
            "calibration",
            "meta_rollouts.parquet",
            "checkpoint 2",
            "trained",
        }
        steps = {f"{name} {step}" for name in ("rollouts", "scores", "step") for step in range(3)}
        assert keys == stages | steps | {"evaluation", "evaluation.parquet"}
    assert {key for draft, key in runs[2].seen if draft == ".start.partial"} >= {"member 1", "evaluation", "sft_rollouts.parquet"}


def test_every_file_and_every_number_is_the_same(runs: tuple[Path, Path, Cuts]) -> None:
    whole, cut, _ = runs
    assert rows(cut) == rows(whole)
    one, other = files(whole), files(cut)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def test_tensorboard_has_every_step_once(runs: tuple[Path, Path, Cuts]) -> None:
    for phase, name in (("policy", "policy/kl"), ("sync", "sync/bytes"), ("evaluation", "evaluation/kl")):
        seen = []
        for run in runs[:2]:
            board = EventAccumulator(str(run / "tensorboard" / phase), size_guidance={"scalars": 0})
            board.Reload()
            seen.append([(event.step, event.value) for event in board.Scalars(name)])
        assert seen[0] == seen[1] and len({step for step, _ in seen[1]}) == len(seen[1]), phase


def test_every_sample_was_learned_from_once(runs: tuple[Path, Path, Cuts]) -> None:
    for index in (0, 1):
        journals = [Journal(run / "rounds" / f"round_{index:03d}") for run in runs[:2]]
        whole, cut = (learned_from(journal) for journal in journals)
        assert whole == cut and [len(ids) for ids in cut.values()] == [16, 16, 16]
        assert any(entry.key == "undone" for entry in journals[1].entries), "steps were done again"
