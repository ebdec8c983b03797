"""`study`: reward models trained on parts of the pairs chosen by preference strength, for the figures of the strength report.

Every fit takes as many optimizer steps as one on all pairs: a part is gone through more often. So arms differ in what they are
trained on, never in how long. Arms that are the same in two studies are fitted once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import ray

from actors.board import Board
from actors.study import StudyJob, StudyReport, fit_arm, measured_every
from cluster.config import RunConfig
from cluster.console import Console
from cluster.denoising import check_columns
from cluster.differences import refuse_differences
from cluster.inputs import Source, open_source
from cluster.run import connected
from cluster.run_directory import space_errors
from cluster.seeds import derive
from cluster.storage import storage_root
from cluster.strength import strength
from cluster.strength_directory import StrengthDirectory
from cluster.study_arms import Arm, Ranked, arms_of, treat
from cluster.tasks import Work, finish, setup_of, share_of_a_fit, suited, task_options
from evaluation.json_node import lines_of
from evaluation.studies import STUDIES, TRAINING, StudyRow, read_studies
from preferences.config import DenoiseConfig
from rm.config import RewardConfig
from tokens.durable import write_file
from tokens.errors import UserError
from tokens.records import Pair

LOOKS = 10
"""Measurements of a fit where reward.evaluate_every is null."""
Rows = tuple[StudyRow, ...]


@dataclass(frozen=True)
class Place:
    """Where the rows of a fit are written: an arm of a study, with the number of its seed."""

    study: str
    arm: str
    seed: int


def study(config: RunConfig, names: Sequence[str] | None, seeds: int, console: Console) -> Path:
    """Fit and measure every arm of some studies; the same command again continues, and fits only what is not there yet.

    The strengths are those of STORAGE/strengths/NAME, measured first where they are missing. ``reward`` says how the models are
    fitted, but none stops early; ``data.denoise`` says what is noisy, alpha and the margins; its method plays no part.

    Args:
        config: of the strength run.
        names: of the studies; None = all.
        seeds: fits of each arm.
        console: to show progress on.

    Returns:
        The strength run's directory; the rows are in studies/NAME.jsonl there.

    Raises:
        UserError: if a study is not known, an input is wrong, or there is no room; before any process starts where that can be
            known.
        RoleFailed: if a fit failed; the finished ones are there, the same command continues.
    """
    chosen = _check(config, names, seeds)
    source = open_source(config, storage_root(config), policy=False)
    check_columns(source)
    strength(config, console)
    directory = StrengthDirectory(config)
    with directory.open():
        console.say(f"[bold]Rondo[/] studies {', '.join(chosen)} in {directory.path}")
        if not source.prepared:
            assert source.recipe is not None
            with console.bar("prepare the SFT model") as bar:
                source.recipe(lambda unit, done, total: bar.update(done, total, unit))
        material = _load(config, directory, source)
        with space_errors(directory.path):
            book = Book(directory.path / "studies", _settings(config), directory.hold.check)
            missing = book.missing(chosen, seeds)
            if not missing:
                console.say("All of them are there; nothing to do.")
                return directory.path
            with connected(config, console) as fixed:
                config = suited(config, console, directory.logs, fixed)
                _fit(config, console, directory.logs, book, missing, material)
    return directory.path


class Book:
    """The rows of all studies of a strength run, on disk and by fit.

    Args:
        folder: of the .jsonl files; made if needed.
        settings: what the rows depend on beside the strengths, flat.
        may_write: asked before a file is written; raises if the directory is another driver's.

    Raises:
        UserError: if the rows that are there were made with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], may_write: Callable[[], None] = lambda: None) -> None:
        self.folder, self.arms, self.may_write = folder, arms_of(), may_write
        folder.mkdir(exist_ok=True)
        begun = folder / "begun.json"
        if begun.is_file():
            refuse_differences(folder, json.loads(begun.read_text()), settings)
        may_write()
        write_file(begun, json.dumps(settings, indent=1))
        self.rows: dict[Place, Rows] = {}
        for row in (row for rows in read_studies(folder).values() for row in rows):
            place = Place(row.study, row.arm, row.seed)
            self.rows[place] = (*(self.rows[place] if place in self.rows else ()), row)

    def missing(self, names: Sequence[str], seeds: int) -> dict[tuple[Arm, int], list[Place]]:
        """What is still to be fitted, and where its rows belong; rows that another study has already are copied.

        Args:
            names: of the studies.
            seeds: of each arm.

        Returns:
            Places by arm and seed, the seeds one after another.
        """
        known = {
            (self.arms[place.study][place.arm], place.seed): place
            for place in self.rows
            if place.study in self.arms and place.arm in self.arms[place.study]
        }
        wanted: dict[tuple[Arm, int], list[Place]] = {}
        for seed in range(seeds):
            for name in names:
                for title, arm in self.arms[name].items():
                    place = Place(name, title, seed)
                    if place in self.rows:
                        continue
                    if (arm, seed) in known:
                        self.add([place], self.rows[known[arm, seed]])
                    else:
                        wanted.setdefault((arm, seed), []).append(place)
        return wanted

    def add(self, places: Sequence[Place], rows: Rows) -> None:
        """Write the rows of one fit into every study that it belongs to, each file whole or not at all.

        Args:
            places: of the fit.
            rows: of any one of them; study and arm are replaced.
        """
        for place in places:
            self.rows[place] = tuple(replace(row, study=place.study, arm=place.arm) for row in rows)
        for name in sorted({place.study for place in places}):
            order = {arm: number for number, arm in enumerate(self.arms[name])}
            own = [place for place in self.rows if place.study == name and place.arm in order]
            own.sort(key=lambda place: (order[place.arm], place.seed))
            self.may_write()
            write_file(self.folder / f"{name}.jsonl", lines_of(row for place in own for row in self.rows[place]))


