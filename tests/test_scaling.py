"""The page of runs on paper."""

from __future__ import annotations

from benchmarks.scaling import BEGIN, END, MEMBERS, PAGE, POLICIES, PROMPTS, SAMPLES, best_layout, layouts, of_size, written
from cluster import times

SMALL, _, LARGE = POLICIES


def test_the_smallest_layout_by_hand() -> None:
    layout = best_layout(SMALL, 8)
    assert layout is not None and layout.engines + layout.learner + layout.reward + layout.scorers <= 8
    step = {phase.name: phase for phase in layout.times.step}
    tokens = PROMPTS[8] * SAMPLES * 1024
    flops = 2 * 6_476_271_616 + 2 * 32 * 4096 * 1024  # of a token: a reward model of 7B, and attention in its 32 layers
    assert step["score"].seconds == MEMBERS * tokens * flops / (layout.scorers * times.TFLOPS * 1e12 * times.SCORING_MFU)
    assert not layout.plan.shortfalls


def test_what_cannot_fit_has_no_layout() -> None:
    assert list(layouts(LARGE, 8)) == []  # an engine alone takes all eight
    assert best_layout(LARGE, 8) is None


def test_the_page_says_what_the_planner_says_now() -> None:
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith(f"| {SMALL.name} | 8 |")]
    assert rows[0] == "| " + " | ".join(next(row for row in of_size(SMALL, (8,)))) + " |"


def test_tables_are_put_between_the_marks() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert written(page, "new") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
