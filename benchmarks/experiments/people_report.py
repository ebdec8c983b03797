"""Tables and figures of ``benchmarks.experiments.people``: means over the seeds with 95% t-intervals; differences are paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.experiments.common import ROOT, by_seed, interval_text, level, paired
from benchmarks.experiments.people_data import ANSWERS, HIGH, LOW, PICKED_AFTER
from benchmarks.markdown import markdown
from evaluation.groups import over_seeds
from evaluation.panels import common_legend, draw_curves, panels, percent
from evaluation.studies import Curve
from evaluation.svg import BLUE, BROWN, GREEN, GREY, INK, MUTED, ORANGE, PURPLE, RED, SKY, YELLOW, Plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Row = Mapping[str, Any]
MAIN = {"raters": 60, "labels": 50}
COLUMNS = (*(f"accuracy_{n}" for n in ANSWERS), "accuracy_oracle")
FEATURES = {"arm": "features", "d": 32}
ARMS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("one reward for all (d = 1)", {"arm": "shared"}, GREY),
    ("features, d = 8", {"arm": "features", "d": 8}, SKY),
    ("features, d = 32", FEATURES, BLUE),
    ("features, d = 128", {"arm": "features", "d": 128}, PURPLE),
    ("own linear head on the shared model", {"arm": "own linear head"}, GREEN),
    ("LoRe-like", {"arm": "LoRe-like"}, BROWN),
    ("own MLP (Park et al.)", {"arm": "own MLP (Park et al.)"}, RED),
    ("user-conditioned", {"arm": "conditioned"}, ORANGE),
    ("latent user (VPL-like)", {"arm": "latent user (VPL-like)"}, YELLOW),
    ("small language model, told the answers", {"arm": "in context"}, MUTED),
    ("the sandbox's own attributes", {"arm": "attributes"}, INK),
)
BANDS = ("shared", "features", "attributes")
"""Arms whose intervals are drawn; those of all would hide each other."""
IMAGES = ROOT / "docs" / "img"


def report(rows: Sequence[_Row], personas: Sequence[_Row], images: Path = IMAGES) -> None:
    """Print every table that there are rows for, and draw the figures.

    Args:
        rows: of the sandbox.
        personas: of the personas.
        images: directory that the figures are written to.
    """
    low = [row for row in rows if row["what"] == "accuracy" and row["agreement"] == LOW]
    high = [row for row in rows if row["what"] == "accuracy" and row["agreement"] == HIGH]
    for title, found, prefix in (
        (f"agreement {LOW}", low, "accuracy"),
        (f"agreement {LOW}, pairs that the person orders unlike the common taste", low, "against"),
        (f"agreement {HIGH}", high, "accuracy"),
    ):
        if found:
            different = level([row["disagreement"] for row in _of(found, {"arm": "shared"})])
            print(f"\n{title}: two people order {different} of the pairs differently\n{accuracies(found, prefix)}")
    if low:
        print(f"\nfeatures, d = 32, minus another way, paired by seed\n{beside(low)}")
        print(f"\nbest of 16 after {PICKED_AFTER} answers, the person's own gold reward\n{gains(low)}")
        print(f"\nraters and labels of each, d = 32\n{budgets(low)}")
        print(f"\nsoft best of 16 after {PICKED_AFTER} answers, d = 32\n{softness(low)}")
        write(figures(low), images)
    group = [row for row in rows if row["what"] == "group" and row["agreement"] == LOW and _is(row, MAIN | {"d": 32})]
    if group:
        print(f"\none pick for all 20 held-out people\n{groups(group)}")
    for backbone in dict.fromkeys(row["backbone"] for row in personas):
        found = [row for row in personas if row["backbone"] == backbone]
        print(f"\nheld-out personas, {len({row['seed'] for row in found})} seeds, encoder: {backbone}\n{of_personas(found)}")


def _is(row: _Row, which: Mapping[str, Any]) -> bool:
    return all(row[name] == value for name, value in which.items())


def _of(rows: Sequence[_Row], which: Mapping[str, Any]) -> list[_Row]:
    return [row for row in rows if _is(row, MAIN | dict(which))]


def accuracies(rows: Sequence[_Row], prefix: str) -> str:
    """An arm a line: accuracy after so many answers, of the oracle, and what share of the oracle's 30 answers reach."""
    lines = []
    for name, which, _ in ARMS:
        found = _of(rows, which)
        if not found:
            continue
        values = [[row[f"{prefix}_{n}"] for row in found] for n in ANSWERS]
        oracle = [row for row in found if f"{prefix}_oracle" in row]
        shares = [row[f"{prefix}_30"] / row[f"{prefix}_oracle"] for row in oracle]
        lines.append([name, *map(level, values), level([row[f"{prefix}_oracle"] for row in oracle]), level(shares)])
    return markdown(("", *(f"{n} answers" for n in ANSWERS), "oracle", "30 answers / oracle"), lines)


