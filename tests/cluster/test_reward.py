"""``reward``: one reward model by the real command, what it leaves behind, and the chain from strengths to a run."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from cluster.cli import main
from cluster.inputs import open_source
from cluster.lineage import digests_of, lineage_of
from cluster.load_config import load_config
from cluster.model_sizes import model_size, reward_size
from cluster.reward_inputs import load_inputs
from cluster.sandbox_source import SandboxSource
from cluster.seeds import derive
from evaluation.records import MetaRow, write_rows
from preferences.denoise import read_pairs, undo
from preferences.encode import encode_prompt, encode_response
from preferences.strength import write_strengths
from preferences.swap import as_table
from rm.shifted import kept_back
from tests.cluster.command import TINY, Command
from tokens.records import Pair


@pytest.fixture(scope="module")
def world(command: Command) -> SandboxSource:
    """The tiny world, built where the command looks for it."""
    source = SandboxSource(load_config(TINY), command.storage / "cache", policy=False)
    assert source.recipe is not None
    source.recipe(lambda unit, done, total: None)
    return source


@pytest.fixture(scope="module")
def hand_made(world: SandboxSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Strengths of the tiny world's training pairs that know the truth."""
    folder = tmp_path_factory.mktemp("strengths")
    train, _ = world.preferences()
    gap = np.array(train.rows["gold_chosen"]) - np.array(train.rows["gold_rejected"])
    scores = np.stack([gap, gap + 0.5], axis=1)
    rows = train.rows.with_format("arrow")[:]
    write_strengths(
        folder, 0, rows, scores, np.zeros_like(scores), split="train", source="sandbox", fingerprint=train.fingerprint
    )
    return folder


