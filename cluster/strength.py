"""`strength`: M reward models trained on the same pairs, and what they say of every pair (Secrets of RLHF II, section 2.2)."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.config import RunConfig
from cluster.console import Console
from cluster.inputs import Source, open_source
from cluster.lineage import Lineage, digests_of
from cluster.run import connected
from cluster.run_directory import space_errors
from cluster.storage import storage_root
from cluster.strength_directory import StrengthDirectory
from cluster.strength_parts import folds_of, plan_parts, write_texts
from tokens.durable import write_file
from tokens.pair_store import PairStore

if TYPE_CHECKING:
    from preferences.sets import PreferenceSet


def strength(config: RunConfig, console: Console) -> Path:
    """Measure the preference strength of every pair; the same command again continues, and does nothing once all is there.

    Training pairs are scored by members that saw them, as in the paper, or with ``strength.folds`` K >= 2 by members trained on
    the K - 1 parts of the prompts that do not hold theirs. No member sees a validation pair; with folds those of fold 0 score
    them. What ``data.denoise`` asks for plays no part: strengths are of the pairs as they were given.

    Args:
        config: of the run.
        console: to show progress on.

    Returns:
        The run's directory, STORAGE/strengths/NAME; what is in it is said in ``cluster.strength_directory``.

    Raises:
        UserError: if an input is wrong, there is no room, or what is there belongs to other pairs; before any process starts
            where that can be known. Or if members score with NaN, or all alike.
        RoleFailed: if a process failed; the members and parts that are there stay, the same command continues.
    """
    directory = StrengthDirectory(config)
    directory.inspect()
    source = open_source(config, storage_root(config), policy=False)
    if source.ready:
        training, validation = source.preferences()
        folds_of(training, config.strength.folds, config.seed)
        directory.refuse_other(fingerprint(training, validation))
    if directory.finished:
        console.say(f"The strengths in {directory.path} are there; nothing to do.")
        return directory.path
    with directory.open():
        console.say(f"[bold]Rondo[/] strength {config.name} in {directory.path}")
        if config.resources.reward.num_ranks > 1:
            console.say(
                f"[yellow]note[/] resources.reward.num_ranks is {config.resources.reward.num_ranks} and plays no part here: each "
                "member is trained whole in one process, with one rank's share of the machine, several members side by side"
            )
        if config.strength.num_members == 1:
            console.say("[yellow]note[/] strength.num_members is 1: one model has no spread, the column of sigma stays empty")
        with connected(config, console) as fixed, space_errors(directory.path):
            _measure(config, console, directory, source, fixed)
    return directory.path


def _measure(config: RunConfig, console: Console, directory: StrengthDirectory, source: Source, fixed: bool) -> None:
    from cluster.strength_card import card_of, read_columns, table_of
    from cluster.strength_scores import score
    from cluster.strength_work import train
    from cluster.tasks import suited
    from preferences.sets import count_reasons, with_equal_columns
    from preferences.strength import read_strengths, refuse_constant

    config = suited(config, console, directory.logs, fixed)
    prepare_s = _prepare(config, console, directory, source)
    training, validation = source.preferences()
    directory.belong_to(fingerprint(training, validation))
    pairs, dropped = source.encode_stored(training)
    others, dropped_others = source.encode_stored(validation)
    folds = folds_of(training, config.strength.folds, config.seed)
    kept = _kept(training, pairs)
    planned = [
        ("train", training, folds, kept),
        ("validation", validation, np.zeros(len(validation), dtype=np.int64), _kept(validation, others)),
    ]
    parts = plan_parts(planned, config.strength.rows_per_block)
    if not directory.texts.is_file():
        write_texts(
            directory.texts, parts, dict(zip(("train", "validation"), with_equal_columns(training, validation), strict=True))
        )
    Lineage(source.base_dir, digests_of(training)).write(directory.path)
    reports = train(config, console, directory, source.base_dir, pairs.plain(), folds[kept])
    scored = score(config, console, directory, source.base_dir, parts, training)
    refuse_constant(read_strengths(directory.strengths))
    identity = {"config_sha256": directory.begun["config_sha256"], "data_sha256": directory.begun["data_sha256"]}
    num_distinct = sum(part.num_distinct for part in parts)
    reasons = count_reasons((*dropped, *dropped_others))
    columns = read_columns(directory.strengths)
    card = card_of(config, identity, columns, reports, scored, num_distinct, reasons, prepare_s)
    directory.hold.check()
    write_file(directory.card, json.dumps(card, indent=1))
    console.show(table_of(card))


def _prepare(config: RunConfig, console: Console, directory: StrengthDirectory, source: Source) -> float:
    """Make the SFT model and the sandbox's pairs, where they are missing, with the learner's share of the machine."""
    import ray

    from actors.preparer import Preparer
    from cluster.tasks import setup_of, task_options
    from cluster.waiting import Pending, Waiter

    if source.recipe is None or (source.ready and source.base_dir.is_dir()):
        return 0.0
    began, share = time.perf_counter(), config.resources.learner
    setup = setup_of(share, "preparer-0", directory.logs)
    actor_class: Any = Preparer
    actor = actor_class.options(**task_options(config, share, setup)).remote(setup)
    wait = Waiter(console, directory.logs, config.resources.deadline_s)
    with console.bar("prepare the SFT model") as bar:
        pending = Pending((actor.make.remote(source.recipe),), (setup.name,), ("?",), lambda answers: answers[0], (actor,))
        wait("prepare", pending, bar)
    ray.kill(actor)
    return time.perf_counter() - began


def fingerprint(training: PreferenceSet, validation: PreferenceSet) -> str:
    """SHA-256 of both splits: a strength run that is continued must be given the same pairs."""
    return hashlib.sha256(f"{training.fingerprint} {validation.fingerprint}".encode()).hexdigest()


def _kept(pairs: PreferenceSet, encoded: PairStore) -> np.ndarray:
    ids = set(encoded.ids)
    return np.array([id_ in ids for id_ in pairs.rows["id"]], dtype=bool)
