"""What a run, or a command that trains reward models, learned from, kept beside what it made: so that a judge of it can be told
from its teacher later.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokens.durable import write_file
from tokens.errors import UserError

if TYPE_CHECKING:
    from preferences.sets import PreferenceSet

LINEAGE = "lineage.json"
FORMAT = 1
START = "start"
"""Folder of a run in which it keeps its own."""
HELD_OUT = "held_out"
"""Of it: the reward models that only judge."""
DEPTH = 4
"""Levels that a model lies below what made it, at most: RUN/rounds/round_000/members/1."""


@dataclass(frozen=True)
class Lineage:
    """What something was trained on.

    Args:
        base: directory of the model that its reward models were made of, absolute: a relative name or one of the hub says little
            elsewhere.
        pairs: a digest a preference pair, see ``digests_of``.
    """

    base: Path
    pairs: frozenset[str]

    def write(self, directory: Path) -> None:
        """Keep it in a directory, whole.

        Args:
            directory: of what was made; must exist.
        """
        content = {"format": FORMAT, "base": str(self.base.absolute()), "pairs": sorted(self.pairs)}
        write_file(directory / LINEAGE, json.dumps(content, indent=0))


def digests_of(pairs: PreferenceSet) -> frozenset[str]:
    """A name for each pair by its texts alone: the first 16 hexadecimal digits of the SHA-256 of prompt and both responses.

    Which response is preferred plays no part, nor do ids: a pair whose label was turned round is the same pair.

    Args:
        pairs: as text.
    """
    found = set()
    for batch in pairs.rows.select_columns(["prompt", "chosen", "rejected"]).iter(batch_size=1000):
        for prompt, *responses in zip(batch["prompt"], batch["chosen"], batch["rejected"], strict=True):
            text = json.dumps([prompt, *sorted(responses)], ensure_ascii=False)
            found.add(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16])
    return frozenset(found)


def lineage_of(model: Path) -> Lineage | None:
    """What a model was made of, as the nearest directory above it says that knows.

    Args:
        model: directory of a reward model, or of a run.

    Returns:
        It; None where nobody kept it: a model from elsewhere, or one that was copied out of where it was made.

    Raises:
        UserError: if the file is damaged.
    """
    place = model.resolve()
    for folder in (place, *list(place.parents)[:DEPTH]):
        for file in (folder / LINEAGE, folder / START / LINEAGE):
            if file.is_file():
                return _read(file)
    return None


def _read(file: Path) -> Lineage:
    try:
        content = json.loads(file.read_text("utf-8"))
        if content["format"] != FORMAT:
            raise UserError(f"{file}: format {content['format']}, this version reads {FORMAT}")
        return Lineage(Path(content["base"]), frozenset(content["pairs"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} cannot be read ({error}): put back a copy of it, or remove it, and what was learned from is not known"
        ) from error
