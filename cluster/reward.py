"""``python -m cluster reward``: one reward model, without any RL."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.fit_saves import FitSaves
from actors.reward_trainer import Study
from actors.study import measured_every
from cluster.config import RunConfig
from cluster.console import Console
from cluster.denoising import check_strengths, ensure_strengths, in_words
from cluster.inputs import Source, check_batches, check_stopping, open_source
from cluster.lineage import Lineage, digests_of
from cluster.model_sizes import model_size, reward_size
from cluster.plan import Bundle, reward_bundles
from cluster.preflight import check_nodes
from cluster.reward_directory import RewardDirectory
from cluster.reward_inputs import RewardInputs, load_inputs, pairs_sha256, read_samples
from cluster.roles import RewardHandle
from cluster.run import connected
from cluster.run_directory import now, space_errors
from cluster.seeds import derive
from cluster.stage import Stage
from cluster.storage import storage_root
from cluster.study import LOOKS
from cluster.waiting import Waiter
from evaluation.records import MetaRow
from preferences.denoise import write_pairs
from rm.config import RewardConfig
from tokens.durable import write_file

NUM_FEATURED = 500
"""Validation pairs whose features are kept, to be drawn."""


def reward(config: RunConfig, console: Console) -> Path:
    """Train the reward model that the config describes, measure it, and save it with its tokenizer.

    With ``meta.samples`` it is trained by MetaRM, and a vanilla twin (equal seed, pairs and order) beside it to compare with.

    Args:
        config: of the command.
        console: to show progress on.

    Returns:
        STORAGE/rewards/NAME.

    Raises:
        UserError: if an input is wrong, there is no room, or a finished model was made of other pairs; before any process starts
            where that can be known.
        RoleFailed: if the trainer failed; its log is left, and how far the fit has come, where the same command goes on.
    """
    directory = RewardDirectory(config)
    directory.inspect()
    samples = read_samples(config)
    source = open_source(config, storage_root(config), policy=False)
    if directory.card is None:
        check_batches(config, source)
        check_stopping(config, source)
        check_strengths(config, source)
    elif source.ready:
        directory.refuse_other(pairs_sha256(source))
    with space_errors(directory.path), directory.open():
        console.say(f"[bold]Rondo[/] reward model {config.name} in {directory.path}")
        if directory.card is not None:
            console.say("It is done; nothing to do. Choose another name to train another.")
            return directory.path
        strengths = ensure_strengths(config, console)
        asked = reward_bundles(config, reward_size(config, model_size(config)), metarm=bool(samples))
        with connected(config, console) as fixed, directory.draft() as draft:
            training = Training(config, console, directory.logs, source, strengths, directory.fits)
            directory.commit(draft, training.run(draft, samples, asked, fixed))
    console.say(f"Model: {directory.path / 'model'}")
    return directory.path


@dataclass(frozen=True)
class Training:
    """One reward model under way.

    Args:
        config: of the command.
        console: shows it.
        logs: directory of log files.
        source: of the pairs.
        strengths: what ``data.denoise`` goes by; None where it does nothing.
        fits: directory in which the trainer keeps how far it has come.
    """

    config: RunConfig
    console: Console
    logs: Path
    source: Source
    strengths: str | None
    fits: Path

    def run(self, draft: Path, samples: Sequence[MetaRow], asked: Sequence[Bundle], fixed: bool) -> dict[str, Any]:
        """Train it, and its twin where there are shifted samples; write both down.

        Args:
            draft: directory to write to.
            samples: S_k as recorded; may be none.
            asked: what the trainer's processes need.
            fixed: True on a cluster that cannot grow.

        Returns:
            The card.
        """
        from rm.shifted import kept_back

        config, console = self.config, self.console
        wait = Waiter(console, self.logs, config.resources.deadline_s)
        wait.begin("reward")
        stage = Stage(config, asked, self.logs, console.say, fixed)
        try:
            stage.wait_for_room()
            check_nodes(stage.nodes(), storage_root(config), wait)
            if self.source.recipe is not None and not self.source.prepared:
                with console.bar("prepare the SFT model") as bar:
                    actor, pending = stage.prepare(self.source.recipe, "reward")
                    wait("prepare", pending, bar)
                    stage.release(actor)
            inputs = load_inputs(config, self.source, self.strengths, samples)
            if self.strengths is not None:
                console.say(in_words(inputs.denoised, self.strengths))
            with console.bar("start the reward trainer"):
                how = watched(config.reward, inputs)
                trainer = wait("start", stage.start_reward(self.source.base_dir, inputs.pairs, inputs.validation, how))
                if len(trainer.ranks) > 1:
                    wait("start", trainer.join(wait("start", trainer.open())))
            twin = self._fit("vanilla twin", trainer, wait, inputs, None, False) if samples else None
            study = self._fit("reward model", trainer, wait, inputs, draft / "model", bool(samples))
        finally:
            stage.close()
        write_pairs(inputs.training, draft)
        Lineage(self.source.base_dir, digests_of(inputs.training)).write(draft)
        write_study(draft, study, twin, inputs.samples, kept_back(len(inputs.groups), derive(config.seed, "reward", 0)))
        for line in findings(study, twin):
            console.say(line)
        seconds = {phase: round(value, 3) for phase, value in wait.seconds.items()}
        return self._card(inputs, study, twin) | {"seconds": seconds}

    def _fit(self, title: str, trainer: RewardHandle, wait: Waiter, inputs: RewardInputs, out: Path | None, meta: bool) -> Study:
        seed, every = derive(self.config.seed, "reward", 0), self.config.rounds.save_fit_every
        saves = None if every is None else FitSaves(self.fits / title.replace(" ", "_"), every)
        with self.console.bar(title, "pairs") as bar:
            featured = 0 if out is None else NUM_FEATURED
            return wait(title, trainer.study(out, seed, inputs.groups, meta, featured, saves), bar)

    def _card(self, inputs: RewardInputs, study: Study, twin: Study | None) -> dict[str, Any]:
        config = self.config
        return {
            "name": config.name,
            "finished_at": now(),
            "preferences": config.data.preferences,
            "data_sha256": inputs.fingerprint,
            "pairs_sha256": inputs.pairs_sha256,
            "num_pairs": len(inputs.pairs),
            "validation_pairs": {name: len(pairs) for name, pairs in inputs.validation.items()},
            "dropped": inputs.dropped,
            "strengths": self.strengths,
            "denoised": inputs.denoised,
            "base": str(self.source.base_dir),
            "samples": config.meta.samples,
            "num_steps": len(study.report.steps),
            "planned_steps": config.reward.epochs * -(-len(inputs.pairs) // config.reward.batch_size),
            "fit": study.report.summary,
            "validation": study.validation,
            "fit_seconds": round(study.seconds, 3),
            "twin": None if twin is None else {"fit": twin.report.summary, "validation": twin.validation},
        }


def watched(reward: RewardConfig, inputs: RewardInputs) -> RewardConfig:
    """How the model is fitted, with about ten measurements where ``evaluate_every`` is null and there is anything to measure on.

    Args:
        reward: of the config.
        inputs: of the model.
    """
    if not inputs.validation:
        return reward
    return reward.model_copy(update={"evaluate_every": measured_every(reward, len(inputs.pairs), LOOKS)})


def findings(study: Study, twin: Study | None) -> list[str]:
    """What the terminal shows of the finished model, a line a validation set; of its twin beside it."""
    lines = []
    for name in dict.fromkeys(row.set for row in study.scores):
        accuracy, loss, ece = (study.validation[f"validation/{name}/{what}"] for what in ("accuracy", "loss", "ece"))
        beside = "" if twin is None else f"; vanilla twin {twin.validation[f'validation/{name}/accuracy']:.3f}"
        lines.append(f"  {name:<12} accuracy {accuracy:.3f}  loss {loss:.3f}  calibration error {ece:.3f}{beside}")
    return lines


def write_study(draft: Path, study: Study, twin: Study | None, samples: Sequence[MetaRow], back: Collection[int]) -> None:
    """Write metrics.jsonl and the tables; those that would be empty are left out.

    Args:
        draft: directory to write to.
        study: of the model.
        twin: of its vanilla twin; None without shifted samples.
        samples: S_k as recorded, in the order of the studies' scores.
        back: places of the prompts that the ascent did not see.
    """
    report = study.report
    rows: list[dict[str, Any]] = [{"phase": "reward", "step": step, **row} for step, row in enumerate(report.steps, start=1)]
    measured = report.measurements or (((len(report.steps), study.validation),) if study.validation else ())
    rows += [{"phase": "validation", "step": step, **row} for step, row in measured]
    write_file(draft / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if study.scores:
        _write_table(draft / "scores.parquet", [vars(row) for row in study.scores])
    if study.features:
        _write_table(draft / "features.parquet", [vars(row) for row in study.features])
    if twin is not None:
        unseen = {name for place, name in enumerate(dict.fromkeys(row.prompt_id for row in samples)) if place in back}
        shifted = [
            {
                "prompt_id": row.prompt_id,
                "sample": row.sample,
                "score_vanilla": vanilla,
                "score_metarm": metarm,
                "kept_back": row.prompt_id in unseen,
            }
            for row, vanilla, metarm in zip(samples, twin.shifted, study.shifted, strict=True)
        ]
        _write_table(draft / "shifted.parquet", shifted)


def _write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow as pa

    from preferences.labels import write_table

    write_table(pa.Table.from_pylist(list(rows)), path)
