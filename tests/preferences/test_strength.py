"""Strengths go out and come back; what does not belong to the pairs is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from preferences.config import DataConfig
from preferences.load import load_preferences
from preferences.sets import PreferenceSet
from preferences.strength import Strengths, match, read_strengths, refuse_constant, write_strengths, written_parts
from preferences.strength_files import CHOSEN_SCORES, MEAN, REJECTED_SCORES, STD
from preferences.swap import as_table, swap_sides
from tests.preferences.conftest import WriteRows
from tests.preferences.strengths import preference_set, strengths_of
from tokens.errors import UserError


def write(directory: Path, part: int, pairs: PreferenceSet, strengths: Strengths, split: str = "train") -> Path:
    return write_strengths(
        directory,
        part,
        as_table(pairs.rows),
        strengths.chosen,
        strengths.rejected,
        split=split,
        source="pairs.jsonl",
        fingerprint=strengths.fingerprint,
    )


def test_strength_is_the_mean_and_population_std_over_the_members() -> None:
    chosen = np.array([[3.0, 1.0, 2.0], [0.0, 0.0, 1.0]])
    rejected = np.array([[1.0, 1.0, 0.0], [1.0, 2.0, 0.0]])
    strengths = Strengths(("x", "y"), chosen, rejected, ("train",) * 2, "here", None, (b"1", b"2"))
    assert strengths.margin.tolist() == [[2.0, 0.0, 2.0], [-1.0, -2.0, 1.0]]
    assert strengths.mean.tolist() == pytest.approx([4 / 3, -2 / 3])
    # by hand: ((2/3)^2 + (4/3)^2 + (2/3)^2) / 3 = 8/9, divided by M and not by M - 1
    assert strengths.std.tolist() == pytest.approx([np.sqrt(8 / 9), np.sqrt(((1 / 3) ** 2 + (4 / 3) ** 2 + (5 / 3) ** 2) / 3)])


def test_what_is_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    pairs = preference_set(5, {"gold_chosen": [0.1, 0.2, 0.3, 0.4, 0.5], "label": [1, 0, -1, 1, 0]})
    strengths = strengths_of(pairs, [0.3, -1.7, 0.0, 2.5, 1 / 3], 3)
    table = as_table(pairs.rows)
    for part, rows in enumerate(([0, 1, 2], [3, 4])):
        some = strengths.select(rows)
        write_strengths(
            tmp_path,
            part,
            table.take(pa.array(rows)),
            some.chosen,
            some.rejected,
            split=("train", "validation")[part],
            source="pairs.jsonl",
            fingerprint=pairs.fingerprint,
        )
    assert written_parts(tmp_path) == {0, 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-00000.parquet", "part-00001.parquet"]
    read = read_strengths(tmp_path)
    assert (read.chosen == strengths.chosen).all() and (read.rejected == strengths.rejected).all()
    assert read.splits == ("train", "train", "train", "validation", "validation")
    assert (read.ids, read.texts, read.fingerprint) == (strengths.ids, strengths.texts, pairs.fingerprint)
    written = parquet.read_table(tmp_path / "part-00001.parquet")
    assert written[MEAN].to_pylist() == strengths.mean[3:].tolist()
    assert written[STD].to_pylist() == strengths.std[3:].tolist()
    assert written["GPT4 label"].to_pylist() == [1, 0]
    assert written["gold_chosen"].to_pylist() == [0.4, 0.5]
    assert written[CHOSEN_SCORES].type == pa.list_(pa.float64())


def test_a_part_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = preference_set(2)
    strengths = strengths_of(pairs, [1.0, 2.0])
    path = write(tmp_path, 0, pairs, strengths)
    before = path.read_bytes()

    def broken(writer: object, table: pa.Table) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(parquet.ParquetWriter, "write_table", broken)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, 0, pairs, strengths_of(pairs, [5.0, 6.0]))
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, 1, pairs, strengths)
    assert path.read_bytes() == before
    assert written_parts(tmp_path) == {0}
    assert len(read_strengths(tmp_path)) == 2  # what is half written is not read


def test_strength_files_are_preference_data_too(tmp_path: Path) -> None:
    pairs = preference_set(3)
    path = write(tmp_path, 0, pairs, strengths_of(pairs, [1.0, 2.0, -1.0]))
    read = load_preferences(DataConfig(preferences=str(path)))
    assert read.fingerprint == pairs.fingerprint


TURNS = {
    "chosen": ["What is green?", "Grass.", "And blue?", "The sky."],
    "rejected": ["What is green?", "Grass.", "And blue?", "No."],
    "GPT4 label": 1,
    MEAN: 0.5,
    STD: 0.5,
    CHOSEN_SCORES: [1, 2.0],
    REJECTED_SCORES: [1.0, 1.0],
}
HH = {
    "chosen": "\n\nHuman: What is green?\n\nAssistant: Grass.\n\nHuman: And blue?\n\nAssistant: The sky.",
    "rejected": "\n\nHuman: What is green?\n\nAssistant: Grass.\n\nHuman: And blue?\n\nAssistant: No.",
}


def public_row(number: int) -> dict[str, object]:
    side = ["Marked?", f"Yes {number}."]
    return TURNS | {"chosen": side, "rejected": [side[0], "Maybe."], "GPT4 label": -1}


def test_the_public_columns_are_read_as_pairs_and_as_strengths(write: WriteRows) -> None:
    rows = [TURNS, *(public_row(number) for number in range(3))]
    path = write(rows, "public/train.jsonl")
    write([public_row(9)], "public/valid.jsonl")
    pairs = load_preferences(DataConfig(preferences=path))
    assert pairs.format == "turns"
    first = pairs.rows[0]
    assert first["prompt"] == "\n\nHuman: What is green?\n\nAssistant: Grass.\n\nHuman: And blue?\n\nAssistant:"
    assert (first["chosen"], first["rejected"]) == (" The sky.", " No.")
    strengths = read_strengths(Path(path).parent)
    assert strengths.splits == ("train",) * 4 + ("validation",)
    assert strengths.mean.tolist() == [0.5] * 5
    assert match(strengths, pairs).ids == ("1", "2", "3", "4")


def test_public_strengths_fit_hh_transcripts_of_the_same_dialogues(write: WriteRows) -> None:
    strengths = read_strengths(write([TURNS | {CHOSEN_SCORES: [3.0, 4.0]}, public_row(1)], "valid.jsonl"))
    marked = {
        "chosen": ["Human: Marked?", "Assistant: Yes 1."],
        "rejected": ["Human: Marked?", "Assistant: Maybe."],
    }
    assert match(strengths, load_preferences(DataConfig(preferences=write([HH, HH], "hh.jsonl")))).mean.tolist() == [2.5, 2.5]
    assert match(strengths, load_preferences(DataConfig(preferences=write([marked, marked], "m.jsonl")))).mean[0] == 0.5


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": ["a", "b"], "rejected": ["c", "b"]}, "the prompts of chosen and rejected differ"),
        ({"chosen": ["a", "b"], "rejected": ["a", "b"]}, "chosen equals rejected"),
        ({"chosen": ["b"], "rejected": ["c"]}, "prompt is empty"),
        ({"chosen": ["a", " "], "rejected": ["a", "b"]}, "chosen is empty"),
        ({"chosen": [], "rejected": ["a", "b"]}, "chosen is empty"),
        ({"chosen": "a", "rejected": "b"}, "column 'chosen' holds text here and turns above"),
        ({"chosen": ["a", 3], "rejected": ["a", "b"]}, "column 'chosen' must be text, a list of"),
    ],
)
def test_bad_turns_are_named_with_their_line(write: WriteRows, row: dict[str, object], words: str) -> None:
    good = {"chosen": ["a", "b"], "rejected": ["a", "c"]}
    with pytest.raises(UserError, match=words) as caught:
        load_preferences(DataConfig(preferences=write([good, row])))
    assert "line 2" in str(caught.value)


def test_turns_with_a_prompt_of_their_own_are_refused(write: WriteRows) -> None:
    row = {"prompt": "a", "chosen": ["a", "b"], "rejected": ["a", "c"]}
    with pytest.raises(UserError, match="lists of turns, which hold the prompt"):
        load_preferences(DataConfig(preferences=write([row, row])))


def test_saved_data_sets_are_read_with_all_their_splits(tmp_path: Path) -> None:
    rows = [public_row(number) for number in range(4)]
    saved = DatasetDict({"train": Dataset.from_list(rows[:3]), "valid": Dataset.from_list(rows[3:])})
    saved.save_to_disk(tmp_path / "saved")
    strengths = read_strengths(tmp_path / "saved")
    assert strengths.splits == ("train", "train", "train", "validation")


def test_pairs_are_found_by_id_where_the_data_is_the_same_and_by_text_elsewhere() -> None:
    pairs = preference_set(4)
    strengths = strengths_of(pairs, [1.0, 2.0, 3.0, 4.0])
    shuffled = strengths.select([2, 0, 3, 1])
    assert match(replace(shuffled, fingerprint=pairs.fingerprint), pairs).mean.tolist() == pytest.approx([1, 2, 3, 4])
    # by id, texts play no part; by text, ids do not
    assert match(replace(strengths, texts=(b"",) * 4), pairs).ids == strengths.ids
    assert match(replace(shuffled, ids=("z",) * 4), pairs).mean.tolist() == pytest.approx([1, 2, 3, 4])
    part = pairs.with_table(as_table(pairs.rows).slice(1, 2))
    found = match(strengths, part)
    assert (found.ids, found.mean.tolist()) == (("a1", "a2"), pytest.approx([2.0, 3.0]))
    assert found.fingerprint == part.fingerprint
    assert match(found, part).mean.tolist() == found.mean.tolist()


def test_the_ids_of_another_data_set_are_not_believed() -> None:
    pairs, other = preference_set(3), preference_set(3, {"chosen": ["else 0", "good 1", "else 2"]})
    with pytest.raises(UserError) as caught:
        match(strengths_of(other, [1.0, 2.0, 3.0]), pairs)
    for part in ("2 of 3 pairs of here have no strength in scores", "'a0'", pairs.fingerprint[:16], other.fingerprint[:16]):
        assert part in str(caught.value)


def test_missing_pairs_are_missing_although_the_fingerprint_is_right() -> None:
    pairs = preference_set(3)
    part = replace(strengths_of(pairs, [1.0, 2.0, 3.0]).select([0, 2]), fingerprint=pairs.fingerprint)
    with pytest.raises(UserError, match=r"1 of 3 pairs of here have no strength.*'a1'"):
        match(part, pairs)


def test_flipped_pairs_are_recognised_and_refused() -> None:
    pairs = preference_set(3)
    flipped = pairs.with_table(swap_sides(as_table(pairs.rows), np.array([False, True, False])))
    with pytest.raises(UserError, match="1 of them are there with chosen and rejected exchanged"):
        match(strengths_of(pairs, [1.0, 2.0, 3.0]), flipped)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_named_by_member_and_pair(tmp_path: Path, value: float) -> None:
    pairs = preference_set(4)
    strengths = strengths_of(pairs, [1.0, 2.0, 3.0, 4.0], 3)
    rejected = strengths.rejected.copy()
    rejected[2, 1] = rejected[3, 1] = value
    for attempt in (
        lambda: replace(strengths, rejected=rejected),
        lambda: write_strengths(
            tmp_path, 0, as_table(pairs.rows), strengths.chosen, rejected, split="train", source="scores", fingerprint=None
        ),
    ):
        with pytest.raises(UserError) as caught:
            attempt()
        for part in ("scores: 2 of 4 pairs", "members 1", f"member 1 gave {value}", "rejected response of pair 'a2'"):
            assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_scores_in_files_are_checked_likewise(tmp_path: Path) -> None:
    rows = [public_row(number) | {"id": f"r{number}"} for number in range(3)]
    rows[1][CHOSEN_SCORES] = [1.0, None]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "null.parquet")
    with pytest.raises(UserError, match="member 1 gave nan for the chosen response of pair 'r1'"):
        read_strengths(tmp_path / "null.parquet")


def test_one_member_has_a_mean_and_no_std(tmp_path: Path) -> None:
    pairs = preference_set(2)
    path = write(tmp_path, 0, pairs, strengths_of(pairs, [1.0, -1.0], 1))
    assert parquet.read_table(path)[STD].to_pylist() == [None, None]
    read = read_strengths(path)
    assert read.mean.tolist() == [1.0, -1.0]
    with pytest.raises(
        UserError, match=r"there is one member\. Run `strength` with strength\.num_members of 2 or more, under another name"
    ):
        _ = read.std


def test_scores_that_tell_nothing_are_refused() -> None:
    pairs = preference_set(3)
    strengths = strengths_of(pairs, [1.0, 2.0, 3.0])
    refuse_constant(strengths)
    flat = np.ones((3, 2))
    flat[:, 0] = [1, 2, 3]
    dead = replace(strengths, chosen=flat, rejected=flat)
    with pytest.raises(UserError, match="member 1 gives every response the score 1: it has learnt nothing"):
        refuse_constant(dead)
    with pytest.raises(UserError, match=r"all 3 pairs have the strength 0\.5"):
        refuse_constant(strengths_of(pairs, [0.5, 0.5, 0.5]))


def make_bad(name: str, tmp_path: Path) -> Path:
    rows = [public_row(number) for number in range(3)]
    path = tmp_path / "bad.parquet"
    if name == "missing":
        return tmp_path / "nowhere"
    if name == "missing file":
        return path
    if name == "empty directory":
        return tmp_path
    if name == "unfinished":
        (tmp_path / "strengths").mkdir()
        return tmp_path
    if name == "no parquet":
        path.write_bytes(b"PAR1 and then nothing")
        return path
    if name == "no scores":
        rows = [{key: value for key, value in row.items() if key != REJECTED_SCORES} for row in rows]
    if name == "not lists":
        rows = [row | {CHOSEN_SCORES: 1.5} for row in rows]
    if name == "lists of text":
        rows = [row | {CHOSEN_SCORES: ["a", "b"]} for row in rows]
    if name == "ragged":
        rows[1] = rows[1] | {REJECTED_SCORES: [1.0]}
    if name == "one side shorter":
        rows = [row | {REJECTED_SCORES: [1.0]} for row in rows]
    if name == "messages":
        side = [{"role": "user", "content": "hi"}]
        rows = [row | {"chosen": side, "rejected": side} for row in rows]
    table = pa.Table.from_pylist(rows)
    if name == "no rows":
        table = table.slice(0, 0)
    if name == "no members":
        table = table.set_column(
            table.schema.get_field_index(CHOSEN_SCORES), CHOSEN_SCORES, pa.array([[]] * 3, pa.list_(pa.float64()))
        )
    if name == "two data sets":
        parquet.write_table(table.replace_schema_metadata({"rondo.fingerprint": "abc"}), tmp_path / "one.parquet")
    parquet.write_table(table, path)
    return tmp_path if name == "two data sets" else path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "no strengths: .*nowhere: no such file or directory.*python -m cluster strength CONFIG"),
        ("missing file", "no strengths: .*bad.parquet: no such file"),
        ("empty directory", "the directory holds no strengths"),
        ("unfinished", "this strength run is not finished"),
        ("no parquet", "not a Parquet file, or cut off"),
        ("no scores", "no column 'rejected score list'; columns found: chosen"),
        ("not lists", "column 'chosen score list' must be a list of numbers, one a member; got double"),
        ("lists of text", "column 'chosen score list' must be a list of numbers"),
        ("ragged", "a score of every member in every row; pair '2' has 1, pair '1' has 2"),
        ("one side shorter", r"the scores of the same members, got lists of \[1, 2\] scores"),
        ("no members", "pair '1' has 0"),
        ("messages", "lists of messages; strengths are matched by text"),
        ("no rows", "holds no pair"),
        ("two data sets", "strengths of different data sets"),
    ],
)
def test_files_that_hold_no_strengths_are_refused(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_strengths(make_bad(name, tmp_path))


def test_a_finished_run_is_read_from_its_directory(tmp_path: Path) -> None:
    pairs = preference_set(2)
    (tmp_path / "strengths").mkdir()
    write(tmp_path / "strengths", 0, pairs, strengths_of(pairs, [1.0, -1.0]))
    (tmp_path / "card.json").write_text(json.dumps({"kind": "strength"}))
    assert read_strengths(tmp_path).ids == ("a0", "a1")


def test_reading_keeps_the_numbers_and_not_the_texts(tmp_path: Path) -> None:
    """Nine thousand pairs of 2 kB each, in two batches: what stays is far smaller than the texts."""
    import tracemalloc

    number = 9_000
    long = "x" * 1000
    table = pa.table(
        {
            "id": [str(i) for i in range(number)],
            "prompt": [f"{i} {long}" for i in range(number)],
            "chosen": [f"good {long}"] * number,
            "rejected": ["bad"] * number,
            "domain": [""] * number,
        }
    )
    scores = np.random.default_rng(0).normal(size=(number, 2))
    write_strengths(tmp_path, 0, table, scores, -scores, split="train", source="x", fingerprint=None)
    tracemalloc.start()
    strengths = read_strengths(tmp_path)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (strengths.chosen == scores).all()
    assert kept < table.nbytes / 5
