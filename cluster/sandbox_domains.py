"""The sandbox's domains as scored responses."""

from __future__ import annotations

from pathlib import Path

from cluster.config import RunConfig
from cluster.console import Console
from cluster.inputs import SANDBOX
from preferences.queries import QuerySet, TextQuery
from tokens.errors import UserError


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
