"""Builds the files of a world once, and finds them again by the hash of their recipe."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from random import Random
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from sandbox.candidates import sample_responses
from sandbox.config import WorldConfig
from sandbox.gold import ATTRIBUTE_NAMES, Attributes
from sandbox.labels import Candidate, LabelledPair, annotate, judge, match, truth
from sandbox.tokenizer import make_tokenizer
from sandbox.world import SPLITS, World, WorldPrompt
from tokens.section import Section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RECIPE = 1
"""Raise it when the code changes what a recipe makes."""
STATISTICS_TEXTS = 2000
FitFn = Callable[
    [Sequence[tuple[list[int], list[int]]], "PreTrainedTokenizerFast", Path, Any, int, Callable[[int, int], None]],
    dict[str, float],
]
"""Trains a language model: ``policy.sft.fit_language_model``, handed in from above."""
Progress = Callable[[str, int, int], None]
"""Called with the name of the phase, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class StoredPrompt:
    """A row of prompts.parquet."""

    id: str
    text: str
    domain: str
    split: str


@dataclass(frozen=True)
class WorldFiles:
    """Where the files of a world lie, and how to read them.

    ``pairs`` has the splits train (noisy labels, training domains), validation (true labels, training domains) and
    validation_held_out (true labels, held-out domains).
    """

    root: Path

    @property
    def sft_dir(self) -> Path:
        """The SFT policy and its tokenizer, a Hugging Face directory."""
        return self.root / "sft"

    @property
    def prompts_path(self) -> Path:
        return self.root / "prompts.parquet"

    @property
    def pairs_path(self) -> Path:
        return self.root / "pairs.parquet"

    @property
    def users_path(self) -> Path:
        return self.root / "users.json"

    @property
    def card_path(self) -> Path:
        return self.root / "card.json"

    def prompts(self, split: str) -> list[StoredPrompt]:
        """The prompts of one split: train, validation or test."""
        return [StoredPrompt(**row) for row in _read_table(self.prompts_path) if row["split"] == split]

    def pairs(self, split: str) -> list[LabelledPair]:
        """The pairs of one split."""
        return [LabelledPair(**row) for row in _read_table(self.pairs_path) if row["split"] == split]

    def users(self) -> dict[str, Attributes]:
        """Each user's weights, before the domain has its say."""
        return {name: Attributes(**weights) for name, weights in json.loads(self.users_path.read_text("utf-8")).items()}

    def card(self) -> dict[str, object]:
        """What the world is made of, in numbers."""
        card: dict[str, object] = json.loads(self.card_path.read_text("utf-8"))
        return card


def build(config: WorldConfig, sft: Section, cache_root: Path, fit: FitFn, on_progress: Progress) -> WorldFiles:
    """The files of a world, made now or found in the cache.

    Args:
        config: the world's recipe.
        sft: how to train its SFT policy; handed to ``fit`` as it is.
        cache_root: the directory that worlds lie in; made if it is missing.
        fit: trains the SFT policy (phase "sft").
        on_progress: hears from the phases "sft" and "candidates".

    Returns:
        The files. They appear all at once, under a name that is a hash of the recipe.
    """
    target = world_directory(config, sft, cache_root)
    if target.is_dir():
        return WorldFiles(target)
    cache_root.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=cache_root, prefix=".unfinished-"))
    try:
        card = _make(WorldFiles(unfinished), config, sft, fit, on_progress)
        _write_json(unfinished / "card.json", {**_recipe(config, sft), **card})
        unfinished.chmod(0o755)
        _move(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return WorldFiles(target)


def world_directory(config: WorldConfig, sft: Section, cache_root: Path) -> Path:
    """Where ``build`` puts the files of a world; the arguments are its."""
    digest = hashlib.sha256(json.dumps(_recipe(config, sft), sort_keys=True).encode()).hexdigest()
    return cache_root / f"world-{digest[:12]}"


def _recipe(config: WorldConfig, sft: Section) -> dict[str, object]:
    made_by = sft.model_dump(mode="json", exclude={"data", "microbatch_size"})  # the one is not read here, the other saves memory
    return {"recipe": RECIPE, "world": config.model_dump(mode="json"), "sft": made_by}


def _move(unfinished: Path, target: Path) -> None:
    """Give the finished directory its name; where somebody else was faster, theirs is as good."""
    try:
        os.replace(unfinished, target)
    except OSError:
        if not target.is_dir():
            raise


def _make(files: WorldFiles, config: WorldConfig, sft: Section, fit: FitFn, on_progress: Progress) -> dict[str, object]:
    began = time.monotonic()
    world = World(config)
    corpus = world.corpus()
    tokenizer = make_tokenizer(world.vocabulary)
    examples = _encode(corpus, tokenizer)
    texts_done = time.monotonic()
    fitted = fit(examples, tokenizer, files.sft_dir, sft, config.seed, lambda done, total: on_progress("sft", done, total))
    sft_done = time.monotonic()
    candidates = _candidates(world, files.sft_dir, on_progress)
    candidates_done = time.monotonic()
    pairs = [
        *annotate(match(candidates["train"], config.num_pairs, config, _rng(config, "train")), config, _rng(config, "labels")),
        *(
            pair
            for split in ("validation", "validation_held_out")
            for pair in truth(match(candidates[split], _number(world, split), config, _rng(config, split)), split)
        ),
    ]
    _write_table(
        files.prompts_path, [StoredPrompt(p.id, p.text, p.domain, split) for split in SPLITS for p in world.prompts(split)]
    )
    _write_table(files.pairs_path, pairs)
    _write_json(files.users_path, {user: asdict(world.user_weights(user)) for user in world.users})
    train = [pair for pair in pairs if pair.split == "train"]
    return {
        "sizes": {
            "vocabulary": len(tokenizer),
            "corpus": len(corpus),
            "prompts": {split: len(world.prompts(split)) for split in SPLITS},
            "candidates": {split: len(drawn) for split, drawn in candidates.items()},
            "pairs": {split: sum(pair.split == split for pair in pairs) for split in candidates},
            "users": len(world.users),
        },
        "domains": {"train": world.train_domains, "held_out": world.held_out_domains},
        "sft_fit": fitted,
        "wrong_labels": fmean(pair.gold_chosen < pair.gold_rejected for pair in train),
        "attributes": {
            "corpus": _statistics(world, corpus),
            "sft": _statistics(world, [(candidate.prompt.text, candidate.text) for candidate in candidates["train"]]),
        },
        "seconds": {
            "texts": texts_done - began,
            "sft": sft_done - texts_done,
            "candidates": candidates_done - sft_done,
            "labels": time.monotonic() - candidates_done,
        },
    }


def _rng(config: WorldConfig, stream: str) -> Random:
    return Random(f"{config.seed} pairs {stream}")


def _encode(corpus: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], list[int]]]:
    prompts = tokenizer([prompt for prompt, _ in corpus], add_special_tokens=False).input_ids
    responses = tokenizer([response for _, response in corpus], add_special_tokens=False).input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [([bos, *prompt], [*response, eos]) for prompt, response in zip(prompts, responses, strict=True)]


