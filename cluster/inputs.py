"""What a run learns from: pairs, prompts, the SFT model. What is wrong with them is found here, before any process starts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from actors.preparer import Recipe
from cluster.config import RunConfig
from policy.config import SFTConfig
from sandbox.config import WorldConfig
from tokens.errors import UserError
from tokens.records import Pair, Prompt

if TYPE_CHECKING:
    from preferences.sets import PromptSet
    from sandbox.build import WorldFiles
    from sandbox.world import Split, World

SANDBOX = "sandbox"
FEWEST_EVALUATION_PROMPTS = 8


@dataclass(frozen=True)
class Inputs:
    """What the roles are given.

    Args:
        sft_dir: the SFT model, with its tokenizer.
        pairs: D.
        validation: held-out pairs; may be none.
        meta_prompts: prompts that S_k is sampled for.
        policy_prompts: prompts of PPO.
        eval_prompts: prompts that neither of the two holds.
        gold: the sandbox's truth of (prompt, response); None for real data.
        dropped: rows left out, counted by reason, by data set.
    """

    sft_dir: Path
    pairs: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    meta_prompts: tuple[Prompt, ...]
    policy_prompts: tuple[Prompt, ...]
    eval_prompts: tuple[Prompt, ...]
    gold: Callable[[str, str], float] | None
    dropped: dict[str, dict[str, int]]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of pairs and prompts: a run that is continued must be given the same."""
        prompts = (self.meta_prompts, self.policy_prompts, self.eval_prompts)
        return hashlib.sha256(repr((self.pairs, self.validation, prompts)).encode()).hexdigest()


class Source(Protocol):
    """Where the inputs come from."""

    @property
    def recipe(self) -> Recipe | None:
        """What must be made first, once (the SFT model); None where it is given."""

    def load(self) -> Inputs:
        """Read everything, once the recipe's directory is there."""


def open_source(config: RunConfig, root: Path) -> Source:
    """Check the inputs that the config names.

    Args:
        config: of the run.
        root: the storage root; what is made is cached under it.

    Returns:
        The source.

    Raises:
        UserError: if anything is wrong with a data set, a prompt or a model directory.
    """
    cache = root / "cache"
    return SandboxSource(config, cache) if config.data.preferences == SANDBOX else DataSource(config, cache)


def without(prompts: Sequence[Prompt], judged: set[str], key: str) -> tuple[Prompt, ...]:
    """The prompts that no evaluation uses.

    Args:
        prompts: of the data set that ``key`` names.
        judged: texts of the evaluation prompts.
        key: of the config, for the message.

    Raises:
        UserError: if none is left.
    """
    kept = tuple(prompt for prompt in prompts if prompt.text not in judged)
    if not kept:
        raise UserError(f"{key}: every prompt is held out to judge the policy; lower data.validation_fraction or add prompts")
    return kept


def publish(partial: Path, final: Path) -> None:
    """Give a finished directory of the cache its name; where another run was faster, its own is as good."""
    try:
        os.replace(partial, final)
    except OSError:
        if not final.is_dir():
            raise


@dataclass(frozen=True)
class WorldRecipe:
    """Build the sandbox world: texts, SFT policy, candidate responses, labels."""

    world: WorldConfig
    sft: SFTConfig
    cache: Path

    def __call__(self, on_progress: Callable[[str, int, int], None]) -> Path:
        """Build it, or find it in the cache."""
        names = {"sft": "SFT steps", "candidates": "responses"}
        return self.build(lambda phase, done, total: on_progress(names[phase], done, total)).root

    def build(self, on_progress: Callable[[str, int, int], None]) -> WorldFiles:
        """The same, as the sandbox's own record."""
        from policy.sft import fit_language_model
        from sandbox.build import build

        return build(self.world, self.sft, self.cache, fit_language_model, on_progress)


