"""Studies: what each arm is trained on, what is fitted once, and that the real command writes what the report draws."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from actors.study import StudyReport, measured_every, repeated
from cluster.console import Console
from cluster.load_config import load_config
from cluster.sandbox_source import SandboxSource
from cluster.strength import fingerprint
from cluster.strength_directory import StrengthDirectory
from cluster.study import Book, Place, rows_of, study
from cluster.study_arms import Arm, Ranked, arms_of, treat
from evaluation.studies import FLIPPED_BAND, STRONGEST, STUDIES, StudyRow, read_studies
from preferences.config import DenoiseConfig, DenoiseMethod
from preferences.denoise import denoise
from preferences.encode import encode_pairs
from preferences.sets import PreferenceSet
from preferences.strength import Strengths, write_strengths
from preferences.strength_files import text_key
from preferences.swap import as_table
from rm.config import RewardConfig
from sandbox.config import WorldConfig
from sandbox.tokenizer import make_tokenizer
from sandbox.world import World
from tests.cluster.command import TINY, Command
from tokens.errors import UserError
from tokens.records import Pair

N = 40
METHODS: tuple[DenoiseMethod, ...] = ("none", "flip", "soft", "margin", "flip+margin", "soft+margin", "drop")


@pytest.fixture(scope="module")
def preferences() -> PreferenceSet:
    """Forty pairs of words that the sandbox's tokenizer knows."""
    words = World(WorldConfig()).vocabulary
    good, bad = [[f"{words[20 + i]} {words[70 + i + shift]}" for i in range(N)] for shift in (0, 7)]
    texts = {"id": [f"p{i:02d}" for i in range(N)], "prompt": [words[120 + i] for i in range(N)], "chosen": good, "rejected": bad}
    return PreferenceSet(Dataset(pa.table(texts | {"domain": [""] * N})), "made up", "explicit")


@pytest.fixture(scope="module")
def strengths(preferences: PreferenceSet) -> Strengths:
    """A third of the pairs below 0, in no order of the rows."""
    mean = np.random.default_rng(3).permutation(np.linspace(-1.3, 2.6, N))
    chosen = mean[:, None] + np.array([[0.1, -0.1]])
    keys = tuple(text_key(r["prompt"], r["chosen"], r["rejected"]) for r in preferences.rows)
    ids = tuple(preferences.rows["id"])
    return Strengths(ids, chosen, np.zeros((N, 2)), ("train",) * N, "made up", preferences.fingerprint, keys)


@pytest.fixture(scope="module")
def pairs(preferences: PreferenceSet) -> tuple[Pair, ...]:
    return tuple(encode_pairs(preferences, make_tokenizer(World(WorldConfig()).vocabulary), 8, 8, False)[0])


@pytest.fixture(scope="module")
def ranked(preferences: PreferenceSet, strengths: Strengths) -> Ranked:
    return Ranked.of(tuple(preferences.rows["id"]), strengths.mean, strengths.mean)


def test_the_studies_are_those_that_are_drawn_and_arms_are_shared() -> None:
    arms = arms_of()
    assert tuple(arms) == STUDIES
    assert [len(of_study) for of_study in arms.values()] == [10, 4, 4, 2, 7, 20, 11]
    assert len({arm for of_study in arms.values() for arm in of_study.values()}) == 46  # 58 names
    assert arms["lowest"]["0-10%: flip"] == arms["bands"][f"{FLIPPED_BAND}: flip"] == Arm(0, 1, "flip")
    assert arms["margin"]["none"] == arms["growing"][f"{STRONGEST}: 100%"] == arms["methods"]["none"] == Arm()
    assert arms["deciles"]["90-100%"] == arms["top"]["none"] == arms["growing"][f"{STRONGEST}: 10%"]


def test_tenths_by_hand() -> None:
    mean = np.array([3.0, 1.0, 1.0, 2.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 0.0])
    ids = tuple("fcbdkjihgea")
    ranked = Ranked.of(ids, mean, mean)
    by_tenth = [[ids[i] for i in np.flatnonzero(ranked.tenth == t)] for t in range(10)]
    assert by_tenth == [["b", "a"], ["c"], ["d"], ["f"], ["e"], ["g"], ["h"], ["i"], ["j"], ["k"]]  # eleven pairs; b before c
    with pytest.raises(UserError, match="at least 10 training pairs"):
        Ranked.of(ids[:9], mean[:9], mean[:9])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changed", [{}, {"margin_scale": "std", "margin_clip": 0.5, "fraction": 0.3, "smoothing": 0.25}])
