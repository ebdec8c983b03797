"""The sandbox world as a source of pairs and prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import RunConfig
from cluster.given_model import GivenModel, given_base, given_model, refuse_base_of_a_run, refuse_other_tokenizer
from cluster.inputs import SANDBOX, Inputs, Source
from cluster.texts import longest_text, ptx_texts, sandbox_texts
from policy.config import SFTConfig
from preferences.sets import PreferenceSet, count_reasons
from sandbox.build import WorldFiles, build, world_directory
from sandbox.config import WorldConfig
from sandbox.tokenizer import make_tokenizer
from sandbox.world import Split, World
from tokens.errors import UserError
from tokens.records import Prompt

if TYPE_CHECKING:
    from sandbox.labels import LabelledPair
    from sandbox.raters import RatedPair

RATED_COLUMNS = ("id", "prompt", "chosen", "rejected", "domain", "rater")


@dataclass(frozen=True)
class WorldRecipe:
    """Build the sandbox world: texts, SFT policy, candidate responses, labels."""

    world: WorldConfig
    sft: SFTConfig
    cache: Path

    @property
    def own_sft(self) -> SFTConfig:
        """How the world's own SFT policy, whose responses the pairs are made of, is trained; a given model has no part in it."""
        return self.sft.model_copy(update={"model": None, "data": None})

    @property
    def directory(self) -> Path:
        """Where the world is, or will be."""
        return world_directory(self.world, self.own_sft, self.cache)

    def __call__(self, on_progress: Callable[[str, int, int], None]) -> Path:
        """Build it, or find it in the cache."""
        names = {"sft": "SFT steps", "candidates": "responses"}
        return self.build(lambda phase, done, total: on_progress(names[phase], done, total)).root

    def build(self, on_progress: Callable[[str, int, int], None]) -> WorldFiles:
        """The same, as the sandbox's own record."""
        from policy.sft import fit_language_model

        return build(self.world, self.own_sft, self.cache, fit_language_model, on_progress)


