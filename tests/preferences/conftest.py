"""Tokenizers and files small enough to read."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>"]

WriteRows = Callable[..., str]


@pytest.fixture(scope="session")
def backend() -> Tokenizer:
    """Byte-level BPE over 256 bytes, a few merges, and five special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["good morning to you and to you too"] * 4, trainer)
    return tokenizer


@pytest.fixture
def tokenizer(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """With BOS, EOS, padding and a chat template whose marks are special but have no role, as Llama 3's."""
    made: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(backend.to_str()),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )
    return made


@pytest.fixture
def write(tmp_path: Path) -> WriteRows:
    """write(rows, name) makes a JSON Lines file and returns its path."""

    def write_rows(rows: Sequence[dict[str, Any]], name: str = "pairs.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write_rows


@pytest.fixture
def hh_file() -> str:
    """The real HH-RLHF pairs, where they are at hand beside the checkout."""
    path = Path(__file__).parents[3] / "shared" / "data" / "hh_helpful" / "pairs.jsonl"
    if not path.is_file():
        pytest.skip("shared/data/hh_helpful is not at hand")
    return str(path)