@pytest.fixture(scope="module")
def samples(world: SandboxSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three responses to each of twenty prompts, as a run records them."""
    path = tmp_path_factory.mktemp("samples") / "meta_rollouts.parquet"
    texts: dict[str, list[str]] = {}
    for row in world.preferences()[0].rows:
        texts.setdefault(row["prompt"], []).extend([row["chosen"], row["rejected"]])
    rows = [
        MetaRow(f"p{number}", prompt, sample, text, ids, (-1.0,) * len(ids), 0, True, None, 0.0)
        for number, (prompt, found) in enumerate(list(texts.items())[:20])
        for sample, text in enumerate((found * 2)[:3])
        for ids in [encode_response(world.tokenizer, text)]
    ]
    write_rows(path, rows)
    return path


@pytest.fixture(scope="module")
def tiny_reward(command: Command, world: SandboxSource, hand_made: Path, samples: Path) -> tuple[Path, Any]:
    """MetaRM on flipped pairs, measured every third step: the directory, and what was printed."""
    done = command(
        "reward", str(TINY), "--name", "tiny-reward", "--reward.evaluate_every", "3", "--meta.samples", str(samples),
        "--data.denoise.method", "flip", "--data.denoise.strength", str(hand_made),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return command.storage / "rewards" / "tiny-reward", done


def rows(folder: Path, phase: str) -> list[dict[str, Any]]:
    return [row for line in (folder / "metrics.jsonl").read_text().splitlines() if (row := json.loads(line))["phase"] == phase]


def test_sandbox_pairs_are_encoded_as_they_stand_in_the_files(world: SandboxSource) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.sft_dir)
    for split, pairs in zip(("train", "validation"), world.preferences(), strict=True):
        by_hand = tuple(
            Pair(
                row.id,
                encode_prompt(tokenizer, row.prompt),
                encode_response(tokenizer, row.chosen),
                encode_response(tokenizer, row.rejected),
                row.domain,
            )
            for row in world.files.pairs(split)
        )
        assert world.encode(pairs) == by_hand
        assert pairs.rows["flipped"] == [row.flipped for row in world.files.pairs(split)]
    inputs = world.load()
    assert inputs.pairs == world.encode(world.preferences()[0]) and inputs.base_dir == inputs.sft_dir
    others = world.other_domains()
    assert others is not None and set(others.rows["domain"]) == set(world.world.held_out_domains)


def test_the_model_loads_with_transformers_and_scores_as_recorded(tiny_reward: tuple[Path, Any], world: SandboxSource) -> None:
    folder, _ = tiny_reward
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    recorded = {(row["set"], row["id"]): row for row in pq.read_table(folder / "scores.parquet").to_pylist()}
    _, validation = world.preferences()
    for row in list(validation.rows)[:4]:
        for side in ("chosen", "rejected"):
            ids = [*encode_prompt(tokenizer, row["prompt"]), *encode_response(tokenizer, row[side])]
            with torch.no_grad():
                score = float(model(torch.tensor([ids])).logits)
            assert score == pytest.approx(recorded["original", row["id"]][side], abs=1e-5)
    assert {name for name, _ in recorded} == {"original", "held_out"} and len(recorded) == 40
    kept = lineage_of(folder / "model")
    assert kept is not None and kept.base == world.base_dir
    assert kept.pairs == digests_of(world.preferences()[0]), "flipping a label makes no other pair"


def test_what_was_measured_is_written_down(tiny_reward: tuple[Path, Any]) -> None:
    folder, done = tiny_reward
    card = json.loads((folder / "card.json").read_text())
    assert [row["step"] for row in rows(folder, "reward")] == list(range(1, 9))
    measured = rows(folder, "validation")
    assert [row["step"] for row in measured] == [3, 6, 8]
    for name in ("original", "held_out"):
        assert {f"validation/{name}/{what}" for what in ("accuracy", "loss", "ece")} <= measured[0].keys()
    assert {"scores/chosen_mean", "scores/rejected_mean", "scores/std"} <= measured[0].keys()
    assert card["validation"] == {key: value for key, value in measured[-1].items() if "/" in key}, "the last weights were kept"
    assert card["kind"] == "reward" and card["num_steps"] == 8 and card["validation_pairs"] == {"original": 32, "held_out": 8}
    features = pq.read_table(folder / "features.parquet").to_pylist()
    assert len(features) == 64 and {len(row["vector"]) for row in features} == {64}
    assert {row["side"] for row in features} == {"chosen", "rejected"}
    assert (folder / "report.html").is_file() and "accuracy" in done.stdout


def test_the_pairs_were_flipped_by_the_strengths(tiny_reward: tuple[Path, Any]) -> None:
    folder, done = tiny_reward
    card = json.loads((folder / "card.json").read_text())
    assert card["denoised"]["flip"] == round(0.2 * 128) and card["denoised"]["kept"] == card["num_pairs"] == 128
    assert "26 flip" in done.stdout


def test_what_was_done_to_each_pair_lies_beside_the_model_and_is_undone(
    tiny_reward: tuple[Path, Any], world: SandboxSource
) -> None:
    folder, _ = tiny_reward
    train, _ = world.preferences()
    done = read_pairs(folder)
    gap = np.array(train.rows["gold_chosen"]) - np.array(train.rows["gold_rejected"])
    flipped = np.array([action == "flip" for action in done.rows["denoise"]])
    assert flipped.sum() == 26 and gap[flipped].max() <= gap[~flipped].min()
    assert np.array(done.rows["flipped"])[flipped].tolist() == [not wrong for wrong in np.array(train.rows["flipped"])[flipped]]
    back = undo(done)
    assert as_table(back.rows) == as_table(train.rows) and back.fingerprint == train.fingerprint


def test_metarm_and_its_vanilla_twin(tiny_reward: tuple[Path, Any]) -> None:
    folder, _ = tiny_reward
    card = json.loads((folder / "card.json").read_text())
    assert card["fit"]["J_after"] > card["fit"]["J_before"] and card["twin"]["fit"]["J_after"] is None
    shifted = pq.read_table(folder / "shifted.parquet").to_pylist()
    assert [(row["prompt_id"], row["sample"]) for row in shifted[:4]] == [("p0", 0), ("p0", 1), ("p0", 2), ("p1", 0)]
    assert len(shifted) == 60
    back = kept_back(20, derive(load_config(TINY).seed, "reward", 0))
    assert {row["prompt_id"] for row in shifted if row["kept_back"]} == {f"p{place}" for place in back} and len(back) == 2
    assert any(abs(row["score_vanilla"] - row["score_metarm"]) > 1e-6 for row in shifted), "two different models"
    assert max(abs(row["score_vanilla"] - row["score_metarm"]) for row in shifted) < 1, "of one start and one order"


def test_the_same_command_again_and_another_one_under_its_name(
    tiny_reward: tuple[Path, Any], command: Command, hand_made: Path, samples: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, _ = tiny_reward
    monkeypatch.setenv("RONDO_STORAGE", str(command.storage))
    before = {path: path.stat().st_mtime_ns for path in (folder / "model").iterdir()}
    same = [
        "reward", str(TINY), "--name", "tiny-reward", "--reward.evaluate_every", "3", "--meta.samples", str(samples),
        "--data.denoise.method", "flip", "--data.denoise.strength", str(hand_made),
    ]  # fmt: skip
    assert main([*same, "--policy.lr", "1e-6"]) == 0, "what plays no part may change"
    assert "nothing to do" in capsys.readouterr().out
    assert main([*same, "--reward.lr", "1e-4"]) == 2
    message = capsys.readouterr().err
    assert "belongs to another config" in message and "reward.lr: 0.001 there, 0.0001 here" in message
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(same) == 2
    assert "another driver" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (folder / "model").iterdir()} == before


def encoder(path: Path, words: list[str]) -> Path:
    """A small BERT with a word-level tokenizer of its own: CLS and SEP, no BOS and no EOS."""
    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *words]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    ).save_pretrained(path)
    shape = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=96, pad_token_id=0,
    )  # fmt: skip
    BertModel(shape).save_pretrained(path)
    return path


def write_data(path: Path) -> list[str]:
    """Pairs in TRL's explicit format, with a second labeller's column; the words they are made of."""
    table = [
        {"prompt": f"say {i % 40}", "chosen": f"word {i} is good", "rejected": f"no {i}", "label": (1, 0, -1)[i % 3]}
        for i in range(120)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return ["say", "word", "is", "good", "no", *map(str, range(120))]


def test_an_encoder_with_a_tokenizer_of_its_own_on_data_in_trl_format(command: Command, tmp_path: Path) -> None:
    words = write_data(tmp_path / "d.jsonl")
    base = encoder(tmp_path / "bert", words)
    policies = set((command.storage / "cache").glob("sft-*"))  # other tests trained them
    done = command(
        "reward", str(TINY), "--name", "bert", "--reward.base", str(base), "--data.preferences", str(tmp_path / "d.jsonl"),
        "--reward.epochs", "6",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    folder = command.storage / "rewards" / "bert"
    card = json.loads((folder / "card.json").read_text())
    sets = card["validation_pairs"]
    assert sets["relabelled"] == 8 and sets["agreement"] == 4 and sets["original"] == 12
    assert card["validation"]["validation/original/accuracy"] == 1.0, "good and no are easily told apart"
    assert card["validation"]["validation/agreement/accuracy"] == 1.0
    assert card["validation"]["validation/relabelled/accuracy"] == 0.5, "half of the labels are turned round"
    assert set((command.storage / "cache").glob("sft-*")) == policies, "no policy was trained"
    looks = [row["step"] for row in rows(folder, "validation")]
    assert looks == [5, 10, 15, 20, 25, 30, 35, 40, 42], "about ten where evaluate_every is null"
    assert not (folder / "training_pairs.parquet").exists(), "nothing was done to the pairs"
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    row = next(row for row in pq.read_table(folder / "scores.parquet").to_pylist() if row["set"] == "original")
    number = int(row["id"]) - 1
    both = [f"say {number % 40} word {number} is good", f"say {number % 40} no {number}"]
    for text, side in zip(both, ("chosen", "rejected"), strict=True):
        ids = [tokenizer.cls_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]
        with torch.no_grad():
            assert float(model(torch.tensor([ids])).logits) == pytest.approx(row[side], abs=1e-5)


def doubted(number: int) -> list[dict[str, Any]]:
    """Held-out pairs: every other one has a wrong label, and a second labeller says so of each."""
    sides = ("chosen", "rejected")
    return [
        {"prompt": f"say {i}"}
        | dict(zip(sides if i % 2 else sides[::-1], (f"word {i + 50} is good", f"no {i + 50}"), strict=True))
        | {"label": i % 2}
        for i in range(number)
    ]


def test_held_out_rows_that_do_not_fit_are_counted_where_there_are_labels_too(tmp_path: Path) -> None:
    base = encoder(tmp_path / "bert", write_data(tmp_path / "d.jsonl"))
    held_out = [*doubted(4), {"prompt": "say 9", "chosen": "word " * 50, "rejected": "no", "label": 1}]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    overrides = ["--data.preferences", str(tmp_path / "d.jsonl"), "--data.validation", str(tmp_path / "v.jsonl")]
    config = load_config(TINY, [*overrides, "--reward.base", str(base), "--data.drop_bad", "true"])
    inputs = load_inputs(config, open_source(config, tmp_path / "storage", policy=False), None, ())
    assert inputs.dropped == {"response too long": 1}
    assert {name: len(pairs) for name, pairs in inputs.validation.items()} == {"original": 4, "relabelled": 4, "agreement": 2}
    assert len(inputs.pairs) == 120, "all of data.preferences is trained on"


def test_a_fit_stops_by_the_set_that_it_is_told_to(command: Command, tmp_path: Path) -> None:
    base = encoder(tmp_path / "bert", write_data(tmp_path / "d.jsonl"))
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in doubted(30)))
    done = command(
        "reward", str(TINY), "--name", "stopped", "--reward.base", str(base), "--data.preferences", str(tmp_path / "d.jsonl"),
        "--data.validation", str(tmp_path / "v.jsonl"), "--reward.epochs", "5", "--reward.lr", "3e-5",
        "--reward.evaluate_every", "2", "--reward.patience", "1", "--reward.stop_on", "relabelled",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    folder = command.storage / "rewards" / "stopped"
    looks, card = rows(folder, "validation"), json.loads((folder / "card.json").read_text())
    assert card["validation_pairs"] == {"original": 30, "relabelled": 30, "agreement": 15}

    def stopped(name: str) -> tuple[int, int]:
        """The best measurement, and the one after which patience is over."""
        best = -1
        values = [row[f"validation/{name}/accuracy"] for row in looks]
        for number, value in enumerate(values):
            if best < 0 or value > values[best]:
                best = number
            elif number > best:
                return best, number
        return best, len(values) - 1

    best, last = stopped("relabelled")
    assert last == len(looks) - 1 and best > 0, "the fit went on while it ranked more of the corrected pairs rightly"
    assert stopped("original")[1] < last, "by the labels as given it would have stopped sooner"
    kept = card["validation"]["validation/relabelled/accuracy"]
    assert kept == max(row["validation/relabelled/accuracy"] for row in looks) == looks[best]["validation/relabelled/accuracy"]


def test_run_refuses_a_base_whose_tokens_are_not_the_policys(
    world: SandboxSource, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RONDO_STORAGE", str(command.storage))
    other = encoder(tmp_path / "other", ["word"])
    assert main(["run", str(TINY), "--name", "x", "--reward.base", str(other)]) == 2
    assert "different vocabularies" in (message := capsys.readouterr().err) and "decoder" in message
    like = tmp_path / "like"
    BertModel(BertConfig(vocab_size=600, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                         max_position_embeddings=96, pad_token_id=0)).save_pretrained(like)  # fmt: skip
    AutoTokenizer.from_pretrained(world.sft_dir).save_pretrained(like)
    assert main(["run", str(TINY), "--name", "x", "--reward.base", str(like)]) == 2
    assert "is an encoder" in capsys.readouterr().err
    assert main(["reward", str(TINY), "--name", "x", "--reward.base", str(like), "--reward.pooling", "mean"]) == 2
    assert "reward.pooling must be last" in capsys.readouterr().err
    assert not (command.storage / "runs" / "x").exists() and not (command.storage / "rewards" / "x").exists()
    config = load_config(TINY, ["--reward.base", str(other)])
    assert reward_size(config, model_size(config)).parameters == BertModel.from_pretrained(other).num_parameters()
    assert open_source(config, command.storage, policy=False).tokenizer.eos_token == "[SEP]"


@pytest.mark.slow
def test_strengths_that_are_missing_are_made_first_and_a_run_uses_them_too(command: Command) -> None:
    words = ("--name", "chain", "--data.denoise.method", "soft+margin", "--strength.num_members", "2", "--rounds.num_rounds", "1")
    done = command("reward", str(TINY), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "come first" in done.stdout and (command.storage / "strengths" / "chain" / "card.json").is_file()
    again = command("run", str(TINY), *words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "come first" not in again.stdout
    entry = json.loads((command.storage / "runs" / "chain" / "ledger.json").read_text())["rounds"][0]
    assert entry["denoised"]["margin"] == 128 and entry["choices"]["data.denoise.method"] == "soft+margin"


@pytest.mark.slow
def test_two_ranks_make_the_same_reward_model(
    tiny_reward: tuple[Path, Any], command: Command, hand_made: Path, samples: Path
) -> None:
    done = command(
        "reward", str(TINY), "--name", "two-ranks", "--reward.evaluate_every", "3", "--meta.samples", str(samples),
        "--data.denoise.method", "flip", "--data.denoise.strength", str(hand_made), "--resources.reward.num_ranks", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("scores.parquet", "shifted.parquet"):
        one, two = (
            pq.read_table(folder / name).to_pandas() for folder in (tiny_reward[0], command.storage / "rewards" / "two-ranks")
        )
        for column in one.select_dtypes("number"):
            assert np.allclose(one[column], two[column], atol=1e-5), (name, column)