class SandboxSource:
    """The sandbox world."""

    def __init__(self, config: RunConfig, cache: Path) -> None:
        from sandbox.world import World

        if config.sft.model is not None:
            raise UserError(
                f"data.preferences sandbox trains its own SFT policy; sft.model must be null, got {config.sft.model!r}"
            )
        self.config = config
        self.recipe = WorldRecipe(config.world, config.sft, cache)
        self.world: World = World(config.world)
        self._domains(config.meta.prompts, "meta.prompts")
        self._domains(config.policy.prompts, "policy.prompts")

    def _domains(self, prompts: str | None, key: str) -> tuple[str, ...]:
        if prompts is None:
            return self.world.train_domains
        kind, _, names = prompts.partition(":")
        chosen = self.world.held_out_domains if names == "held_out" else tuple(names.split(","))
        unknown = [name for name in chosen if name not in self.world.domains]
        if kind != SANDBOX or unknown or not chosen:
            raise UserError(
                f"{key} must be null, sandbox:held_out or sandbox:DOMAIN,DOMAIN with domains of {', '.join(self.world.domains)}; "
                f"got {prompts!r}"
            )
        return chosen

    def load(self) -> Inputs:
        """Read the world's files."""
        from transformers import AutoTokenizer

        from preferences.encode import encode_prompt, encode_response

        files = self.recipe.build(lambda phase, done, total: None)  # made already: found in the cache
        tokenizer = AutoTokenizer.from_pretrained(files.sft_dir)
        limits = self.config.data

        def prompts(split: Split, domains: tuple[str, ...]) -> tuple[Prompt, ...]:
            return tuple(
                Prompt(p.id, p.text, encode_prompt(tokenizer, p.text), p.domain)
                for p in self.world.prompts(split)
                if p.domain in domains
            )

        def pairs(split: str) -> tuple[Pair, ...]:
            return tuple(
                Pair(
                    row.id,
                    encode_prompt(tokenizer, row.prompt),
                    encode_response(tokenizer, row.chosen),
                    encode_response(tokenizer, row.rejected),
                    row.domain,
                )
                for row in files.pairs(split)
            )

        learnt = self._domains(self.config.policy.prompts, "policy.prompts")
        inputs = Inputs(
            sft_dir=files.sft_dir,
            pairs=pairs("train")[: limits.max_pairs],
            validation=pairs("validation"),
            meta_prompts=prompts("train", self._domains(self.config.meta.prompts, "meta.prompts")),
            policy_prompts=prompts("train", learnt),
            eval_prompts=prompts("validation", learnt),
            gold=self.world.gold,
            dropped={},
        )
        longest = max(len(p.token_ids) for p in (*inputs.meta_prompts, *inputs.policy_prompts, *inputs.eval_prompts))
        if longest > limits.max_prompt_tokens:
            raise UserError(
                f"the sandbox's prompts have up to {longest} tokens, data.max_prompt_tokens is {limits.max_prompt_tokens}"
            )
        return inputs


