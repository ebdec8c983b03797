"""What is done to noisy pairs is what the paper says, stands in columns, and can be undone to the bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from preferences.config import DenoiseConfig, DenoiseMethod
from preferences.denoise import COLUMNS, PAIRS_FILE, count_actions, denoise, noisy_pairs, read_pairs, undo, write_pairs
from preferences.encode import LEFT_OUT, encode_pairs
from preferences.sets import PreferenceSet
from preferences.swap import as_table, swap_sides
from tests.preferences.strengths import preference_set, strengths_of
from tests.preferences.test_encode import words
from tokens.errors import UserError

MU = [-2.0, 0.5, -0.5, 3.0, 1.0]
"""Of five pairs; the lowest 20% is the first, two are negative."""


def done(method: DenoiseMethod, pairs: PreferenceSet | None = None, mu: list[float] = MU, **keys: Any) -> list[dict[str, Any]]:
    pairs = pairs or preference_set(len(mu))
    return list(denoise(pairs, strengths_of(pairs, mu), DenoiseConfig(method=method, **keys)).rows)


def column(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows]


def test_flip_exchanges_the_lowest_fifth_and_negates_its_strength() -> None:
    rows = done("flip")
    assert column(rows, "chosen") == ["bad 0", "good 1", "good 2", "good 3", "good 4"]
    assert column(rows, "rejected") == ["good 0", "bad 1", "bad 2", "bad 3", "bad 4"]
    assert column(rows, "strength") == pytest.approx([2.0, 0.5, -0.5, 3.0, 1.0])
    assert column(rows, "denoise") == ["flip", "", "", "", ""]
    assert column(rows, "margin") == column(rows, "smoothing") == [0.0] * 5
    assert column(rows, "strength_std") == pytest.approx([0.5] * 5)
    assert all(column(rows, "keep"))


def test_soft_smooths_where_the_strength_is_negative() -> None:
    rows = done("soft", smoothing=0.3)
    assert column(rows, "smoothing") == [0.3, 0.0, 0.3, 0.0, 0.0]
    assert column(rows, "denoise") == ["soft", "", "soft", "", ""]
    assert column(rows, "strength") == pytest.approx(MU)
    assert column(rows, "margin") == [0.0] * 5
    assert column(rows, "chosen")[0] == "good 0"


def test_margin_is_the_strength_of_every_pair() -> None:
    rows = done("margin")
    assert column(rows, "margin") == pytest.approx(MU)
    assert column(rows, "denoise") == ["margin"] * 5
    assert column(rows, "smoothing") == [0.0] * 5


def test_after_a_flip_the_margin_is_the_negated_strength() -> None:
    rows = done("flip+margin")
    assert column(rows, "margin") == column(rows, "strength") == pytest.approx([2.0, 0.5, -0.5, 3.0, 1.0])
    assert column(rows, "denoise") == ["flip+margin", "margin", "margin", "margin", "margin"]


def test_soft_with_margin_keeps_negative_margins() -> None:
    rows = done("soft+margin")
    assert column(rows, "margin") == pytest.approx(MU)
    assert column(rows, "smoothing") == [0.1, 0.0, 0.1, 0.0, 0.0]
    assert column(rows, "denoise") == ["soft+margin", "margin", "soft+margin", "margin", "margin"]


def test_drop_keeps_the_row_and_says_so() -> None:
    rows = done("drop", fraction=0.4)
    assert column(rows, "keep") == [False, True, False, True, True]
    assert column(rows, "denoise") == ["drop", "", "drop", "", ""]
    assert column(rows, "id") == ["a0", "a1", "a2", "a3", "a4"]


def test_none_changes_nothing_and_asks_for_no_strengths() -> None:
    pairs = preference_set(3)
    assert denoise(pairs, strengths_of(preference_set(2), [1.0, 2.0]), DenoiseConfig()) is pairs


@pytest.mark.parametrize(
    ("method", "noisy", "fraction", "expected"),
    [
        ("flip", "auto", 0.2, [0]),
        ("flip", "negative", 0.2, [0, 2]),
        ("soft", "auto", 0.2, [0, 2]),
        ("soft", "lowest", 0.2, [0]),
        ("soft+margin", "auto", 0.2, [0, 2]),
        ("flip+margin", "auto", 0.6, [0, 1, 2]),
        ("drop", "auto", 0.5, [0, 2]),  # round(2.5) = 2
        ("drop", "auto", 0.01, [0]),  # at least one
    ],
)
def test_which_pairs_are_noisy(method: DenoiseMethod, noisy: Any, fraction: float, expected: list[int]) -> None:
    config = DenoiseConfig(method=method, noisy=noisy, fraction=fraction)
    assert np.flatnonzero(noisy_pairs(np.array(MU), list("abcde"), config)).tolist() == expected


@given(st.lists(st.integers(-2, 2), min_size=2, max_size=40), st.floats(0.01, 0.99), st.randoms())
def test_ties_do_not_depend_on_the_order_of_rows(values: list[int], fraction: float, random: Any) -> None:
    config = DenoiseConfig(method="flip", fraction=fraction)
    ids = [f"id {i}" for i in range(len(values))]
    order = list(range(len(values)))
    random.shuffle(order)
    mu = np.array(values, dtype=float)
    noisy = noisy_pairs(mu, ids, config)
    again = noisy_pairs(mu[order], [ids[i] for i in order], config)
    assert {ids[i] for i in np.flatnonzero(noisy)} == {ids[order[i]] for i in np.flatnonzero(again)}
    assert noisy.sum() == max(1, round(fraction * len(values)))
    assert mu[noisy].max() <= mu[~noisy].min() if not noisy.all() else True


def test_margins_are_scaled_by_the_std_over_the_pairs_and_then_clipped() -> None:
    unit = float(np.std(MU))
    assert column(done("margin", margin_scale="std"), "margin") == pytest.approx([mu / unit for mu in MU])
    assert column(done("margin", margin_clip=0.75), "margin") == pytest.approx([-0.75, 0.5, -0.5, 0.75, 0.75])
    rows = done("flip+margin", margin_scale="std", margin_clip=1.0)
    # the unit is that of the strengths as measured, before any is negated
    assert column(rows, "margin") == pytest.approx([1.0, 0.5 / unit, -0.5 / unit, 1.0, 1.0 / unit])
    assert column(rows, "strength") == pytest.approx([2.0, 0.5, -0.5, 3.0, 1.0])


def test_the_unit_of_the_ensemble_does_not_matter_to_scaled_margins() -> None:
    rows = done("margin", mu=[7 * mu for mu in MU], margin_scale="std")
    assert column(rows, "margin") == pytest.approx(column(done("margin", margin_scale="std"), "margin"))


def test_columns_that_depend_on_the_sides_follow_the_flip() -> None:
    extra = {
        "gold_chosen": [1.0, 2.0],
        "gold_rejected": [3.0, 4.0],
        "chosen score list": [[1.0], [2.0, 3.0]],
        "rejected score list": [[4.0, 5.0], [6.0]],
        "mean preference difference": [-3.0, 2.0],
        "flipped": [False, True],
        "label": [0, 1],
        "GPT4 label": [-1, None],
        "label_forward": [1, -1],
        "label_backward": [0, 0],
        "user": ["u", "v"],
        "chosen_by": ["x", "y"],  # no rejected_by: nothing to trade places with
    }
    pairs = preference_set(2, extra)
    expected = {
        "gold_chosen": [3.0, 2.0],
        "gold_rejected": [1.0, 4.0],
        "chosen score list": [[4.0, 5.0], [2.0, 3.0]],
        "rejected score list": [[1.0], [6.0]],
        "mean preference difference": [3.0, 2.0],
        "flipped": [True, True],
        "label": [1, 1],
        "GPT4 label": [-1, None],
        "label_forward": [0, -1],
        "label_backward": [1, 0],
        "user": ["u", "v"],
        "chosen_by": ["x", "y"],
    }
    rows = done("flip", pairs, [-1.0, 1.0])
    assert {name: column(rows, name) for name in extra} == expected
    everything = swap_sides(as_table(pairs.rows), np.array([True, True]))
    assert everything["flipped"].to_pylist() == [True, False]
    assert everything["label"].to_pylist() == [1, 0]


def test_messages_and_other_lists_are_exchanged_whole() -> None:
    side = [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "no"}]
    table = pa.table({"chosen": [side, side[:1]], "rejected": [side[1:], side[:1]], "note": ["a", "b"]})
    swapped = swap_sides(table, np.array([True, False]))
    assert swapped["chosen"].to_pylist() == [side[1:], side[:1]]
    assert swapped["rejected"].to_pylist() == [side, side[:1]]


FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=64)
ROW = st.tuples(
    st.text(max_size=8),
    st.text(max_size=8),
    FLOATS,
    FLOATS,
    st.booleans() | st.none(),
    st.sampled_from([1, 0, -1, None]),
    st.lists(FLOATS, max_size=3),
    st.floats(-5, 5),
)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(ROW, min_size=3, max_size=12),
    st.sampled_from(["flip", "soft", "margin", "flip+margin", "soft+margin", "drop"]),
    st.sampled_from(["auto", "lowest", "negative"]),
    st.floats(0.05, 0.6),
    st.sampled_from(["none", "std"]),
)
def test_undo_gives_back_the_pairs_bit_for_bit(
    rows: list[Any], method: DenoiseMethod, noisy: Any, fraction: float, scale: Any
) -> None:
    mu = [row[7] + 0.01 * index for index, row in enumerate(rows)]
    mu[0] = max(mu) + 1  # one pair is always good, so that drop leaves one and the strengths differ
    table = pa.table(
        {
            "id": pa.array([str(i) for i in range(len(rows))], pa.large_string()),
            "prompt": pa.array([f"p{i}" for i in range(len(rows))], pa.large_string()),
            "chosen": pa.array([row[0] + "+" for row in rows], pa.large_string()),
            "rejected": pa.array([row[1] + "-" for row in rows], pa.large_string()),
            "domain": pa.array([""] * len(rows), pa.large_string()),
            "gold_chosen": pa.array([row[2] for row in rows]),
            "gold_rejected": pa.array([row[3] for row in rows]),
            "mean preference difference": pa.array([row[2] for row in rows], pa.float64()),
            "flipped": pa.array([row[4] for row in rows], pa.bool_()),
            "label": pa.array([row[5] for row in rows], pa.int8()),
            "chosen score list": pa.array([row[6] for row in rows], pa.list_(pa.float64())),
            "rejected score list": pa.array([row[6][::-1] for row in rows], pa.list_(pa.float64())),
        }
    )
    pairs = PreferenceSet(Dataset(table), "here", "explicit")
    config = DenoiseConfig(method=method, noisy=noisy, fraction=fraction, margin_scale=scale)
    changed = denoise(pairs, strengths_of(pairs, mu), config)
    assert changed.rows.column_names == [*table.column_names, *COLUMNS]
    back = as_table(undo(changed).rows)
    assert back.schema.equals(table.schema)
    assert back.equals(table)
    for name in ("gold_chosen", "mean preference difference"):  # equals() takes -0.0 for 0.0
        assert back[name].to_numpy().tobytes() == table[name].to_numpy().tobytes()
    counts = count_actions(changed)
    turned = sum(a != b for a, b in zip(changed.rows["chosen"], table["chosen"].to_pylist(), strict=True))
    assert counts["flip"] == turned
    assert counts["kept"] == len(rows) - counts["drop"]


def test_pairs_that_were_not_denoised_are_undone_already() -> None:
    pairs = preference_set(2)
    assert undo(pairs) is pairs
    with pytest.raises(UserError, match="cannot undo the denoising: no column 'strength'"):
        undo(
            preference_set(
                2,
                {"keep": [True] * 2, "denoise": [""] * 2, "strength_std": [0.0] * 2, "margin": [0.0] * 2, "smoothing": [0.0] * 2},
            )
        )


def test_counts_per_action() -> None:
    pairs = preference_set(5)
    strengths = strengths_of(pairs, MU)

    def counts(method: DenoiseMethod) -> dict[str, int]:
        return count_actions(denoise(pairs, strengths, DenoiseConfig(method=method)))

    assert counts("none") == {"pairs": 5, "kept": 5, "flip": 0, "soft": 0, "margin": 0, "drop": 0}
    assert counts("flip+margin") == {"pairs": 5, "kept": 5, "flip": 1, "soft": 0, "margin": 5, "drop": 0}
    assert counts("soft+margin") == {"pairs": 5, "kept": 5, "flip": 0, "soft": 2, "margin": 5, "drop": 0}
    assert counts("drop") == {"pairs": 5, "kept": 4, "flip": 0, "soft": 0, "margin": 0, "drop": 1}


def test_a_domain_emptied_by_dropping_is_named() -> None:
    pairs = preference_set(6, domains="xyz")  # y holds a1 and a4
    with pytest.raises(UserError, match=r"would leave no pair of the domain\(s\) 'y' \(2\)\. Lower data\.denoise\.fraction"):
        done("drop", pairs, [3.0, -1.0, 2.0, 4.0, -2.0, 5.0], fraction=0.34)
    assert sum(column(done("drop", pairs, [3.0, -1.0, 2.0, 4.0, -2.0, 5.0], fraction=0.17), "keep")) == 5
    with pytest.raises(UserError, match="all 3 pairs"):
        done("drop", mu=[-1.0, -2.0, -3.0], noisy="negative")


def test_columns_that_are_there_already_are_refused() -> None:
    pairs = preference_set(5)
    once = denoise(pairs, strengths_of(pairs, MU), DenoiseConfig(method="margin"))
    with pytest.raises(UserError, match=r"have the column\(s\) keep, denoise, strength, strength_std, margin, smoothing"):
        denoise(once, strengths_of(pairs, MU), DenoiseConfig(method="flip"))
    with pytest.raises(UserError, match=r"have the column\(s\) margin, which data\.denoise writes"):
        done("soft", preference_set(5, {"margin": [1.0] * 5}))


def test_strengths_that_tell_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="all 5 pairs have the strength 0"):
        done("margin", mu=[0.0] * 5, margin_scale="std")
    pairs = preference_set(5)
    with pytest.raises(UserError, match="5 of 5 pairs of here have no strength"):
        denoise(
            pairs, strengths_of(preference_set(3, {"prompt": ["x", "y", "z"]}), [1.0, 2.0, 3.0]), DenoiseConfig(method="flip")
        )


def test_sides_of_different_types_cannot_be_flipped() -> None:
    pairs = preference_set(5, {"gold_chosen": [1, 2, 3, 4, 5], "gold_rejected": [0.5] * 5})
    with pytest.raises(UserError, match=r"'gold_chosen' \(int64\) and 'gold_rejected' \(double\) cannot trade places"):
        done("flip", pairs)


def test_one_member_leaves_the_spread_empty() -> None:
    pairs = preference_set(5)
    rows = list(denoise(pairs, strengths_of(pairs, MU, 1), DenoiseConfig(method="margin", margin_scale="std")).rows)
    assert column(rows, "strength_std") == [None] * 5
    assert column(rows, "margin") == pytest.approx([mu / float(np.std(MU)) for mu in MU])


def encodable(extra: dict[str, list[Any]]) -> PreferenceSet:
    return preference_set(
        4, {"prompt": ["good day"] * 4, "chosen": ["good", "day", "good day", "good"], "rejected": ["bad"] * 4} | extra
    )


def test_margin_and_smoothing_reach_the_pairs_and_left_out_rows_are_listed() -> None:
    pairs = encodable({"id": list("wxyz")})
    strengths = strengths_of(pairs, [-1.0, 2.0, 0.5, 1.0])
    kept, dropped = encode_pairs(denoise(pairs, strengths, DenoiseConfig(method="soft+margin")), words(), 5, 5, drop=False)
    assert [pair.margin for pair in kept] == pytest.approx([-1.0, 2.0, 0.5, 1.0])
    assert [pair.smoothing for pair in kept] == [0.1, 0.0, 0.0, 0.0]
    assert dropped == ()
    kept, dropped = encode_pairs(denoise(pairs, strengths, DenoiseConfig(method="drop")), words(), 5, 5, drop=False)
    assert [pair.id for pair in kept] == ["x", "y", "z"]
    assert [(row.where, row.reason) for row in dropped] == [("pair w", LEFT_OUT)]
    kept, _ = encode_pairs(denoise(pairs, strengths, DenoiseConfig(method="flip")), words(), 5, 5, drop=False)
    plain, _ = encode_pairs(pairs, words(), 5, 5, drop=False)
    assert (kept[0].chosen_ids, kept[0].rejected_ids) == (plain[0].rejected_ids, plain[0].chosen_ids)
    assert kept[1:] == plain[1:]
    assert {(pair.margin, pair.smoothing) for pair in plain} == {(0.0, 0.0)}


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"margin": [1.0, 2.0, float("nan"), 0.0]}, "pair a2: margin is not a finite number"),
        ({"margin": ["1", "2", "3", "4"]}, "pair a0: margin is not a finite number"),
        ({"margin": [1.0, None, 2.0, 0.0]}, "pair a1: margin is not a finite number"),
        ({"smoothing": [0.0, 0.0, 0.0, 1.5]}, "pair a3: smoothing is not a number from 0 to 1"),
    ],
)
def test_margins_of_the_users_own_are_checked(extra: dict[str, list[Any]], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        encode_pairs(encodable(extra), words(), 5, 5, drop=False)


def test_a_whole_number_is_a_margin() -> None:
    kept, _ = encode_pairs(encodable({"margin": [1, 2, 3, 4]}), words(), 5, 5, drop=False)
    assert [pair.margin for pair in kept] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("method", ["flip", "soft", "margin", "flip+margin", "soft+margin", "drop"])
def test_the_file_of_training_pairs_can_be_read_and_undone(
    method: DenoiseMethod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preferences.denoise.BATCH", 2)  # row groups of two
    extra = {"gold_chosen": [0.1, 0.2, 0.3, 0.4, 0.5], "gold_rejected": [1.0] * 5, "label": [1, 0, -1, None, 1]}
    given = preference_set(6, extra | {name: [*values, values[0]] for name, values in extra.items()})
    source = given.with_table(as_table(given.rows.select([5, 1, 2, 3, 4])))  # rows that are picked, as a split's are
    changed = denoise(source, strengths_of(source, MU), DenoiseConfig(method=method))
    path = write_pairs(changed, tmp_path)
    assert path == tmp_path / PAIRS_FILE and parquet.ParquetFile(path).num_row_groups == 3
    read = read_pairs(tmp_path)
    assert as_table(read.rows) == as_table(changed.rows)
    assert (read.source, read.format) == (source.source, source.format)
    back = undo(read)
    assert as_table(back.rows) == as_table(source.rows) and back.fingerprint == source.fingerprint
    assert [file.name for file in tmp_path.iterdir()] == [PAIRS_FILE]


def test_pairs_that_nothing_was_done_to_need_no_file(tmp_path: Path) -> None:
    assert write_pairs(preference_set(3), tmp_path) is None and not list(tmp_path.iterdir())
    own = preference_set(2, {"margin": [0.5, 1.0]})
    write_pairs(own, tmp_path)
    assert list(read_pairs(tmp_path / PAIRS_FILE).rows["margin"]) == [0.5, 1.0]  # the data's own column


def test_other_files_are_no_training_pairs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training_pairs.parquet: no such file; `reward` and `run` write it where data.denoise"):
        read_pairs(tmp_path)
    (tmp_path / PAIRS_FILE).write_text("no Parquet")
    with pytest.raises(UserError, match="not a Parquet file"):
        read_pairs(tmp_path)
    parquet.write_table(pa.table({"chosen": ["a"]}), tmp_path / PAIRS_FILE)
    with pytest.raises(UserError, match="not a file of training pairs that `reward` or `run` wrote; columns: chosen"):
        read_pairs(tmp_path)
