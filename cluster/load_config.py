"""A config from YAML and dotted overrides; every mistake in it is one readable message."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from cluster.config import RunConfig
from tokens.errors import UserError
from tokens.paths import check_path

LARGEST, MOST_VALUES, DEEPEST = 1_000_000, 10_000, 20
"""Of a config: bytes of its file, values in it, sections in sections."""


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, but a key that comes twice is an error instead of a silent last-one-wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {sorted(twice)[0]!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML recipe and apply overrides such as ``--policy.kl.coef 0.05``.

    Args:
        path: of the YAML file.
        overrides: arguments as they stand on the command line.

    Returns:
        The checked config.

    Raises:
        UserError: for a file that cannot be read, an unknown key (the nearest known one is named), a wrong value, or sections
            that contradict each other.
    """
    return checked(with_overrides(read_yaml(path), overrides), path)


def read_yaml(path: Path) -> dict[str, Any]:
    """The file's mapping.

    Raises:
        UserError: if it is missing, empty, not UTF-8, not YAML, or not a mapping.
    """
    check_path(str(path))
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
        text = raw.decode("utf-8")
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"there is no config file {path}" + (f"; there are: {', '.join(near)}" if near else "")) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory; give a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if len(raw) > LARGEST:
        raise UserError(f"{path} is larger than {LARGEST:,} bytes: that is no config; data sets are named in one")
    try:
        tree = _parse(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of sections, got {'nothing' if tree is None else type(tree).__name__}")
    return tree


def with_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The tree with ``--a.b value`` or ``--a.b=value`` put in; values are read as YAML."""
    words = [part for word in overrides for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise UserError(f"overrides come in pairs, --section.key value; got: {' '.join(overrides)}")
    for flag, value in zip(words[::2], words[1::2], strict=True):
        *parents, last = flag.removeprefix("--").replace("-", "_").split(".")
        branch = tree
        for parent in parents:
            child = branch.setdefault(parent, {})
            if not isinstance(child, dict):
                raise UserError(f"{flag}: {parent} is a value, not a section")
            branch = child
        try:
            branch[last] = _number(_parse(value))
        except yaml.YAMLError:
            branch[last] = value
    return tree


def _parse(text: str) -> Any:
    """A YAML text as values. It must not grow when aliases are written out, nor be deeper than any config."""
    loader = _UniqueKeys(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _weigh(node, {}, ())
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError(f"it is nested more than {DEEPEST} deep") from None
    finally:
        loader.dispose()


def _weigh(node: yaml.Node, known: dict[int, int], above: tuple[int, ...]) -> int:
    """How many values a node is once its aliases are written out."""
    if len(above) > DEEPEST or id(node) in above:
        raise yaml.YAMLError(f"it is nested more than {DEEPEST} deep")
    if id(node) not in known:
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        here = (*above, id(node))
        size = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_weigh(part, known, here) for part in inner))
        if size > MOST_VALUES:
            raise yaml.YAMLError(f"it holds more than {MOST_VALUES:,} values once its aliases are written out")
        known[id(node)] = size
    return known[id(node)]


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-6 as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def checked(tree: dict[str, Any], source: Path | str) -> RunConfig:
    """Validate a tree.

    Args:
        tree: as read.
        source: named in messages.

    Raises:
        UserError: naming every wrong key.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(_words(dict(problem)) for problem in error.errors(include_url=False))
        raise UserError(f"{source}: {problems}") from None


def _words(problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = list(_section(location[:-1]).model_fields)
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5) or _elsewhere(location[-1])
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {name}; {hint}"
    if problem["type"] == "missing":
        return f"the key {name} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{name}: {message}" if name else message
    return f"{name}: {message[0].lower()}{message[1:]}, got {problem['input']!r}"


def _section(path: Sequence[str]) -> type[BaseModel]:
    section: type[BaseModel] = RunConfig
    keys = iter(path)
    for key in keys:
        annotation = section.model_fields[key].annotation
        found = _as_section(annotation)
        assert found is not None
        section = found
        if _is_named(annotation):
            next(keys, None)  # the name that the user gave
    return section


def _is_named(annotation: Any) -> bool:
    """Whether a key holds sections by names of the user's."""
    return get_origin(annotation) is dict


def _as_section(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, also where it may be null; None for a plain value."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def all_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, tuple[str, str]]:
    """Every dotted key with its default and what it means.

    Args:
        section: to start from.
        prefix: of the keys.

    Returns:
        By key: default and description.
    """
    keys: dict[str, tuple[str, str]] = {}
    for name, info in section.model_fields.items():
        inner = _as_section(info.annotation)
        if inner is not None:
            keys |= all_keys(inner, f"{prefix}{name}.NAME." if _is_named(info.annotation) else f"{prefix}{name}.")
        else:
            default = "required" if info.is_required() else repr(info.default)
            keys[prefix + name] = (default, " ".join((info.description or "").split()))
    return keys


def _elsewhere(name: str) -> list[str]:
    """Keys of that name, or a like one, in other sections."""
    by_last: dict[str, str] = {key.split(".")[-1]: key for key in all_keys()}
    return [by_last[near] for near in difflib.get_close_matches(name, by_last, n=1, cutoff=0.8)]
