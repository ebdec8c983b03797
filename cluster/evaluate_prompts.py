"""The prompts that two models are compared on: a file's, or those of the sandbox's test split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.load_config import load_config
from preferences.formats import ChatTemplate, PlainTemplate, Template
from tokens.errors import UserError

SANDBOX = "sandbox:"
SPLITS = ("test", "validation", "train")
"""Of the sandbox's prompts."""


@dataclass(frozen=True)
class Prompts:
    """Prompts, each at its place.

    Args:
        name: where they come from.
        ids: of each.
        domains: of each, "" where there is none.
        plain: of each, as a reader sees it.
        conversational: whether they are messages, which a template renders.
        rendered: the texts by a template; where they are no messages, the texts.
        sandbox: the config of their world; None for a file.
    """

    name: str
    ids: tuple[str, ...]
    domains: tuple[str, ...]
    plain: tuple[str, ...]
    conversational: bool
    rendered: Callable[[Template], tuple[str, ...]]
    sandbox: RunConfig | None

    @property
    def digest(self) -> str:
        """SHA-256 of all texts, in order."""
        return hashlib.sha256(json.dumps(self.plain).encode()).hexdigest()

    def for_model(self, tokenizer: Any) -> tuple[str, ...]:
        """As a model with this tokenizer is given them.

        Raises:
            UserError: if they are messages, and the tokenizer has no chat template.
        """
        if not self.conversational:
            return self.plain
        if not tokenizer.chat_template:
            raise UserError(
                f"{self.name}: the prompts are conversational, and the tokenizer of {tokenizer.name_or_path} has no chat "
                "template: set one, or turn the messages into text"
            )
        return self.rendered(ChatTemplate(tokenizer))

    def for_judge(self, judge: str, template: Template | None) -> tuple[str, ...]:
        """As a judge with this template is given them.

        Raises:
            UserError: if they are messages, and it has none.
        """
        if not self.conversational:
            return self.plain
        if template is None:
            raise UserError(f"{self.name}: the prompts are conversational, and --judge {judge} has no chat template to read them")
        return self.rendered(template)


def open_prompts(name: str, split: str | None, limit: int | None, allow_hub: bool) -> Prompts:
    """Read the prompts.

    Args:
        name: a data set with a column ``prompt`` (text or messages), or sandbox:CONFIG.yaml.
        split: of it; None = train, and test for the sandbox.
        limit: take the first so many; None = all.
        allow_hub: whether a name that is no local path may be fetched.

    Raises:
        UserError: if there are none.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--num-prompts must be at least 1, got {limit}")
    if not name.startswith(SANDBOX):
        return _of_file(name, split or "train", limit, allow_hub)
    from sandbox.world import World

    config = load_config(Path(name.removeprefix(SANDBOX)))
    chosen = split or SPLITS[0]
    if chosen not in SPLITS:
        raise UserError(f"the sandbox's prompts have the splits {', '.join(SPLITS)}, not {chosen!r}; set --split")
    found = World(config.world).prompts(chosen)[:limit]  # type: ignore[arg-type]
    texts = tuple(prompt.text for prompt in found)
    ids, domains = tuple(prompt.id for prompt in found), tuple(prompt.domain for prompt in found)
    return Prompts(f"the sandbox's {chosen} prompts", ids, domains, texts, False, lambda template: texts, config)


def _of_file(name: str, split: str, limit: int | None, allow_hub: bool) -> Prompts:
    from preferences.load import load_prompts

    def read(template: Template) -> Any:
        try:
            return load_prompts(name, split, allow_hub, max_prompts=limit, template=template)
        except UserError as error:  # there is no config here to leave rows out by
            raise UserError(
                str(error).replace("set data.drop_bad to true to leave them out and list them", "leave them out")
            ) from error

    plain = read(PlainTemplate())
    ids = tuple(plain.rows["id"])

    def rendered(template: Template) -> tuple[str, ...]:
        texts = tuple(read(template).rows["prompt"])
        if len(texts) != len(ids):
            raise UserError(f"{name}: a chat template makes one text of two different prompts: leave one of them out")
        return texts

    domains = tuple(plain.rows["domain"])
    return Prompts(name, ids, domains, tuple(plain.rows["prompt"]), plain.templated, rendered, None)
