"""What `customize` learns from and measures on: general and domain data sets as scored responses, checked and encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.console import Console
from cluster.domain_checks import check_base, has_language_head
from cluster.given_model import given_base
from cluster.inputs import SANDBOX
from cluster.kept_apart import NOTHING, Apart, Prompts, keep_apart
from cluster.sandbox_domains import SandboxDomains
from cluster.seeds import derive
from preferences.queries import QuerySet, TextQuery, chosen_queries, encode_queries, load_queries, split_queries
from preferences.sets import prompt_id
from rm.domain_config import StrategyConfig
from rm.ranked import length_accuracy
from tokens.errors import UserError
from tokens.queries import Query


@dataclass(frozen=True, eq=False)
class QueryData:
    """One data set.

    Args:
        name: of the domain or of the general set.
        train: queries to train on.
        test: held-out queries that are measured on.
        length_alone: accuracy on ``test`` of what looks at the number of tokens alone.
        left_out: rows of the source that cannot be used: tied, too long, ...
        held_out: queries that nothing trains on, of which ``test`` are at most ``customize.measured_queries``.
        held_out_elsewhere: queries that are not trained on because another set holds their prompts out.
        trained_before: held-out queries that are not measured on because what was there before this set has learned from them.
        apart: the prompts of these two.
    """

    name: str
    train: tuple[Query, ...]
    test: tuple[Query, ...]
    length_alone: float
    left_out: int
    held_out: int
    held_out_elsewhere: int
    trained_before: int
    apart: Apart

    def fingerprint(self) -> str:
        """SHA-256 of all that is trained and measured on."""
        return hashlib.sha256(repr((self.name, self.train, self.test)).encode()).hexdigest()

    def in_words(self) -> str:
        """How much there is of it, for a line on the console."""
        measured = f", {len(self.test):,} of them measured on" if len(self.test) < self.held_out else ""
        counts = {
            "left out": self.left_out,
            "not trained on, as another set holds them out": self.held_out_elsewhere,
            "not measured on, as they were trained on before this set came": self.trained_before,
        }
        others = "".join(f", {count:,} {what}" for what, count in counts.items() if count)
        return f"{len(self.train):,} queries to train on, {self.held_out:,} held out{measured}{others}"


@dataclass(frozen=True, eq=False)
class DomainData:
    """All data sets of a customisation.

    Args:
        base: model directory that all stages go back to.
        general: the general sets.
        domains: the domains' sets.
        pool: training queries of all general sets, in the order in which enrichment takes them.
    """

    base: Path
    general: tuple[QueryData, ...]
    domains: tuple[QueryData, ...]
    pool: tuple[Query, ...]

    @property
    def sets(self) -> tuple[QueryData, ...]:
        """All of them, the general ones first."""
        return (*self.general, *self.domains)

    @property
    def tests(self) -> dict[str, tuple[Query, ...]]:
        """Held-out queries by the name of their set."""
        return {data.name: data.test for data in self.sets}

    @property
    def predicts(self) -> bool:
        """Whether the base predicts the next token."""
        return has_language_head(self.base)

    @property
    def from_reward_model(self) -> bool:
        """Whether the base is a general reward model already."""
        from rm.checkpoints import kind_of

        return kind_of(self.base) == "reward model"

    def domain(self, name: str) -> QueryData:
        """One domain's set."""
        return next(data for data in self.domains if data.name == name)

    def fingerprint(self) -> str:
        """SHA-256 of everything that is trained and measured on, as earlier versions noted it."""
        return hashlib.sha256(repr([(data.name, data.train, data.test) for data in self.sets]).encode()).hexdigest()


def base_of(config: RunConfig, sandbox: SandboxDomains | None, what: str) -> tuple[Path, Any]:
    """What every model starts from: the sandbox's own where it is asked for, else ``reward.base``.

    Args:
        config: of the command.
        sandbox: its domains; None where no data set is of it.
        what: the model that is to be named, in words.

    Returns:
        The model's directory, and its tokenizer.

    Raises:
        UserError: if none is named, or it cannot be read.
    """
    if sandbox is not None:
        return sandbox.base_dir, sandbox.tokenizer
    if config.reward.base is None:
        raise UserError(f"reward.base is null: name {what}")
    given = given_base(config.reward.base, config, policy=False)
    return given.path, given.tokenizer