@dataclass(frozen=True)
class TextsRecipe:
    """Train the SFT model on the chosen responses, once; the directory is named by a hash of all that goes into it."""

    examples: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    tokenizer_dir: Path
    sft: SFTConfig
    seed: int
    cache: Path

    @property
    def directory(self) -> Path:
        """Where the model is, or will be."""
        digest = hashlib.sha256(repr((self.examples, self.tokenizer_dir.name, self.seed)).encode())
        digest.update(self.sft.model_dump_json().encode())
        return self.cache / f"sft-{digest.hexdigest()[:12]}"

    def __call__(self, on_progress: Callable[[str, int, int], None]) -> Path:
        """Train it, or find it in the cache."""
        from transformers import PreTrainedTokenizerFast

        from policy.sft import fit_language_model

        final = self.directory
        if final.is_dir():
            return final
        partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
        try:
            summary = fit_language_model(
                [(list(prompt), list(response)) for prompt, response in self.examples],
                PreTrainedTokenizerFast.from_pretrained(self.tokenizer_dir),
                partial,
                self.sft,
                self.seed,
                lambda done, total: on_progress("SFT steps", done, total),
            )
            (partial / "sft.json").write_text(json.dumps(summary, indent=1))
            publish(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return final


class DataSource:
    """Preference pairs of the user's own."""

    def __init__(self, config: RunConfig, cache: Path) -> None:
        from datasets import disable_progress_bars

        from preferences.encode import encode_pairs
        from preferences.load import load_preferences
        from preferences.sets import count_reasons

        disable_progress_bars()  # type: ignore[no-untyped-call]
        self.config = config
        data = config.data
        given = self._given_model()
        tokenizer = given[1] if given else None
        preferences = load_preferences(data, tokenizer)
        train, held_out = preferences.split(data.validation_fraction, config.seed)
        if tokenizer is None:
            texts = [text for row in train.rows for text in (row["prompt"], row["chosen"], row["rejected"])]
            tokenizer_dir, tokenizer = self._make_tokenizer(texts, cache)
        self.tokenizer = tokenizer
        limits = (data.max_prompt_tokens, data.max_response_tokens, data.drop_bad)
        pairs, dropped = encode_pairs(train, tokenizer, *limits)
        validation, dropped_validation = encode_pairs(held_out, tokenizer, *limits) if len(held_out) else ([], ())
        self.pairs, self.validation = tuple(pairs), tuple(validation)
        self.dropped = {
            "preferences": count_reasons((*preferences.dropped, *dropped, *dropped_validation)),
        }
        if given:
            self.recipe: Recipe | None = None
            self.sft_dir = given[0]
        else:
            recipe = TextsRecipe(
                tuple((p.prompt_ids, p.chosen_ids) for p in self.pairs), tokenizer_dir, config.sft, config.seed, cache
            )
            self.recipe, self.sft_dir = recipe, recipe.directory
        if config.policy.prompts is None:
            policy_prompts, self.eval_prompts = self._prompts(None, train.prompts()), self._prompts(None, held_out.prompts())
        else:
            own = self._load_prompts(config.policy.prompts)
            ours, theirs = own.split(data.validation_fraction, config.seed)
            policy_prompts, self.eval_prompts = self._prompts(None, ours), self._prompts(None, theirs)
        judged = {prompt.text for prompt in self.eval_prompts}
        self.policy_prompts = without(policy_prompts, judged, "policy.prompts")
        self.meta_prompts = without(self._prompts(config.meta.prompts, train.prompts()), judged, "meta.prompts")
        if len(self.eval_prompts) < FEWEST_EVALUATION_PROMPTS:
            raise UserError(
                f"only {len(self.eval_prompts)} prompts are held out to judge the policy, "
                f"at least {FEWEST_EVALUATION_PROMPTS} are needed: "
                f"raise data.validation_fraction (now {data.validation_fraction:g}) or add prompts"
            )

    def _given_model(self) -> tuple[Path, Any] | None:
        name = self.config.sft.model
        if name is None:
            return None
        from transformers import AutoTokenizer

        from preferences.models import check_context, check_model_directory

        if not Path(name).is_dir():
            if not self.config.data.allow_hub:
                raise UserError(f"sft.model {name!r} is not a directory; to fetch it from the hub set data.allow_hub to true")
            name = self._download(name)
        data = self.config.data
        longest = max(data.max_response_tokens, self.config.rollout.max_new_tokens)
        check_context(check_model_directory(name, reward=True), data.max_prompt_tokens, longest)
        return Path(name), AutoTokenizer.from_pretrained(name, trust_remote_code=False)

    def _download(self, name: str) -> str:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"sft.model {name!r} is no directory here, and the hub did not give it: {reason}") from error

    def _make_tokenizer(self, texts: Sequence[str], cache: Path) -> tuple[Path, Any]:
        from transformers import AutoTokenizer

        from policy.sft import train_tokenizer

        size = self.config.sft.shape.vocab_size
        digest = hashlib.sha256("\x00".join([str(size), *texts]).encode()).hexdigest()[:12]
        directory = cache / f"tokenizer-{digest}"
        if not directory.is_dir():
            partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
            cache.mkdir(parents=True, exist_ok=True)
            try:
                train_tokenizer(texts, size, partial)
                publish(partial, directory)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return directory, AutoTokenizer.from_pretrained(directory)

    def _load_prompts(self, source: str) -> PromptSet:
        from preferences.load import load_prompts

        data = self.config.data
        return load_prompts(source, data.split, data.allow_hub, data.drop_bad, self.tokenizer)

    def _prompts(self, source: str | None, default: PromptSet) -> tuple[Prompt, ...]:
        from preferences.encode import encode_prompts
        from preferences.sets import count_reasons

        chosen = default if source is None else self._load_prompts(source)
        if not len(chosen):
            return ()
        prompts, dropped = encode_prompts(chosen, self.tokenizer, self.config.data.max_prompt_tokens, self.config.data.drop_bad)
        if source is not None:
            self.dropped[source] = count_reasons((*chosen.dropped, *dropped))
        return tuple(prompts)

    def load(self) -> Inputs:
        """What was checked at the start."""
        return Inputs(
            self.sft_dir,
            self.pairs,
            self.validation,
            self.meta_prompts,
            self.policy_prompts,
            self.eval_prompts,
            None,
            self.dropped,
        )
