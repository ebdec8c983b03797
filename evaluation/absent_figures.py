"""Figures that a page has not, and which key or command gives them: a sentence each.

A page that silently lacks a figure looks as if there was nothing to see.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from evaluation.embedding import FEWEST_FEATURED
from evaluation.reward_run import RewardRun
from evaluation.strength_run import StrengthRun
from evaluation.studies import STUDIES

LOOKS = 10
"""Measurements that the page proposes."""
OF_STUDY: Mapping[str, tuple[str, str]] = {
    "deciles": ("Figure 4", "models trained on each tenth of the pairs alone"),
    "lowest": ("Figure 5", "models trained on the two weakest tenths alone, as labelled and flipped"),
    "top": ("Figure 6", "models trained on the strongest tenth alone, with soft labels and margins"),
    "margin": ("Figure 7", "models trained on all pairs without and with margins"),
    "methods": ("Figure 8", "models trained with every data.denoise.method"),
    "growing": ("Figures 21 and 22", "models trained on growing parts, from the weakest and from the strongest"),
    "bands": ("Figures 23 to 25", "models trained on bands of the pairs that were treated"),
}


@dataclass(frozen=True)
class Absent:
    """Figures of the paper that are not on the page, and a sentence on how to get them."""

    figures: str
    how: str


def absent_of_strength(run: StrengthRun) -> tuple[Absent, ...]:
    """What the page of a strength run lacks.

    Source: Secrets of RLHF Part II (2401.06080), Figures 3 to 8 and 21 to 25.

    Args:
        run: as read.

    Returns:
        In the order of the paper's figures.

    Padding contract: there is none.
    """
    found = []
    if run.label is None and run.truth is None:
        how = (
            "It needs a second labeller: `python -m cluster relabel PAIRS --judge …` asks one, and strengths measured on the "
            "file that it writes have the figure."
        )
        found.append(Absent("Figure 3", how))
    for study in STUDIES:
        if study not in run.studies:
            figures, what = OF_STUDY[study]
            need = "They need" if figures.startswith("Figures") else "It needs"
            how = f"{need} {what}: `python -m cluster study CONFIG --studies {study}` trains them."
            found.append(Absent(figures, how))
    return tuple(found)


def absent_of_reward(run: RewardRun) -> tuple[Absent, ...]:
    """What the page of a reward run lacks.

    Source: Secrets of RLHF Part II (2401.06080), Figures 8, 11, 16, 19 and 20.

    Args:
        run: as read.

    Returns:
        In the order of the paper's figures.

    Padding contract: there is none.
    """
    found = []
    if not run.scores:
        how = "They need held-out pairs: raise `data.validation_fraction` or give `data.validation`."
        found.append(Absent("Figures 8, 11 and 20", how))
    else:
        if len(run.measurements) < 2:
            every = max(1, len(run.steps) // LOOKS)
            how = f"The model was measured once, at the end: `--reward.evaluate_every {every}` measures it while it is trained."
            found.append(Absent("Figures 8 and 20, and the scores of Figure 19", how))
        if run.features is None or len(run.features.vectors) < FEWEST_FEATURED:
            how = f"It needs at least {FEWEST_FEATURED // 2} held-out pairs: raise `data.validation_fraction`."
            found.append(Absent("Figure 11", how))
    if not run.shifted:
        how = (
            "It needs samples of a shifted policy: `--meta.samples RUN/rounds/round_NNN`, a round of a run, trains the model by "
            "MetaRM and a vanilla twin beside it."
        )
        found.append(Absent("Figure 16", how))
    return tuple(found)