def load_data(config: RunConfig, root: Path, console: Console, settled: Mapping[str, Apart] = NOTHING) -> DomainData:
    """Read, check, split and encode every data set; the sandbox's world is built first where it is asked for and missing.

    What any set holds out no set trains on, see ``cluster.kept_apart``.

    Args:
        config: of the command.
        root: storage root.
        console: shows what is read.
        settled: of the sets that models were fitted on before; see ``DomainDirectory.settled``.

    Returns:
        The data.

    Raises:
        UserError: if a set cannot be used, a strategy asks for more general data than there is, or for what the base model cannot
            have.
    """
    customize = config.customize
    paths = {**customize.general, **customize.domains}
    sandbox = SandboxDomains(config, root, console) if SANDBOX in paths.values() else None
    base, tokenizer = base_of(config, sandbox, "the model directory that the reward models start from (docs/domains.md)")
    check_base(config, base)
    reader = _Reader(config, tokenizer, sandbox)
    texts = {name: reader.read(name, path) for name, path in paths.items()}
    prompts = {name: Prompts.of([q.prompt for q in of.train], [q.prompt for q in of.test]) for name, of in texts.items()}
    apart = keep_apart(prompts, settled)
    sets = {name: reader.encode(of, apart[name]) for name, of in texts.items()}
    for data in sets.values():
        console.say(f"  {data.name:<14} {data.in_words()}; length alone {data.length_alone:.3f}")
    general, domains = (tuple(sets[name] for name in names) for names in (customize.general, customize.domains))
    found = DomainData(base, general, domains, _pool(config, general))
    for name, strategy in customize.strategies.items():
        _check_amounts(config, found, name, strategy)
    return found


def num_general(config: RunConfig, data: DomainData, strategy: StrategyConfig) -> int:
    """Queries of a strategy's general stage.

    Args:
        config: of the command.
        data: read.
        strategy: one of the config's.
    """
    one = config.customize.general_queries or len(data.pool)
    return round(strategy.enrichment * one)


def _check_amounts(config: RunConfig, data: DomainData, name: str, strategy: StrategyConfig) -> None:
    wanted = num_general(config, data, strategy)
    if strategy.general and wanted > len(data.pool):
        raise UserError(
            f"customize.strategies.{name}.enrichment {strategy.enrichment:g} times general_queries "
            f"{config.customize.general_queries} asks for {wanted:,} general queries, there are {len(data.pool):,} to train on: "
            "lower one of the two, or add a general data set"
        )
    for domain in data.domains:
        asked = round(strategy.rehearsal * len(domain.train))
        there = wanted if strategy.general else len(data.pool)
        if asked > there:
            raise UserError(
                f"customize.strategies.{name}.rehearsal {strategy.rehearsal:g} asks for {asked:,} general queries beside the "
                f"{len(domain.train):,} of {domain.name}, there are {there:,}: lower it"
            )


def _pool(config: RunConfig, general: Sequence[QueryData]) -> tuple[Query, ...]:
    """General training queries in an order of the seed's, so that a smaller factor's are the first of a larger one's."""
    import torch

    queries = [query for data in general for query in data.train]
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(derive(config.seed, "general order")))
    return tuple(queries[i] for i in order.tolist())


@dataclass(frozen=True, eq=False)
class _Texts:
    """One data set as text: all of it, and its training and held-out queries."""

    given: QuerySet
    train: tuple[TextQuery, ...]
    test: tuple[TextQuery, ...]


class _Reader:
    """Reads one data set after another."""

    def __init__(self, config: RunConfig, tokenizer: Any, sandbox: SandboxDomains | None) -> None:
        self.config, self.tokenizer, self.sandbox = config, tokenizer, sandbox

    def read(self, name: str, path: str) -> _Texts:
        customize, data = self.config.customize, self.config.data
        if path == SANDBOX:
            assert self.sandbox is not None
            return _Texts(*self.sandbox.queries(name, name in customize.domains))
        given = load_queries(name, data.model_copy(update={"preferences": path, "validation": None}), self.tokenizer)
        return _Texts(given, *split_queries(given, customize.test_fraction, self.config.seed))

    def encode(self, texts: _Texts, apart: Apart) -> QueryData:
        customize, name, seed = self.config.customize, texts.given.name, self.config.seed
        train = tuple(query for query in texts.train if prompt_id(query.prompt) not in apart.train)
        test = tuple(query for query in texts.test if prompt_id(query.prompt) not in apart.test)
        counts = (len(texts.train) - len(train), len(texts.test) - len(test))
        if not train or not test:
            what = "is held out to measure another set" if not train else "was trained on by a set that was there before it"
            raise UserError(
                f"{name} ({texts.given.source}): every prompt that it {'trains' if not train else 'is measured'} on {what}, and "
                "accuracy is measured on prompts that nothing was trained on: expected queries of its own. Add some, or begin "
                "under another name"
            )
        held_out = len(test)
        train = chosen_queries(train, customize.domain_queries if name in customize.domains else None, seed)
        test = chosen_queries(test, customize.measured_queries, seed)
        train_ids, _ = encode_queries(texts.given, train, self.tokenizer, self.config.data)
        test_ids, _ = encode_queries(texts.given, test, self.tokenizer, self.config.data)
        left_out = len(texts.given.dropped) + len(train) - len(train_ids) + len(test) - len(test_ids)
        alone = length_accuracy(train_ids, test_ids)
        return QueryData(name, train_ids, test_ids, alone, left_out, held_out, *counts, apart)


def length_baselines(data: DomainData) -> Mapping[str, float]:
    """Accuracy of length alone by set.

    Args:
        data: read.
    """
    return {each.name: each.length_alone for each in data.sets}
