"""`python -m cluster report`: the page of one directory again, or one page that compares several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokens.errors import UserError

RUN = "run"
MARKS = (
    ("judgements.jsonl", "evaluate"),
    ("raters.jsonl", "features"),
    ("results.jsonl", "customize"),
    ("references", "generalize"),
    ("card.json", "strength or reward"),
)
"""What only the directory of a command has, and the command."""


def report(directories: Sequence[Path], out: Path | None) -> Path:
    """Write the page again, or a comparison.

    Args:
        directories: one of any command that writes a page, or several of `run`.
        out: where the comparison goes; None = comparison.html in the first directory.

    Returns:
        The page.

    Raises:
        UserError: if a directory is none of these, or several are not all runs.
    """
    if len(directories) > 1:
        refuse_other_kinds(directories)
        from evaluation.compared_report import write_comparison

        return write_comparison(directories, out)
    if out is not None:
        raise UserError(
            f"--out {out}: a page of one directory lies in it, as report.html; --out is for a comparison of several runs"
        )
    return write_again(directories[0])


def kind_of(directory: Path) -> str:
    """The command that made a directory.

    Args:
        directory: to be reported on.

    Returns:
        As in ``MARKS``; ``run`` where nothing speaks for another.
    """
    return next((command for mark, command in MARKS if (directory / mark).exists()), RUN)


def refuse_other_kinds(directories: Sequence[Path]) -> None:
    """Only runs of rounds are compared.

    Args:
        directories: to be compared.

    Raises:
        UserError: naming those that another command made.
    """
    others = [f"{directory} (of `{kind}`)" for directory in directories if (kind := kind_of(directory)) != RUN]
    if others:
        raise UserError(
            f"a comparison is of directories that `run` made (STORAGE/runs/NAME), got {', '.join(others)}. Give each of these to "
            "`report` alone"
        )


def write_again(directory: Path) -> Path:
    """Write the page of one directory.

    Args:
        directory: of any command that writes a page.

    Returns:
        The page.
    """
    kind = kind_of(directory)
    if kind == "evaluate":
        from evaluation.judgement_report import write_judgement_report

        return write_judgement_report(directory)
    if kind == "features":
        from evaluation.feature_report import write_feature_report

        return write_feature_report(directory)
    if kind == "customize":
        from evaluation.domain_report import write_domain_report

        return write_domain_report(directory)
    if kind == "generalize":
        from evaluation.generalize_report import write_generalize_report

        return write_generalize_report(directory)
    if kind == RUN:
        from evaluation.report import write_report

        return write_report(directory)
    from evaluation.preference_report import write_preference_report

    return write_preference_report(directory)
