"""Before the first round: the vanilla members of the ensemble, and the SFT policy judged. Committed like a round."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from actors.fit_saves import FitSaves
from actors.reward_trainer import RewardReport
from cluster.config import RunConfig
from cluster.console import Console
from cluster.inputs import Inputs
from cluster.judging import Judgement, judge, meta_rows, sample_for_judging
from cluster.lineage import HELD_OUT, Lineage, digests_of
from cluster.metrics import Metrics
from cluster.roles import Roles
from cluster.run_directory import RunDirectory
from cluster.seeds import derive
from cluster.stages import Stages
from cluster.waiting import Waiter
from evaluation.records import EvaluationRow, MetaRow, read_rows
from preferences.denoise import write_pairs
from tokens.errors import UserError
from tokens.records import Rollout


def begin(
    config: RunConfig, directory: RunDirectory, inputs: Inputs, roles: Roles, wait: Waiter, console: Console, metrics: Metrics
) -> tuple[Judgement, int]:
    """Make or read ``start/``, and put every role where the next round finds it.

    Args:
        config: of the run.
        directory: of the run.
        inputs: what it learns from.
        roles: who does the work.
        wait: waits for them.
        console: shows it.
        metrics: writes it down.

    Returns:
        How the SFT policy was judged, and the version of the weights that the engines hold.
    """
    directory.look_again()
    version = directory.policy_version
    roles.sync(wait, version)
    if directory.ledger["start"]:
        return resume(config, directory, inputs, roles, wait), version
    with directory.draft(directory.start_path) as draft:
        draft.begin(version, metrics.mark())
        point = draft.go_back()
        metrics.go_back(point.metrics_bytes)
        wait.seconds.update(point.seconds)
        work = Stages(draft, wait, metrics, config, -1)
        for member in range(1, config.scorer.num_members) if config.scorer.num_members > 1 else range(1):
            work.fit(f"member {member}", f"members/{member}", partial(fit_vanilla, config, roles, wait, console, member))
        for number in range(config.evaluation.num_held_out):
            work.fit(
                f"{HELD_OUT} {number}", f"{HELD_OUT}/{number}", partial(fit_judge, config, inputs, roles, wait, console, number)
            )
        with console.bar("judge the SFT policy", "samples") as bar:
            given = (config, inputs, roles, wait, version)
            rollouts = work.rollouts("evaluation", "evaluation_rollouts.parquet", lambda: sample_for_judging(*given, bar))
            wait("evaluate", roles.scorer.calibrate_on(rollouts))
            load_members(config, draft / "members", roles, wait)
            load_judges(config, draft / HELD_OUT, roles, wait)
            if config.scorer.num_members == 1:
                wait("evaluate", roles.scorer.load(0, draft / "members" / "0"))  # stands in until r_0 is there
            sft = judge(*given, None, rollouts=rollouts)
        write_pairs(inputs.training, draft.path)
        Lineage(inputs.base_dir, digests_of(inputs.training)).write(draft.path)
        if inputs.judging_texts is not None:
            Lineage(inputs.base_dir, digests_of(inputs.judging_texts)).write(draft.path / HELD_OUT)
        work.rows("evaluation.parquet", sft.rows)
        scores = wait("evaluate", roles.scorer.score(rollouts))
        work.rows("sft_rollouts.parquet", meta_rows(rollouts, scores, vanilla=None, gold=inputs.gold))
        metrics.evaluation(-1, sft.summary)
        seconds = {phase: round(value, 3) for phase, value in wait.seconds.items()}
        directory.commit_start(
            draft, {"committed": True, "data_sha256": inputs.fingerprint, "seconds": seconds, "evaluation": sft.summary}
        )
        roles.scorer.holds.committed(draft.path, directory.start_path)
    return sft, version


def fit_vanilla(
    config: RunConfig, roles: Roles, wait: Waiter, console: Console, member: int, place: Path, saves: FitSaves | None
) -> RewardReport:
    """Fit a member of the ensemble on D alone, into a directory."""
    with console.bar(f"vanilla reward model {member}", "pairs") as bar:
        return wait("reward", roles.reward.fit(place, derive(config.seed, "member", member), None, None, saves), bar)


def fit_judge(
    config: RunConfig,
    inputs: Inputs,
    roles: Roles,
    wait: Waiter,
    console: Console,
    member: int,
    place: Path,
    saves: FitSaves | None,
) -> RewardReport:
    """Fit a held-out reward model on pairs that nothing else learns from, into a directory."""
    with console.bar(f"held-out reward model {member}", "pairs") as bar:
        seed = derive(config.seed, HELD_OUT, member)
        return wait("reward", roles.reward.fit(place, seed, None, None, saves, inputs.judging), bar)


def refuse_other_data(directory: RunDirectory, inputs: Inputs) -> None:
    """A run that is continued must be given the pairs and prompts that it was begun with.

    Args:
        directory: of the run.
        inputs: what it would learn from.

    Raises:
        UserError: if they are others.
    """
    if directory.ledger["start"] and directory.ledger["start"]["data_sha256"] != inputs.fingerprint:
        raise UserError(
            f"the preference pairs or prompts are not those that {directory.path} was begun with, although the config is "
            "the same: put the old files back, or choose another name"
        )


def load_members(config: RunConfig, members: Path, roles: Roles, wait: Waiter) -> None:
    """Load members 1..M-1; member 0 is the round's own."""
    for member in range(1, config.scorer.num_members):
        wait("evaluate", roles.scorer.load(member, members / str(member)))


def load_judges(config: RunConfig, place: Path, roles: Roles, wait: Waiter) -> None:
    """Load the held-out reward models: members -1, -2, ..."""
    for number in range(config.evaluation.num_held_out):
        wait("evaluate", roles.scorer.load(-1 - number, place / str(number)))


def resume(config: RunConfig, directory: RunDirectory, inputs: Inputs, roles: Roles, wait: Waiter) -> Judgement:
    """Read what was committed, and give the scorer back its members and its calibration."""
    rows = read_rows(directory.start_path / "evaluation.parquet", EvaluationRow)
    rollouts = restore(read_rows(directory.start_path / "sft_rollouts.parquet", MetaRow), inputs)
    wait("evaluate", roles.scorer.calibrate_on(rollouts))
    refreshed = config.scorer.refresh == "each_round" and directory.num_committed > 0
    holder = directory.round_path(directory.num_committed - 1) if refreshed else directory.start_path
    load_members(config, holder / "members", roles, wait)
    load_judges(config, directory.start_path / HELD_OUT, roles, wait)
    return Judgement(tuple(rollouts), rows, directory.ledger["start"]["evaluation"])


def restore(rows: Sequence[MetaRow], inputs: Inputs) -> list[Rollout]:
    """Recorded samples as rollouts again."""
    prompts = {prompt.id: prompt for prompt in inputs.eval_prompts}
    return [
        Rollout(prompts[r.prompt_id], r.sample, r.token_ids, r.response, r.sampler_logprobs, r.policy_version, r.finished)
        for r in rows
    ]
