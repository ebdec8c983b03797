"""`features`: reward features that all raters share and each rater's weights on them, learnt together as a Ray task."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import ray

from actors.board import Board
from actors.features import FeatureJob, FeatureReport, learn_features
from actors.fit_saves import FitSaves
from cluster.config import RunConfig
from cluster.console import Console
from cluster.feature_data import FeatureData, check_settings, load_data
from cluster.feature_directory import MODEL, ROWS, FeatureDirectory
from cluster.run import connected
from cluster.run_directory import now, space_errors
from cluster.seeds import derive
from cluster.storage import storage_root
from cluster.tasks import Work, finish, setup_of, share_of_a_fit, suited, task_options
from evaluation.feature_run import NEW, TRAINED, FeatureRow
from evaluation.json_node import lines_of
from preferences.pool import POOL, pool_text
from tokens.durable import write_file


def features(config: RunConfig, console: Console) -> Path:
    """Learn the features that the config describes, measure them on every rater, and save them with their tokenizer.

    Args:
        config: of the command.
        console: to show progress on.

    Returns:
        STORAGE/features/NAME.

    Raises:
        UserError: if an input is wrong, there is no room, or a finished model was made of other labels; before any process starts
            where that can be known.
        RoleFailed: if the fit failed; nothing is left but its log.
    """
    check_settings(config)
    root, directory = storage_root(config), FeatureDirectory(config)
    directory.inspect()
    console.say(f"[bold]Rondo[/] reward features {config.name} in {directory.path}")
    data = load_data(config, root, console)
    directory.refuse_other(data.sha256())
    with space_errors(directory.path), directory.open():
        if directory.card is not None:
            console.say("They are there; nothing to do. Choose another name to train others.")
            return directory.path
        with connected(config, console) as fixed, directory.draft() as draft:
            config = suited(config, console, directory.logs, fixed)
            report = _learn(config, console, directory, data, draft)
            _write(draft, report)
            if data.pool:
                write_file(draft / MODEL / POOL, pool_text(data.pool))
            directory.commit(draft, _card(config, data, report))
    for line in findings(report):
        console.say(line)
    console.say(f"Model: {directory.path / MODEL}")
    return directory.path


def _learn(config: RunConfig, console: Console, directory: FeatureDirectory, data: FeatureData, draft: Path) -> FeatureReport:
    """Hand the fit to Ray, and wait for it."""
    every = config.rounds.save_fit_every
    job = FeatureJob(
        name="features",
        base=data.base,
        directory=draft / MODEL,
        features=config.features,
        reward=config.reward,
        seed=derive(config.seed, "features"),
        guards=config.guards,
        saves=None if every is None else FitSaves(directory.fits / "features", every),
    )
    share = share_of_a_fit(config.resources.reward)
    setup = setup_of(share, job.name, directory.logs)
    board = cast(Any, Board).remote({job.name: config.reward.epochs * len(data.train.pairs)}, "labels")
    task = learn_features.options(name=job.name, **task_options(config, share, setup))
    ref = task.remote(setup, job, data.raters, ray.put(data.train), ray.put(data.tests), ray.put(data.new), board)
    work = Work("features", "features", "learn reward features", "labels", (ref,), (job.name,), board, share)
    report: FeatureReport
    (report,) = finish(config, console, directory.logs, work)
    return report


def findings(report: FeatureReport) -> list[str]:
    """What the terminal shows of the finished model.

    Args:
        report: of the fit.
    """
    lines = []
    if report.trained:
        own, mean = fmean(row.accuracy for row in report.trained), fmean(row.mean_accuracy for row in report.trained)
        lines.append(f"  {len(report.trained)} raters that were trained on: accuracy {own:.3f}; the mean rater's {mean:.3f}")
    counts = sorted({row.num_labels for row in report.new})
    for count in counts:
        rows = [row for row in report.new if row.num_labels == count]
        lines.append(f"  {len(rows)} new raters after {count:>2} answers: accuracy {fmean(row.accuracy for row in rows):.3f}")
    return lines


def _write(draft: Path, report: FeatureReport) -> None:
    """metrics.jsonl, and every rater's accuracy."""
    rows = [{"phase": "features", "step": step, **row} for step, row in enumerate(report.steps, start=1)]
    write_file(draft / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found = [FeatureRow(kind, **vars(row)) for kind, of in ((TRAINED, report.trained), (NEW, report.new)) for row in of]
    write_file(draft / ROWS, lines_of(found))


def _card(config: RunConfig, data: FeatureData, report: FeatureReport) -> dict[str, Any]:
    last = report.steps[-max(1, len(report.steps) // 4) :]
    return {
        "name": config.name,
        "finished_at": now(),
        "preferences": config.data.preferences,
        "pairs_sha256": data.sha256(),
        "fingerprint": report.fingerprint,
        "d": config.features.d,
        "shared": config.features.shared,
        "num_raters": len(data.raters),
        "num_new_raters": len(data.new),
        "num_labels": len(data.train.pairs),
        "num_tests": len(data.tests.pairs),
        "dropped": data.dropped,
        "base": str(data.base),
        "num_steps": len(report.steps),
        "fit": {name: fmean(step[f"features/{name}"] for step in last) for name in ("loss", "accuracy")},
        "seconds": round(report.seconds, 3),
    }
