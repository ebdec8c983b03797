"""The user's own preference pairs as a source of pairs and prompts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.preparer import Recipe
from cluster.config import RunConfig
from cluster.given_model import GivenModel, given_base, given_model, refuse_base_of_a_run
from cluster.inputs import Inputs, Source
from policy.config import SFTConfig
from preferences.sets import PreferenceSet, count_reasons
from tokens.errors import UserError
from tokens.records import Prompt

if TYPE_CHECKING:
    from preferences.sets import PromptSet

FEWEST_EVALUATION_PROMPTS = 8


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
        raise UserError(
            f"{key}: every prompt is held out to judge the policy; hold out fewer (data.validation_fraction, data.validation) or "
            "add prompts"
        )
    return kept


def publish(partial: Path, final: Path) -> None:
    """Give a finished directory of the cache its name; where another run was faster, its own is as good."""
    try:
        os.replace(partial, final)
    except OSError:
        if not final.is_dir():
            raise


def made_tokenizer(texts: Sequence[str], size: int, cache: Path) -> tuple[Path, Any]:
    """A byte-level tokenizer trained on texts, or found in the cache by their hash.

    Args:
        texts: to learn from.
        size: entries.
        cache: directory of tokenizers.

    Returns:
        Its directory, and the tokenizer.
    """
    from transformers import AutoTokenizer

    from policy.sft import train_tokenizer

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
        digest.update(self.sft.model_dump_json(exclude={"data", "microbatch_size"}).encode())
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


@dataclass(frozen=True)
class PolicyPrompts:
    """The prompts of a run; see ``Inputs``."""

    meta: tuple[Prompt, ...]
    policy: tuple[Prompt, ...]
    evaluation: tuple[Prompt, ...]


class DataSource(Source):
    """Preference pairs of the user's own. All of them are read and encoded at once, so that what is wrong is known early.

    The SFT model is trained on the chosen responses as they were given: ``data.denoise`` has no say in it.

    Args:
        config: of the run.
        cache: directory of trained tokenizers and SFT models.
        policy: as in ``open_source``.
    """

    def __init__(self, config: RunConfig, cache: Path, policy: bool = True) -> None:
        from datasets import disable_progress_bars

        from cluster.texts import ptx_texts
        from preferences.labels import refuse_other_labels
        from preferences.load import load_preferences, load_validation

        disable_progress_bars()  # type: ignore[no-untyped-call]
        super().__init__(config)
        data = config.data
        if policy and config.evaluation.judge == "gold":
            raise UserError(
                f"evaluation.judge gold is the sandbox's truth; with data.preferences {data.preferences!r} set evaluation.judge "
                "to held_out, or to ensemble"
            )
        base = None if config.reward.base is None else given_base(config.reward.base, config, policy)
        given = self._start(base, policy)
        chat_tokenizer = given.tokenizer if given else None
        preferences = load_preferences(data, chat_tokenizer)
        refuse_other_labels(preferences)
        if data.validation is None:
            self._train, self._validation = preferences.split(data.validation_fraction, config.seed)
        else:
            self._train, self._validation = load_validation(data, preferences, chat_tokenizer)
            refuse_other_labels(self._validation)
        tokenizer_dir = cache
        if given is None:
            config.refuse_short_context()
            texts = [text for row in self._train.rows for text in (row["prompt"], row["chosen"], row["rejected"])]
            tokenizer_dir, self._tokenizer = made_tokenizer(texts, config.sft.shape.vocab_size, cache)
        else:
            self._tokenizer = given.tokenizer
        if base is not None and policy:
            refuse_base_of_a_run(base, self._tokenizer, "the SFT" if config.sft.model else "the newly made")
        self.pairs, dropped = self.encode_stored(self._train)
        self.validation, dropped_validation = self.encode_stored(self._validation)
        self._unread = (*self._train.dropped, *self._validation.dropped, *dropped_validation)
        self.dropped = {"preferences": count_reasons((*self._unread, *dropped))}
        self.recipe: Recipe | None = None
        if given is None:
            examples = tuple((p.prompt_ids, p.chosen_ids) for p in self.pairs)
            self.recipe = recipe = TextsRecipe(examples, tokenizer_dir, config.sft, config.seed, cache)
            self._sft_dir = recipe.directory
        else:
            self._sft_dir = given.path
        self._base_dir = self._sft_dir if base is None else base.path
        self._prompts = self._choose_prompts() if policy else None
        self._ptx = (
            ptx_texts(config, self._tokenizer, lambda: [(p.prompt_ids, p.chosen_ids) for p in self.pairs]) if policy else ()
        )

    def _start(self, base: GivenModel | None, policy: bool) -> GivenModel | None:
        """The model whose tokenizer is used: the SFT model, or, where no policy is trained, ``reward.base``."""
        config = self.config
        if base is not None and not policy:
            return base
        if config.sft.model is None:
            return None
        longest = max(config.data.max_response_tokens, config.rollout.max_new_tokens)
        return given_model("sft.model", config.sft.model, config.data, longest)

    @property
    def ready(self) -> bool:
        return True

    @property
    def sft_dir(self) -> Path:
        return self._sft_dir

    @property
    def base_dir(self) -> Path:
        return self._base_dir

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    def preferences(self) -> tuple[PreferenceSet, PreferenceSet]:
        return self._train, self._validation

    def other_domains(self) -> None:
        return None

    def _choose_prompts(self) -> PolicyPrompts:
        config, data = self.config, self.config.data
        if config.policy.prompts is None:
            ours, theirs = self._train.prompts(), self._validation.prompts()
        else:
            ours, theirs = self._load_prompts(config.policy.prompts).split(data.validation_fraction, config.seed)
        policy_prompts, eval_prompts = self._encode_prompts(ours), self._encode_prompts(theirs)
        judged = {prompt.text for prompt in eval_prompts}
        policy_prompts = without(policy_prompts, judged, "policy.prompts")
        shifted = self._train.prompts() if config.meta.prompts is None else self._load_prompts(config.meta.prompts)
        self.rendered = shifted.templated
        meta_prompts = without(self._encode_prompts(shifted, config.meta.prompts), judged, "meta.prompts")
        if len(eval_prompts) < FEWEST_EVALUATION_PROMPTS:
            split = data.validation is None or config.policy.prompts is not None
            more = (
                f"raise data.validation_fraction (now {data.validation_fraction:g})" if split else "use a larger data.validation"
            )
            raise UserError(
                f"only {len(eval_prompts)} prompts are held out to judge the policy, "
                f"at least {FEWEST_EVALUATION_PROMPTS} are needed: {more} or add prompts"
            )
        return PolicyPrompts(meta_prompts, policy_prompts, eval_prompts)

    def _load_prompts(self, source: str) -> PromptSet:
        from preferences.load import load_prompts

        data = self.config.data
        return load_prompts(source, data.split, data.allow_hub, data.drop_bad, self.tokenizer)

    def _encode_prompts(self, chosen: PromptSet, source: str | None = None) -> tuple[Prompt, ...]:
        from preferences.encode import encode_prompts

        if not len(chosen):
            return ()
        prompts, dropped = encode_prompts(chosen, self.tokenizer, self.config.data.max_prompt_tokens, self.config.data.drop_bad)
        if source is not None:
            self.dropped[source] = count_reasons((*chosen.dropped, *dropped))
        return tuple(prompts)

    def prompt_domains(self) -> tuple[list[str], list[str], list[str]]:
        assert self._prompts is not None, "opened for reward models only"
        learnt, shifted, judged = (
            [prompt.domain for prompt in prompts]
            for prompts in (self._prompts.policy, self._prompts.meta, self._prompts.evaluation)
        )
        return learnt, shifted, judged

    def load(self, strengths: str | None = None) -> Inputs:
        from preferences.denoise import count_actions

        assert self._prompts is not None, "opened for reward models only"
        (train, judging, judging_texts), dropped = self.for_judges(self.training(strengths)), dict(self.dropped)
        if strengths is None and not judging:
            pairs = tuple(self.pairs)
        else:
            pairs, left_out = self.encode_listing(train)
            dropped["preferences"] = count_reasons((*self._unread, *left_out))
        denoised = {} if strengths is None else count_actions(train)
        return Inputs(
            sft_dir=self.sft_dir,
            base_dir=self.base_dir,
            pairs=pairs,
            validation=tuple(self.validation),
            meta_prompts=self._prompts.meta,
            policy_prompts=self._prompts.policy,
            eval_prompts=self._prompts.evaluation,
            gold=None,
            dropped=dropped,
            denoised=denoised,
            training=train,
            stopping=self.stopping(),
            ptx=self._ptx,
            judging=judging,
            judging_texts=judging_texts,
        )
