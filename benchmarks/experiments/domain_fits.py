"""Stages of customisations fitted by the processes of an experiment, without Ray: as `customize` fits them, to the same bits.

`customize` then finds all of it there, and writes the results. What is finished is kept, so that either may go on from the other.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from actors.customize import run_stage
from actors.ranks import Rank
from cluster.config import RunConfig
from cluster.console import Console
from cluster.customize import Stages, is_done
from cluster.domain_checks import check_settings
from cluster.domain_data import load_data
from cluster.domain_directory import DomainDirectory
from cluster.storage import storage_root
from cluster.tasks import setup_of
from tokens.durable import commit_directory

Given = TypeVar("Given")
Made = TypeVar("Made")


def fit_here(config: RunConfig) -> None:
    """Fit every stage that is missing, one after another in this process, on ``resources.reward.threads`` of its CPUs.

    Args:
        config: of the customisation.
    """
    check_settings(config)
    console, directory = Console(), DomainDirectory(config)
    with directory.open():
        data = load_data(config, storage_root(config), console, directory.settled())
        directory.refuse_other_inputs(data.fingerprint(), data.base, data.sets)
        directory.keep_config()
        stages = Stages(config, directory, data)
        rank = Rank(setup_of(config.resources.reward, "here", directory.logs))
        trained = {each.name: each.train for each in data.domains}
        for job in (*stages.general(), *stages.domains()):
            if not is_done(job):
                report = run_stage(rank, job, data.pool, trained, data.tests, commit_directory, _say_nothing, lambda: None)
                console.say(f"{config.name}: {job.name}: {report.cpu_seconds:.1f} CPU s, {report.seconds:.1f} s")


def side_by_side(work: Callable[[Given], Made], given: Sequence[Given], processes: int) -> list[Made]:
    """Do the same work several times in processes of their own.

    Args:
        work: a function of a module, or a partial one.
        given: one a call.
        processes: at most so many at a time; 1 = this one.

    Returns:
        What the calls returned, in the order of what was given.
    """
    if processes == 1:
        return [work(each) for each in given]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(work, given))


def _say_nothing(seen: int, last: bool) -> None:
    """Queries seen: the stage's end is said."""
