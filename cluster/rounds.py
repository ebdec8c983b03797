"""The loop: sample, reward, policy, evaluate, commit, and again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from actors.fit_saves import FitSaves
from actors.reward_trainer import RewardReport
from actors.scorer import Scores
from cluster.config import RunConfig
from cluster.console import Console
from cluster.draft import Draft, Point
from cluster.fresh import Labelling, told, told_accuracy
from cluster.guarding import EVALUATED, SHIFTED, Guard, counts, moved, until_good
from cluster.inputs import Inputs
from cluster.judges import Judge
from cluster.judging import Judgement, judge, meta_rows, monitored, parity_bound, sample_for_judging
from cluster.metrics import Metrics
from cluster.recovery import Recovery
from cluster.roles import Roles
from cluster.run_directory import RunDirectory, now
from cluster.sampling import Sampling, ages, draw
from cluster.seeds import derive
from cluster.signals import end, finishing, stop_asked
from cluster.stages import Stages
from cluster.start import resume
from cluster.sync import Sync
from cluster.versions import versions
from cluster.waiting import Waiter
from evaluation.alarms import Alarm, alarms
from evaluation.best import OUT, best_of
from evaluation.table import round_table
from tokens.records import Pair, Rollout

CHOICES = (
    "reward.start", "policy.start", "policy.reference", "policy.critic_start", "scorer.refresh", "scorer.aggregate",
    "meta.enabled", "meta.prompts", "policy.prompts", "policy.kl.controller", "policy.max_lag",
    "reward.base", "meta.order", "meta.deploy", "meta.objective", "meta.direction", "data.denoise.method", "fresh.carry",
)  # fmt: skip
"""What is carried from round to round and what starts anew; each is written into the ledger."""


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
        stands: round that the roles stand at, and where the learner's state of it lies (None: as the round finds it); None while
            they move, and where that has failed.
        recover: makes good what is lost in something that goes on where it was left.
        labeller: compares samples of each round's policy; None = nobody does.
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
    stands: tuple[int, Path | None] | None
    recover: Recovery
    labeller: Judge | None = None

    choices: ClassVar[tuple[str, ...]] = CHOICES

    def run(self) -> None:
        """Play every round that is not committed yet, until the judgements no longer get better (``rounds.stop``)."""
        while not self.directory.finished:
            self.recover(partial(until_good, partial(self.play, self.directory.num_committed)))

    def play(self, index: int) -> None:
        """Play a round from where its draft stands: what is recorded there is not done again."""
        if self.stands is None and self.directory.look_again() > index:
            return  # its commit is in its place, and only what came after it failed
        self.wait.begin(f"round {index}", index)
        self.console.say(f"[bold]Round {index + 1} of {self.config.rounds.num_rounds}[/]")
        with self.directory.draft(self.directory.round_path(index)) as draft:
            work = self.take_up(index, draft)
            guard = Guard(self.config.guards, work.draft, index, self.metrics, self.console.say, self.refit)
            shifted = guard.trusting(SHIFTED, partial(self.sample_shifted, index, work))
            report = self.train_reward(index, work, shifted)
            first = self.begin_policy(index, work, self.score_shifted(index, work, shifted))
            with finishing():
                for step in self.steps(first):
                    guard.step(step, partial(self.learn, index, work, step))
                    self.keep(index, work, step + 1)
                self.save(work)
                judgement = guard.trusting(EVALUATED, partial(self.evaluate, index, work))
                self.commit(index, work, report, judgement)

    def learn(self, index: int, work: Stages, step: int) -> None:
        """One PPO step: sample, score, update, and give the engines the new weights."""
        rollouts = work.batch(step, partial(self.sample, index, step, self.version))
        rewards = work.rewards(step, partial(self.score, rollouts))
        bound, number = parity_bound(self.config, rollouts, self.version), index * self.config.policy.steps_per_round + step
        fresh = work.first(step) and self.warms_up(index)
        with moved(fresh):
            if fresh:
                self.warm_up(rollouts, rewards)
            update = self.wait("policy", self.roles.learner.update(rollouts, rewards.aggregated, bound, number))
        golds = self.golds(rollouts)
        gold = None if golds is None else sum(golds) / len(golds)
        self.metrics.policy(index, step, update | ages(rollouts, self.version), rewards, gold)
        self.look(index, step, rollouts, rewards, golds, update)
        self.metrics.sync(index, step, self.sync())
        work.record(f"step {step}", [], {"version": self.version})

    def look(
        self,
        index: int,
        step: int,
        rollouts: Sequence[Rollout],
        rewards: Scores,
        golds: Sequence[float] | None,
        update: Mapping[str, float],
    ) -> None:
        """Every ``evaluation.every_steps`` steps: signs of over-optimisation in the step's own rollouts."""
        every = self.config.evaluation.every_steps
        if every is None or (step + 1) % every:
            return
        judged = self.wait("evaluate", self.roles.scorer.judge(rollouts)) if self.config.evaluation.num_held_out else None
        held_out = None if judged is None else (sum(judged.mean) / len(judged.mean), sum(judged.std) / len(judged.std))
        proxies = [row[0] for row in rewards.members]
        self.metrics.monitor(index, step, monitored(rollouts, proxies, golds, held_out, update))

    def refit(self) -> None:
        """Give the engines the learner's weights once more; what they were asked for ahead is asked for again."""
        self.sample.forget()
        self.roles.sync(self.wait, self.version)

    def take_up(self, index: int, draft: Draft) -> Stages:
        """Go to where the round's draft stands, unless the roles stand there."""
        if self.stands is None:
            draft.check(self.console.say)
            draft.tidy()
        draft.begin(self.version, self.metrics.mark())
        point = draft.go_back()
        self.wait.seconds.update(point.seconds)
        if self.stands != (index, point.place):
            self.restore(point)
        self.stands = None
        if point.steps:
            self.console.say(f"  goes on after step {point.steps} of {self.config.policy.steps_per_round}")
        return Stages(draft, self.wait, self.metrics, self.config, index)

    def restore(self, point: Point) -> None:
        """Put every role where a round goes on: in living processes, and in those that have taken a dead one's place."""
        self.sample.forget()
        self.metrics.go_back(point.metrics_bytes)
        resume(self.config, self.directory, self.inputs, self.roles, self.wait)
        saved = (self.directory.learner_path, self.directory.critic_base(self.inputs.sft_dir))
        self.wait("restore", self.roles.learner.restore(*saved))
        self.version = point.policy_version
        self.roles.sync(self.wait, self.version)

    def keep(self, index: int, work: Stages, steps: int) -> None:
        """Save the round as it stands if that is due, or a signal came; then end the run.

        Raises:
            Stopped: when all is saved.
            RoleLost: if the learner moves to another node, where it goes on from what was saved.
        """
        every, total, stopping = self.config.rounds.checkpoint_every, self.config.policy.steps_per_round, stop_asked()
        if stopping or self.recover.moving.saving_is_due() or (every is not None and steps % every == 0 and steps < total):
            work.checkpoint(
                steps,
                self.version,
                lambda place: self.wait("checkpoint", self.roles.learner.save(place)),
                self.config.rounds.keep_checkpoints,
            )
            self.directory.keep_draft()
            self.recover.moving.move_learner()
        if stopping:
            end(f"round {index + 1} is saved after step {steps} of {total}; the same command continues there")

    def sample_shifted(self, index: int, work: Stages) -> list[Rollout]:
        """S_k: k responses of the current policy to each of the meta prompts."""
        number = min(self.config.meta.num_prompts, len(self.inputs.meta_prompts))
        prompts = draw(self.config.seed, self.inputs.meta_prompts, 0, number, "meta", index)
        seed = derive(self.config.seed, "meta", index)

        def sample() -> list[Rollout]:
            with self.console.bar("sample S_k", "samples") as bar:
                pending = self.roles.rollout.sample(prompts, self.config.meta.samples_per_prompt, seed, self.version)
                return self.wait("sample_meta", pending, bar)

        return work.rollouts("shifted", "shifted.parquet", sample)

    def label(self, index: int, work: Stages, shifted: Sequence[Rollout]) -> tuple[Pair, ...] | None:
        """Have pairs of S_k labelled where somebody does that.

        Returns:
            What r_k learns from; None = D.
        """
        if self.labeller is None:
            return None
        labelling = Labelling(self.config, self.labeller, self.directory, self.wait, self.console)
        labelling.label(index, work, shifted, self.kept_back(index, shifted), partial(self.by_last, index, shifted))
        return labelling.learnt(index, work, self.inputs.pairs)

    def by_last(self, index: int, shifted: Sequence[Rollout]) -> list[float] | None:
        """Scores of S_k by the reward model of the round before; None where some were not finite, and it was left out."""
        self.wait("score", self.roles.scorer.load(0, self.directory.round_path(index - 1) / "reward"))
        scores = self.score(shifted)
        return [members[scores.ids.index(0)] for members in scores.members] if 0 in scores.ids else None

    def train_reward(self, index: int, work: Stages, shifted: Sequence[Rollout]) -> RewardReport:
        """r_k: MetaRM on D and S_k, with fresh labels where somebody gives them; it becomes member 0 of the ensemble."""
        config, pairs = self.config, self.label(index, work, shifted)
        last = self.directory.round_path(index - 1) / "reward" if index else None
        previous = last if config.reward.start == "previous" else None
        meta = shifted if config.meta.enabled else None

        def fit(place: Path, saves: FitSaves | None) -> RewardReport:
            with self.console.bar("reward model", "pairs") as bar:
                seed = derive(config.seed, "reward", index)
                report = self.wait("reward", self.roles.reward.fit(place, seed, previous, meta, saves, pairs), bar)
            self.metrics.reward(index, report)
            return report

        report = work.fit("reward", "reward", fit)
        self.wait("score", self.roles.scorer.load(0, work.draft / "reward"))
        if config.scorer.refresh == "each_round":
            for member in range(1, config.scorer.num_members):
                work.fit(f"member {member}", f"members/{member}", partial(self.fit_member, member, meta, pairs))
                self.wait("score", self.roles.scorer.load(member, work.draft / "members" / str(member)))
        return report

    def fit_member(
        self,
        member: int,
        meta: Sequence[Rollout] | None,
        pairs: Sequence[Pair] | None,
        place: Path,
        saves: FitSaves | None,
    ) -> RewardReport:
        """A further member of the ensemble."""
        seed = derive(self.config.seed, "member", member)
        with self.console.bar(f"ensemble member {member}", "pairs") as bar:
            return self.wait("reward", self.roles.reward.fit(place, seed, None, meta, saves, pairs), bar)

    def kept_back(self, index: int, shifted: Sequence[Rollout]) -> frozenset[int]:
        """Places of the prompts of S_k that r_k's ascent did not see."""
        from rm.shifted import kept_back

        if not self.config.meta.enabled:
            return frozenset()
        return kept_back(len({rollout.prompt.id for rollout in shifted}), derive(self.config.seed, "reward", index))

    def score_shifted(self, index: int, work: Stages, shifted: Sequence[Rollout]) -> Scores:
        """What r_k and a reward model without MetaRM say of S_k; PPO's reward moments start from it."""
        scores = work.scores("calibration", "calibration.json", partial(self.score, shifted))
        refitted = self.config.scorer.refresh == "each_round" and self.config.meta.enabled
        rows = meta_rows(shifted, scores, None if refitted else 1, self.inputs.gold, self.kept_back(index, shifted))
        work.rows("meta_rollouts.parquet", rows)
        return scores

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """What every member says of rollouts."""
        return self.wait("score", self.roles.scorer.score(rollouts))

    def begin_policy(self, index: int, work: Stages, scores: Scores) -> int:
        """Go on with the policy after the steps that are done; else critic, reference and start of it, as the config chooses.

        Returns:
            PPO steps that are done.
        """
        point = work.draft.go_back()
        if point.place is not None:
            self.wait("policy", self.roles.learner.begin_round(index, None, None, None, self.reference(index)))
        else:
            self.start_policy(index, work.draft, scores)
        return point.steps

    def start_policy(self, index: int, draft: Draft, scores: Scores) -> None:
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

    def warms_up(self, index: int) -> bool:
        """Whether a round's critic is new, and fitted to the first rollouts before the policy moves."""
        policy = self.config.policy
        return policy.critic_warmup_steps > 0 and (policy.critic_start != "previous" or index == 0)

    def warm_up(self, rollouts: Sequence[Rollout], rewards: Scores) -> None:
        """Fit the new critic to the first rollouts of the round before the policy moves."""
        self.wait("policy", self.roles.learner.warm_up(rollouts, rewards.aggregated, self.config.policy.critic_warmup_steps))

    def sync(self) -> Sync:
        """Give the engines the learner's weights, as the next version."""
        self.version += 1
        return self.roles.sync(self.wait, self.version)

    def golds(self, rollouts: Sequence[Rollout]) -> list[float] | None:
        """The gold reward of each, where the truth is known."""
        return None if self.inputs.gold is None else [self.inputs.gold(r.prompt.text, r.text) for r in rollouts]

    def evaluate(self, index: int, work: Stages) -> Judgement:
        """One response to each held-out prompt, judged against SFT's."""
        with self.console.bar("evaluate", "samples") as bar:
            given = (self.config, self.inputs, self.roles, self.wait, self.version)
            rollouts = work.rollouts("evaluation", "evaluation_rollouts.parquet", lambda: sample_for_judging(*given, bar))
            judgement = judge(*given, self.sft, bar, rollouts)
        if self.labeller is not None:
            labels = {"fresh_accuracy": told_accuracy(work), "fresh_labelled": float(told(work)["labelled"])}
            judgement = replace(judgement, summary={**judgement.summary, **labels})
        work.rows("evaluation.parquet", judgement.rows)
        self.metrics.evaluation(index, judgement.summary | self.outcome(judgement))
        return judgement

    def commit(self, index: int, work: Stages, report: RewardReport, judgement: Judgement) -> None:
        """Make the round part of the run, in one step."""
        flat = self.config.model_dump(mode="json")
        entry: dict[str, Any] = {
            "round": index,
            "committed_at": now(),
            "policy_version": self.version,
            "choices": {key: str(look_up(flat, key)) for key in self.choices},
            "seconds": {phase: round(seconds, 3) for phase, seconds in self.wait.seconds.items()},
            "reward": {**report.summary, "validation_accuracy": report.validation_accuracy},
            "evaluation": judgement.summary,
            "alarms": [vars(alarm) for alarm in self.alarms(judgement)],
            **self.disqualified(judgement),
            "dropped": self.inputs.dropped,
            "denoised": self.inputs.denoised,
            **({"fresh": told(work)} if self.labeller is not None else {}),
            "guards": counts(work.draft),
            "git_commit": versions()["git_commit"],
        }
        self.directory.commit_round(work.draft, entry)
        self.roles.scorer.holds.committed(work.draft.path, self.directory.round_path(index))
        self.stands = (index + 1, None)
        self.console.show(round_table(self.directory.ledger))
        for alarm in self.directory.ledger["rounds"][-1]["alarms"]:
            self.console.say(f"[bold red]alarm[/] {Alarm(**alarm).words()}")
        self.tell_best()
        if stop_asked():
            end(f"round {index + 1} is committed; the same command continues after it")

    def outcome(self, judgement: Judgement) -> dict[str, float]:
        """What the round's end will tell, in numbers: how many alarms, and the best round by then (-1 = SFT)."""
        ledger = self.directory.ledger
        entry = {"evaluation": judgement.summary, **self.disqualified(judgement)}
        best = best_of(ledger | {"rounds": [*ledger["rounds"], entry]})
        number = -1.0 if best.round is None else float(best.round)
        return {"alarms": float(len(self.alarms(judgement))), "best_round": number, "best_gain": best.gain}

    def alarms(self, judgement: Judgement) -> tuple[Alarm, ...]:
        """What a round's judgement should alarm about, beside those before it."""
        before = [entry["evaluation"] for entry in self.directory.ledger["rounds"]]
        return alarms(self.sft.summary, [*before, judgement.summary], self.config.evaluation.kl_budget)

    def disqualified(self, judgement: Judgement) -> dict[str, list[str]]:
        """The ledger's part that says for which of its alarms a round does not count; nothing where none would matter."""
        named = self.config.evaluation.disqualify
        return {OUT: [alarm.name for alarm in self.alarms(judgement) if alarm.name in named]} if named else {}

    def tell_best(self) -> None:
        """Which round is the best so far, and why the run ends, if it does."""
        if self.directory.best.is_kept(self.directory.ledger):
            self.console.say(f"  best: {best_of(self.directory.ledger).words()}")
        stopped = self.directory.why_stopped(self.directory.ledger)
        if stopped is not None and self.directory.num_committed < self.config.rounds.num_rounds:
            self.console.say(f"[bold]Stopped[/] after round {self.directory.num_committed - 1}: {stopped}")

    def save(self, work: Stages) -> None:
        """The learner's models and all that moves, which the next round continues from."""
        steps = self.config.policy.steps_per_round
        work.trained(steps, self.version, lambda place: self.wait("commit", self.roles.learner.save(place)))


def look_up(tree: dict[str, Any], dotted: str) -> Any:
    """The value at a dotted key."""
    value: Any = tree
    for key in dotted.split("."):
        value = value[key]
    return value
