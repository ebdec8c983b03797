"""timeline.jsonl is read with care, and its figure shows a few steps."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from evaluation.timeline import DRIVER, Span, read_timeline, window
from evaluation.timeline_figure import timeline_figure
from tokens.errors import UserError

START = Span("start_roles", DRIVER, None, None, 0.0, 10.0)


def step(round_: int, number: int, start: float) -> list[Span]:
    """Sampling takes 2 s, learning 3 s, a sync none."""
    return [
        Span("sample", DRIVER, round_, number, start, start + 2),
        Span("sample", "rollout-0", round_, number, start, start + 2),
        Span("policy", DRIVER, round_, number, start + 2, start + 5),
        Span("policy", "learner-0", round_, number, start + 2, start + 5),
        Span("sync", DRIVER, round_, number, start + 5, start + 5),
        Span("sync", "rollout-0", round_, number, start + 5, start + 5),
    ]


def write(path: Path, spans: list[Span]) -> Path:
    path.write_text("".join(json.dumps(asdict(span)) + "\n" for span in spans))
    return path


def test_a_round_that_was_played_again_counts_once(tmp_path: Path) -> None:
    again = replace(START, start=60.0, end=70.0)
    spans = [START, *step(0, 0, 10.0), *step(1, 0, 20.0), *step(1, 1, 25.0), again, *step(1, 0, 70.0)]
    read = read_timeline(write(tmp_path / "timeline.jsonl", spans))
    assert read == (START, *step(0, 0, 10.0), again, *step(1, 0, 70.0))
    assert read_timeline(tmp_path / "none.jsonl") == (), "a run of an earlier version has none"


def test_a_line_without_an_end_is_named(tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    path.write_text('{"what": "sample", "who": "driver", "round": 0, "step": 0, "start": 1.0}\n')
    with pytest.raises(UserError, match=r"timeline\.jsonl, line 1 has no key 'end'"):
        read_timeline(path)


def test_a_window_is_a_few_steps_of_the_last_round() -> None:
    spans = [START, *(span for i in range(9) for round_ in (0, 1) for span in step(round_, i, 10.0 + 100 * round_ + 5 * i))]
    shown = window(spans, 3)
    assert {(span.round, span.step) for span in shown} == {(1, 3), (1, 4), (1, 5)}
    assert (min(span.start for span in shown), max(span.end for span in shown)) == (125.0, 140.0)
    assert window([START], 3) == ()
    early = Span("sample", "rollout-0", 1, 6, 131.0, 137.0)  # what is at work for another step belongs to the picture
    assert early in window([*spans, early], 3)


def test_the_figure_names_processes_phases_and_steps() -> None:
    assert timeline_figure([START]) is None
    figure = timeline_figure([START, *(span for i in range(9) for span in step(0, i, 10.0 + 5 * i))])
    assert figure is not None
    words = [text.text for text in ElementTree.fromstring(figure.wide).iter() if text.tag.endswith("text")]
    assert {"driver", "rollout-0", "learner-0", "sample", "policy", "sync", "2", "3", "4", "5"} <= set(words)
    assert "6" not in words and "seconds" in words
