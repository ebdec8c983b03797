"""The loop: sample, reward, policy, evaluate, commit, and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from actors.reward_trainer import RewardReport
from actors.scorer import Scores
from cluster.config import RunConfig
from cluster.console import Console
from cluster.inputs import Inputs
from cluster.judging import Judgement, judge, meta_rows, parity_bound
from cluster.metrics import Metrics
from cluster.pause import Pause, lay_down
from cluster.roles import Roles
from cluster.run_directory import RunDirectory, now, versions
from cluster.sampling import Sampling, ages, draw
from cluster.seeds import derive
from cluster.signals import end, finishing, stop_asked
from cluster.sync import Sync
from cluster.waiting import Waiter
from evaluation.records import write_rows
from evaluation.table import round_table
from tokens.records import Rollout

CHOICES = (
    "reward.start", "policy.start", "policy.reference", "policy.critic_start", "scorer.refresh", "scorer.aggregate",
    "meta.enabled", "meta.prompts", "policy.prompts", "policy.kl.controller", "policy.max_lag",
    "reward.base", "meta.order", "meta.deploy", "meta.objective", "meta.direction", "data.denoise.method",
)  # fmt: skip
"""What is carried from round to round and what starts anew; each is written into the ledger."""


@dataclass(frozen=True)
class Begun:
    """A round that has its reward model.

    Args:
        report: of the reward model's fit.
        steps: PPO steps that are done.
    """

    report: RewardReport
    steps: int


@dataclass
class Theme:
    """A run under way.

    Args:
        config: of the run.
        directory: where it is committed.
        inputs: what it learns from.
        roles: who does the work.
        sample: gives PPO the rollouts of a step.
        wait: waits for them.
        console: shows it.
        metrics: writes it down.
        sft: the SFT policy's samples and how they were judged.
        version: of the policy's weights that the engines hold.
    """

    config: RunConfig
    directory: RunDirectory
    inputs: Inputs
    roles: Roles
    sample: Sampling
    wait: Waiter
    console: Console
    metrics: Metrics
    sft: Judgement
    version: int

    choices: ClassVar[tuple[str, ...]] = CHOICES

    def run(self) -> None:
        """Play every round that is not committed yet; one that was laid down goes on at its next step."""
        for index in range(self.directory.num_committed, self.config.rounds.num_rounds):
            self.wait.begin(f"round {index}", index)
            self.console.say(f"[bold]Round {index + 1} of {self.config.rounds.num_rounds}[/]")
            with self.directory.draft(self.directory.round_path(index)) as draft:
                begun = self.take_up(index, draft) or self.begin(index, draft)
                with finishing():
                    for step in self.steps(begun.steps):
                        rollouts = self.sample(index, step, self.version)
                        rewards = self.wait("score", self.roles.scorer.score(rollouts))
                        if step == 0:
                            self.warm_up(index, rollouts, rewards)
                        bound = parity_bound(self.config, rollouts, self.version)
                        update = self.wait("policy", self.roles.learner.update(rollouts, rewards.aggregated, bound))
                        self.metrics.policy(index, step, update | ages(rollouts, self.version), rewards, self.gold(rollouts))
                        self.metrics.sync(index, step, self.sync())
                        self.stop_if_asked(index, draft, Begun(begun.report, step + 1))
                    judgement = self.evaluate(index, draft)
                    self.commit(index, draft, begun.report, judgement)

    def begin(self, index: int, draft: Path) -> Begun:
        """S_k, r_k, and where PPO starts."""
        shifted = self.sample_shifted(index)
        report = self.train_reward(index, draft, shifted)
        scores = self.score_shifted(shifted, draft)
        self.begin_policy(index, draft, scores)
        return Begun(report, 0)

    def take_up(self, index: int, draft: Path) -> Begun | None:
        """Put the roles where they were when this round was laid down; None if it never was."""
        paused = self.directory.paused
        if paused is None:
            return None
        self.console.say(f"  goes on after step {paused.steps} of {self.config.policy.steps_per_round}")
        self.wait.seconds.update(paused.seconds)
        new = {0: draft / "reward"} | {i: draft / "members" / str(i) for i in range(1, self.config.scorer.num_members)}
        for member, path in new.items():
            if path.exists():
                self.wait("score", self.roles.scorer.load(member, path))
        self.wait("policy", self.roles.learner.begin_round(index, None, None, None, self.reference(index)))
        return Begun(RewardReport(dict(paused.reward), (), (), paused.validation_accuracy), paused.steps)

    def stop_if_asked(self, index: int, draft: Path, begun: Begun) -> None:
        """Lay the round down and end the run, if a signal came; the step under way is over now.

        Raises:
            Stopped: when all is saved.
        """
        if stop_asked():
            self.lay_down(draft, begun)
            total = self.config.policy.steps_per_round
            end(f"round {index + 1} is saved after step {begun.steps} of {total}; the same command continues there")

    def lay_down(self, draft: Path, begun: Begun) -> None:
        """Save all that the rest of the round rests on."""
        report, seconds, mark = begun.report, dict(self.wait.seconds), self.metrics.mark()
        state = Pause(begun.steps, self.version, report.summary, report.validation_accuracy, seconds, mark)
        lay_down(draft, state, lambda place: self.wait("commit", self.roles.learner.save(place)))
        self.directory.keep_pause()

    def sample_shifted(self, index: int) -> list[Rollout]:
        """S_k: k responses of the current policy to each of the meta prompts."""
        number = min(self.config.meta.num_prompts, len(self.inputs.meta_prompts))
        prompts = draw(self.config.seed, self.inputs.meta_prompts, 0, number, "meta", index)
        seed = derive(self.config.seed, "meta", index)
        with self.console.bar("sample S_k", "samples") as bar:
            pending = self.roles.rollout.sample(prompts, self.config.meta.samples_per_prompt, seed, self.version)
            return self.wait("sample_meta", pending, bar)

    def train_reward(self, index: int, draft: Path, shifted: Sequence[Rollout]) -> RewardReport:
        """r_k: MetaRM on D and S_k; it becomes member 0 of the ensemble."""
        config = self.config
        last = self.directory.round_path(index - 1) / "reward" if index else None
        previous = last if config.reward.start == "previous" else None
        meta = shifted if config.meta.enabled else None
        with self.console.bar("reward model", "pairs") as bar:
            report = self.wait(
                "reward", self.roles.reward.fit(draft / "reward", derive(config.seed, "reward", index), previous, meta), bar
            )
        self.metrics.reward(index, report)
        self.wait("score", self.roles.scorer.load(0, draft / "reward"))
        if config.scorer.refresh == "each_round":
            for member in range(1, config.scorer.num_members):
                with self.console.bar(f"ensemble member {member}", "pairs") as bar:
                    out, seed = draft / "members" / str(member), derive(config.seed, "member", member)
                    self.wait("reward", self.roles.reward.fit(out, seed, None, meta), bar)
                self.wait("score", self.roles.scorer.load(member, out))
        return report

    def score_shifted(self, shifted: Sequence[Rollout], draft: Path) -> Scores:
        """What r_k and a reward model without MetaRM say of S_k; PPO's reward moments start from it."""
        scores = self.wait("score", self.roles.scorer.score(shifted))
        refitted = self.config.scorer.refresh == "each_round" and self.config.meta.enabled
        write_rows(draft / "meta_rollouts.parquet", meta_rows(shifted, scores, vanilla=None if refitted else 1))
        return scores

    def begin_policy(self, index: int, draft: Path, scores: Scores) -> None:
        """Critic, reference and start of the policy, as the config chooses."""
        policy = self.config.policy
        begins = {"reward": draft / "reward", "sft": self.inputs.sft_dir, "previous": None if index else draft / "reward"}
        restart = self.inputs.sft_dir if policy.start == "sft" and index else None
        self.wait(
            "policy",
            self.roles.learner.begin_round(index, scores.aggregated, begins[policy.critic_start], restart, self.reference(index)),
        )
        if restart:
            self.sync()

    def reference(self, index: int) -> Path | None:
        """What KL is measured against from this round on; None = SFT."""
        return self.directory.round_path(index - 1) / "policy" if self.config.policy.reference == "previous" and index else None

    def steps(self, first: int) -> Iterator[int]:
        """The PPO steps of a round from ``first`` on."""
        for step in self.metrics.steps(first, self.config.policy.steps_per_round, self.console):
            self.wait.step = step
            yield step
        self.wait.step = None

    def warm_up(self, index: int, rollouts: Sequence[Rollout], rewards: Scores) -> None:
        """Fit the new critic to the first rollouts of the round before the policy moves."""
        steps = self.config.policy.critic_warmup_steps
        if steps and (self.config.policy.critic_start != "previous" or index == 0):
            self.wait("policy", self.roles.learner.warm_up(rollouts, rewards.aggregated, steps))

    def sync(self) -> Sync:
        """Give the engines the learner's weights, as the next version."""
        self.version += 1
        return self.roles.sync(self.wait, self.version)

    def gold(self, rollouts: Sequence[Rollout]) -> float | None:
        """Mean gold reward, where the truth is known."""
        if self.inputs.gold is None:
            return None
        return sum(self.inputs.gold(r.prompt.text, r.text) for r in rollouts) / len(rollouts)

    def evaluate(self, index: int, draft: Path) -> Judgement:
        """One response to each held-out prompt, judged against SFT's."""
        with self.console.bar("evaluate", "samples") as bar:
            judgement = judge(self.config, self.inputs, self.roles, self.wait, self.version, self.sft, bar)
        write_rows(draft / "evaluation.parquet", judgement.rows)
        self.metrics.evaluation(index, judgement.summary)
        return judgement

    def commit(self, index: int, draft: Path, report: RewardReport, judgement: Judgement) -> None:
        """Save what the next round needs and make the round part of the run, in one step."""
        self.save(draft)
        flat = self.config.model_dump(mode="json")
        entry: dict[str, Any] = {
            "round": index,
            "committed_at": now(),
            "policy_version": self.version,
            "choices": {key: str(look_up(flat, key)) for key in self.choices},
            "seconds": {phase: round(seconds, 3) for phase, seconds in self.wait.seconds.items()},
            "reward": {**report.summary, "validation_accuracy": report.validation_accuracy},
            "evaluation": judgement.summary,
            "dropped": self.inputs.dropped,
            "denoised": self.inputs.denoised,
            "git_commit": versions()["git_commit"],
        }
        self.directory.commit_round(draft, entry)
        self.console.show(round_table(self.directory.ledger))
        if stop_asked():
            end(f"round {index + 1} is committed; the same command continues after it")

    def save(self, draft: Path) -> None:
        """The learner's models and all that moves, which the next round continues from."""
        self.wait("commit", self.roles.learner.save(draft))


def look_up(tree: dict[str, Any], dotted: str) -> Any:
    """The value at a dotted key."""
    value: Any = tree
    for key in dotted.split("."):
        value = value[key]
    return value