class SandboxSource(Source):
    """The sandbox world.

    Args:
        config: of the run.
        cache: directory that worlds lie in.
        policy: as in ``open_source``.
    """

    def __init__(self, config: RunConfig, cache: Path, policy: bool = True) -> None:
        super().__init__(config)
        self.recipe = self.world_recipe = WorldRecipe(config.world, config.sft, cache)
        self.world = World(config.world)
        self.given = given_sft(config, self.world)
        tokenizer = make_tokenizer(self.world.vocabulary)
        own = partial(sandbox_texts, self.world, tokenizer, longest_text(config))
        self._ptx = ptx_texts(config, tokenizer, own) if policy else ()
        self.base: GivenModel | None = None
        if config.reward.base is not None:
            self.base = given_base(config.reward.base, config, policy)
            if policy:
                refuse_base_of_a_run(self.base, tokenizer, "the sandbox's")
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

    @cached_property
    def files(self) -> WorldFiles:
        """The world's files, found in the cache once the recipe has made them."""
        return self.world_recipe.build(lambda phase, done, total: None)

    @property
    def ready(self) -> bool:
        return self.world_recipe.directory.is_dir()

    @property
    def sft_dir(self) -> Path:
        return self.files.sft_dir if self.given is None else self.given.path

    @property
    def base_dir(self) -> Path:
        return self.sft_dir if self.base is None else self.base.path

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.sft_dir) if self.base is None else self.base.tokenizer

    def _pairs(self, split: str, limit: int | None = None) -> PreferenceSet:
        return as_set(self.files.pairs(split)[:limit])

    def preferences(self) -> tuple[PreferenceSet, PreferenceSet]:
        return self._pairs("train", self.config.data.max_pairs), self._pairs("validation")

    def other_domains(self) -> PreferenceSet | None:
        return self._pairs("validation_held_out")

    def prompt_domains(self) -> tuple[list[str], list[str], list[str]]:
        learnt = self._domains(self.config.policy.prompts, "policy.prompts")
        shifted = self._domains(self.config.meta.prompts, "meta.prompts")
        train, validation = self.world.prompts("train"), self.world.prompts("validation")
        return (
            [p.domain for p in train if p.domain in learnt],
            [p.domain for p in train if p.domain in shifted],
            [p.domain for p in validation if p.domain in learnt],
        )

    def load(self, strengths: str | None = None) -> Inputs:
        from preferences.denoise import count_actions
        from preferences.encode import encode_prompt

        limits = self.config.data

        def prompts(split: Split, domains: tuple[str, ...]) -> tuple[Prompt, ...]:
            return tuple(
                Prompt(p.id, p.text, encode_prompt(self.tokenizer, p.text), p.domain)
                for p in self.world.prompts(split)
                if p.domain in domains
            )

        learnt = self._domains(self.config.policy.prompts, "policy.prompts")
        meta_prompts = prompts("train", self._domains(self.config.meta.prompts, "meta.prompts"))
        policy_prompts, eval_prompts = prompts("train", learnt), prompts("validation", learnt)
        longest = max(len(p.token_ids) for p in (*meta_prompts, *policy_prompts, *eval_prompts))
        if longest > limits.max_prompt_tokens:
            raise UserError(
                f"the sandbox's prompts have up to {longest} tokens, data.max_prompt_tokens is {limits.max_prompt_tokens}"
            )
        train, judging, judging_texts = self.for_judges(self.training(strengths))
        pairs, dropped = self.encode_listing(train)
        return Inputs(
            sft_dir=self.sft_dir,
            base_dir=self.base_dir,
            pairs=pairs,
            validation=self.encode(self.preferences()[1]),
            meta_prompts=meta_prompts,
            policy_prompts=policy_prompts,
            eval_prompts=eval_prompts,
            gold=self.world.gold,
            dropped={"preferences": count_reasons(dropped)} if dropped else {},
            denoised={} if strengths is None else count_actions(train),
            training=train,
            stopping=self.stopping(),
            ptx=self._ptx,
            judging=judging,
            judging_texts=judging_texts,
        )


def given_sft(config: RunConfig, world: World) -> GivenModel | None:
    """The model that ``sft.model`` names, checked: it must speak the sandbox's language.

    Args:
        config: of the command.
        world: the sandbox's.

    Returns:
        The model; None where the world's own is used.

    Raises:
        UserError: as ``given_model``, or if it has another tokenizer.
    """
    if config.sft.model is None:
        return None
    longest = max(config.data.max_response_tokens, config.rollout.max_new_tokens)
    given = given_model("sft.model", config.sft.model, config.data, longest)
    remedy = "With data.preferences sandbox, sft.model is null or what `python -m cluster sft` made of this config"
    refuse_other_tokenizer(given, f"sft.model {given.path}", make_tokenizer(world.vocabulary), "the sandbox", remedy)
    return given


def as_set(pairs: list[LabelledPair]) -> PreferenceSet:
    """The world's pairs with the columns of any preference data, and the truth in gold_chosen, gold_rejected and flipped."""
    import pyarrow as pa
    from datasets import Dataset

    text, kinds = pa.large_string(), {"gold_chosen": pa.float64(), "gold_rejected": pa.float64(), "flipped": pa.bool_()}
    columns = dict.fromkeys(("id", "prompt", "chosen", "rejected", "domain"), text) | kinds
    table = pa.table({name: pa.array([vars(pair)[name] for pair in pairs], kind) for name, kind in columns.items()})
    return PreferenceSet(Dataset(table), SANDBOX, "explicit")


def rated_set(pairs: list[RatedPair]) -> PreferenceSet:
    """Users' labels with the columns of any preference data, and the user in ``rater``."""
    import pyarrow as pa
    from datasets import Dataset

    columns = {name: pa.array([vars(pair)[name] for pair in pairs], pa.large_string()) for name in RATED_COLUMNS}
    return PreferenceSet(Dataset(pa.table(columns)), SANDBOX, "explicit")
