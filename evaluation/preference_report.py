"""report.html of a strength run or a reward run, and its figures as PNG files. Reads the directory and nothing else.

The page runs no script and may load nothing, and every text is escaped: a data set's texts are not to be trusted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.absent_figures import absent_of_reward, absent_of_strength
from evaluation.fit_words import META_WORDS, collapsed, inflation, meta_tiles
from evaluation.groups import share
from evaluation.json_node import JsonNode, read_json
from evaluation.page import Tiles, render_page, write_page, write_whole
from evaluation.reward_figures import reward_plots
from evaluation.reward_run import RewardRun, read_reward_run
from evaluation.strength_figures import strength_plots
from evaluation.strength_run import Example, StrengthRun, examples, read_strength_run
from evaluation.study_figures import study_plots
from evaluation.summary import Finding, Headline
from evaluation.svg import Drawing, Plot
from tokens.errors import UserError

KINDS = ("strength", "reward")
NUM_LOWEST, NUM_OF_EACH = 20, 2
LONGEST_TEXT = 3000
"""Characters of a text that the page shows."""
WEAK_AUROC = 0.6
LATE_DECLINE = 0.01
"""An accuracy this far below its best on the way is worth saying."""


@dataclass(frozen=True)
class Figure:
    """A figure of the page, and the figure of the paper that it repeats; "" for none."""

    paper: str
    drawing: Drawing


@dataclass(frozen=True)
class Examples:
    """Pairs to be read, chosen by a rule."""

    title: str
    why: str
    pairs: tuple[Example, ...]
    num_open: int


def write_preference_report(directory: Path) -> Path:
    """Write report.html and figures/*.png from the files of a strength run or a reward run, each whole or not at all.

    Source: Secrets of RLHF Part II (2401.06080), the figures that the page names.

    Args:
        directory: STORAGE/strengths/NAME or STORAGE/rewards/NAME; its card.json says which.

    Returns:
        The report's path. The same files give the same bytes.

    Raises:
        UserError: if it is no such directory, or a file is missing or malformed.
        OSError: if the disk refuses; an earlier report stays as it was.

    Padding contract: there is none.
    """
    path = directory / "card.json"
    if not path.is_file():
        raise UserError(
            f"{directory} is not the directory of a strength or reward run: it has no card.json. "
            "Give the directory that `strength` or `reward` printed; if it was interrupted, run the same command again first."
        )
    kind = JsonNode(read_json(path.read_text("utf-8"), str(path)), str(path)).one_of("kind", KINDS)
    if kind == "strength":
        page = _strength_page(read_strength_run(directory))
    else:
        page = _reward_page(read_reward_run(directory))
    return write_page(directory / "report.html", page)


def pick_examples(run: StrengthRun) -> tuple[Examples, ...]:
    """Pairs worth reading: of the lowest strength, nearest to 0, of the highest; and the 20 lowest.

    Source: Secrets of RLHF Part II, Table 1.

    Args:
        run: as read.

    Returns:
        Four groups; training pairs only. In ties the earlier pair comes first.

    Padding contract: there is none.
    """
    rows = run.of_training
    mean = run.mean[rows]
    rising = rows[np.argsort(mean, kind="stable")]
    ambiguous = rows[np.argsort(np.abs(mean), kind="stable")]
    wanted = (
        ("Lowest strength", "Table 1, top: the label is probably wrong.", rising[:NUM_OF_EACH]),
        ("Strength near 0", "Table 1, middle: hard to say.", ambiguous[:NUM_OF_EACH]),
        ("Highest strength", "Table 1, bottom: a clear preference.", rising[::-1][:NUM_OF_EACH]),
        (f"The {min(NUM_LOWEST, len(rising))} lowest", "Do they look wrong to a reader?", rising[:NUM_LOWEST]),
    )
    return tuple(
        Examples(title, why, examples(run, indices.tolist()), 0 if len(indices) > NUM_OF_EACH else len(indices))
        for title, why, indices in wanted
    )


def _strength_page(run: StrengthRun) -> str:
    rows = run.of_training
    below = share(float((run.mean[rows] < 0).sum()), len(rows))
    text = f"{below.value:.0%} of {len(rows):,} training pairs have a strength below 0: {_members(run)} doubt their labels."
    interval = f"95% interval {below.low:.1%} to {below.high:.1%}"
    detail = f"{interval}. Strength is the mean over the members of score(chosen) − score(rejected)."
    return render_page(
        "preference.html.j2",
        name=run.directory.resolve().name,
        kind="preference strength",
        headline=Headline("good", "Measured", text, detail),
        findings=_strength_findings(run),
        tiles=_strength_tiles(run),
        meta=(),
        meta_words="",
        groups=pick_examples(run),
        figures=draw_figures(run.directory, (*strength_plots(run), *study_plots(run.studies))),
        absent=absent_of_strength(run),
        longest=LONGEST_TEXT,
        config=run.config,
        versions=run.versions,
        files="card.json, strengths/ and studies/",
    )


def _members(run: StrengthRun) -> str:
    return f"{run.card.num_members} reward models" if run.card.num_members > 1 else "the one reward model"


def _strength_tiles(run: StrengthRun) -> Tiles:
    rows, card = run.of_training, run.card
    how = "in-sample" if card.folds == 1 else f"{card.folds} folds, cross-fitted"
    tiles = [
        ("pairs", f"{len(rows):,}", f"of {len(run.mean):,} scored" if len(rows) < len(run.mean) else "all scored"),
        ("members M", str(card.num_members), f"{card.members}, {how}"),
        ("strength below 0", f"{float((run.mean[rows] < 0).mean()):.1%}", "of the training pairs"),
    ]
    if card.auroc_wrong is not None and run.wrong is not None:
        tiles.append(("AUROC of −μ", f"{card.auroc_wrong:.3f}", f"{float(run.wrong[rows].mean()):.1%} of the labels are wrong"))
    if run.label is not None:
        asked = run.label[run.label >= 0]
        tiles.append(("second labeller", f"{float(asked.mean()):.1%}", f"agrees, of {len(asked):,} labels"))
    if run.std is not None:
        tiles.append(("std σ, median", f"{float(np.median(run.std[rows])):.2f}", "over the members"))
    total = card.seconds["train"] + card.seconds["score"]
    tiles.append(("time", f"{total / 60:.1f} min" if total >= 90 else f"{total:.0f} s", "all fits, and scoring"))
    return tiles


def _strength_findings(run: StrengthRun) -> tuple[Finding, ...]:
    found: list[Finding] = []
    area = run.card.auroc_wrong
    if area is not None and area < WEAK_AUROC:
        found.append(Finding("warn", f"Low strength hardly finds the wrong labels here: AUROC {area:.2f}, and a coin has 0.50."))
    if run.std is None:
        found.append(Finding("note", "There is one member, so nothing can be said of how far members disagree."))
    return tuple(found)


def _reward_page(run: RewardRun) -> str:
    accuracies = {name: share(float((0.5 * (1 + np.sign(s.difference))).sum()), len(s.chosen)) for name, s in run.scores.items()}
    if accuracies:
        name, first = next(iter(accuracies.items()))
        text = f"The reward model ranks {first.value:.1%} of {len(run.scores[name].chosen):,} validation pairs as labelled."
        detail = f"95% interval {first.low:.1%} to {first.high:.1%}, on the {name.replace('_', ' ')} set."
        better = first.low > 0.5
        verdict = "Better than chance" if better else "Not told from chance"
        headline = Headline("good" if better else "warn", verdict, text, detail)
    else:
        text = "The reward model was fitted without validation pairs."
        headline = Headline("warn", "Not measured", text, "Nothing says how good it is.")
    tiles = [
        (name.replace("_", " "), f"{e.value:.1%}", f"{e.low:.1%} to {e.high:.1%} of {len(run.scores[name].chosen):,}")
        for name, e in accuracies.items()
    ]
    if run.scores:
        name = next(iter(run.scores))
        tiles.append(("calibration error", f"{run.ece[name]:.1%}", f"on {name.replace('_', ' ')}"))
    prototypes = [value for _, value in run.over_steps("reward/prototypes_effective")]
    if prototypes:
        tiles.append(("prototypes", f"{prototypes[-1]:.1f}", "in effective use, last step"))
    tiles.append(("steps", f"{len(run.steps):,}", "of the optimizer"))
    return render_page(
        "preference.html.j2",
        name=run.directory.resolve().name,
        kind="reward model",
        headline=headline,
        findings=_reward_findings(run),
        tiles=tiles,
        meta=meta_tiles(run.fit),
        meta_words=META_WORDS,
        groups=(),
        figures=draw_figures(run.directory, reward_plots(run)),
        absent=absent_of_reward(run),
        longest=LONGEST_TEXT,
        config=run.config,
        versions=run.versions,
        files="metrics.jsonl and the Parquet files",
    )


def _reward_findings(run: RewardRun) -> tuple[Finding, ...]:
    words = (inflation(run.fit), collapsed([value for _, value in run.over_steps("reward/prototypes_effective")]))
    return (*_declines(run), *(Finding("warn", text) for text in words if text is not None))


def _declines(run: RewardRun) -> tuple[Finding, ...]:
    """The sets on which another step's weights were better than those that were kept."""
    falls = []
    for name in run.sets:
        points = run.over_training(f"validation/{name}/accuracy")
        step, best = max(points, key=lambda point: point[1], default=(0, 0.0))
        kept = dict(points)[run.best_step] if run.best_step is not None and points else points[-1][1] if points else 0.0
        if best - kept > LATE_DECLINE:
            falls.append(f"{name.replace('_', ' ')} {best:.1%} at step {step:,} to {kept:.1%}")
    if run.best_step is not None:
        text = f"Early stopping kept the weights of step {run.best_step:,}, the best on the set that reward.stop_on names"
        return (Finding("note", f"{text}; another step was better on others: {'; '.join(falls)}." if falls else f"{text}."),)
    if not falls:
        return ()
    why = "Perhaps wrong labels learnt by heart (data.denoise), or noise; reward.patience keeps the best weights."
    return (Finding("warn", f"The accuracy fell from its best: {'; '.join(falls)}. {why}"),)


def draw_figures(directory: Path, plots: Sequence[Plot]) -> tuple[Figure, ...]:
    """Draw every figure; the PNG files are written on the way.

    Source: none needed.

    Args:
        directory: whose figures/ the files go to; made if needed.
        plots: to be drawn.

    Returns:
        The figures, for the page.

    Padding contract: there is none.
    """
    folder = directory / "figures"
    folder.mkdir(exist_ok=True)
    drawn = []
    for plot in plots:
        drawing, png = plot.render()
        write_whole(folder / f"{plot.name}.png", png)
        drawn.append(Figure(plot.paper, drawing))
    return tuple(drawn)
