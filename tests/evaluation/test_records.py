import math
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation.records import EvaluationRow, MetaRow, read_rows, write_rows
from tokens.errors import UserError

JUDGED = EvaluationRow("p0", "Why?", "law", "Because ☕", True, 3, 0.5, 0.25, 0.3, 0.1, (0.2, 0.4), -3.5, -4.0)
ROLLOUT = MetaRow("p0", "Why?", 1, "So", (5, 6), (-0.5, -0.25), 7, False, None, 0.75)


@pytest.mark.parametrize(
    "rows",
    [
        [JUDGED, replace(JUDGED, prompt_id="p1", gold=None)],
        [replace(JUDGED, gold=None)],
        [ROLLOUT, replace(ROLLOUT, score_vanilla=0.1)],
        [replace(ROLLOUT, members=(0, 2), member_scores=(0.75, -1.5), gold=0.25), ROLLOUT],
    ],
)
def test_what_is_written_is_read(tmp_path: Path, rows: list[EvaluationRow] | list[MetaRow]) -> None:
    write_rows(tmp_path / "rows.parquet", rows)
    assert read_rows(tmp_path / "rows.parquet", type(rows[0])) == tuple(rows)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_the_file_is_what_any_reader_expects(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", [replace(JUDGED, gold=None)])
    file = pq.ParquetFile(tmp_path / "rows.parquet")
    schema = file.schema_arrow
    assert schema.field("gold").type == pa.float64()
    assert schema.field("gold").nullable
    assert not schema.field("proxy").nullable
    assert schema.field("member_scores").type == pa.list_(pa.float64())
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"


@pytest.mark.parametrize("rows", [[], [JUDGED, ROLLOUT]])
def test_no_rows_or_two_kinds_are_refused(tmp_path: Path, rows: list[EvaluationRow]) -> None:
    with pytest.raises(ValueError, match="rows of one kind"):
        write_rows(tmp_path / "rows.parquet", rows)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet"
    write_rows(path, [JUDGED])
    before = path.read_bytes()

    def full(table: pa.Table, where: Path, **_: str) -> None:
        Path(where).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        write_rows(path, [JUDGED, JUDGED])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["rows.parquet"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proxy": math.nan}, "not finite"),
        ({"gold": math.inf}, "not finite"),
        ({"num_tokens": 0}, "at least one token"),
        ({"member_scores": ()}, "one member"),
    ],
)
def test_a_bad_judgement_cannot_be_made(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(JUDGED, **change)


@pytest.mark.parametrize(
    "change",
    [{"token_ids": (5,)}, {"token_ids": (), "sampler_logprobs": ()}, {"score_metarm": math.nan}, {"score_vanilla": math.inf},
     {"members": (0,)}, {"members": (0,), "member_scores": (math.nan,)}, {"gold": math.inf}],
)  # fmt: skip
def test_a_bad_rollout_cannot_be_made(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="rollout p0/1"):
        replace(ROLLOUT, **change)


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        read_rows(tmp_path / "none.parquet", MetaRow)
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read_rows(tmp_path / "text.parquet", MetaRow)
    write_rows(tmp_path / "rows.parquet", [JUDGED])
    with pytest.raises(UserError, match=r"has no column .*token_ids"):
        read_rows(tmp_path / "rows.parquet", MetaRow)


def test_a_file_from_before_members_were_kept_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_rows(path, [replace(ROLLOUT, members=(0, 1), member_scores=(0.75, 0.5), gold=0.25)])
    pq.write_table(pq.read_table(path).drop_columns(["members", "member_scores", "gold"]), path)
    assert read_rows(path, MetaRow) == (ROLLOUT,)
