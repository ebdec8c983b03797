"""What the round loop is compared with: the same house, other episodes.

vanilla_ppo is one long PPO against one reward model, ensemble_ppo against several; best_of_n leaves the policy alone and picks
among its samples; dpo trains it on the pairs without a reward model. Each is committed and judged as a round is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from actors.reward_trainer import RewardReport
from actors.scorer import Scores
from cluster.config import RunConfig
from cluster.draft import TRAINED, Draft, Point
from cluster.failures import RoleFailed
from cluster.judging import EVALUATION_SEED, Judgement, judge, meta_rows
from cluster.roles import ScorerHandle
from cluster.rounds import CHOICES, Theme
from cluster.rounds_config import Baseline
from cluster.seeds import derive
from cluster.stages import Stages
from cluster.waiting import Pending
from evaluation.best_of_n import best_of_n_kl, pick_best, pick_softly, soft_best_of_n_kl
from tokens.records import Rollout

NO_SCORES = Scores((), (), (), (), ())
"""Where nothing is scored: the reward moments go on."""


class FirstMember(ScorerHandle):
    """The scorer, but what PPO is paid by is r_0 alone; the other members still say what they think."""

    def score(self, rollouts: Sequence[Rollout]) -> Pending[Scores]:
        """Score rollouts with every member."""
        asked = super().score(rollouts)
        return replace(asked, combine=lambda answers: first_alone(asked.combine(answers)))


def first_alone(scores: Scores) -> Scores:
    """Scores whose aggregate is member 0's.

    Raises:
        RoleFailed: if member 0's were not finite and it was left out.
    """
    if 0 not in scores.ids:
        raise RoleFailed("the reward model that vanilla PPO is paid by gave scores that are not finite")
    column = scores.ids.index(0)
    return replace(scores, aggregated=tuple(row[column] for row in scores.members))


@dataclass
class VanillaPPO(Theme):
    """One reward model, trained on D in the first round and never again; later rounds go on where the one before stopped."""

    choices = ("rounds.baseline", *(key for key in CHOICES if not key.startswith("meta.")), "policy.prompts")

    def run(self) -> None:
        """Play every round that is not committed yet."""
        self.roles = replace(self.roles, scorer=self.payer(self.roles.scorer))
        self.recover(self.load_first)
        super().run()

    def payer(self, scorer: ScorerHandle) -> ScorerHandle:
        """What PPO is paid by: r_0 alone."""
        return FirstMember(scorer.processes, scorer.rota, scorer.holds, scorer.config, scorer.guards)

    def sample_shifted(self, index: int, work: Stages) -> list[Rollout]:
        """S_0, which the reward moments start from; nothing later."""
        return [] if index else super().sample_shifted(index, work)

    def train_reward(self, index: int, work: Stages, shifted: Sequence[Rollout]) -> RewardReport:
        """r_0, without MetaRM; later rounds keep it, and have no fit to report."""
        return kept(self.directory.ledger["rounds"][0]["reward"]) if index else super().train_reward(index, work, shifted)

    def score_shifted(self, index: int, work: Stages, shifted: Sequence[Rollout]) -> Scores:
        """What r_0 says of S_0."""
        return super().score_shifted(index, work, shifted) if shifted else NO_SCORES

    def start_policy(self, index: int, draft: Draft, scores: Scores) -> None:
        """The first round's start; later nothing starts: policy, critic, reference, optimizers and moments go on."""
        if index:
            self.wait("policy", self.roles.learner.begin_round(index, None, None, None, None))
        else:
            super().start_policy(index, draft, scores)

    def restore(self, point: Point) -> None:
        """Put every role where a round goes on; the scorer still has r_0, or is given it again."""
        super().restore(point)
        self.load_first()

    def load_first(self) -> None:
        """Give the scorer r_0, once that is committed; in the first round it is loaded when it is fitted."""
        if self.directory.num_committed:
            self.wait("score", self.roles.scorer.load(0, self.directory.round_path(0) / "reward"))

    def reference(self, index: int) -> Path | None:
        """SFT in every round."""
        return None

    def warms_up(self, index: int) -> bool:
        """The new critic of the first round."""
        return not index and super().warms_up(index)


@dataclass
class EnsemblePPO(VanillaPPO):
    """The same, paid by r_0 and all other members, as ``scorer.aggregate`` has it (Coste et al. 2024, arXiv:2310.02743)."""

    def payer(self, scorer: ScorerHandle) -> ScorerHandle:
        """What PPO is paid by: the ensemble."""
        return scorer


def kept(reward: dict[str, float | None]) -> RewardReport:
    """The report of a round that trained no reward model: r_0's accuracy, and nothing of a fit.

    Args:
        reward: the ledger's entry of round 0.
    """
    summary: dict[str, float | None] = {name: None for name in reward if name != "validation_accuracy"}
    return RewardReport(summary, (), (), reward["validation_accuracy"])


