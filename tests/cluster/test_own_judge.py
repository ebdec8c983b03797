"""A judge that trained a policy is refused by whatever name the run knew it; what else the two share is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from cluster.evaluate_models import Contestant
from cluster.lineage import Lineage, digests_of, lineage_of
from cluster.own_judge import refuse_own_judge, remarks_on
from preferences.sets import PreferenceSet
from tokens.errors import UserError


def model(path: Path, weights: str) -> Path:
    """As much of a model directory as tells it from another."""
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_text(weights)
    return path


def pairs_of(*rows: tuple[str, str, str]) -> PreferenceSet:
    names = ("prompt", "chosen", "rejected")
    columns: dict[str, list[Any]] = {name: [row[place] for row in rows] for place, name in enumerate(names)}
    ids, domains = [str(place) for place in range(len(rows))], [""] * len(rows)
    return PreferenceSet(Dataset.from_dict(columns | {"id": ids, "domain": domains}), "here", "explicit")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of one round, with what it learned from."""
    folder = tmp_path / "runs" / "mine"
    model(folder / "rounds" / "round_000" / "policy", "policy")
    model(folder / "rounds" / "round_000" / "reward", "reward 0")
    model(folder / "start" / "held_out" / "0", "judge 0")
    model(folder / "start" / "held_out" / "1", "judge 1")
    (folder / "ledger.json").write_text("{}")
    return folder


@pytest.fixture
def based(run: Path) -> Callable[[str | None], None]:
    """Writes what the run's config calls the model that its reward models were made of."""
    return lambda name: (run / "config.yaml").write_text(yaml.safe_dump({"reward": {"base": name}})) and None


def made_by(run: Path | None, letter: Any = "B") -> Contestant:
    place = Path("elsewhere") if run is None else run / "rounds" / "round_000" / "policy"
    return Contestant(letter, place, None, None, "", run)


def test_a_base_is_known_by_a_relative_name_by_home_and_by_what_the_run_kept(
    run: Path, based: Callable[[str | None], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, copy = model(tmp_path / "here" / "base", "base"), model(tmp_path / "copy", "base")

    def judged() -> None:
        refuse_own_judge("reward:copy", [copy], [made_by(None, "A"), made_by(run)])

    def refused() -> bool:
        with pytest.raises(UserError) as caught:
            judged()
        return f"which made B, learned from {base}" in str(caught.value)

    based("here/base")
    judged()  # seen from another directory the name leads nowhere
    (told,) = [line for line in remarks_on("reward:copy", [copy], [made_by(run)]) if "here/base" in line]
    assert "is not found from here: whether reward:copy is a copy of it is not known" in told
    monkeypatch.chdir(tmp_path)
    assert refused()
    based("~/base")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    assert refused()
    based("here/base")
    monkeypatch.chdir("/")
    Lineage(base, frozenset()).write(run / "start")
    assert refused(), "the run kept where it lay"
    assert not any("here/base" in line for line in remarks_on("reward:copy", [copy], [made_by(run)]))
    based(None)
    judged()  # the SFT model is no reward model


def test_a_base_of_the_hub_is_looked_up_in_its_cache_and_nobody_is_asked(
    run: Path, based: Callable[[str | None], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    cached = tmp_path / "hub" / "models--somebody--reward"
    model(cached / "snapshots" / commit, "from the hub")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    copy = model(tmp_path / "copy", "from the hub")
    based("somebody/reward")
    with pytest.raises(UserError, match=f"which made B, learned from .*snapshots/{commit}"):
        refuse_own_judge("reward:copy", [copy], [made_by(run)])
    based("somebody/other")
    refuse_own_judge("reward:copy", [copy], [made_by(run)])


def test_held_out_members_may_judge_and_it_is_told_that_they_chose(run: Path, tmp_path: Path) -> None:
    members = [run / "start" / "held_out" / name for name in "01"]
    refuse_own_judge("ensemble:held_out", members, [made_by(run, "A"), made_by(run)])
    Lineage(tmp_path, frozenset("ab")).write(run / "start")
    Lineage(tmp_path, frozenset("cd")).write(run / "start" / "held_out")
    assert remarks_on("ensemble:held_out", members, [made_by(run)]) == []
    (run / "best").mkdir()
    (run / "best" / "best.json").write_text(json.dumps({"policy": "rounds/round_000/policy", "judge": "held_out"}))
    (told,) = remarks_on("ensemble:held_out", members, [made_by(run, "A"), made_by(run)])
    assert "chose the best round" in told and "which made A and B" in told
    with pytest.raises(UserError, match=r"which made B, learned from .*round_000/reward"):
        refuse_own_judge("ensemble:mixed", [*members, run / "rounds" / "round_000" / "reward"], [made_by(run)])


def test_pairs_that_judge_and_run_both_learned_from_are_counted(run: Path, tmp_path: Path) -> None:
    ours = pairs_of(("p", "good", "bad"), ("q", "yes", "no"), ("r", "1", "2"))
    turned = pairs_of(("p", "bad", "good"), ("s", "yes", "no"), ("q", "yes", "nope"), ("t", "", " "))
    judge = model(tmp_path / "rewards" / "other" / "model", "other")
    (told,) = remarks_on("reward:other", [judge], [made_by(run)])
    assert told.endswith("cannot be seen: the run that made it has no record of its pairs")
    Lineage(tmp_path, digests_of(ours)).write(run / "start")
    (told,) = remarks_on("reward:other", [judge], [made_by(run)])
    assert told.endswith("cannot be seen: the judge has no record of its pairs")
    Lineage(tmp_path, digests_of(turned)).write(judge.parent)
    (told,) = remarks_on("reward:other", [judge], [made_by(run, "A"), made_by(run)])
    assert "reward:other learned from 1 pairs (25% of its own) that the run which made A and B learned from too" in told
    Lineage(tmp_path, digests_of(pairs_of(("p", "good", "worse")))).write(judge.parent)
    assert remarks_on("reward:other", [judge], [made_by(run)]) == []
    (told,) = remarks_on("reward:other", [judge], [made_by(None, "A"), made_by(run)])
    assert told.startswith("which run made A cannot be seen")


def test_what_something_learned_from_is_found_from_where_its_models_lie(run: Path, tmp_path: Path) -> None:
    assert lineage_of(run) is None
    kept = Lineage(tmp_path / "base", frozenset({"a", "b"}))
    kept.write(run / "start")
    deep = model(run / "rounds" / "round_000" / "members" / "1", "member")
    assert lineage_of(run) == lineage_of(deep) == lineage_of(run / "rounds" / "round_000" / "reward") == kept
    shutil.copytree(deep, tmp_path / "moved")
    assert lineage_of(tmp_path / "moved") is None
    (run / "start" / "lineage.json").write_text("{")
    with pytest.raises(UserError, match=r"lineage.json cannot be read .*put back a copy"):
        lineage_of(run)
    (run / "start" / "lineage.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match="format 2, this version reads 1"):
        lineage_of(run)
