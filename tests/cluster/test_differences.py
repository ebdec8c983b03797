"""What makes a directory another one's, and what does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cluster.differences import differences, flat, refuse_differences
from cluster.load_config import load_config
from cluster.reward_directory import RewardDirectory, learnt_from
from cluster.run_directory import RunDirectory
from cluster.strength_directory import StrengthDirectory, settings
from tests.cluster.command import TINY
from tests.cluster.judged import JUDGED
from tokens.errors import UserError


@pytest.fixture(autouse=True)
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RONDO_STORAGE", str(tmp_path))
    return tmp_path


def test_differences_by_hand() -> None:
    assert flat({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}
    there = {"reward.lr": 0.1, "seed": 0, "old.key": 3}
    here = {"reward.lr": 0.2, "seed": 0, "reward.stop_on": "original", "data.split": "test"}
    assert differences(there, here) == [
        "data.split: 'train' there, 'test' here",  # a key that is missing has its default
        "old.key: 3 there, None here",
        "reward.lr: 0.1 there, 0.2 here",
    ]
    refuse_differences(Path("x"), here, here)
    with pytest.raises(UserError, match=r"^x belongs to another config \(reward.lr: 0.1 there, 0.2 here\)\. Put .* Hint$"):
        refuse_differences(Path("x"), {"reward.lr": 0.1}, {"reward.lr": 0.2}, "Hint")


def overridden(*overrides: str) -> dict[str, object]:
    return settings(load_config(TINY, list(overrides)))


@pytest.mark.parametrize(
    "overrides",
    [
        ("--reward.microbatch_size", "4"),
        ("--reward.backward_size", "4"),
        ("--reward.packing", "true"),
        ("--data.allow_hub", "true"),
        ("--reward.lora.alpha", "3"),
        ("--reward.lora.dropout", "0.1"),
        ("--reward.patience", "2"),
        ("--data.denoise.method", "flip"),
        ("--strength.batch_size", "2"),
        ("--resources.reward.num_cpus", "2"),
    ],
)
def test_strengths_do_not_depend_on_speed_or_on_what_is_not_used(overrides: tuple[str, str]) -> None:
    assert overridden(*overrides) == overridden()


@pytest.mark.parametrize(
    ("base", "overrides"),
    [
        ((), ("--resources.reward.dtype", "bfloat16")),
        ((), ("--resources.scorer.dtype", "bfloat16")),
        ((), ("--reward.dropout", "0.1")),
        ((), ("--strength.folds", "2")),
        (("--reward.dropout", "0.1"), ("--reward.microbatch_size", "4")),
        (("--reward.dropout", "0.1"), ("--reward.backward_size", "4")),
        (("--reward.dropout", "0.1"), ("--reward.packing", "true")),
        (("--strength.members", "lora"), ("--reward.lora.alpha", "3")),
        (("--strength.members", "lora"), ("--strength.lora_rank", "2")),
        (("--strength.members", "lora", "--reward.lora.dropout", "0.1"), ("--reward.microbatch_size", "4")),
    ],
)
def test_strengths_depend_on_what_changes_them(base: tuple[str, ...], overrides: tuple[str, str]) -> None:
    assert overridden(*base, *overrides) != overridden(*base)


def test_a_strength_directory_that_was_made_before_a_key_existed_goes_on(storage: Path) -> None:
    directory = StrengthDirectory(load_config(TINY))
    with directory.open():
        pass
    begun = json.loads((directory.path / "begun.json").read_text())
    older = {key: value for key, value in begun["settings"].items() if not key.startswith("resources.")}
    older |= {"reward.microbatch_size": 32, "reward.lora.alpha": 16.0, "data.allow_hub": False}
    (directory.path / "begun.json").write_text(json.dumps(begun | {"settings": older}))
    with StrengthDirectory(load_config(TINY, ["--reward.microbatch_size", "8"])).open():
        pass
    with pytest.raises(
        UserError, match=r"dtype: 'float32' there, 'bfloat16' here.*name their directory: data.denoise.strength /"
    ):
        StrengthDirectory(load_config(TINY, ["--resources.reward.dtype", "bfloat16"])).inspect()


def test_opening_finished_strengths_writes_nothing(storage: Path) -> None:
    directory = StrengthDirectory(load_config(TINY))
    with directory.open():
        directory.card.write_text("{}")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.path.glob("[a-z]*.*")}
    assert {"begun.json", "config.yaml", "versions.json"} <= {path.name for path in before}
    with StrengthDirectory(load_config(TINY, ["--policy.lr", "1e-6"])).open():
        pass
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before


def finished_reward(*overrides: str) -> RewardDirectory:
    directory = RewardDirectory(load_config(TINY, list(overrides)))
    with directory.open(), directory.draft() as draft:
        directory.commit(draft, {"pairs_sha256": "of these"})
    return directory


def test_a_reward_model_depends_on_the_strengths_of_its_own_name() -> None:
    flip = ("--data.denoise.method", "flip")
    assert "strength.folds" not in learnt_from(load_config(TINY))
    assert "strength.folds" not in learnt_from(load_config(TINY, [*flip, "--data.denoise.strength", "elsewhere"]))
    finished_reward(*flip)
    RewardDirectory(load_config(TINY, [*flip, "--strength.batch_size", "3", "--strength.lora_rank", "3"])).inspect()
    for key, value, old in (("folds", "2", "1"), ("num_members", "3", "10"), ("members", "heads", "'full'")):
        with pytest.raises(UserError, match=rf"tiny belongs to another config \(strength.{key}: {old} there"):
            RewardDirectory(load_config(TINY, [*flip, f"--strength.{key}", value])).inspect()
    with pytest.raises(UserError, match=r"data.denoise.method: 'flip' there, 'none' here"):
        RewardDirectory(load_config(TINY)).inspect()


def test_a_reward_model_without_denoising_does_not_depend_on_strengths() -> None:
    finished_reward()
    RewardDirectory(load_config(TINY, ["--strength.folds", "2", "--policy.lr", "1e-6"])).inspect()


def test_how_far_a_reward_model_came_is_kept_for_the_same_one_alone() -> None:
    def reopened(*overrides: str) -> bool:
        """Whether the next driver finds what the last one left of its fit."""
        with RewardDirectory(load_config(TINY, list(overrides))).open() as directory:
            kept = (directory.fits / "reward_model" / "00000003.json").is_file()
            (directory.fits / "reward_model").mkdir(exist_ok=True)
            (directory.fits / "reward_model" / "00000003.json").touch()
            (directory.path / "half.parquet").touch()
        return kept

    assert [reopened(), reopened(), reopened("--policy.lr", "1e-6")] == [False, True, True]
    assert not reopened("--reward.lr", "0.5") and not reopened()
    directory = finished_reward()
    assert not directory.fits.exists() and not (directory.path / "half.parquet").exists()


def test_a_directory_of_another_kind_is_no_reward_models(storage: Path) -> None:
    directory = finished_reward()
    (directory.path / "card.json").write_text(json.dumps({"kind": "strength"}))
    with pytest.raises(UserError, match="not a reward run's directory"), RewardDirectory(load_config(TINY)).open():
        pass
    assert (directory.path / "config.yaml").is_file()


def test_a_run_that_was_begun_before_a_key_existed_goes_on(storage: Path) -> None:
    with RunDirectory(load_config(TINY)).open() as run, run.draft(run.start_path) as draft:
        run.commit_start(draft, {**JUDGED, "committed": True})
    stored = yaml.safe_load((run.path / "config.yaml").read_text())
    del stored["reward"]["stop_on"], stored["data"]["validation"]
    (run.path / "config.yaml").write_text(yaml.safe_dump(stored))
    ledger = json.loads((run.path / "ledger.json").read_text())
    (run.path / "ledger.json").write_text(json.dumps(ledger | {"config_sha256": "of the shorter config"}))
    again = RunDirectory(load_config(TINY, ["--resources.reward.num_cpus", "1"]))
    again.inspect()
    assert again.ledger["start"] == {**JUDGED, "committed": True}
    with pytest.raises(UserError, match=r"runs/tiny belongs to another config \(policy.lr: 0.0003 there, 1e-06 here\)"):
        RunDirectory(load_config(TINY, ["--policy.lr", "1e-6"])).inspect()
