"""What `generalize` learns from and is tested on: labelled domains and targets, checked and encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.generalize import DomainPart
from cluster.config import RunConfig
from cluster.console import Console
from cluster.domain_checks import refuse_idle
from cluster.domain_data import base_of
from cluster.inputs import SANDBOX
from cluster.sandbox_domains import SandboxDomains
from preferences.queries import QuerySet, encode_queries, load_queries, split_queries
from preferences.texts import Example, TextRow, TextSet, encode_texts, load_texts
from rm.bilevel_config import GeneralizeConfig, LabelledDomain, TargetDomain, check_domains
from rm.config import RewardConfig
from sandbox.world import World
from tokens.errors import UserError
from tokens.queries import Query

KEYS_OF_FORMS = {
    "closed": (),
    "unrolled": ("inner_steps", "inner_lr"),
    "first_order": ("inner_steps", "inner_lr"),
    "implicit": ("solver", "solver_iterations", "neumann_step", "damping"),
}
"""Keys of `generalize` that only some forms of differentiation read."""


@dataclass(frozen=True, eq=False)
class GeneralizeData:
    """All domains.

    Args:
        base: model directory that everything starts from, with a language head.
        labelled: to learn from.
        targets: to use the reward model in.
    """

    base: Path
    labelled: tuple[DomainPart, ...]
    targets: tuple[DomainPart, ...]

    def fingerprint(self) -> str:
        """SHA-256 of everything that is trained and measured on."""
        return hashlib.sha256(repr((self.labelled, self.targets)).encode()).hexdigest()


def check_settings(config: RunConfig) -> None:
    """Refuse what `generalize` has no use for, and domains that lack something; before anything is read.

    Args:
        config: of the command.

    Raises:
        UserError: naming the keys.
    """
    try:
        check_domains(config.generalize)
    except ValueError as error:
        raise UserError(str(error)) from error
    usual = RewardConfig()
    more = {f"reward.{key}": (getattr(config.reward, key), getattr(usual, key)) for key in ("epochs", "batch_size")}
    hint = "; generalize.steps, domains_per_step and queries_per_step say how long and on how much it trains"
    refuse_idle(config, "generalize", more, hint)
    _refuse_keys_of_other_forms(config.generalize)


def _refuse_keys_of_other_forms(given: GeneralizeConfig) -> None:
    usual, used = GeneralizeConfig().model_dump(), KEYS_OF_FORMS[given.form]
    idle = [key for keys in KEYS_OF_FORMS.values() for key in keys if key not in used]
    if given.form == "implicit" and given.solver == "cg":
        idle.append("neumann_step")
    asked = [f"generalize.{key} {value!r}" for key, value in given.model_dump(include=set(idle)).items() if value != usual[key]]
    if asked:
        raise UserError(
            f"{', '.join(asked)}: generalize.form {given.form!r} has no use for it; leave it out, or set a form that has "
            "(docs/generalize.md)"
        )


def load_data(config: RunConfig, root: Path, console: Console) -> GeneralizeData:
    """Read, check, split and encode every domain; the sandbox's world is built first where it is asked for and missing.

    Args:
        config: of the command.
        root: storage root.
        console: shows what is read.

    Raises:
        UserError: if a domain cannot be used, or the base is no language model.
    """
    given = config.generalize
    paths = {path for each in given.domains.values() for path in (each.texts, each.preferences)}
    paths |= {path for target in given.targets.values() for path in (target.texts, target.preferences)}
    sandbox = SandboxDomains(config, root, console) if SANDBOX in paths else None
    base, tokenizer = base_of(config, sandbox, "the language model that everything starts from (docs/generalize.md)")
    _refuse_other_models(base)
    read = _Reader(config, tokenizer, sandbox)
    labelled = tuple(read.labelled(name, each) for name, each in given.domains.items())
    targets = tuple(read.target(name, each) for name, each in given.targets.items())
    for part in (*labelled, *targets):
        what = f"{len(part.train):,} queries to train on" if part.train else f"target, {len(part.prompts):,} prompts"
        console.say(f"  {part.name:<14} {what}, {len(part.test):,} held out, {len(part.texts):,} texts")
    return GeneralizeData(base, labelled, targets)


def _refuse_other_models(base: Path) -> None:
    from rm.checkpoints import kind_of

    kind = kind_of(base)
    if kind != "language model":
        raise UserError(
            f"{base} holds a model of the kind {kind!r}, and a domain's reference policy must predict the next token: start from "
            "a causal language model (reward.base)"
        )


def sandbox_texts(world: World, name: str) -> tuple[tuple[str, str], ...]:
    """A domain's texts in the sandbox: those of its prompts in the corpus, the half that its own taste likes better.

    Args:
        world: the sandbox's.
        name: of the domain, whose number is that of the user who judges it.

    Raises:
        UserError: if there is no such domain.
    """
    if name not in world.domains:
        raise UserError(f"generalize: {name} is sandbox, whose domains are {', '.join(world.domains)}")
    user = world.users[world.domains.index(name)]
    own = [text for text in world.corpus() if text[0].startswith(f"@{name} ")]
    return tuple(sorted(own, key=lambda text: -world.gold(*text, user=user))[: len(own) // 2])


class _Reader:
    """Reads one domain after another."""

    def __init__(self, config: RunConfig, tokenizer: Any, sandbox: SandboxDomains | None) -> None:
        self.config, self.tokenizer, self.sandbox = config, tokenizer, sandbox

    def labelled(self, name: str, domain: LabelledDomain) -> DomainPart:
        assert domain.preferences is not None and domain.texts is not None  # as check_domains holds
        train, test = self._queries(name, domain.preferences, split=True)
        return DomainPart(name, self._texts(name, domain.texts), train, test, ())

    def target(self, name: str, domain: TargetDomain) -> DomainPart:
        assert domain.texts is not None
        test: tuple[Query, ...] = ()
        if domain.preferences is not None:
            _, test = self._queries(name, domain.preferences, split=False)
        texts = self._texts(name, domain.texts)
        prompts = tuple(dict.fromkeys(prompt for prompt, _ in texts))[: self.config.generalize.num_prompts]
        return DomainPart(name, texts, (), test, prompts)

    def _queries(self, name: str, path: str, split: bool) -> tuple[tuple[Query, ...], tuple[Query, ...]]:
        """Training and held-out queries; of a target all are held out."""
        given, data = self.config.generalize, self.config.data
        if path == SANDBOX:
            assert self.sandbox is not None
            found, train, test = self.sandbox.queries(name, domain=True)
        else:
            found = load_queries(name, data.model_copy(update={"preferences": path, "validation": None}), self.tokenizer)
            train, test = split_queries(found, given.test_fraction, self.config.seed) if split else ((), found.queries)
        measured = self._encoded(found, test[: given.measured_queries])
        return (self._encoded(found, train) if split else ()), measured

    def _encoded(self, found: QuerySet, queries: Sequence[Any]) -> tuple[Query, ...]:
        return encode_queries(found, queries, self.tokenizer, self.config.data)[0]

    def _texts(self, name: str, path: str) -> tuple[Example, ...]:
        data = self.config.data
        if path == SANDBOX:
            assert self.sandbox is not None
            rows = tuple(TextRow(f"{name} {i}", *text) for i, text in enumerate(sandbox_texts(self.sandbox.world, name), start=1))
            texts = TextSet(rows, SANDBOX, False)
        else:
            texts = load_texts(path, data.split, data.allow_hub, data.drop_bad, self.tokenizer)
        examples, _ = encode_texts(texts, self.tokenizer, data.max_prompt_tokens + data.max_response_tokens, data.drop_bad)
        if not examples:
            raise UserError(
                f"generalize: {name} has no texts in {path} to fine-tune its reference policy on, which the lower level starts "
                "from; name some, or take the domain out"
            )
        return examples