def _check(config: RunConfig, names: Sequence[str] | None, seeds: int) -> list[str]:
    unknown = [name for name in names or () if name not in STUDIES]
    if unknown:
        raise UserError(f"there is no study {', '.join(unknown)}; there are {', '.join(STUDIES)}")
    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {seeds}")
    if config.reward.contrastive.method != "none":
        raise UserError(
            f"reward.contrastive.method is {config.reward.contrastive.method}: a study goes through small parts of the pairs "
            "many times, and a batch would hold a pair twice, as its own negative. Set it to none"
        )
    return [name for name in STUDIES if names is None or name in names]


def _settings(config: RunConfig) -> dict[str, Any]:
    """What a fit depends on beside the strengths, which belong to their own config and data."""
    masked = config.reward.dropout or config.reward.lora.dropout  # each part of a step has masks of its own
    left_out = {"start", "base", "microbatch_size"} | (set() if masked else {"backward_size"})
    reward = _plain(config.reward).model_dump(mode="json", exclude=left_out)
    denoise = config.data.denoise.model_dump(mode="json", exclude={"method", "strength"})
    flat = {f"reward.{key}": value for key, value in reward.items()}
    return flat | {f"data.denoise.{key}": value for key, value in denoise.items()}


def _plain(reward: RewardConfig) -> RewardConfig:
    """The same fit, never stopped early: arms are compared after equally many steps."""
    return reward.model_copy(update={"patience": None, "stop_on": "original"})


@dataclass(frozen=True, eq=False)
class Material:
    """What the fits of a study are given.

    Args:
        base: model directory to start from.
        pairs: N training pairs as they were given.
        ranked: the same by strength.
        validation: held-out pairs by the name of their set.
    """

    base: Path
    pairs: tuple[Pair, ...]
    ranked: Ranked
    validation: Mapping[str, tuple[Pair, ...]]


def _load(config: RunConfig, directory: StrengthDirectory, source: Source) -> Material:
    from cluster.reward_inputs import load_inputs
    from preferences.denoise import MARGIN, STRENGTH, denoise
    from preferences.strength import read_strengths
    from preferences.swap import as_table

    inputs = load_inputs(config, source, None, ())
    if not inputs.validation:
        raise UserError("a study measures on held-out pairs, and there are none: raise data.validation_fraction")
    train, _ = source.preferences()
    ids = tuple(pair.id for pair in inputs.pairs)
    if len(ids) < len(train):  # data.drop_bad left some out
        table, kept = as_table(train.rows), set(ids)
        train = train.with_table(table.take([i for i, id_ in enumerate(table["id"].to_pylist()) if id_ in kept]))
    margins = DenoiseConfig.model_validate(config.data.denoise.model_dump() | {"method": "margin"})
    rows = as_table(denoise(train, read_strengths(directory.path), margins).rows)
    assert tuple(rows["id"].to_pylist()) == ids
    ranked = Ranked.of(ids, rows[STRENGTH].to_numpy(), rows[MARGIN].to_numpy())
    return Material(source.base_dir, inputs.pairs, ranked, inputs.validation)


def _fit(
    config: RunConfig,
    console: Console,
    logs: Path,
    book: Book,
    missing: Mapping[tuple[Arm, int], Sequence[Place]],
    material: Material,
) -> None:
    """Hand every missing fit to Ray, and write the rows of each as it comes."""
    share, reward, num_pairs = share_of_a_fit(config.resources.reward), _plain(config.reward), len(material.pairs)
    every = measured_every(reward, num_pairs, LOOKS)
    jobs: dict[str, StudyJob] = {}
    belongs: dict[str, Sequence[Place]] = {}
    for (arm, seed), places in missing.items():
        name = f"{places[0].study}, {places[0].arm}, seed {seed}"
        treated = treat(arm, material.ranked, config.data.denoise)
        jobs[name] = StudyJob(name, material.base, reward, derive(config.seed, "study", seed), every, treated)
        belongs[name] = places
    setup = setup_of(share, "study", logs)
    board = cast(Any, Board).remote(dict.fromkeys(jobs, num_pairs * reward.epochs))
    held, validation = ray.put(material.pairs), ray.put(dict(material.validation))
    asked = task_options(config, share, setup)
    refs = tuple(fit_arm.options(name=name, **asked).remote(setup, job, held, validation, board) for name, job in jobs.items())

    def write(report: StudyReport) -> None:
        places, job = belongs[report.name], jobs[report.name]
        book.add(places, rows_of(report, places[0], len(job.treated.rows)))

    title = f"fit {len(jobs)} models"
    work = Work("study", "study", title, "pairs", refs, tuple(jobs), board, share, on_answer=write, log=setup.name)
    finish(config, console, logs, work)


def rows_of(report: StudyReport, place: Place, num_pairs: int) -> Rows:
    """What a fit measured, as rows.

    Args:
        report: of the fit.
        place: study, arm and seed of the rows.
        num_pairs: different pairs that it was trained on.
    """
    rows = []
    for step, numbers in report.looks:
        sets = [key.split("/")[1] for key in numbers if key.startswith("validation/") and key.endswith("/accuracy")]
        for name in sets:
            accuracy, loss, ece = (numbers[f"validation/{name}/{what}"] for what in ("accuracy", "loss", "ece"))
            rows.append(StudyRow(place.study, place.arm, place.seed, step, num_pairs, name, accuracy, loss, ece))
        if "train/loss" in numbers:
            seen = (numbers["train/accuracy"], numbers["train/loss"])
            rows.append(StudyRow(place.study, place.arm, place.seed, step, num_pairs, TRAINING, *seen, None))
    return tuple(rows)
