"""A run directory, read: what the driver wrote, checked key by key, as records.

Every key below must be there; those typed ``| None`` may be null. Keys that are not named here are left alone.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from evaluation.alarms import Alarm
from evaluation.best import OUT
from evaluation.config import Judge
from evaluation.json_node import JsonNode, json_file, json_lines, read_json, read_text
from evaluation.records import PEOPLE, EvaluationRow, MetaRow, PersonRow, read_rows
from evaluation.timeline import Span, read_timeline
from tokens.errors import UserError

JUDGES: tuple[Judge, ...] = ("gold", "held_out", "ensemble")


@dataclass(frozen=True)
class Evaluation:
    """Means over the judged responses of one policy; the outcome against SFT is None where the policy is SFT itself."""

    proxy: float
    ensemble_mean: float
    ensemble_std: float
    gold: float | None
    kl: float  # nats per response
    perplexity: float  # under SFT
    length: float  # tokens
    finished: float
    win: float | None
    tie: float | None
    lose: float | None
    margin: float | None
    margin_low: float | None
    margin_high: float | None
    judge: Judge
    held_out: float | None = None
    """Mean of the held-out members' scores; None where there are none."""
    held_out_std: float | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    """All that the ledger says, by its names; nulls are left out, and so is what an earlier version did not write."""


@dataclass(frozen=True)
class RewardFit:
    """How the reward model of a round was fitted; what only MetaRM has is None without it.

    ``numbers`` holds all that the ledger says, by its names; nulls are left out, and so is what an earlier version did not write.
    """

    loss: float | None
    accuracy: float | None
    validation_accuracy: float | None
    j_before: float | None
    j_after: float | None
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class Round:
    """A committed round."""

    index: int
    committed_at: str
    choices: Mapping[str, str]
    seconds: Mapping[str, float]
    reward: RewardFit
    evaluation: Evaluation
    dropped: str  # JSON
    bad_steps: Mapping[str, float]
    """PPO steps whose numbers went wrong, by what was done about them; empty in a ledger from before there were such."""
    fresh: Mapping[str, float]
    """What came of labelling samples: "labelled", "accuracy" of the last reward model ...; empty where nobody did."""
    alarms: tuple[Alarm, ...] = ()
    """What the round's end alarmed about."""
    disqualified: tuple[str, ...] = ()
    """Alarms for which the round does not count (``evaluation.disqualify``)."""
    best: str = ""
    """Which round was the best by then, and why; "" in a ledger from before that was told."""
    best_round: int | None = None
    """Its index; None = SFT, or such a ledger."""


@dataclass(frozen=True)
class Ledger:
    """ledger.json: the start (SFT) and the committed rounds, at least one."""

    start_seconds: Mapping[str, float]
    start: Evaluation
    rounds: tuple[Round, ...]

    @property
    def sft_ensemble_std(self) -> float | None:
        """How far all members lie apart on SFT's responses, of the first round, since the start has one member less; None in a
        ledger from before it was kept."""
        numbers = self.rounds[0].evaluation.numbers
        return numbers["sft_ensemble_std"] if "sft_ensemble_std" in numbers else None


@dataclass(frozen=True)
class MetricRow:
    """One line of metrics.jsonl that belongs to a committed round; nulls are left out of ``values``."""

    round: int
    step: int
    phase: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """All that the report needs of a run directory. A baseline trains no reward model on S_k and has no ``meta_rows``."""

    directory: Path
    config: str
    versions: Mapping[str, str]
    ledger: Ledger
    metrics: tuple[MetricRow, ...]
    start_rows: tuple[EvaluationRow, ...]
    round_rows: tuple[tuple[EvaluationRow, ...], ...]
    meta_rows: tuple[tuple[MetaRow, ...], ...]
    timeline: tuple[Span, ...]
    people: tuple[PersonRow, ...]
    """What the policy of the last round is worth to each person; none where no people pay."""

    @property
    def baseline(self) -> str | None:
        """What was played in place of the rounds (``rounds.baseline``); None where the rounds were."""
        choices = self.ledger.rounds[-1].choices
        return choices["rounds.baseline"] if "rounds.baseline" in choices else None


def read_run(directory: Path) -> Run:
    """Read a run directory.

    Source: the run directory's layout.

    Args:
        directory: RUN.

    Returns:
        The run; of rounds, the committed ones.

    Raises:
        UserError: if it is no run directory, no round is committed, or a file lacks a key.

    Padding contract: there is none.
    """
    ledger_path = directory / "ledger.json"
    if not ledger_path.is_file():
        raise UserError(
            f"{directory} is not a run directory: it has no ledger.json. Give the directory that a run printed when it started."
            if directory.is_dir()
            else f"{directory} is not a directory. Give the directory that a run printed when it started."
        )
    ledger = parse_ledger(read_json(ledger_path.read_text("utf-8"), str(ledger_path)), str(ledger_path))
    versions = json_file(directory / "versions.json").strings()
    played = {None, *(round.index for round in ledger.rounds)}
    folders = [directory / "rounds" / f"round_{round.index:03d}" for round in ledger.rounds]
    return Run(
        directory=directory,
        config=read_text(directory / "config.yaml"),
        versions=versions,
        ledger=ledger,
        metrics=_metrics(directory / "metrics.jsonl", {round.index for round in ledger.rounds}),
        start_rows=read_rows(directory / "start" / "evaluation.parquet", EvaluationRow),
        round_rows=tuple(read_rows(folder / "evaluation.parquet", EvaluationRow) for folder in folders),
        meta_rows=tuple(
            () if "rounds.baseline" in round.choices else read_rows(folder / "meta_rollouts.parquet", MetaRow)
            for round, folder in zip(ledger.rounds, folders, strict=True)
        ),
        timeline=tuple(span for span in read_timeline(directory / "timeline.jsonl") if span.round in played),
        people=tuple(read_rows(folders[-1] / PEOPLE, PersonRow)) if (folders[-1] / PEOPLE).is_file() else (),
    )


