"""What a run learns from: pairs, prompts, the SFT model. What is wrong with them is found here, before any process starts."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.preparer import Recipe
from cluster.config import RunConfig
from cluster.seeds import derive
from tokens.errors import UserError
from tokens.pair_store import PairStore
from tokens.records import Pair, Prompt

if TYPE_CHECKING:
    from preferences.sets import DroppedRow, PreferenceSet
    from preferences.texts import Example

SANDBOX = "sandbox"
FEWEST_OF_A_DOMAIN = 2
"""Evaluation prompts of each domain, where every domain has a unit of its own: a standard deviation needs two."""


@dataclass(frozen=True)
class Inputs:
    """What the roles are given.

    Args:
        sft_dir: the SFT model, with its tokenizer.
        base_dir: what reward models start from: ``reward.base``, or the SFT model.
        pairs: D, after ``data.denoise``.
        validation: held-out pairs; may be none.
        meta_prompts: prompts that S_k is sampled for.
        policy_prompts: prompts of PPO.
        eval_prompts: prompts that neither of the two holds.
        gold: the sandbox's truth of (prompt, response); None for real data.
        dropped: rows left out, counted by reason, by data set.
        denoised: training pairs counted by what ``data.denoise`` did to them; empty where it does nothing.
        training: the pairs of D as text, with what was done to them.
        stopping: held-out pairs that early stopping goes by, where these are not ``validation``.
        ptx: texts of PPO's language-modelling loss; none where ``policy.ptx_coef`` is 0.
        judging: pairs that held-out reward models learn from, as they were given; none of them is in ``pairs``. May be none.
        judging_texts: the same as text; None where there are none.
    """

    sft_dir: Path
    base_dir: Path
    pairs: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    meta_prompts: tuple[Prompt, ...]
    policy_prompts: tuple[Prompt, ...]
    eval_prompts: tuple[Prompt, ...]
    gold: Callable[[str, str], float] | None
    dropped: dict[str, dict[str, int]]
    denoised: dict[str, int]
    training: PreferenceSet
    stopping: dict[str, tuple[Pair, ...]]
    ptx: tuple[Example, ...]
    judging: tuple[Pair, ...] = ()
    judging_texts: PreferenceSet | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of pairs and prompts: a run that is continued must be given the same."""
        prompts = (self.meta_prompts, self.policy_prompts, self.eval_prompts)
        named = tuple(each for each in (self.stopping, self.ptx, self.judging) if each)
        return hashlib.sha256(repr((self.pairs, self.validation, prompts, *named)).encode()).hexdigest()


