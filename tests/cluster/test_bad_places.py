"""Paths, ledgers and model directories that cannot be right: one clear message, exit code 2, no Ray, nothing left behind."""

from __future__ import annotations

import json
import shutil
import struct
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from cluster.cli import main
from cluster.config import RunConfig
from cluster.load_config import load_config
from cluster.reward_directory import RewardDirectory
from cluster.run_directory import RunDirectory
from cluster.sft_directory import SFTDirectory
from cluster.strength_directory import StrengthDirectory
from tests.cluster.command import TINY
from tests.cluster.refused import GOOD, jsonl, refused
from tokens.errors import UserError
from tokens.paths import check_path, printable
from tokens.weights import check_finite

PATH_KEYS = (
    "storage", "scratch", "data.preferences", "data.validation", "data.denoise.strength", "sft.model", "sft.data", "reward.base",
    "meta.samples", "meta.prompts", "policy.prompts", "policy.ptx_data", "generalize.domains.NAME.preferences",
    "generalize.domains.NAME.texts", "generalize.targets.NAME.preferences", "generalize.targets.NAME.texts",
)  # fmt: skip


@pytest.fixture(autouse=True)
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RONDO_STORAGE", str(tmp_path / "storage"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path / "storage"


PATHS: dict[str, tuple[str, list[str]]] = {
    "a variable": ("$FOO/x", ["variable $FOO", "not replaced"]),
    "a variable in braces": ("/data/${FOO}/x", ["variable ${FOO}"]),
    "a NUL": ('"/a\\0b"', ["control character", "\\x00"]),
    "a line end": ('"/a\\nb"', ["control character", "\\n"]),
    "300 characters": ("a" * 300, ["255", "300"]),
    "6000 characters": ("a/" * 3000, ["4096", "6000"]),
    "blank": ('" "', ["empty"]),
}


@pytest.mark.parametrize("key", PATH_KEYS)
@pytest.mark.parametrize(("path", "words"), PATHS.values(), ids=PATHS.keys())
def test_path(key: str, path: str, words: list[str], storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, storage, "run", str(TINY), f"--{key}", path)
    assert key in message and all(word in message for word in words), message


