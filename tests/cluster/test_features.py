"""`features` and `adapt` by the real commands: what they leave behind, and what they refuse."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.features import FeatureJob, Labels, NewRater, run_job
from actors.fit_saves import FitSaves
from actors.process import ProcessSetup
from actors.ranks import Rank
from cluster.cli import main
from cluster.console import Console
from cluster.feature_data import load_data
from cluster.load_config import checked, load_config
from evaluation.feature_run import after_answers, read_feature_run
from rm.features import FeatureModel, fingerprint
from rm.profiles import read_profile
from tests.cluster.command import TINY, Command
from tests.cluster.people import PROMPTS, SIDES, write_feature_model
from tests.cluster.refused import refused
from tokens.saved_state import latest_state

RATERS = ("ann", "bob", "cy", "dan", "eve", "fay")


def labels(number: int = 40) -> list[dict[str, Any]]:
    """Half of the raters like what the others do not; each has judged all pairs."""
    return [
        {
            "prompt": f"{PROMPTS[i % len(PROMPTS)]} {i}",
            "chosen": SIDES[i % len(SIDES)][place % 2],
            "rejected": SIDES[i % len(SIDES)][1 - place % 2],
            "rater": rater,
        }
        for i in range(number)
        for place, rater in enumerate(RATERS)
    ]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature model, whose language model is a base to train from, and labels."""
    folder = tmp_path_factory.mktemp("people")
    model = write_feature_model(folder / "given")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / "language_model" / name).write_bytes((model / "backbone" / name).read_bytes())
    written(folder / "labels.jsonl", labels())
    return folder


def tree(material: Path, storage: Path, **features: Any) -> dict[str, Any]:
    return {
        "name": "two-kinds",
        "storage": str(storage),
        "data": {"preferences": str(material / "labels.jsonl"), "max_prompt_tokens": 60, "max_response_tokens": 90},
        "reward": {"base": str(material / "given" / "language_model"), "pooling": "mean", "lr": 3e-3, "batch_size": 24},
        "features": {"d": 2, "lr": 0.05, "held_out_raters": 2, **features},
        "rounds": {"save_fit_every": 4},
        "resources": {"reward": {"num_cpus": 0.5, "threads": 1}},
    }


