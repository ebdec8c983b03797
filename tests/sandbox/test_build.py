"""The files of a world: complete, cached, and never half there."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sandbox.build import build
from sandbox.config import WorldConfig
from sandbox.labels import LabelledPair
from sandbox.world import SPLITS, World
from tokens.section import Section


class Recipe(Section):
    lr: float = 0.1


CONFIG = WorldConfig(
    num_texts=100,
    num_prompts=60,
    num_eval_prompts=40,
    num_pairs=80,
    num_validation_pairs=30,
    max_response_tokens=12,
    near_tie_share=0.1,
)
calls: list[int] = []


def fit(
    examples: Sequence[tuple[list[int], list[int]]],
    tokenizer: object,
    out_dir: Path,
    sft: Section,
    seed: int,
    on_progress: Callable[[int, int], None],
) -> dict[str, float]:
    """An untrained model in place of the SFT policy: its responses are random words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    assert isinstance(tokenizer, PreTrainedTokenizerFast) and isinstance(sft, Recipe)
    assert all(prompt[0] == tokenizer.bos_token_id and response[-1] == tokenizer.eos_token_id for prompt, response in examples)
    calls.append(seed)
    on_progress(1, 1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
        )
        LlamaForCausalLM(shape).save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return {"loss": 1.0}


def silent(phase: str, done: int, total: int) -> None:
    assert phase in ("sft", "candidates") and 0 < done <= total


def test_build_makes_every_file_and_the_second_call_finds_them(tmp_path: Path) -> None:
    calls.clear()
    files = build(CONFIG, Recipe(), tmp_path, fit, silent)
    stamp = files.pairs_path.stat().st_mtime_ns
    assert build(CONFIG, Recipe(), tmp_path, fit, silent) == files
    assert len(calls) == 1 and files.pairs_path.stat().st_mtime_ns == stamp
    assert [path.name for path in tmp_path.iterdir()] == [files.root.name]
    _check_contents(files.pairs("train"), files.pairs("validation"), files.pairs("validation_held_out"))
    world = World(CONFIG)
    assert {split: len(files.prompts(split)) for split in SPLITS} == {"train": 60, "validation": 40, "test": 40}
    assert list(files.users()) == list(world.users)
    assert files.users()["user-003"] == world.user_weights("user-003")
    card = files.card()
    train = files.pairs("train")
    assert card["wrong_labels"] == sum(pair.gold_chosen < pair.gold_rejected for pair in train) / 80
    assert files.sft_dir.joinpath("tokenizer.json").is_file() and files.sft_dir.joinpath("model.safetensors").is_file()


def _check_contents(train: list[LabelledPair], validation: list[LabelledPair], held_out: list[LabelledPair]) -> None:
    world = World(CONFIG)
    assert (len(train), len(validation), len(held_out)) == (80, 30, 8)
    texts = {split: {prompt.text for prompt in world.prompts(split)} for split in SPLITS}
    for pairs, split, domains in (
        (train, "train", world.train_domains),
        (validation, "validation", world.train_domains),
        (held_out, "validation", world.held_out_domains),
    ):
        for pair in pairs:
            assert pair.prompt in texts[split] and pair.domain in domains
            assert pair.chosen != pair.rejected and pair.chosen.strip() and pair.rejected.strip()
            assert pair.gold_chosen == world.gold(pair.prompt, pair.chosen)
            assert len(pair.chosen.split()) <= CONFIG.max_response_tokens
    assert sum(pair.flipped for pair in train) == 20
    assert all(pair.gold_chosen >= pair.gold_rejected for pair in [*validation, *held_out])


def test_the_same_recipe_elsewhere_gives_the_same_pairs_and_another_recipe_another_directory(tmp_path: Path) -> None:
    first = build(CONFIG, Recipe(), tmp_path / "a", fit, silent)
    second = build(CONFIG, Recipe(), tmp_path / "b", fit, silent)
    assert first.root.name == second.root.name
    assert first.pairs("train") == second.pairs("train")
    other = build(CONFIG, Recipe(lr=0.2), tmp_path / "a", fit, silent)
    assert other.root != first.root and first.root.is_dir()


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken(
        examples: object, tokenizer: object, out_dir: Path, sft: Section, seed: int, on_progress: object
    ) -> dict[str, float]:
        out_dir.mkdir()
        (out_dir / "half.bin").write_bytes(b"x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build(CONFIG, Recipe(), tmp_path, broken, silent)
    assert list(tmp_path.iterdir()) == []


def test_two_builders_at_once_end_with_one_directory(tmp_path: Path) -> None:
    def beaten(
        examples: Sequence[tuple[list[int], list[int]]],
        tokenizer: object,
        out_dir: Path,
        sft: Section,
        seed: int,
        on_progress: Callable[[int, int], None],
    ) -> dict[str, float]:
        build(CONFIG, Recipe(), tmp_path, fit, silent)  # somebody else finishes first
        return fit(examples, tokenizer, out_dir, sft, seed, on_progress)

    files = build(CONFIG, Recipe(), tmp_path, beaten, silent)
    assert [path.name for path in tmp_path.iterdir()] == [files.root.name]
    assert len(files.pairs("train")) == 80
