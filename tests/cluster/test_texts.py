"""What `sft` and PPO's ptx loss are given: the same texts that a run's own SFT model learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.data_source import TextsRecipe
from cluster.inputs import open_source
from cluster.load_config import load_config
from cluster.sandbox_source import SandboxSource
from cluster.texts import sft_texts
from sandbox.tokenizer import make_tokenizer
from sandbox.world import World
from tests.cluster.command import TINY

REAL = ["--evaluation.judge", "ensemble", "--sft.shape.vocab_size", "300", "--data.validation_fraction", "0.2"]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": f"say {i}", "chosen": f"word {i} is good", "rejected": f"no {i}"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_chosen_responses_are_those_of_a_run_and_its_held_out_prompts_stay_unseen(pairs: str, tmp_path: Path) -> None:
    config = load_config(TINY, ["--data.preferences", pairs, *REAL, "--policy.ptx_coef", "0.5", "--storage", str(tmp_path / "s")])
    texts, source = sft_texts(config, tmp_path / "cache"), open_source(config, tmp_path)
    assert isinstance(source.recipe, TextsRecipe) and texts.examples == source.recipe.examples
    assert texts.start is None and texts.tokenizer.get_vocab() == source.tokenizer.get_vocab()
    inputs = source.load()
    assert inputs.ptx == texts.examples and len(texts.held_out) == 12
    judged = {prompt.token_ids for prompt in inputs.eval_prompts}
    assert {prompt for prompt, _ in texts.held_out} == judged and not judged & {prompt for prompt, _ in texts.examples}
    off = config.model_copy(update={"policy": config.policy.model_copy(update={"ptx_coef": 0.0})})
    plain = open_source(off, tmp_path).load()
    assert plain.ptx == () and plain.fingerprint != inputs.fingerprint


def test_the_sandbox_gives_its_corpus(tmp_path: Path) -> None:
    config = load_config(TINY, ["--policy.ptx_coef", "0.5"])
    texts, source = sft_texts(config, tmp_path), SandboxSource(config, tmp_path)
    world = World(config.world)
    tokenizer = make_tokenizer(world.vocabulary)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    corpus = [((bos, *tokenizer(prompt).input_ids), (*tokenizer(response).input_ids, eos)) for prompt, response in world.corpus()]
    assert list(source._ptx) == corpus
    assert sorted((*texts.examples, *texts.held_out)) == sorted(corpus) and len(texts.held_out) > 100


def test_what_a_given_model_and_its_data_are_plays_no_part_in_the_world(tmp_path: Path) -> None:
    config = load_config(TINY)
    recipe = SandboxSource(config, tmp_path).world_recipe
    other = recipe.sft.model_copy(update={"model": "somewhere", "data": "x.jsonl", "microbatch_size": 8})
    assert type(recipe)(recipe.world, other, recipe.cache).directory == recipe.directory
    longer = recipe.sft.model_copy(update={"epochs": 2.0})
    assert type(recipe)(recipe.world, longer, recipe.cache).directory != recipe.directory
