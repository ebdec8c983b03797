"""A page as one file: templates filled in, every text escaped, written whole or not at all.

A page may load nothing (its content security policy says so). Of the reports only a run's has a script, which searches its
samples and is named by its digest; the page that asks a person runs one under a nonce.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from evaluation.svg import DARK, LIGHT

Tiles = Sequence[tuple[str, str, str]]
"""Numbers in a row: label, value, hint."""


def render_page(template: str, **values: object) -> str:
    """Fill in a template.

    Source: templates/; every page extends base.html.j2.

    Args:
        template: file name.
        values: what the template names; one that is missing is an error.

    Returns:
        A whole document; all texts are escaped.

    Padding contract: there is none.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(light=LIGHT, dark=DARK, **values)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place, under a name of this process's own, and rename it.

    Source: none needed; ``tokens.durable`` without its wait for the disk: what is written can be made again.

    Args:
        path: of the file.
        content: of it.

    Raises:
        OSError: if the disk refuses; an earlier file stays as it was.

    Padding contract: there is none.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_page(path: Path, page: str) -> Path:
    """Write a page in one step.

    Source: none needed.

    Args:
        path: of the page.
        page: its HTML.

    Returns:
        ``path``.

    Raises:
        OSError: if the disk refuses; an earlier page stays as it was.

    Padding contract: there is none.
    """
    write_whole(path, page.encode())
    return path
