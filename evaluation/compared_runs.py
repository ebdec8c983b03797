"""Several runs side by side, as data: what each is called, which round was its best, how they fare against each other, and what
differs in their configs.

Letters: R runs, N prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.compare import WinTieLose, win_tie_lose
from evaluation.records import EvaluationRow
from evaluation.run import Evaluation, Round, Run, read_run
from evaluation.run_config import flat_config, tie_of
from evaluation.svg import SERIES
from tokens.errors import UserError
from tokens.paths import printable

ABSENT = "–"


@dataclass(frozen=True)
class ComparedRun:
    """A run among others.

    Args:
        name: that no other of them has.
        label: the same in letters that every font has, and short.
        colour: of ``evaluation.svg``.
        run: as read.
        config: values by dotted key.
    """

    name: str
    label: str
    colour: str
    run: Run
    config: Mapping[str, object]

    @property
    def best(self) -> int:
        """Place of the round that ``evaluation.best`` takes, were SFT not among them: the highest mean of the run's judge, of the
        rounds that count; of all where none does."""
        rounds = self.run.ledger.rounds
        counted = [round_ for round_ in rounds if not round_.disqualified] or rounds
        return rounds.index(max(counted, key=lambda round_: judged_mean(round_.evaluation)))

    @property
    def best_round(self) -> Round:
        """That round."""
        return self.run.ledger.rounds[self.best]

    @property
    def best_rows(self) -> tuple[EvaluationRow, ...]:
        """Its judged responses."""
        return self.run.round_rows[self.best]


@dataclass(frozen=True)
class Difference:
    """A value that is not the same in all runs, in the runs' order."""

    key: str
    values: tuple[str, ...]


def judged_mean(evaluation: Evaluation) -> float:
    """The mean of the judge over the responses, which the best round is chosen by.

    Source: ``evaluation.best``.

    Args:
        evaluation: of a round.

    Returns:
        It, in units of the judge.

    Padding contract: there is none.
    """
    means = {"gold": evaluation.gold, "held_out": evaluation.held_out, "ensemble": evaluation.ensemble_mean}
    found = means[evaluation.judge]
    assert found is not None  # a judge has judged
    return found


def read_runs(directories: Sequence[Path]) -> tuple[ComparedRun, ...]:
    """Read the directories of several runs.

    Source: the run directory's layout.

    Args:
        directories: R of them, 2 to 9.

    Returns:
        [R], in the order given.

    Raises:
        UserError: if there are too few or too many, one comes twice, or one cannot be read as a run.

    Padding contract: there is none.
    """
    if not 2 <= len(directories) <= len(SERIES):
        raise UserError(
            f"from 2 to {len(SERIES)} runs can be compared, which have colours to tell them apart; got {len(directories)}"
        )
    places = [directory.resolve() for directory in directories]
    for number, place in enumerate(places):
        if place in places[:number]:
            first = directories[places.index(place)]
            raise UserError(f"{directories[number]} and {first} are the same run: name each run once")
    runs = [read_run(directory) for directory in directories]
    return tuple(
        ComparedRun(name, _label(name), colour, run, flat_config(run))
        for name, colour, run in zip(names_of(places), SERIES, runs, strict=False)
    )


def names_of(places: Sequence[Path]) -> tuple[str, ...]:
    """Names for directories: the shortest ends of their paths that tell them all apart.

    Source: none needed.

    Args:
        places: R absolute paths, all different.

    Returns:
        [R], all different.

    Padding contract: there is none.
    """
    names: list[str] = []
    for length in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-length:]) for place in places]
        if len(set(names)) == len(names):
            break
    return tuple(names)


def duel(ours: ComparedRun, theirs: ComparedRun) -> WinTieLose | None:
    """The best round of one run against the best round of another, prompt by prompt, under the gold reward.

    Source: MetaRM (Dou et al. 2024), the comparison with vanilla PPO; ``win_tie_lose``.

    Args:
        ours: whose wins are counted.
        theirs: whom they are counted against.

    Returns:
        The outcome; None where the two were not judged by one truth on the same prompts.

    Padding contract: there is none.
    """
    if not same_truth(ours, theirs):
        return None
    there = {row.prompt_id: row.gold for row in theirs.best_rows if row.gold is not None}
    pairs = [(row.gold, there[row.prompt_id]) for row in ours.best_rows if row.gold is not None]
    return win_tie_lose([a for a, _ in pairs], [b for _, b in pairs], tie_of(ours.config))


def same_prompts(a: ComparedRun, b: ComparedRun) -> bool:
    """Whether two runs were judged on the same prompts.

    Source: none needed.

    Args:
        a: a run.
        b: another.

    Returns:
        True if so.

    Padding contract: there is none.
    """
    return _prompts(a) == _prompts(b)


def same_truth(a: ComparedRun, b: ComparedRun) -> bool:
    """Whether two runs have the same prompts and the same gold reward for all of them.

    Source: none needed; a sandbox's truth follows from ``world``.

    Args:
        a: a run.
        b: another.

    Returns:
        True if so; False for real data, which has no gold reward.

    Padding contract: there is none.
    """
    known = all(row.gold is not None for one in (a, b) for row in one.best_rows)
    return known and same_prompts(a, b) and _world(a) == _world(b)


def config_differences(runs: Sequence[ComparedRun]) -> tuple[Difference, ...]:
    """The keys of the config whose values differ, names apart.

    Source: config.yaml, versions.json.

    Args:
        runs: R of them.

    Returns:
        One row per key, sorted; a run that lacks the key has a dash. Versions come last.

    Padding contract: there is none.
    """
    versions = [{f"version of {name}": value for name, value in one.run.versions.items()} for one in runs]
    found: list[Difference] = []
    for tables in ([one.config for one in runs], versions):
        for key in sorted({key for table in tables for key in table} - {"name"}):
            values = tuple(_shown(table[key]) if key in table else ABSENT for table in tables)
            if len(set(values)) > 1:
                found.append(Difference(key, values))
    return tuple(found)


def _shown(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _prompts(one: ComparedRun) -> dict[str, str]:
    return {row.prompt_id: row.prompt for row in one.run.start_rows}


def _world(one: ComparedRun) -> dict[str, object]:
    return {key: value for key, value in one.config.items() if key.startswith("world.")}


def _label(name: str) -> str:
    """A name for a figure: no letter that its font lacks, no first character that hides it from a legend."""
    plain = printable(name).encode("ascii", "backslashreplace").decode()
    short = plain if len(plain) <= 28 else f"{plain[:13]}...{plain[-12:]}"
    return f" {short}" if short.startswith("_") else short
