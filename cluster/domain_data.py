"""What `customize` learns from and measures on: general and domain data sets as scored responses, checked and encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.console import Console
from cluster.given_model import given_base
from cluster.inputs import SANDBOX
from cluster.seeds import derive
from preferences.queries import QuerySet, TextQuery, encode_queries, load_queries, split_queries
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
        test: held-out queries.
        length_alone: accuracy on ``test`` of what looks at the number of tokens alone.
        left_out: rows of the source that are in neither.
    """

    name: str
    train: tuple[Query, ...]
    test: tuple[Query, ...]
    length_alone: float
    left_out: int


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
    def tests(self) -> dict[str, tuple[Query, ...]]:
        """Held-out queries by the name of their set, the general ones first."""
        return {data.name: data.test for data in (*self.general, *self.domains)}

    @property
    def language_model(self) -> bool:
        """Whether the base predicts the next token."""
        from rm.checkpoints import kind_of

        return kind_of(self.base) == "language model"

    def domain(self, name: str) -> QueryData:
        """One domain's set."""
        return next(data for data in self.domains if data.name == name)

    def fingerprint(self) -> str:
        """SHA-256 of everything that is trained and measured on."""
        return hashlib.sha256(
            repr([(data.name, data.train, data.test) for data in (*self.general, *self.domains)]).encode()
        ).hexdigest()


def check_settings(config: RunConfig) -> None:
    """Refuse what `customize` has no use for, and strategies without their data; before anything is read.

    Raises:
        UserError: naming the keys.
    """
    customize = config.customize
    if not customize.domains:
        raise UserError("customize.domains is empty: name at least one domain and its data, see docs/domains.md")
    needed = [name for name, strategy in customize.strategies.items() if strategy.general or strategy.rehearsal]
    if needed and not customize.general:
        raise UserError(
            f"customize.general is empty, and the strategies {', '.join(needed)} learn from general data: name a general data "
            "set, or set their general to false and rehearsal to 0"
        )
    more = {"customize.lora.dropout": (customize.lora.dropout, 0)}
    refuse_idle(config, "customize", more, " (adapters are customize.lora, measurements customize.measure_every)")


def refuse_idle(config: RunConfig, command: str, more: Mapping[str, tuple[object, object]], hint: str = "") -> None:
    """Refuse keys of ``reward`` that a command which fits domains side by side has no use for.

    Args:
        config: of the command.
        command: its name.
        more: further keys, with what is given and what may be.
        hint: what is there instead; behind the message.

    Raises:
        UserError: naming the keys.
    """
    reward = config.reward
    idle = {
        "start": (reward.start, "sft"),
        "lora.rank": (reward.lora.rank, 0),
        "contrastive.method": (reward.contrastive.method, "none"),
        "dropout": (reward.dropout, 0),
        "packing": (reward.packing, False),
        "backward_size": (reward.backward_size, None),
        "patience": (reward.patience, None),
        "evaluate_every": (reward.evaluate_every, None),
    }
    values = {f"reward.{key}": pair for key, pair in idle.items()} | dict(more)
    asked = [f"{key} {given!r}" for key, (given, usual) in values.items() if given != usual]
    if asked:
        raise UserError(f"{command} has no use for {', '.join(asked)}: leave it out{hint}")
    if config.resources.reward.num_ranks > 1:
        raise UserError(
            f"resources.reward.num_ranks is {config.resources.reward.num_ranks}: {command} fits each model in one process, and "
            "domains side by side; set it to 1"
        )


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


def load_data(config: RunConfig, root: Path, console: Console) -> DomainData:
    """Read, check, split and encode every data set; the sandbox's world is built first where it is asked for and missing.

    Args:
        config: of the command.
        root: storage root.
        console: shows what is read.

    Returns:
        The data.

    Raises:
        UserError: if a set cannot be used, a strategy asks for more general data than there is, or for an imitation loss that the
            base model cannot have.
    """
    customize = config.customize
    sandbox = (
        SandboxDomains(config, root, console) if SANDBOX in (*customize.general.values(), *customize.domains.values()) else None
    )
    base, tokenizer = base_of(config, sandbox, "the model directory that the reward models start from (docs/domains.md)")
    _check_imitation(config, base)
    read = _Reader(config, tokenizer, sandbox)
    general = tuple(read(name, path, domain=False) for name, path in customize.general.items())
    domains = tuple(read(name, path, domain=True) for name, path in customize.domains.items())
    for data in (*general, *domains):
        left = f", {data.left_out:,} left out" if data.left_out else ""
        console.say(
            f"  {data.name:<14} {len(data.train):,} queries to train on, {len(data.test):,} held out{left}; length alone "
            f"{data.length_alone:.3f}"
        )
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


