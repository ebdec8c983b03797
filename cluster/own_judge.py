"""Whether a reward model may judge a policy: not if it trained it; with a warning where the two learned from the same."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from cluster.best_directory import held_by
from cluster.evaluate_models import Contestant
from cluster.given_model import found_here
from cluster.lineage import HELD_OUT, START, lineage_of
from cluster.open_judge import find_members
from tokens.errors import UserError

JUDGES = Path(START) / HELD_OUT
"""Of a run: reward models that nothing was trained by."""


def refuse_own_judge(judge: str, models: Sequence[Path], contestants: Sequence[Contestant]) -> None:
    """A reward model that trained a policy is no judge of it.

    Args:
        judge: its name.
        models: directories of the judge's reward models.
        contestants: the models that are compared.

    Raises:
        UserError: if one of them was made by a run that used one of these reward models, a copy of it, or one made of it.
    """
    for one in contestants:
        if one.run is None:
            continue
        inside = [model for model in models if model.resolve().is_relative_to(one.run) and not _only_judges(model, one.run)]
        used = _copies(_reward_models(one.run), models)
        if inside or used:
            raise UserError(
                f"--judge {judge}: the run {one.run}, which made {one.letter}, learned from {(inside + used)[0]}: what it was "
                "trained on cannot say whether it is better. Judge by reward models that no part of the run has seen "
                f"(its own {JUDGES}, `python -m cluster strength` or `reward` on pairs held out), or by another judge"
            )


def remarks_on(judge: str, models: Sequence[Path], contestants: Sequence[Contestant]) -> list[str]:
    """What a reader must know of a judge that is not refused: what it shares with the policies, and what cannot be seen.

    Args:
        judge: its name.
        models: directories of the judge's reward models; at least one.
        contestants: the models that are compared.

    Returns:
        Sentences without their full stops; none where the judge is seen to be independent of both.
    """
    found = []
    unseen = [one.letter for one in contestants if one.run is None]
    if unseen:
        found.append(
            f"which run made {' and '.join(unseen)} cannot be seen from where it lies: that {judge} had no part in its training "
            "is taken on trust"
        )
    for run in dict.fromkeys(one.run for one in contestants if one.run is not None):
        letters = " and ".join(one.letter for one in contestants if one.run == run)
        found += _of_run(judge, models, letters, run)
    return found


def _of_run(judge: str, models: Sequence[Path], letters: str, run: Path) -> list[str]:
    found, base = [], _base(run)
    if isinstance(base, str):
        found.append(
            f"the reward models of {run}, which made {letters}, were made of {base}, and that is not found from here: whether "
            f"{judge} is a copy of it is not known"
        )
    best = held_by(run)
    if best is not None and best["judge"] == HELD_OUT and any(_only_judges(model, run) for model in models):
        found.append(
            f"{judge} chose the best round of {run}, which made {letters}: what was picked by a judge is a little lucky by the "
            "same one. Another judge says more of its best/"
        )
    own, theirs = lineage_of(run), [lineage_of(model) for model in models]
    if own is None or None in theirs:
        which = "the run that made it" if own is None else "the judge"
        return [
            *found,
            f"whether {judge} learned from the same pairs as {letters} cannot be seen: {which} has no record of its pairs",
        ]
    learnt = frozenset[str]().union(*(lineage.pairs for lineage in theirs if lineage is not None))
    both = len(learnt & own.pairs)
    if both:
        found.append(
            f"{judge} learned from {both:,} pairs ({both / len(learnt):.0%} of its own) that the run which made {letters} "
            "learned from too: where their labels err, policy and judge err alike. Pairs held out from the run make a better one"
        )
    return found


def _only_judges(model: Path, run: Path) -> bool:
    return model.resolve().is_relative_to((run / JUDGES).resolve())


def _base(run: Path) -> Path | str | None:
    """What a run's reward models were made of: its directory; the name that the config gives it, where it is not found by that;
    None where that is the SFT model.
    """
    name = None
    with suppress(OSError, KeyError, TypeError, yaml.YAMLError):
        name = yaml.safe_load((run / "config.yaml").read_text())["reward"]["base"]
    if name is None:
        return None
    kept = lineage_of(run)
    if kept is not None and kept.base.is_dir():
        return kept.base
    return found_here(str(name)) or str(name)


def _labellers(run: Path) -> list[Path]:
    """Reward models that labelled fresh pairs for a run (``fresh.judge``), where they are still found."""
    with suppress(OSError, KeyError, TypeError, yaml.YAMLError, UserError):
        kind, _, places = str(yaml.safe_load((run / "config.yaml").read_text())["fresh"]["judge"]).partition(":")
        found = find_members(places) if kind == "ensemble" else [Path(places).expanduser()] if kind == "reward" else []
        return [place / "model" if (place / "card.json").is_file() else place for place in found]
    return []


def _reward_models(run: Path) -> list[Path]:
    """Of a run: of each round, of the ensemble, what they were made of, and what labelled pairs for them."""
    found = [path for pattern in ("rounds/*/reward", "rounds/*/members/*", "start/members/*") for path in run.glob(pattern)]
    base = _base(run)
    return [*found, *([base] if isinstance(base, Path) else []), *_labellers(run)]


def _copies(found: Sequence[Path], models: Sequence[Path]) -> list[Path]:
    """Those of ``found`` that have the weights of one of the models; files are only read where their sizes are alike."""
    from tokens.durable import digest_of_file

    def weights(path: Path) -> list[Path]:
        return sorted(path.glob("*.safetensors"))

    def sizes(path: Path) -> tuple[int, ...]:
        return tuple(file.stat().st_size for file in weights(path))

    def digests(path: Path) -> tuple[str, ...]:
        return tuple(map(digest_of_file, weights(path)))

    judged = {sizes(model) for model in models} - {()}
    alike = [path for path in found if sizes(path) in judged]
    known = {digests(model) for model in models} if alike else set()
    return [path for path in alike if digests(path) in known]
