"""``data.denoise`` in the commands that train reward models: where the strengths come from, and what was done."""

from __future__ import annotations

from pathlib import Path

from cluster.config import RunConfig
from cluster.console import Console
from cluster.inputs import Source
from preferences.sets import PreferenceSet
from tokens.errors import UserError


def find_strengths(config: RunConfig) -> str | None:
    """The strengths that ``data.denoise`` goes by, where there are any yet.

    Args:
        config: of the command.

    Returns:
        What ``preferences.strength.read_strengths`` reads; None where nothing is denoised, or those of the config's own name have
        not been made yet.

    Raises:
        UserError: if the config names strengths that are not there, or those of its own name belong to another config.
    """
    denoise = config.data.denoise
    if denoise.method == "none":
        return None
    if denoise.strength is None:
        from cluster.strength_directory import StrengthDirectory

        own = StrengthDirectory(config)
        own.inspect()
        return str(own.path) if own.finished else None
    named = Path(denoise.strength).expanduser()
    if not named.exists() and not config.data.allow_hub:
        raise UserError(
            f"data.denoise.strength: no such file or directory {named.absolute()}. Make strengths with "
            "`python -m cluster strength CONFIG`, or set it to null to have them made first"
        )
    return str(named) if named.exists() else denoise.strength


def check_strengths(config: RunConfig, source: Source) -> None:
    """Denoise once for the errors in it, if strengths and pairs are there already: before any process starts.

    Raises:
        UserError: if the strengths are missing, of other pairs, or tell nothing; or, strengths or not, the pairs have a column
            that denoising writes.
    """
    strengths = find_strengths(config)
    if strengths is not None and source.ready:
        source.training(strengths)
    elif config.data.denoise.method != "none":
        check_columns(source)


def check_columns(source: Source) -> None:
    """Refuse pairs with a column that denoising writes, where they can be read already.

    Raises:
        UserError: naming the columns.
    """
    from preferences.denoise import refuse_columns

    if source.ready:
        refuse_columns(source.preferences()[0])


def ensure_strengths(config: RunConfig, console: Console) -> str | None:
    """The same as ``find_strengths``; those of the config's own name are made first where they are missing.

    Call it before the command's own Ray session: making them is a session of its own.

    Args:
        config: of the command.
        console: to show progress on.

    Returns:
        The strengths; None where nothing is denoised.
    """
    found = find_strengths(config)
    if found is not None or config.data.denoise.method == "none":
        return found
    from cluster.strength import strength

    console.say(f"[yellow]note[/] data.denoise.method is {config.data.denoise.method}: the preference strengths come first")
    strength(config, console)
    return find_strengths(config)


def denoised(config: RunConfig, pairs: PreferenceSet, strengths: str) -> PreferenceSet:
    """Training pairs after ``data.denoise``.

    Args:
        config: what to do.
        pairs: as they were given.
        strengths: what ``ensure_strengths`` answered.

    Returns:
        The same pairs in the same order, with what was done in their columns.

    Raises:
        UserError: if the strengths are of other pairs or cannot be used, or no pair is left.
    """
    from preferences.denoise import denoise
    from preferences.strength import read_strengths

    return denoise(pairs, read_strengths(strengths, config.data.allow_hub), config.data.denoise)


def in_words(counts: dict[str, int], strengths: str) -> str:
    """A line for the terminal: what ``preferences.denoise.count_actions`` counted."""
    done = ", ".join(f"{number:,} {name}" for name, number in counts.items() if name != "pairs" and number)
    return f"  data.denoise: {counts['pairs']:,} pairs, {done}; by {strengths}"