def test_on_all_pairs_an_arm_is_what_data_denoise_does(
    method: DenoiseMethod, changed: dict[str, object], preferences: PreferenceSet, strengths: Strengths, pairs: tuple[Pair, ...]
) -> None:
    config = DenoiseConfig.model_validate({"method": method, **changed})
    margins = as_table(denoise(preferences, strengths, config.model_copy(update={"method": "margin"})).rows)["margin"].to_numpy()
    arm = arms_of()["methods"][method]
    ours = treat(arm, Ranked.of(tuple(preferences.rows["id"]), strengths.mean, margins), config).of(pairs)
    done = denoise(preferences, strengths, config)
    if method == "drop":
        kept = np.flatnonzero(done.rows["keep"])
        done = done.with_table(as_table(done.rows).take(kept))
    theirs, _ = encode_pairs(done, make_tokenizer(World(WorldConfig()).vocabulary), 8, 8, False)
    assert ours == list(theirs)
    assert method == "none" or ours != list(pairs)


def test_bands_are_treated_whole(ranked: Ranked, pairs: tuple[Pair, ...]) -> None:
    config = DenoiseConfig(smoothing=0.2)
    weakest = np.argsort(ranked.mean)[:4]
    treated = treat(Arm(0, 1, "flip+soft+margin"), ranked, config)
    assert sorted(treated.rows) == sorted(weakest)
    for row, pair in zip(treated.rows, treated.of(pairs), strict=True):
        assert (pair.chosen_ids, pair.rejected_ids) == (pairs[row].rejected_ids, pairs[row].chosen_ids)
        assert pair.margin == -ranked.mean[row] > 0
        assert pair.smoothing == 0.2
    fourth = treat(Arm(3, 4, "margin"), ranked, config)
    np.testing.assert_allclose(np.sort(ranked.mean[fourth.rows]), np.sort(ranked.mean)[12:16])
    assert not fourth.flipped.any() and not fourth.smoothing.any()
    some = treat(Arm(method="soft", noisy="weakest"), ranked, config)
    assert len(some.rows) == N and set(np.flatnonzero(some.smoothing)) == set(weakest)
    with pytest.raises(UserError, match="no pair left"):
        treat(Arm(0, 1, "drop", "weakest"), ranked, config)


def test_all_arms_take_equally_many_steps(pairs: tuple[Pair, ...]) -> None:
    few = repeated(pairs[:7], N)
    assert len(few) == N
    assert set(Counter(pair.id for pair in few).values()) == {5, 6}
    assert measured_every(RewardConfig(epochs=2, batch_size=16), N, 10) == 1  # 6 steps
    assert measured_every(RewardConfig(batch_size=2), 3000, 10) == 150
    assert measured_every(RewardConfig(evaluate_every=7), 3000, 10) == 7


def test_rows_of_a_report() -> None:
    numbers = {"validation/original/accuracy": 0.6, "validation/original/loss": 0.7, "validation/original/ece": 0.1}
    look = numbers | {"scores/std": 1.0, "train/loss": 0.5, "train/accuracy": 0.8}
    report = StudyReport("x", ((0, numbers), (4, look)))
    rows = rows_of(report, Place("top", "soft", 2), 13)
    assert [(row.step, row.set, row.accuracy, row.loss, row.ece) for row in rows] == [
        (0, "original", 0.6, 0.7, 0.1), (4, "original", 0.6, 0.7, 0.1), (4, "train", 0.8, 0.5, None),
    ]  # fmt: skip
    assert {(row.study, row.arm, row.seed, row.num_pairs) for row in rows} == {("top", "soft", 2, 13)}


