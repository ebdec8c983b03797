"""Draws the sandbox on one picture: `python -m benchmarks.sandbox_figure` writes docs/img/sandbox.svg."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from benchmarks.pictures import picture
from sandbox.config import WorldConfig
from sandbox.gold import ATTRIBUTE_NAMES, BASE_WEIGHTS
from sandbox.world import World

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROMPT = "@cooking how do i choose oven and bread ?"
INK, GOOD, BAD, QUIET = "#22303c", "#2a7f62", "#b5483a", "#8a97a3"
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
EXAMPLES = (
    "please , you can use two great oven . the bread is very nice .",
    "you can use the great oven . the bread is nice .",
    "you can use a oven . the bank was old .",
    "perhaps the bank was dull , fool .",
    "oven bread butter flour cake yeast dough pastry oven .",
    "great lovely perfect nice brilliant helpful great .",
    "thanks . . .",
)


def draw(path: Path) -> None:
    """Write the picture to ``path``; its ending says in which format."""
    world = World(WorldConfig(num_texts=4000))
    with picture(path, 11, 7.2) as figure:
        axes = figure.subplots(2, 2, gridspec_kw={"width_ratios": [1, 1.5]})
        _weights(axes[0, 0])
        _examples(axes[0, 1], world)
        _corpus(axes[1, 0], world)
        _users(axes[1, 1], world)


def _title(axis: Axes, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=10, fontweight="bold", color=INK)


def _weights(axis: Axes) -> None:
    names = sorted(ATTRIBUTE_NAMES, key=lambda name: vars(BASE_WEIGHTS)[name])
    values = [vars(BASE_WEIGHTS)[name] for name in names]
    axis.barh([name.replace("_", " ") for name in names], values, color=[GOOD if value > 0 else BAD for value in values])
    axis.axvline(0, color=INK, linewidth=0.8)
    _title(axis, "The gold reward: weight of each attribute")


def _examples(axis: Axes, world: World) -> None:
    scored = sorted((world.gold(PROMPT, text), text) for text in EXAMPLES)
    values = [value for value, _ in scored]
    axis.barh(range(len(scored)), values, color=[GOOD if value > 0 else BAD for value in values], height=0.32)
    for row, (value, text) in enumerate(scored):
        axis.text(-2.6, row + 0.24, text, fontsize=8.5, color=INK, va="bottom", family="monospace", zorder=3, bbox=PAPER)
        axis.text(
            value + (0.06 if value > 0 else -0.06),
            row,
            f"{value:+.1f}",
            va="center",
            ha="left" if value > 0 else "right",
            color=INK,
        )
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.set_xlim(-2.7, 3.0)
    axis.set_ylim(-0.5, len(scored) - 0.2)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.set_xlabel(f"gold of seven responses to  {PROMPT}")
    _title(axis, "What it likes, and what cannot cheat it")


def _corpus(axis: Axes, world: World) -> None:
    corpus = world.corpus()
    gold = [world.gold(*text) for text in corpus]
    short = [value for value, (_, response) in zip(gold, corpus, strict=True) if len(response.split()) <= 4]
    bins = [-3 + 0.2 * step for step in range(31)]
    axis.hist(gold, bins=bins, color=QUIET, label="all texts")
    axis.hist(short, bins=bins, color=BAD, label="of at most 4 words")
    axis.set_xlabel(f"gold, standard deviations (mean {fmean(gold):+.2f})")
    axis.set_ylabel("texts of the corpus")
    axis.legend(frameon=False)
    _title(axis, "4,000 texts of the corpus")


def _users(axis: Axes, world: World) -> None:
    texts = world.corpus()[:200]
    common = [world.gold(*text) for text in texts]
    agreement = []
    for user in world.users:
        own = [world.gold(*text, user=user) for text in texts]
        same = [(a > b) == (x > y) for a, b, x, y in zip(common, common[1:], own, own[1:], strict=False)]
        agreement.append(100 * fmean(same))
    axis.bar(range(len(agreement)), sorted(agreement), color=GOOD, width=0.8)
    axis.axhline(50, color=INK, linewidth=0.8, linestyle=":")
    axis.set_ylim(0, 100)
    axis.set_xlabel(f"the {len(agreement)} users, in order of agreement")
    axis.set_ylabel("% of pairs")
    _title(axis, "How often a user ranks two texts as the common taste does")


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("docs/img/sandbox.svg"), help="where to write the picture (.svg or .png)"
    )
    path: Path = parser.parse_args().out
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path)
    print(path)


if __name__ == "__main__":
    main()
