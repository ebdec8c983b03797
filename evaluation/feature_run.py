"""What reward features measured: accuracy of every rater they were trained on, and of new ones against their answers."""

from dataclasses import dataclass
from pathlib import Path

from evaluation.groups import Estimate, over_seeds
from evaluation.json_node import JsonNode, json_lines, read_json
from tokens.errors import UserError

TRAINED, NEW = "trained", "new"


@dataclass(frozen=True)
class FeatureRow:
    """One rater's held-out pairs.

    Args:
        kind: ``TRAINED`` or ``NEW``.
        rater: by name.
        num_labels: answers that the weights were fitted to.
        num_tests: held-out pairs.
        accuracy: share of them ranked as the rater did.
        mean_accuracy: the same of the mean rater's weights.
    """

    kind: str
    rater: str
    num_labels: int
    num_tests: int
    accuracy: float
    mean_accuracy: float


@dataclass(frozen=True)
class FeatureCard:
    """What the page says of the fit.

    Args:
        d: reward features.
        shared: one reward for all.
        num_raters: trained on.
        num_labels: likewise.
        loss: nats per label, last quarter of the steps.
        fingerprint: of the model.
    """

    d: int
    shared: bool
    num_raters: int
    num_labels: int
    loss: float
    fingerprint: str


@dataclass(frozen=True)
class FeatureRun:
    """Reward features as their directory says.

    Args:
        directory: of them.
        card: of the fit.
        rows: every measurement.
    """

    directory: Path
    card: FeatureCard
    rows: tuple[FeatureRow, ...]

    @property
    def trained(self) -> tuple[FeatureRow, ...]:
        """Of the raters that were trained on."""
        return tuple(row for row in self.rows if row.kind == TRAINED)

    @property
    def new(self) -> tuple[FeatureRow, ...]:
        """Of the raters that were held out, several each."""
        return tuple(row for row in self.rows if row.kind == NEW)


def read_feature_run(directory: Path) -> FeatureRun:
    """Read a finished model's measurements.

    Source: the directory's layout.

    Args:
        directory: STORAGE/features/NAME.

    Returns:
        The run.

    Raises:
        UserError: if a file is missing or malformed.

    Padding contract: there is none.
    """
    path = directory / "card.json"
    if not path.is_file():
        raise UserError(f"{directory} has no card.json: the fit is not finished. Run the same `features` command again first")
    node = JsonNode(read_json(path.read_text("utf-8"), str(path)), str(path))
    rows = tuple(
        FeatureRow(
            kind=row.one_of("kind", (TRAINED, NEW)),
            rater=row.string("rater"),
            num_labels=int(row.number("num_labels")),
            num_tests=int(row.number("num_tests")),
            accuracy=row.number("accuracy"),
            mean_accuracy=row.number("mean_accuracy"),
        )
        for row in json_lines(directory / "raters.jsonl")
    )
    card = FeatureCard(
        d=int(node.number("d")),
        shared=node.value("shared") is True,
        num_raters=int(node.number("num_raters")),
        num_labels=int(node.number("num_labels")),
        loss=node.child("fit").number("loss"),
        fingerprint=node.string("fingerprint"),
    )
    return FeatureRun(directory, card, rows)


def after_answers(run: FeatureRun) -> dict[int, Estimate]:
    """Accuracy of the raters who were held out, by the number of their answers; the interval is over the raters.

    Source: ``over_seeds`` with raters in the place of seeds.

    Args:
        run: as read.

    Returns:
        By number of answers, rising.

    Padding contract: there is none.
    """
    counts = sorted({row.num_labels for row in run.new})
    return {count: over_seeds([row.accuracy for row in run.new if row.num_labels == count]) for count in counts}