def test_the_book_fits_what_is_missing_once_and_copies_the_rest(tmp_path: Path) -> None:
    def rows(study: str, arm: str, seed: int) -> tuple[StudyRow, ...]:
        return (StudyRow(study, arm, seed, 8, 4, "original", 0.5 + seed / 10, 0.7, 0.1),)

    book = Book(tmp_path / "studies", {"reward.lr": 0.1})
    missing = book.missing(["lowest", "bands"], 2)
    assert len(missing) == 2 * (4 + 11 - 1)
    shared = missing[Arm(0, 1, "flip"), 1]
    assert shared == [Place("lowest", "0-10%: flip", 1), Place("bands", f"{FLIPPED_BAND}: flip", 1)]
    book.add(shared, rows("lowest", "0-10%: flip", 1))
    book.add(missing[Arm(0, 1), 0], rows("lowest", "0-10%: none", 0))
    again = Book(tmp_path / "studies", {"reward.lr": 0.1})
    assert len(again.missing(["lowest", "bands"], 2)) == 26
    assert (Arm(0, 1), 0) not in again.missing(["deciles"], 1)  # copied: no fit of its own
    read = read_studies(tmp_path / "studies")
    assert [(row.arm, row.seed) for row in read["lowest"]] == [("0-10%: none", 0), ("0-10%: flip", 1)]
    assert read["deciles"] == (replace(rows("", "", 0)[0], study="deciles", arm="0-10%"),)
    with pytest.raises(UserError, match=r"reward.lr: 0.1 there, 0.2 here"):
        Book(tmp_path / "studies", {"reward.lr": 0.2})


def lend_strengths(command: Command, name: str) -> Path:
    """A finished strength run of the tiny world, with strengths from the truth and a seed: no member is trained."""
    config = load_config(TINY, ["--name", name, "--storage", str(command.storage), "--strength.num_members", "2"])
    source = SandboxSource(config, command.storage / "cache", policy=False)
    source.recipe(lambda unit, done, total: None)
    directory = StrengthDirectory(config)
    rng = np.random.default_rng(0)
    with directory.open():
        training, validation = source.preferences()
        directory.belong_to(fingerprint(training, validation))
        for part, (split, of_split) in enumerate((("train", training), ("validation", validation))):
            table = as_table(of_split.rows)
            gap = table["gold_chosen"].to_numpy() - table["gold_rejected"].to_numpy()
            scores = gap[:, None] + 0.3 * rng.normal(size=(len(gap), 2))
            identity = {"split": split, "source": of_split.source, "fingerprint": training.fingerprint}
            write_strengths(directory.strengths, part, table, scores, np.zeros_like(scores), **identity)
        card = {"kind": "strength", "num_pairs": 160, "num_members": 2, "members": "full", "folds": 1}
        card |= {"seconds": {"train": 1.0, "score": 1.0}, "splits": {"train": {"num_pairs": 128}}}
        directory.card.write_text(json.dumps(card | directory.begun))
    return directory.path


def test_the_command(command: Command) -> None:
    """Two arms of one study, and a report that draws them; again, and nothing is fitted."""
    directory = lend_strengths(command, "studied")
    overrides = ["--name", "studied", "--strength.num_members", "2"]
    done = command("study", str(TINY), *overrides, "--studies", "margin", "--seeds", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_studies(directory / "studies")["margin"]
    assert [row.step for row in rows if row.arm == "none" and row.set == "original"] == list(range(9))  # 128 pairs in 16s
    assert {row.set for row in rows} == {"original", "held_out", "train"}
    assert {row.num_pairs for row in rows} == {128}
    first, last = ([row.accuracy for row in rows if row.step == step and row.set == "original"] for step in (0, 8))
    assert first[0] == first[1]  # one seed, one head: the arms start as one model
    assert last != first
    assert (directory / "figures" / "fig07-margin.png").is_file()
    assert "A margin on all pairs" in (directory / "report.html").read_text()
    before = (directory / "studies" / "margin.jsonl").read_bytes()
    assert study(load_config(TINY, [*overrides, "--storage", str(command.storage)]), ["margin"], 1, Console()) == directory
    assert (directory / "studies" / "margin.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "names", "seeds", "message"),
    [
        ([], ["margin", "depth"], 1, "there is no study depth; there are deciles, lowest"),
        ([], None, 0, "--seeds must be at least 1, got 0"),
        (["--reward.contrastive.method", "simcse"], None, 1, "reward.contrastive.method is simcse"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(
    tmp_path: Path, overrides: list[str], names: list[str] | None, seeds: int, message: str
) -> None:
    config = load_config(TINY, ["--storage", str(tmp_path), *overrides])
    with pytest.raises(UserError, match=message):
        study(config, names, seeds, Console())
    assert not list(tmp_path.iterdir())
