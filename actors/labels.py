"""Label selectors, as Ray reads them: which nodes a process may run on. Arithmetic without Ray."""

from __future__ import annotations

import re
from collections.abc import Mapping

NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
KEY = re.compile(rf"(?:(?P<prefix>{NAME}(?:\.{NAME})*)/)?{NAME}")
VALUE = re.compile(rf"(?P<not>!?)(?:(?P<one>{NAME})|in\((?P<several>{NAME}(?:, ?{NAME})*)\))")
LONGEST_PREFIX = 253


def wrong_with(selector: Mapping[str, str]) -> str | None:
    """What Ray would not accept in a selector.

    Args:
        selector: values by the key of the label.

    Returns:
        The first mistake in words; None where there is none.
    """
    for key, value in selector.items():
        found = KEY.fullmatch(key)
        if found is None or len(found["prefix"] or "") > LONGEST_PREFIX:
            return (
                f"the label's key {key!r} is not one: letters and digits, with '-', '_' and '.' between them, 63 at most, after "
                "a prefix and '/' if need be"
            )
        if VALUE.fullmatch(value) is None:
            return (
                f"{key} asks for {value!r}: a value of 63 letters and digits at most, with '-', '_' and '.' between them, or "
                "in(one, another), or either after '!' for all but these, is expected"
            )
    return None


def satisfies(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """True if a node with these labels is one that the selector asks for.

    Args:
        labels: of the node.
        selector: checked by ``wrong_with``.
    """
    for key, asked in selector.items():
        found = VALUE.fullmatch(asked)
        assert found is not None, asked
        wanted = [found["one"]] if found["one"] else re.split(", ?", found["several"])
        there = key in labels and labels[key] in wanted
        if there == bool(found["not"]):
            return False
    return True


def in_words(selector: Mapping[str, str]) -> str:
    """A selector as people write it, e.g. ``pool=trainer``."""
    return ",".join(f"{key}={value}" for key, value in selector.items())