@pytest.fixture(scope="module")
def learnt(material: Path) -> Path:
    """The command's directory."""
    config = material / "two.yaml"
    config.write_text(json.dumps(tree(material, material)))
    command = Command(material, os.environ["PATH"])
    done = command("features", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "raters that were trained on: accuracy" in done.stdout
    assert "2 new raters after 30 answers" in done.stdout and "Report:" in done.stdout
    return material / "features" / "two-kinds"


def test_what_the_command_leaves(learnt: Path) -> None:
    run = read_feature_run(learnt)
    assert len(run.trained) == 4 and len({row.rater for row in run.new}) == 2
    assert list(after_answers(run)) == [0, 3, 10, 30]
    model = FeatureModel.load(learnt / "model", torch.float32)
    assert model.d == 2 and set(model.raters) == {row.rater for row in run.trained}
    assert not (learnt / ".fits").exists(), "how far the fit had come is gone with the fit"
    assert run.card.fingerprint == fingerprint(learnt / "model") and run.card.num_raters == 4
    page = (learnt / "report.html").read_text()
    assert "Each rater" in page and "New raters" in page and all(row.rater in page for row in run.trained)
    assert (learnt / "figures" / "raters.png").stat().st_size > 1000
    assert main(["report", str(learnt)]) == 0


def test_a_fit_that_was_cut_short_goes_on_with_the_same_labels_alone(
    material: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = checked(tree(material, tmp_path, held_out_raters=0), "test")
    data = load_data(config, tmp_path, Console())
    setup = ProcessSetup("features", tmp_path / "log", torch.get_num_threads(), "cpu", "float32", 0, 1, False)
    other = Labels(tuple(reversed(data.train.pairs)), tuple(reversed(data.train.raters)))

    def fitted(place: str, train: Labels, saves: FitSaves | None, stop: int = 1 << 30) -> str:
        def tell(labels: int) -> None:
            if labels >= stop:
                raise KeyboardInterrupt

        job = FeatureJob(place, data.base, tmp_path / place, config.features, config.reward, 1, config.guards, saves)
        return run_job(Rank(setup), job, data.raters, train, Labels((), ()), (), tell).fingerprint

    kept = FitSaves(tmp_path / "fits", 2)
    with pytest.raises(KeyboardInterrupt):
        fitted("cut", data.train, kept, 24 * 5)
    assert latest_state(kept.folder) is not None and "goes on" not in caplog.text
    assert fitted("other", other, kept) == fitted("other", other, None) and "goes on" not in caplog.text
    shutil.rmtree(kept.folder)
    with pytest.raises(KeyboardInterrupt):
        fitted("cut", data.train, kept, 24 * 5)
    assert fitted("cut", data.train, kept) == fitted("whole", data.train, None) and "goes on after step 4" in caplog.text


def test_a_person_is_adapted_and_forgotten(learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in labels(12) if row["rater"] == "bob"]
    path = written(tmp_path / "ann.jsonl", [row | {"model": fingerprint(learnt / "model")} for row in answers])
    assert main(["adapt", str(learnt), "--answers", str(path)]) == 0
    said = capsys.readouterr().out
    assert "d = 2 weights from 12 answers" in said and "of answers that were left out of the fit" in said
    place = learnt / "model" / "profiles" / "ann.json"
    profile = read_profile(place, fingerprint(learnt / "model"), 2)
    assert (
        profile.num_answers == 12
        and profile.accuracy is not None
        and not any(row["prompt"] in place.read_text() for row in answers)
    )
    assert main(["adapt", str(learnt), "--answers", str(path), "--l2", "9", "--towards", "zero", "--out", str(place)]) == 0
    again = read_profile(place)
    assert again.towards == "zero" and float(again.person.weights.norm()) < float(profile.person.weights.norm())
    assert place.stat().st_mode & 0o077 == 0  # its owner alone reads it
    place.unlink()  # nothing else is left of the person
    assert not [f for f in learnt.rglob("*") if f.is_file() and f.suffix in (".json", ".jsonl") and "ann.json" in str(f)]


def test_few_and_separable_answers_are_said(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = written(tmp_path / "me.jsonl", [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in labels(3)[::6]])
    assert main(["adapt", str(material / "given"), "--answers", str(answers), "--out", str(tmp_path / "me.json")]) == 0
    said = capsys.readouterr().out
    assert "3 of 3 answers do not say which model asked" in said and "the answers are separable" in said
    assert "fewer than 5 answers to hold one out of" in said
    assert float(read_profile(tmp_path / "me.json").person.weights.abs().max()) < 1e3


def test_what_adapt_refuses(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, rows = str(material / "given"), labels(4)[::6]
    good = written(tmp_path / "good.jsonl", rows)

    def said(*arguments: str) -> str:
        assert main(["adapt", *arguments]) == 2
        return capsys.readouterr().err

    assert "holds no feature model" in said(str(tmp_path), "--answers", str(good))
    other = written(tmp_path / "other.jsonl", [row | {"model": "ab" * 32} for row in rows])
    assert "holds answers of the model abababababab" in said(given, "--answers", str(other))
    both = written(tmp_path / "both.jsonl", [*rows, rows[0] | {"chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}])
    assert "answers a pair both ways (answers 1, 5)" in said(given, "--answers", str(both))
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    assert "is no profile" in said(given, "--answers", str(good), "--out", str(notes)) and notes.read_text() == "mine"
    assert "--l2 is inf" in said(given, "--answers", str(good), "--l2", "inf")
    assert "--l2 is 0: a number above 0" in said(given, "--answers", str(good), "--l2", "0")
    assert "a person's name has letters" in said(given, "--answers", str(good), "--name", "../me")
    assert "would be written over the answers" in said(given, "--answers", str(good), "--out", str(good))
    assert "adapt takes no config keys" in said(given, "--answers", str(good), "--features.l2", "2")
    assert not (material / "given" / "profiles").exists()


def test_what_features_refuses(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage, path = tmp_path / "storage", tmp_path / "two.yaml"
    path.write_text(json.dumps(tree(material, storage)))

    def said(*arguments: str) -> str:
        return refused(capsys, storage, "features", str(path), *arguments)

    assert "there are 6 raters and features.held_out_raters is 5" in said("--features.held_out_raters", "5")
    assert "shared is true and d is 2" in said("--features.shared", "true")
    assert "features has no use for reward.dropout 0.1" in said("--reward.dropout", "0.1")
    assert "features has no use for reward.backward_size 8" in said("--reward.backward_size", "8")
    bare = written(tmp_path / "bare.jsonl", [{k: v for k, v in row.items() if k != "rater"} for row in labels(20)])
    assert "no column 'rater'" in said("--data.preferences", str(bare))
    few = written(tmp_path / "few.jsonl", [*labels(20), labels(1)[0] | {"rater": "gil"}])
    assert "fewer than 2 labels" in said("--data.preferences", str(few))
    assert "fewer than 99 labels" in said("--features.fewest_labels", "99")


def test_the_sandboxs_users_are_raters(command: Command, tmp_path: Path) -> None:

    keys = {"world.num_users": 6, "features.held_out_raters": 2, "features.labels_per_rater": 20, "features.tests_per_rater": 10}
    config = load_config(TINY, [word for key, value in keys.items() for word in (f"--{key}", str(value))])
    data = load_data(config, command.storage, Console())
    again = load_data(config, command.storage, Console())
    assert data.sha256() == again.sha256()
    assert len(data.raters) == 4 and len(data.new) == 2 and not {rater.name for rater in data.new} & set(data.raters)
    assert isinstance(data.train, Labels) and len(data.train.pairs) == 80 and sorted(set(data.train.raters)) == [0, 1, 2, 3]
    assert all(isinstance(rater, NewRater) and len(rater.answers) == 20 and rater.tests for rater in data.new)
    prompts, held_out = ({pair.prompt_ids for pair in of.pairs} for of in (data.train, data.tests))
    assert prompts and held_out and not prompts & held_out