class Source(ABC):
    """Where the inputs come from.

    Args:
        config: of the run.
    """

    recipe: Recipe | None
    """What must be made first, once (the SFT model, the sandbox's pairs); None where nothing is missing."""
    rendered = False
    """Whether a chat template rendered the prompts that S_k is sampled for."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @property
    @abstractmethod
    def sft_dir(self) -> Path:
        """The SFT model, with its tokenizer."""

    @property
    @abstractmethod
    def base_dir(self) -> Path:
        """What reward models start from, with its tokenizer: ``reward.base``, or the SFT model."""

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """That of ``base_dir``: pairs are encoded with it."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """True if the pairs can be read now; False if the recipe must make them first."""

    @property
    def prepared(self) -> bool:
        """True if the recipe has nothing left to make."""
        return self.recipe is None or (self.ready and self.base_dir.is_dir() and self.sft_dir.is_dir())

    @abstractmethod
    def preferences(self) -> tuple[PreferenceSet, PreferenceSet]:
        """Training and held-out pairs as text, as they were given: nothing is denoised. The second may be empty."""

    @abstractmethod
    def other_domains(self) -> PreferenceSet | None:
        """Held-out pairs of domains that no training pair is of; None where none are known."""

    @abstractmethod
    def load(self, strengths: str | None = None) -> Inputs:
        """Everything that a run learns from, once the recipe's directory is there.

        Args:
            strengths: what ``data.denoise`` goes by (see ``cluster.denoising``); None where it does nothing.

        Raises:
            UserError: if the strengths are of other pairs, or anything else is wrong.
        """

    @abstractmethod
    def prompt_domains(self) -> tuple[list[str], list[str], list[str]]:
        """Domains of the prompts that the policy learns from, of those that S_k is sampled for, and of those that it is evaluated
        on, one a prompt; "" where a prompt names none. Known before anything is prepared."""

    def training(self, strengths: str | None) -> PreferenceSet:
        """The training pairs after ``data.denoise``; ``strengths`` as in ``load``."""
        from cluster.denoising import denoised
        from preferences.swap import as_table

        train, _ = self.preferences()
        if strengths is None:
            return train
        fitting = {pair.id for pair in self.encode(train)}  # the others were not measured either
        mask = [name in fitting for name in train.rows["id"]]
        return denoised(self.config, train if all(mask) else train.with_table(as_table(train.rows).filter(mask)), strengths)

    def for_judges(self, train: PreferenceSet) -> tuple[PreferenceSet, tuple[Pair, ...], PreferenceSet | None]:
        """Take out of D what only held-out reward models learn from (``evaluation.held_out_fraction`` of its prompts).

        Args:
            train: D, after ``data.denoise``.

        Returns:
            The rest of D, and their pairs, encoded and as text: with the labels as they were given. All of D and none without
            such models.

        Raises:
            UserError: if there are fewer such pairs than a batch of ``reward.batch_size``, or nothing is left of D.
        """
        from preferences.swap import as_table

        evaluation, size = self.config.evaluation, self.config.reward.batch_size
        if not evaluation.num_held_out:
            return train, (), None
        raw, _ = self.preferences()
        rest, theirs = raw.split(evaluation.held_out_fraction, derive(self.config.seed, "held out"))
        ours = set(rest.rows["id"])
        left = train.with_table(as_table(train.rows).filter([name in ours for name in train.rows["id"]]))
        pairs = self.encode(theirs)
        for what, number in (("held-out reward models", len(pairs)), ("the reward model that pays PPO", len(left))):
            if number < size:
                raise UserError(
                    f"evaluation.held_out_fraction is {evaluation.held_out_fraction:g} of the prompts of {len(raw)} pairs, which "
                    f"leaves {number} pairs for {what}: at least a batch (reward.batch_size {size}) is needed. Give more pairs, "
                    "choose another held_out_fraction, or do without: evaluation.held_out_members 0, and another evaluation.judge"
                )
        return left, pairs, theirs

    def validation_sets(self) -> dict[str, PreferenceSet]:
        """The held-out pairs by the name of their set: "original", and the two that a second labeller makes of them."""
        from preferences.labels import has_labels, validation_sets
        from rm.config import ORIGINAL

        _, held_out = self.preferences()
        return {ORIGINAL: held_out} | (validation_sets(held_out) if has_labels(held_out) else {})

    def stopping(self) -> dict[str, tuple[Pair, ...]]:
        """What ``reward.stop_on`` names, encoded, by its name; empty where that is the held-out pairs as they are."""
        from rm.config import ORIGINAL

        name = self.config.reward.stop_on
        return {} if name == ORIGINAL else {name: self.encode(self.validation_sets()[name])}

    def encode(self, pairs: PreferenceSet) -> tuple[Pair, ...]:
        """Pairs as ids of ``tokenizer``; see ``encode_listing``."""
        return self.encode_listing(pairs)[0]

    def encode_listing(self, pairs: PreferenceSet) -> tuple[tuple[Pair, ...], tuple[DroppedRow, ...]]:
        """As ``encode_stored``, every pair a record of its own."""
        store, dropped = self.encode_stored(pairs)
        return tuple(store), dropped

    def encode_stored(self, pairs: PreferenceSet) -> tuple[PairStore, tuple[DroppedRow, ...]]:
        """Pairs as ids of ``tokenizer``, and those that were left out.

        Raises:
            UserError: if a pair does not fit into data.max_*_tokens and data.drop_bad is false.
        """
        from preferences.encode import encode_pairs

        if not len(pairs):
            return PairStore.of(()), ()
        data = self.config.data
        return encode_pairs(pairs, self.tokenizer, data.max_prompt_tokens, data.max_response_tokens, data.drop_bad)


def open_source(config: RunConfig, root: Path, *, policy: bool = True) -> Source:
    """Check the inputs that the config names.

    Args:
        config: of the run.
        root: the storage root; what is made is cached under it.
        policy: False for a command that trains reward models only: then no prompts are asked for, and ``reward.base`` may have a
            tokenizer of its own.

    Returns:
        The source.

    Raises:
        UserError: if anything is wrong with a data set, a prompt or a model directory.
    """
    from actors.process import import_transformers
    from cluster.data_source import DataSource
    from cluster.sandbox_source import SandboxSource

    import_transformers()  # tokenizers load the models' code too
    kind = SandboxSource if config.data.preferences == SANDBOX else DataSource
    return kind(config, root / "cache", policy)


def check_batches(config: RunConfig, source: Source) -> None:
    """Refuse fewer pairs than a batch of the contrastive loss needs, where they are known already.

    Raises:
        UserError: if there are too few.
    """
    if config.reward.contrastive.method != "none" and source.ready:
        from rm.contrastive_term import check_contrastive

        check_contrastive(config.reward, len(source.preferences()[0]), config.resources.reward.num_ranks)


def check_stopping(config: RunConfig, source: Source) -> None:
    """Refuse a validation set that early stopping should go by and the data do not have, where they can be read already.

    Raises:
        UserError: if it is not there.
    """
    if config.reward.patience is None or not source.ready:
        return
    sets, name = source.validation_sets(), config.reward.stop_on
    if name not in sets or not len(sets[name]):
        there = ", ".join(f"{found} ({len(pairs)} pairs)" for found, pairs in sets.items())
        raise UserError(
            f"reward.stop_on is {name}, and the held-out pairs have no such set (found: {there}): a second labeller's column "
            "makes it. Label the pairs with `python -m cluster relabel`, hold out more of them (data.validation_fraction or "
            "data.validation), or set reward.stop_on to original"
        )


def check_judges(config: RunConfig, source: Source) -> None:
    """Refuse fewer pairs than held-out reward models need, where they are known already; see ``Source.for_judges``.

    Raises:
        UserError: if there are too few.
    """
    if config.evaluation.num_held_out and source.ready:
        source.for_judges(source.preferences()[0])


def check_domains(config: RunConfig, source: Source) -> None:
    """Refuse prompts of domains that nobody was customised for, where every prompt is paid by its own domain's adapter, and of
    people who are not known, where each is paid by its own person's reward.

    Raises:
        UserError: also if a domain has fewer than two evaluation prompts, whose samples its unit is measured on.
    """
    from rm.domain_bank import check_names
    from rm.domain_config import ADAPTERS
    from rm.people import WHO, People

    if config.scorer.reward_model is None or config.reward.base is None:
        return
    base = Path(config.reward.base)
    if (base / WHO).is_file():
        known = People.load(base)
        if known.group != "own":
            return
        check = known.check_names
    elif (base / ADAPTERS).is_dir():
        check = partial(check_names, sorted(path.name for path in (base / ADAPTERS).iterdir()))
    else:
        return
    learnt, shifted, judged = source.prompt_domains()
    judged = judged[: config.evaluation.num_prompts]
    check((*learnt, *judged))
    try:
        check(shifted)
    except UserError as error:
        raise UserError(f"{error}. S_k is sampled for prompts of it: set meta.prompts as policy.prompts") from None
    measured = (*learnt, *judged) if (base / ADAPTERS).is_dir() else learnt  # a person's unit is of everybody's samples
    few = [domain for domain in dict.fromkeys(measured) if judged.count(domain) < FEWEST_OF_A_DOMAIN]
    if few:
        raise UserError(
            f"scorer.reward_model {config.scorer.reward_model}: the domain {few[0]!r} has {judged.count(few[0])} of the "
            f"{len(judged)} evaluation prompts, at least {FEWEST_OF_A_DOMAIN} are needed to measure its unit. Raise "
            "evaluation.num_prompts, or add prompts of the domain"
        )