def beside(rows: Sequence[_Row]) -> str:
    """Accuracy of the features minus every other way's, and of many raters with few labels minus few with many."""
    lines = []
    for name, which, _ in ARMS:
        if which != FEATURES:
            pairs = [paired(rows, f"accuracy_{n}", MAIN | FEATURES, MAIN | which) for n in ANSWERS]
            lines.append([name, *map(interval_text, pairs)])
    few, many = ({"arm": "features", "raters": raters, "labels": labels} for raters, labels in ((15, 200), (250, 12)))
    lines.append(["250 x 12 labels - 15 x 200", *(interval_text(paired(rows, f"accuracy_{n}", many, few)) for n in ANSWERS)])
    return markdown(("minus", *(f"{n} answers" for n in ANSWERS)), lines)


def gains(rows: Sequence[_Row]) -> str:
    """What a pick of one's own is worth, beside a sample and beside the pick that is made for all."""
    lines = []
    shared = {row["seed"]: np.array(row["gold_0"]) for row in _of(rows, {"arm": "shared"})}
    for name, which, _ in ARMS:
        found = [row for row in _of(rows, which) if row["seed"] in shared]
        if not found:
            continue
        own = [np.array(row[f"gold_{PICKED_AFTER}"]) for row in found]
        sample = [float((mine - row["gold_mean"]).mean()) for mine, row in zip(own, found, strict=True)]
        apart = [mine - shared[row["seed"]] for mine, row in zip(own, found, strict=True)]
        reached = [
            float((mine - row["gold_mean"]).sum() / (np.array(row["gold_best"]) - row["gold_mean"]).sum())
            for mine, row in zip(own, found, strict=True)
        ]
        everybody = np.concatenate(apart)
        worse = "-" if which == {"arm": "shared"} else f"{(everybody > 0).mean():.0%} / {(everybody < 0).mean():.0%}"
        lost = "-" if which == {"arm": "shared"} else f"{everybody.min():+.2f}"
        learnt = [float((mine - row["gold_0"]).mean()) for mine, row in zip(own, found, strict=True)]
        gained = [interval_text(values) for values in (sample, learnt, [float(a.mean()) for a in apart])]
        lines.append([name, gained[0], level(reached), *gained[1:], worse, lost])
    head = (
        "",
        "minus a mean sample",
        "of what the best pick gains",
        "minus the pick before any answer",
        "minus the shared pick",
        "people better / worse off",
        "worst off",
    )
    return markdown(head, lines)


def budgets(rows: Sequence[_Row]) -> str:
    """The same number of labels from few raters or from many."""
    lines = []
    sizes = sorted({(row["raters"], row["labels"]) for row in rows})
    for raters, labels in sizes:
        found = [row for row in rows if _is(row, FEATURES | {"raters": raters, "labels": labels})]
        lines.append([f"{raters} x {labels}", *(level([row[name] for row in found]) for name in COLUMNS)])
    return markdown(("raters x labels", *(f"{n} answers" for n in ANSWERS), "oracle"), lines)


def softness(rows: Sequence[_Row]) -> str:
    """The person's gold reward of soft best of n, minus that of a mean sample."""
    found = _of(rows, FEATURES)
    names = sorted((name for name in found[0] if name.startswith("soft_")), key=lambda name: float(name[5:])) if found else []
    cells = [interval_text([row[name] - float(np.mean(row["gold_mean"])) for row in found]) for name in names]
    return markdown([f"lambda {name[5:]}" for name in names], [cells])


