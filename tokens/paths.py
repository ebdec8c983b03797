"""Names that a user gives to files and directories: what cannot be one is an error where it is read."""

import re
import unicodedata
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

from tokens.errors import UserError

LONGEST_PART, LONGEST_PATH = 255, 4096
"""Bytes; what file systems take."""


def printable(text: str) -> str:
    """A text on one line that a terminal can show: control characters as escapes, line ends and tabs as blanks.

    Args:
        text: any text, of a file or a model too.
    """
    return "".join(
        character if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else ascii(character)[1:-1]
        for character in re.sub(r"[\t\r\n]+", " ", text.strip("\r\n"))
    )


def check_path(text: str) -> str:
    """Refuse what cannot be meant as a path, or as the name of something on a hub.

    Args:
        text: as the user wrote it.

    Returns:
        The same.

    Raises:
        UserError: as ``check_name``, or if it is a URL with a password in it.
    """
    check_name(text)
    _refuse_password(text)
    return text


def check_name(text: str) -> None:
    """The same, whatever a URL holds.

    Args:
        text: as the user wrote it.

    Raises:
        UserError: if it is empty, holds a control character or a variable, or is longer than file systems take.
    """
    if not text.strip():
        raise UserError("a path must not be empty")
    odd = [character for character in text if unicodedata.category(character) in ("Cc", "Cs")]
    if odd:
        raise UserError(f"a path must hold no control character, got {odd[0]!a} in {text[:80]!a}")
    parts = [len(part.encode()) for part in text.split("/")]
    if max(parts) > LONGEST_PART or sum(parts) + len(parts) > LONGEST_PATH:
        raise UserError(
            f"a path may have {LONGEST_PATH} bytes, and {LONGEST_PART} between two slashes, got {len(text.encode())} and "
            f"{max(parts)}: {text[:40]!a}..."
        )
    variable = re.search(r"\$\{?([A-Za-z_]\w*)\}?", text)
    if variable:
        raise UserError(
            f"{text!r} holds the variable {variable[0]}, and variables are not replaced here: write the path itself, or let the "
            "shell replace it"
        )


def _refuse_password(text: str) -> None:
    if "://" not in text:
        return
    try:
        parts = urlsplit(text)
        secret = parts.username is not None or parts.password is not None or bool(parts.query)
    except ValueError:
        secret = "@" in text
    if secret:
        raise UserError(
            "a URL must hold no user name, password or query (it would be written into configs, logs and reports): give "
            "credentials in the environment, as the store's own client reads them"
        )


PathText = Annotated[str, AfterValidator(check_path)]
"""The type of config keys that name files, directories, hub repositories or stores."""