def _number(world: World, split: str) -> int:
    """Pairs of a split; the held-out domains get as many per prompt as the others."""
    if split == "train":
        return world.config.num_pairs
    if split == "validation":
        return world.config.num_validation_pairs
    return round(world.config.num_validation_pairs * len(world.held_out_domains) / len(world.train_domains))


def _candidates(world: World, sft_dir: Path, on_progress: Progress) -> dict[str, list[Candidate]]:
    """Responses of the SFT policy for each split of the pairs."""
    split_prompts = {
        "train": [p for p in world.prompts("train") if p.domain in world.train_domains],
        "validation": [p for p in world.prompts("validation") if p.domain in world.train_domains],
        "validation_held_out": [p for p in world.prompts("validation") if p.domain in world.held_out_domains],
    }
    asked = {split: _repeat(prompts, _number(world, split)) for split, prompts in split_prompts.items()}
    flat = [prompt for prompts in asked.values() for prompt in prompts]
    texts = iter(
        sample_responses(
            sft_dir,
            [prompt.text for prompt in flat],
            world.config.candidate_temperature,
            world.config.max_response_tokens,
            world.config.seed,
            lambda done, total: on_progress("candidates", done, total),
        )
    )
    return {split: judge(world, prompts, [next(texts) for _ in prompts]) for split, prompts in asked.items()}


def _repeat(prompts: Sequence[WorldPrompt], num_pairs: int) -> list[WorldPrompt]:
    """Each prompt so often that there are at least three times as many possible pairs as are wanted, to choose near-ties from."""
    used = prompts[:num_pairs]
    times = 2
    while used and len(used) * times * (times - 1) // 2 < 3 * num_pairs:
        times += 1
    return [prompt for prompt in used for _ in range(times)]


def _statistics(world: World, texts: Sequence[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of gold, words and every attribute, over the first texts."""
    some = texts[:STATISTICS_TEXTS]
    measured = [astuple(world.attributes(prompt, response)) for prompt, response in some]
    columns: dict[str, list[float]] = dict(zip(ATTRIBUTE_NAMES, map(list, zip(*measured, strict=True)), strict=True))
    columns["gold"] = [world.gold(prompt, response) for prompt, response in some]
    columns["words"] = [float(len(response.split())) for _, response in some]
    return {name: {"mean": fmean(values), "std": pstdev(values)} for name, values in columns.items()}


def _write_table(path: Path, rows: Sequence[StoredPrompt] | Sequence[LabelledPair]) -> None:
    import pyarrow
    import pyarrow.parquet

    names = [field.name for field in fields(rows[0])]
    pyarrow.parquet.write_table(pyarrow.table({name: [vars(row)[name] for row in rows] for name in names}), path)


def _read_table(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
