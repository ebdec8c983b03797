"""PPO steps whose numbers go wrong: what the round does about each, what its journal remembers, and when it ends."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cluster.run
from cluster.cli import main
from cluster.draft import Draft, point_of
from cluster.failures import BadNumbers
from cluster.guarding import Guard, StepUndone, counts, moved, until_good
from cluster.load_config import load_config
from cluster.run_directory import config_sha256
from tests.cluster.command import ROOT, SECRETS, TINY, Command
from tokens.guards import BadNumber, GuardsConfig

Fault = BadNumber | None


class Round:
    """A round whose steps only count, on a journal as a run has it."""

    def __init__(self, folder: Path, faults: dict[int, list[Fault]], checkpoint_every: int = 3, **guards: int) -> None:
        self.folder, self.faults, self.every = folder, faults, checkpoint_every
        self.guards = GuardsConfig.model_validate(guards)
        self.learned: list[int] = []
        self.tried: list[int] = []
        self.refitted = 0
        self.rows: list[tuple[int, dict[str, int], str]] = []
        self.said: list[str] = []

    def play(self, num_steps: int) -> None:
        draft = Draft(self.folder)
        draft.begin(0, 0)
        point = draft.go_back()
        self.learned = [s for s in self.learned if s < point.steps]
        metrics: Any = SimpleNamespace(guard=lambda i, step, found, event: self.rows.append((step, found, event["action"])))
        guard = Guard(self.guards, draft, 4, metrics, self.said.append, self.refit)
        for step in range(point.steps, num_steps):
            guard.step(step, lambda step=step: self.learn(draft, step))  # type: ignore[misc]
            if (step + 1) % self.every == 0:
                draft.checkpoint(step + 1, step, lambda place: (place / "x").write_text("x") and None, 2, 0, {})

    def learn(self, draft: Draft, step: int) -> None:
        self.tried.append(step)
        if draft.done(f"rollouts {step}") is None:
            draft.note(f"rollouts {step}", {"try": len(self.tried)})
        fault = self.faults[step].pop(0) if self.faults.get(step) else None
        if fault is not None:
            raise BadNumbers(f"learner-0 failed: {fault}", fault, "learner-0")
        self.learned.append(step)
        draft.note(f"step {step}", {})

    def refit(self) -> None:
        self.refitted += 1


def bad(**more: Any) -> BadNumber:
    return BadNumber("the policy loss", math.nan, where="round 4", **more)


def test_a_step_that_changed_nothing_is_left_out_and_the_next_goes_on(tmp_path: Path) -> None:
    run = Round(tmp_path, {2: [bad()]})
    until_good(lambda: run.play(6))
    assert run.learned == [0, 1, 3, 4, 5] and run.tried == [0, 1, 2, 3, 4, 5]
    assert counts(Draft(tmp_path)) == {"left_out": 1, "undone": 0, "refitted": 0}
    assert run.rows == [(2, {"left_out": 1, "undone": 0, "refitted": 0}, "left out")]
    assert "the policy loss is nan at round 4, expected a finite number; step 2 is left out" in run.said[0]


def test_a_step_that_moved_weights_is_undone_and_those_before_are_learned_again(tmp_path: Path) -> None:
    run = Round(tmp_path, {5: [bad(undo=True)]})
    until_good(lambda: run.play(8))
    assert run.learned == [0, 1, 2, 3, 4, 6, 7] and run.tried == [0, 1, 2, 3, 4, 5, 3, 4, 6, 7]
    draft = Draft(tmp_path)
    assert draft.done("rollouts 4") == next(entry for entry in draft.journal.entries if entry.key == "rollouts 4"), (
        "the same ones"
    )
    assert counts(draft) == {"left_out": 0, "undone": 1, "refitted": 0}
    assert [row[0] for row in run.rows] == [5, 5]  # once when it was found, and once more in its place among the rows


def test_what_a_batch_shows_of_the_update_before_it_undoes_that_one(tmp_path: Path) -> None:
    run = Round(tmp_path, {3: [bad()], 4: [bad(earlier=True)]})  # checkpoint after step 2; step 3 was left out
    until_good(lambda: run.play(6))
    assert run.learned == [0, 1, 3, 4, 5]
    draft = Draft(tmp_path)
    assert draft.done("bad 2") is not None and draft.done("bad 3") is None, "step 3 has a better policy now"
    assert draft.done("checkpoint 3") is not None and draft.journal.alive["checkpoint 3"].facts["steps"] == 3
    assert run.tried == [0, 1, 2, 3, 4, 0, 1, 3, 4, 5], "the checkpoint after step 2 rested on it"


def test_a_round_that_begins_with_a_collapsed_policy_ends(tmp_path: Path) -> None:
    run = Round(tmp_path, {0: [bad(earlier=True)]})
    with pytest.raises(BadNumbers, match=r"first batch of its round: no step of it is to blame: round 5 ends here, its reward"):
        until_good(lambda: run.play(6))
    assert counts(Draft(tmp_path)) == {"left_out": 0, "undone": 0, "refitted": 0}


@pytest.mark.parametrize(
    ("faults", "guards", "words"),
    [
        ({3: [bad()], 4: [bad(undo=True)], 5: [bad()]}, {}, "that is 3 in a row .guards.in_a_row.: round 5 ends here, its last"),
        ({0: [bad()], 2: [bad()], 4: [bad()]}, {"in_a_round": 3}, "that is 3 since it began .guards.in_a_round."),
    ],
)
def test_too_many_end_the_round_with_what_is_good_intact(
    tmp_path: Path, faults: dict[int, list[Fault]], guards: dict[str, int], words: str
) -> None:
    run = Round(tmp_path, faults, **guards)
    with pytest.raises(BadNumbers, match=words):
        until_good(lambda: run.play(9))
    point = point_of(tmp_path)
    assert point is not None and point.steps == 3
    again = Round(tmp_path, {})  # the same command, later: it goes on, and does not try those again
    until_good(lambda: again.play(9))
    assert set(again.learned).isdisjoint(faults) and again.learned[-1] == 8


def test_a_killed_run_goes_on_counting(tmp_path: Path) -> None:
    first = Round(tmp_path, {3: [bad()], 4: [bad()]})
    until_good(lambda: first.play(5))
    second = Round(tmp_path, {5: [bad()]})
    with pytest.raises(BadNumbers, match="3 in a row"):
        until_good(lambda: second.play(9))


def test_engines_that_disagree_are_refitted_once_and_then_count(tmp_path: Path) -> None:
    disagree = bad(engines=("rollout-1",))
    run = Round(tmp_path, {1: [disagree], 3: [disagree, disagree]})
    until_good(lambda: run.play(5))
    assert run.refitted == 2 and run.learned == [0, 1, 2, 4] and run.tried == [0, 1, 1, 2, 3, 3, 4]
    draft = Draft(tmp_path)
    assert counts(draft) == {"left_out": 1, "undone": 0, "refitted": 1}
    tries = [entry.facts["try"] for entry in draft.journal.entries if entry.key == "rollouts 1"]
    assert len(tries) == 2 and draft.journal.alive["rollouts 1"].facts["try"] == tries[1], "they were sampled again"
    assert draft.journal.alive["bad 3"].facts["who"] == "rollout-1"


def test_a_step_that_has_warmed_the_critic_up_is_undone_whatever_went_wrong_in_it(tmp_path: Path) -> None:
    with pytest.raises(BadNumbers) as kept, moved(False):
        raise BadNumbers("x", bad(), "learner-0")
    assert not kept.value.bad.undo
    with pytest.raises(BadNumbers, match="x") as undone, moved(True):
        raise BadNumbers("x", bad(engines=("rollout-0",)), "learner-0", "trace")
    assert undone.value.bad.undo and undone.value.bad.engines == ("rollout-0",)
    assert (undone.value.who, undone.value.trace) == ("learner-0", "trace")
    run = Round(tmp_path, {0: [bad(engines=("rollout-1",), undo=True)]})
    until_good(lambda: run.play(2))
    assert run.tried == [0, 0, 1] and run.learned == [0, 1] and run.refitted == 0, "all roles were put back instead"
    draft = Draft(tmp_path)
    assert counts(draft) == {"left_out": 0, "undone": 0, "refitted": 1}
    assert len([entry for entry in draft.journal.entries if entry.key == "rollouts 0"]) == 2, "they were sampled again"
    always = Round(tmp_path / "always", {0: [bad(engines=("rollout-1",), undo=True)] * 9})
    always.folder.mkdir()
    with pytest.raises(BadNumbers, match="since it began") as ended:
        until_good(lambda: always.play(2))
    assert str(ended.value).count("ends here") == 1


def test_a_refit_that_is_one_too_many_ends_the_round_after_a_step_that_was_learned(tmp_path: Path) -> None:
    run = Round(tmp_path, {0: [bad(engines=("rollout-1",))]}, in_a_row=1)
    with pytest.raises(BadNumbers, match=r"guards\.in_a_row") as caught:
        until_good(lambda: run.play(4))
    assert str(caught.value).count("ends here") == 1
    draft = Draft(tmp_path)
    assert [entry.key for entry in draft.journal.entries].count("bad 0") == 1
    assert counts(draft) == {"left_out": 0, "undone": 0, "refitted": 1} and draft.done("step 0") is not None


def test_a_step_is_left_out_for_bad_numbers_alone(tmp_path: Path) -> None:
    def fail() -> None:
        raise StepUndone("x")

    guard = Guard(GuardsConfig(), Draft(tmp_path), 0, SimpleNamespace(), print, print)  # type: ignore[arg-type]
    with pytest.raises(StepUndone):
        guard.step(0, fail)


def test_the_command_says_with_its_exit_code_that_numbers_went_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def end(config: Any, console: Any) -> None:
        raise BadNumbers("the policy loss is nan; that is 3 in a row", bad(), "learner-0")

    monkeypatch.setattr(cluster.run, "run", end)
    assert main(["run", str(TINY), "--storage", str(tmp_path)]) == 3
    said = capsys.readouterr().err
    assert "failed: the policy loss is nan; that is 3 in a row" in said and "the same command continues" in said


def faulty(storage: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = SECRETS | dict(os.environ) | {"RONDO_STORAGE": str(storage)}
    return subprocess.run(
        [sys.executable, "-m", "tests.cluster.faulty", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


def test_a_run_whose_roles_break_one_after_another_commits_its_round(
    tiny_run: tuple[Path, Any], command: Command, tmp_path: Path
) -> None:
    copy = command.storage / "runs" / "tiny-faulty"
    shutil.copytree(tiny_run[0], copy)
    state = json.loads((copy / "ledger.json").read_text())
    state["config_sha256"] = config_sha256(load_config(TINY, ["--name", "tiny-faulty"]))
    (copy / "ledger.json").write_text(json.dumps(state))
    done = faulty(command.storage, "run", str(TINY), "--name", "tiny-faulty", "--rounds.num_rounds", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    entry = json.loads((copy / "ledger.json").read_text())["rounds"][2]
    assert entry["guards"] == {"left_out": 0, "undone": 1, "refitted": 1}
    assert entry["policy_version"] == 5, "one step of two was learned from"
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row for row in rows if row["phase"] == "guard"}
    assert (found[0]["action"], found[0]["who"]) == ("refitted", "rollout-0")
    assert found[1]["action"] == "undone" and "log-probs" in found[1]["what"] and found[1]["who"] == "learner-0"
    assert [row["step"] for row in rows if row["phase"] == "policy" and row["round"] == 2] == [0]
    assert "again" in done.stdout and "are broken; they are read again" in (copy / "logs" / "scorer-0.log").read_text()
    assert "1 undone" in (copy / "report.html").read_text()