def parse_ledger(raw: object, source: str = "ledger.json") -> Ledger:
    """Check a ledger that was read from JSON and make records of it.

    Source: the run directory's layout.

    Args:
        raw: the parsed JSON.
        source: its name in messages.

    Returns:
        The ledger.

    Raises:
        UserError: if a key is missing or of the wrong type, the format is unknown, or no round is committed.

    Padding contract: there is none.
    """
    root = JsonNode(raw, source)
    if root.number("format") != 1:
        raise UserError(f"{source}: format {root.value('format')} is not known; this version of Rondo reads format 1")
    rounds = tuple(_round(root.child_of_list("rounds", i)) for i in range(root.length("rounds")))
    if not rounds:
        raise UserError(
            f"{source}: no round is committed yet, so there is nothing to report. Let the run finish its first round."
        )
    start = root.child("start")
    return Ledger(start.child("seconds").numbers(), _evaluation(start.child("evaluation")), rounds)


def series(run: Run, phase: str, name: str) -> list[tuple[int, int, float]]:
    """A metric by step over all committed rounds.

    Source: metrics.jsonl.

    Args:
        run: the run.
        phase: of the rows, as ``policy``.
        name: of the metric, as ``policy/kl``.

    Returns:
        (x, round, value) per row that has it; x counts the rows of the phase from 0, so that rounds follow each other.

    Padding contract: there is none.
    """
    rows = [row for row in run.metrics if row.phase == phase]
    return [(x, row.round, row.values[name]) for x, row in enumerate(rows) if name in row.values]


def _evaluation(node: JsonNode) -> Evaluation:
    return Evaluation(
        proxy=node.number("proxy"),
        ensemble_mean=node.number("ensemble_mean"),
        ensemble_std=node.number("ensemble_std"),
        gold=node.optional("gold"),
        kl=node.number("kl"),
        perplexity=node.number("perplexity"),
        length=node.number("length"),
        finished=node.number("finished"),
        win=node.optional("win"),
        tie=node.optional("tie"),
        lose=node.optional("lose"),
        margin=node.optional("margin"),
        margin_low=node.optional("margin_low"),
        margin_high=node.optional("margin_high"),
        judge=_judge(node),
        held_out=node.optional("held_out") if node.has("held_out") else None,
        held_out_std=node.optional("held_out_std") if node.has("held_out_std") else None,
        numbers=node.finite(),
    )


def _judge(node: JsonNode) -> Judge:
    named = node.one_of("judge", JUDGES)
    return next(judge for judge in JUDGES if judge == named)


def _round(node: JsonNode) -> Round:
    reward = node.child("reward")
    return Round(
        index=int(node.number("round")),
        committed_at=node.string("committed_at"),
        choices=node.child("choices").strings(),
        seconds=node.child("seconds").numbers(),
        reward=RewardFit(
            loss=reward.optional("loss"),
            accuracy=reward.optional("accuracy"),
            validation_accuracy=reward.optional("validation_accuracy"),
            j_before=reward.optional("J_before"),
            j_after=reward.optional("J_after"),
            numbers=reward.finite(),
        ),
        evaluation=_evaluation(node.child("evaluation")),
        dropped=json.dumps(node.value("dropped"), indent=2, ensure_ascii=False, sort_keys=True),
        bad_steps=node.child("guards").numbers() if node.has("guards") else {},
        fresh=node.child("fresh").finite() if node.has("fresh") else {},
        alarms=_alarms(node) if node.has("alarms") else (),
        disqualified=node.texts(OUT) if node.has(OUT) else (),
        best=node.child("best").string("why") if node.has("best") else "",
        best_round=_best_round(node.child("best")) if node.has("best") else None,
    )


def _best_round(node: JsonNode) -> int | None:
    return None if node.value("round") is None else int(node.number("round"))


def _alarms(node: JsonNode) -> tuple[Alarm, ...]:
    told = [node.child_of_list("alarms", i) for i in range(node.length("alarms"))]
    return tuple(Alarm(each.string("name"), each.string("text"), each.string("do")) for each in told)


def _metrics(path: Path, committed: set[int]) -> tuple[MetricRow, ...]:
    """Rows of committed rounds in order; a round that was interrupted and run again keeps each step's last row."""
    rows: dict[tuple[int, int, str], MetricRow] = {}
    for node in json_lines(path):
        row = MetricRow(int(node.number("round")), int(node.number("step")), node.string("phase"), node.finite())
        if row.round in committed:
            rows[row.round, row.step, row.phase] = row
    return tuple(rows[key] for key in sorted(rows))
