"""A run in this process, by the command's own path up to its first round, for comparisons that time what comes then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from cluster.config import RunConfig
from cluster.console import Console
from cluster.guarding import Guard
from cluster.inputs import open_source
from cluster.model_sizes import model_size
from cluster.plan import bundles
from cluster.rounds import Theme
from cluster.run import connected, opened
from cluster.run_directory import RunDirectory


@contextlib.contextmanager
def under_way(config: RunConfig, root: Path) -> Iterator[Theme]:
    """Its roles on a Ray of this machine's own, placed where the first round begins, for as long as the context lasts.

    Args:
        config: of the run; its ``storage`` is ``root``.
        root: of the run directory and of caches.
    """
    console, directory = Console(), RunDirectory(config)
    directory.inspect()
    source = open_source(config, root)
    there = config.sft if config.sft.model is None else config.sft.model_copy(update={"model": str(source.sft_dir)})
    asked = bundles(config, model_size(config.model_copy(update={"sft": there})))
    with (
        directory.open(),
        connected(config, console) as fixed,
        opened(config, console, directory, source, None, asked, fixed) as theme,
    ):
        yield theme


@contextlib.contextmanager
def steps_of(theme: Theme, index: int) -> Iterator[tuple[Callable[[], None], Path]]:
    """Play a round up to its first PPO step.

    Args:
        theme: of the run.
        index: of the round.

    Returns:
        What takes the next step, from prompts to weights in the engines, and the directory of the round's reward model.
    """
    theme.wait.begin(f"round {index}", index)
    with theme.directory.draft(theme.directory.round_path(index)) as draft:
        work = theme.take_up(index, draft)
        guard = Guard(theme.config.guards, work.draft, index, theme.metrics, theme.console.say, theme.refit)
        shifted = theme.sample_shifted(index, work)
        theme.train_reward(index, work, shifted)
        numbers = theme.steps(theme.begin_policy(index, work, theme.score_shifted(index, work, shifted)))

        def step() -> None:
            number = next(numbers)
            guard.step(number, partial(theme.learn, index, work, number))
            theme.keep(index, work, number + 1)

        yield step, draft / "reward"