@pytest.mark.parametrize("key", PATH_KEYS)
def test_a_url_with_a_password_is_refused_and_not_shown(key: str, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("s3://key:hunter2@bucket/x", "s3://bucket/x?secret=hunter2", "s3://hunter2@host/x"):
        message = refused(capsys, storage, "run", str(TINY), f"--{key}", url)
        assert key in message and "environment" in message and "hunter2" not in message


def test_every_key_that_names_a_place_is_checked() -> None:
    from cluster.load_config import all_keys

    words = (
        "model",
        "data",
        "prompts",
        "base",
        "samples",
        "preferences",
        "texts",
        "validation",
        "strength",
        "storage",
        "scratch",
        "ptx_data",
    )
    named = [key for key, (default, _) in all_keys().items() if key.split(".")[-1] in words and default in ("None", "'sandbox'")]
    assert sorted(named) == sorted(PATH_KEYS)


@pytest.mark.parametrize("argument", ["a\0b.yaml", "a" * 300 + ".yaml", "a/" * 5000])
@pytest.mark.parametrize("command", ["run", "plan", "report"])
def test_arguments_that_are_paths(command: str, argument: str, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "a path " in refused(capsys, storage, command, argument)


def test_relabel_s_arguments(storage: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(jsonl([dict(row) for row in GOOD]))
    pairs, long = str(tmp_path / "d.jsonl"), "a" * 300
    for arguments in ((long, "--judge", "gold"), (pairs, "--judge", f"reward:{long}"), (pairs, "--judge", "reward:a\0b"),
                      (f"sandbox:{long}", "--judge", "gold"), (pairs, "--judge", "gold", "--out", long)):  # fmt: skip
        assert "a path " in refused(capsys, storage, "relabel", *arguments)
    escape = ("relabel", f"sandbox:{TINY}", "--judge", "gold", "--split", "../../x")
    assert "splits train, validation" in refused(capsys, storage, *escape)


def test_a_storage_root_in_the_environment_is_checked_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RONDO_STORAGE", "/data/$NOWHERE")
    assert main(["run", str(TINY)]) == 2
    assert "variable $NOWHERE" in capsys.readouterr().err


NAMES = st.one_of(
    st.text(max_size=80), st.sampled_from(["..", ".", "/etc", "a/../../b", "~", "a\n", "a\0", "a" * 65, "é", "-", ""])
)


@given(name=NAMES)
def test_no_name_leads_out_of_the_storage_root(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.getbasetemp() / "root"
    try:
        config = RunConfig(name=name, storage=str(root))
    except ValidationError:
        return
    for directory, parent in (
        (RunDirectory, "runs"),
        (RewardDirectory, "rewards"),
        (StrengthDirectory, "strengths"),
        (SFTDirectory, "sft"),
    ):
        path = directory(config).path
        assert path.parent == root / parent and path.name == name and path.resolve().is_relative_to(root.resolve())


@given(text=st.text())
def test_a_path_that_is_taken_is_one_for_the_operating_system(text: str) -> None:
    try:
        check_path(text)
    except UserError:
        return
    Path(text).exists()  # raises for what it cannot be asked about
    assert printable(text) == text.strip("\r\n") or any(not character.isprintable() for character in text)


@given(text=st.text())
def test_what_is_printed_neither_ends_a_line_nor_steers_a_terminal(text: str) -> None:
    shown = printable(text)
    assert not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in shown)


def test_the_terminal_shows_texts_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    from cluster.console import Console

    hostile = "[/] [bold red]x[/bold red] [link=http://evil.example]y[/link] \x1b]0;owned\x07\x1b[31m\r\n\u202e"
    Console().say(f"[yellow]note[/] first: {hostile}")
    Console().say(hostile)
    shown = capsys.readouterr().out
    escaped = "[/] [bold red]x[/bold red] [link=http://evil.example]y[/link] \\x1b]0;owned\\x07\\x1b[31m \\u202e"
    assert shown == f"note first: {escaped}\n{escaped}\n"


def test_symbolic_links_are_not_followed_out_of_a_run(tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "elsewhere" / "round_000").mkdir(parents=True)
    run = storage / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "ledger.json").write_text(json.dumps(RunDirectory(load_config(TINY)).ledger))
    (run / "rounds").symlink_to(tmp_path / "elsewhere")
    assert main(["run", str(TINY)]) == 2
    assert "rounds is a symbolic link" in capsys.readouterr().err
    assert (tmp_path / "elsewhere" / "round_000").is_dir()  # what is uncommitted is cleared away, but not there
    shutil.rmtree(run)
    run.symlink_to(tmp_path / "elsewhere")
    assert main(["run", str(TINY)]) == 2
    assert "not a directory of ours" in capsys.readouterr().err


STARTED = {"format": 1, "config_sha256": "x", "start": {"committed": True}, "rounds": []}
LEDGERS: dict[str, tuple[str, list[str]]] = {
    "of the future": (json.dumps(STARTED | {"format": 2}), ["format 2", "reads 1", "newer"]),
    "without a format": (json.dumps({"start": None}), ["format None", "reads 1"]),
    "cut off": ('{"format": 1,', ["cannot be read"]),
    "a list": ("[]", ["format None"]),
    "without rounds": (json.dumps({"format": 1, "config_sha256": "x", "start": None}), ["rounds is missing"]),
    "a round that is not its own": (json.dumps(STARTED | {"rounds": [{"round": 3}]}), ["entry 0", "round 0"]),
    "a start that is gone": (json.dumps(STARTED), ["is not there"]),
}


@pytest.mark.parametrize(("text", "words"), LEDGERS.values(), ids=LEDGERS.keys())
def test_ledger(text: str, words: list[str], storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = storage / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "ledger.json").write_text(text)
    assert main(["run", str(TINY)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert "ledger.json" in message and all(word in message for word in words), message
    assert [path.name for path in run.iterdir()] == ["ledger.json"] and (run / "ledger.json").read_text() == text


WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small language model with its tokenizer."""
    from policy.sft import make_model, train_tokenizer
    from tokens.shape import ModelShape

    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([text for row in GOOD for text in map(str, row.values())], 300, path)
    make_model(tokenizer, ModelShape(hidden_size=32, num_heads=1, num_layers=1, context_length=128), 0).save_pretrained(path)
    return path


def write_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({name: change(weight) for name, weight in weights.items()}, folder / WEIGHTS, {"format": "pt"})


def change_tokenizer(folder: Path, **changes: object) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "cut off": (lambda m: (m / WEIGHTS).write_bytes((m / WEIGHTS).read_bytes()[:-100]), ["cut off or damaged", "Copy it again"]),
    "2^60 bytes of header": (
        lambda m: (m / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + b"x" * 99), ["header claims 1152921504606846976 bytes"],
    ),
    "another shape": (lambda m: change_weights(m, lambda w: w[..., :16].contiguous()), ["do not fit its config.json", "shape"]),
    "whole numbers": (lambda m: change_weights(m, lambda w: w.to(torch.int32)), ["cannot be trained", "I32"]),
    "pickled": (lambda m: (m / WEIGHTS).rename(m / "pytorch_model.bin"), ["pickled", "refused", "safetensors"]),
    "code of its own": (
        lambda m: write_config(m, model_type="mine", auto_map={"AutoConfig": "code.Mine"}), ["trust_remote_code", "never run"],
    ),
    "a tokenizer with code of its own": (
        lambda m: change_tokenizer(m, tokenizer_class="Mine", auto_map={"AutoTokenizer": ["code.Mine", None]}),
        ["tokenizer cannot be read", "custom code"],
    ),
    "a type that nobody knows": (lambda m: write_config(m, model_type="mine"), ["does not know the model type 'mine'"]),
    "no padding token": (lambda m: change_tokenizer(m, pad_token=None), ["pad_token", "got none"]),
    "fewer embeddings than tokens": (lambda m: write_config(m, vocab_size=100), ["300 entries", "vocab_size is 100"]),
    "no head for language": (
        lambda m: write_config(m, architectures=["LlamaForSequenceClassification"], id2label={"0": "a", "1": "b"}),
        ["LlamaForSequenceClassification", "2 labels"],
    ),
    "another architecture": (
        lambda m: write_config(m, model_type="gpt2", architectures=["GPT2LMHeadModel"]), ["not a GPT2Model's"],
    ),
    "encoder and decoder": (lambda m: write_config(m, model_type="t5", architectures=["T5ForConditionalGeneration"]), ["t5"]),
    "a thousand million layers": (lambda m: write_config(m, num_hidden_layers=10**9), ["num_hidden_layers", "1,000"]),
    "fewer layers than none": (lambda m: write_config(m, num_hidden_layers=-1), ["num_hidden_layers", "-1"]),
}  # fmt: skip


@pytest.mark.parametrize("key", ["sft.model", "reward.base"])
@pytest.mark.parametrize(("spoil", "words"), MODELS.values(), ids=MODELS.keys())
def test_model(
    key: str, spoil: Callable[[Path], object], words: list[str], model: Path, tmp_path: Path, storage: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given_model = shutil.copytree(model, tmp_path / "given")
    spoil(given_model)
    (tmp_path / "d.jsonl").write_bytes(jsonl([dict(row) for row in GOOD]))
    data = ["--data.preferences", str(tmp_path / "d.jsonl"), "--data.max_prompt_tokens", "24", "--evaluation.judge", "ensemble"]
    capsys.readouterr()
    message = refused(capsys, storage, "run" if key == "sft.model" else "reward", str(TINY), *data, f"--{key}", str(given_model))
    assert str(given_model) in message and all(word in message for word in words), message


def test_weights_that_are_no_numbers_are_refused_when_they_are_loaded(model: Path, tmp_path: Path) -> None:
    from actors.learner_models import WholeModels
    from policy.config import PolicyConfig
    from rm.checkpoints import load_with_fresh_head
    from tokens.ranks import Ranks

    given_model = shutil.copytree(model, tmp_path / "given")
    change_weights(given_model, lambda w: w.clone().fill_(float("nan")) if w.shape == (32, 32) else w)
    with pytest.raises(UserError, match=r"given has NaN or infinity in \S*layers\.0.*proj"):
        load_with_fresh_head(given_model, torch.float32, 0)
    models = WholeModels(PolicyConfig(), given_model, torch.float32, Ranks(), lambda made: made)
    with pytest.raises(UserError, match="NaN or infinity"):
        models.policy(given_model)
    weights = load_file(model / WEIGHTS)
    save_file({name: weight for name, weight in weights.items() if "q_proj" not in name}, given_model / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights: \S*q_proj"):
        models.policy(given_model)
    check_finite(load_with_fresh_head(model, torch.float32, 0), model)