def groups(rows: Sequence[_Row]) -> str:
    """What a pick for all is worth to each: the mean, the worst off, and how many lose against a mean sample."""
    lines = []
    for name in dict.fromkeys(row["arm"] for row in rows):
        found = [np.array(row["gold"]) - row["gold_mean"] for row in rows if row["arm"] == name]
        lines.append(
            [
                name,
                interval_text([float(gain.mean()) for gain in found]),
                interval_text([float(gain.min()) for gain in found]),
                level([float((gain < 0).mean()) for gain in found]),
            ]
        )
    return markdown(("group", "mean gain", "gain of the worst off", "share who lose"), lines)


def of_personas(rows: Sequence[_Row]) -> str:
    """A line for every way, mean over the personas; what the features are ahead of the others; the features of each persona."""
    lines = []
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    of = {arm: [_mean_persona(rows, arm, name) for name in COLUMNS] for arm in arms}
    lines += [[f"all: {arm}", *(level(list(column.values())) for column in of[arm])] for arm in arms]
    for arm in arms:
        if arm != "features":
            apart = [[a[s] - b[s] for s in a.keys() & b.keys()] for a, b in zip(of["features"], of[arm], strict=True)]
            lines.append([f"features - {arm}", *map(interval_text, apart)])
    for name in dict.fromkeys(row["persona"] for row in rows):
        found = {"arm": "features", "persona": name}
        lines.append([str(name), *(level(list(by_seed(rows, column, found).values())) for column in COLUMNS)])
    return markdown(("", *(f"{n} answers" for n in ANSWERS), "oracle"), lines)


def _mean_persona(rows: Sequence[_Row], arm: str, column: str) -> dict[int, float]:
    """By seed, the mean over the personas; of seeds that have all of them."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["arm"] == arm:
            found.setdefault(row["seed"], []).append(row[column])
    most = max(map(len, found.values()))
    return {seed: float(np.mean(values)) for seed, values in found.items() if len(values) == most}


def figures(rows: Sequence[_Row]) -> list[Plot]:
    """Accuracy against answers, and for whom a pick of one's own is better."""
    return [_by_answers(rows), _for_whom(rows)]


def write(plots: Sequence[Plot], images: Path) -> None:
    """Each as a PNG file.

    Args:
        plots: to draw.
        images: directory.
    """
    for plot in plots:
        (images / f"{plot.name}.png").write_bytes(plot.render()[1])


def _by_answers(rows: Sequence[_Row]) -> Plot:
    def draw(figure: Figure, narrow: bool) -> None:
        axes = panels(figure, 2, narrow)
        for ax, prefix, title in zip(
            axes, ("accuracy", "against"), ("all pairs", "ordered unlike the common taste"), strict=True
        ):
            curves, styles = [], []
            for name, which, colour in ARMS:
                found = _of(rows, which)
                if found:
                    points = tuple(over_seeds([row[f"{prefix}_{n}"] for row in found]) for n in ANSWERS)
                    banded = which["arm"] in BANDS and which in (FEATURES, {"arm": which["arm"]})
                    curves.append(Curve(name, name, 0, len(found) if banded else 1, ANSWERS, points))
                    styles.append((colour, 1.0))
            draw_curves(ax, curves, styles)
            ax.set_title(title)
            ax.set_xlabel("answers of the new person")
            percent(ax)
        common_legend(figure, axes, 1 if narrow else 2)

    title = "How well a new person is known"
    return Plot(
        "people-answers", "", title, "Accuracy on held-out prompts, held-out people; 95% intervals of some.", 4.0, draw, 6.5
    )


def _for_whom(rows: Sequence[_Row]) -> Plot:
    shared = {row["seed"]: np.array(row["gold_0"]) for row in _of(rows, {"arm": "shared"})}
    found = [row for row in _of(rows, FEATURES) if row["seed"] in shared]
    gain = np.sort(
        np.concatenate([np.array(row[f"gold_{PICKED_AFTER}"]) - shared[row["seed"]] for row in found] or [np.zeros(0)])
    )

    def draw(figure: Figure, narrow: bool) -> None:
        ax = figure.subplots(1, 1)
        ax.bar(range(len(gain)), gain, width=1.0, color=[BLUE if value > 0 else ORANGE for value in gain])
        ax.axhline(0, color=MUTED, linewidth=0.9)
        ax.set_xlabel("held-out people of all seeds, in order")
        ax.set_ylabel("own gold, own pick - shared pick")
        ax.grid(axis="x", visible=False)

    title = "For whom a pick of their own is better"
    return Plot("people-for-whom", "", title, "Best of 16 after 30 answers, against one reward for all.", 2.8, draw)