@dataclass
class OneRound(Theme):
    """A comparison without rounds: a reward model to judge by, a policy, its judgement."""

    def play(self, index: int) -> None:
        """Make it, from where its draft stands."""
        if self.stands is None and self.directory.look_again() > index:
            return
        self.wait.begin(f"round {index}")
        self.console.say(f"[bold]{self.config.rounds.baseline}[/]")
        with self.directory.draft(self.directory.round_path(index)) as draft:
            work = self.take_up(index, draft)
            report = self.train_reward(index, work, ())
            self.improve(work)
            judgement = self.evaluate(index, work)
            self.commit(index, work, report, judgement)

    def improve(self, work: Stages) -> None:
        """Make the policy better than SFT, where it is trained."""


@dataclass
class BestOfN(OneRound):
    """The SFT policy as it is; of its n samples to a prompt the ensemble's favourite is its answer, or one drawn near it."""

    choices = (
        "rounds.baseline", "rounds.best_of", "rounds.softness", "scorer.aggregate", "reward.base", "data.denoise.method",
    )  # fmt: skip

    def evaluate(self, index: int, work: Stages) -> Judgement:
        """The best of n for each held-out prompt, judged against one response of SFT; all n are written down.

        The KL of the summary is a bound (``evaluation.best_of_n``): the rows' log-probs are SFT's, whose samples they are.
        """
        number, softness = self.config.rounds.best_of, self.config.rounds.softness
        assert number is not None
        prompts = self.inputs.eval_prompts[: self.config.evaluation.num_prompts]

        def sample() -> list[Rollout]:
            with self.console.bar(f"evaluate: best of {number}", "samples") as bar:
                return self.wait("evaluate", self.roles.rollout.sample(prompts, number, EVALUATION_SEED, self.version), bar)

        samples = work.rollouts("evaluation", "evaluation_rollouts.parquet", sample)
        scores = self.wait("evaluate", self.roles.scorer.score(samples))
        if softness is None:
            picked, kl = pick_best(scores.aggregated, number), best_of_n_kl(number)
        else:
            picked = pick_softly(scores.aggregated, number, softness, derive(self.config.seed, "soft"))
            kl = soft_best_of_n_kl(scores.aggregated, number, softness)
        best = [samples[i] for i in picked]
        judgement = judge(self.config, self.inputs, self.roles, self.wait, self.version, self.sft, rollouts=best)
        judgement = replace(judgement, summary=judgement.summary | {"kl": kl})
        work.rows("samples.parquet", meta_rows(samples, scores, vanilla=None, gold=self.inputs.gold))
        work.rows("evaluation.parquet", judgement.rows)
        self.metrics.evaluation(index, judgement.summary | self.outcome(judgement))
        return judgement


@dataclass
class DPO(OneRound):
    """The policy trained on D by TRL's DPOTrainer; the reward model only judges."""

    choices = ("rounds.baseline", "dpo.beta", "dpo.lr", "dpo.epochs", "dpo.batch_size", "reward.base", "data.denoise.method")

    def improve(self, work: Stages) -> None:
        """Train it from SFT, in the learner."""
        if work.draft.done(TRAINED) is None:
            work.trained(0, self.version + 1, self.prefer)
            self.sync()

    def prefer(self, place: Path) -> None:
        """By DPO, into a directory."""
        seed = derive(self.config.seed, "dpo")
        with self.console.bar("policy (DPO)", "steps") as bar:
            rows = self.wait("policy", self.roles.learner.prefer(self.inputs.pairs, self.config.dpo, place, seed), bar)
        self.metrics.dpo(0, rows)


THEMES: dict[Baseline, type[Theme]] = {
    "none": Theme,
    "vanilla_ppo": VanillaPPO,
    "ensemble_ppo": EnsemblePPO,
    "best_of_n": BestOfN,
    "dpo": DPO,
}


def theme_of(config: RunConfig) -> type[Theme]:
    """What ``rounds.baseline`` plays.

    Args:
        config: of the run.
    """
    return THEMES[config.rounds.baseline]


NOTES: dict[Baseline, str] = {
    "vanilla_ppo": "one reward model, trained on D in round 0 without MetaRM, pays PPO in every round; critic, reference and "
    "reward moments go on. meta.* is switched off, and scorer.aggregate says nothing of PPO: the other members only judge",
    "ensemble_ppo": "reward models that are trained once without MetaRM pay PPO in every round, by scorer.aggregate; critic, "
    "reference and reward moments go on. meta.* is switched off",
    "best_of_n": "the policy stays SFT, and the favourite of the ensemble among rounds.best_of samples is its answer. meta.* is "
    "switched off, and of policy.* only prompts and microbatch_size are used",
    "dpo": "TRL's DPOTrainer trains the policy on D, and the reward models only judge it. meta.* is switched off, and of "
    "policy.* only prompts and microbatch_size are used",
}
"""What a user should know of each."""


def note(config: RunConfig) -> str | None:
    """What a user should know of the baseline before it starts; None without one.

    Args:
        config: of the run.
    """
    kind = config.rounds.baseline
    return f"rounds.baseline {kind}: {NOTES[kind]}" if kind in NOTES else None