def _check_imitation(config: RunConfig, base: Path) -> None:
    from rm.checkpoints import kind_of

    asked = [name for name, s in config.customize.strategies.items() if s.general_imitation or s.domain_imitation]
    kind = kind_of(base)
    if asked and kind != "language model":
        article = "an" if kind == "encoder" else "a"
        raise UserError(
            f"the strategies {', '.join(asked)} have an imitation loss, which needs a model that predicts the next token, and "
            f"{base} holds {article} {kind} without a language head. Start from a causal language model (reward.base), or set "
            "general_imitation and domain_imitation to 0"
        )


def _pool(config: RunConfig, general: Sequence[QueryData]) -> tuple[Query, ...]:
    """General training queries in an order of the seed's, so that a smaller factor's are the first of a larger one's."""
    import torch

    queries = [query for data in general for query in data.train]
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(derive(config.seed, "general order")))
    return tuple(queries[i] for i in order.tolist())


class _Reader:
    """Reads one data set after another."""

    def __init__(self, config: RunConfig, tokenizer: Any, sandbox: SandboxDomains | None) -> None:
        self.config, self.tokenizer, self.sandbox = config, tokenizer, sandbox

    def __call__(self, name: str, path: str, domain: bool) -> QueryData:
        customize, data = self.config.customize, self.config.data
        if path == SANDBOX:
            assert self.sandbox is not None
            given, train, test = self.sandbox.queries(name, domain)
        else:
            given = load_queries(name, data.model_copy(update={"preferences": path, "validation": None}), self.tokenizer)
            train, test = split_queries(given, customize.test_fraction, self.config.seed)
        limit = customize.domain_queries if domain else None
        train_ids, lost = encode_queries(given, train[:limit], self.tokenizer, data)
        test_ids, lost_too = encode_queries(given, test[: customize.measured_queries], self.tokenizer, data)
        left_out = len(given.dropped) + len(lost) + len(lost_too)
        return QueryData(name, train_ids, test_ids, length_accuracy(train_ids, test_ids), left_out)


class SandboxDomains:
    """The sandbox's pairs: general ones as its annotator labelled them, a domain's judged by a taste of its own.

    Domain number i is judged by the world's user number i, whose taste turns some of the common likings round: what is good in
    the domain is not what is good in general.
    """

    def __init__(self, config: RunConfig, root: Path, console: Console) -> None:
        from cluster.inputs import open_source
        from cluster.sandbox_source import SandboxSource

        inside = config.model_copy(update={"data": config.data.model_copy(update={"preferences": SANDBOX})})
        source = open_source(inside, root, policy=False)
        assert isinstance(source, SandboxSource)
        self.source, self.world = source, source.world
        if len(self.world.users) < len(self.world.domains):
            raise UserError(
                f"world.num_users is {len(self.world.users)}: every one of the {len(self.world.domains)} domains has a taste "
                "of its own; raise it"
            )
        if not source.prepared:
            with console.bar("prepare the sandbox") as bar:
                assert source.recipe is not None
                source.recipe(lambda unit, done, total: bar.update(done, total, unit))
        self.base_dir, self.tokenizer = source.base_dir, source.tokenizer

    def queries(self, name: str, domain: bool) -> tuple[QuerySet, tuple[TextQuery, ...], tuple[TextQuery, ...]]:
        """The set, its training queries and its held-out ones."""
        if domain and name not in self.world.train_domains:
            raise UserError(f"the domain {name} is sandbox, whose domains with pairs are {', '.join(self.world.train_domains)}")
        make = self._of_domain if domain else self._general
        train, test = (make(split, name) for split in ("train", "validation"))
        return QuerySet(name, f"{SANDBOX} {name}" if domain else SANDBOX, (*train, *test)), train, test

    def _general(self, split: str, name: str) -> tuple[TextQuery, ...]:
        pairs = self.source.files.pairs(split)
        return tuple(TextQuery(f"{name}-{p.id}", p.prompt, (p.chosen, p.rejected), (1.0, 0.0)) for p in pairs)

    def _of_domain(self, split: str, name: str) -> tuple[TextQuery, ...]:
        user = self.world.users[self.world.domains.index(name)]
        responses: dict[str, dict[str, None]] = {}
        for pair in self.source.files.pairs(split):
            if pair.domain == name:
                responses.setdefault(pair.prompt, {}).update({pair.chosen: None, pair.rejected: None})
        found = []
        for number, (prompt, texts) in enumerate(responses.items()):
            scores = tuple(self.world.gold(prompt, text, user=user) for text in texts)
            query = TextQuery(f"{name}-{split}-{number:05d}", prompt, tuple(texts), scores)
            if not query.tied:
                found.append(query)
        return tuple(found)


def length_baselines(data: DomainData) -> Mapping[str, float]:
    """Accuracy of length alone by set.

    Args:
        data: read.
    """
    return {each.name: each.length_alone for each in (*data.general, *data.domains)}
