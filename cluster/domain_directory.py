"""The directory of a customisation: STORAGE/domains/NAME, where its models lie.

config.yaml, versions.json       as of the last command that fitted what is there
data.json                        fingerprints of each data set and of the base model, and which prompts each set goes without
general/KEY/seed_S/              the general models: model/ and stage.json
models/STRATEGY/seed_S/DOMAIN/   adapter/ (with customize.lora) or model/, and stage.json
results.jsonl, card.json         every measurement; written when all stages are done
.NAME.checkpoints/               beside a stage that is not done: where it goes on
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from actors.customize import REPORT
from cluster.config import RunConfig
from cluster.differences import flat, refuse_differences
from cluster.domain_models import BASE, BASE_MODEL, BEGUN, FOLDER, digest_of
from cluster.hold import LOCK, Hold
from cluster.kept_apart import Apart
from cluster.run_directory import config_text, made_and_locked
from cluster.storage import storage_root
from cluster.versions import versions
from rm.domain_config import StrategyConfig
from tokens.durable import write_file
from tokens.errors import UserError

if TYPE_CHECKING:
    from cluster.domain_data import QueryData

CARD, RESULTS, KIND = "card.json", "results.jsonl", "domains"
TOGETHER, APART, DATA_OF = "data sets", "apart", "the data of "
"""Keys of data.json: the fingerprint of all data at once, the prompts that each set goes without, and before a set's name its own
fingerprint."""
SPEED = (
    "resources", "storage", "scratch", "rounds", "rollout", "policy", "dpo", "evaluation", "meta", "scorer", "strength",
    "guards", "faults", "features", "report_to",
)  # fmt: skip
"""Sections of the config that change nothing about what is learned here, or may change while it is: how much goes wrong."""
GROWING = ("customize.seeds", "customize.strategies.", "customize.domains.", "generalize.seeds", "generalize.curves")
"""What may be added to a directory that is there: further seeds, strategies, domains and values of beta."""
COUNTED = ("customize.seeds", "generalize.seeds", "generalize.curves")
"""Those of them whose value says how much there is: a directory may hold more."""


class DomainDirectory:
    """One customisation's directory, locked to one driver while it is open.

    Args:
        config: of the command.
        folder: of the storage root, that it lies in.
    """

    def __init__(self, config: RunConfig, folder: str = FOLDER) -> None:
        self.config = config
        self.path = storage_root(config) / folder / config.name
        self.hold = Hold(self.path, 0)  # nobody's: what is not open is not written to

    @property
    def logs(self) -> Path:
        """Log files, one a process."""
        return self.path / "logs"

    def general(self, strategy: StrategyConfig, seed: int) -> Path:
        """Where a strategy's general model lies; strategies with the same general stage share it."""
        return self.path / "general" / general_key(strategy) / f"seed_{seed}"

    def domain(self, strategy: str, seed: int, name: str) -> Path:
        """Where the model of a domain lies."""
        return self.path / "models" / strategy / f"seed_{seed}" / name

    @contextlib.contextmanager
    def open(self) -> Iterator[DomainDirectory]:
        """Make or find the directory.

        Raises:
            UserError: if it belongs to another config, is no customisation's, or another driver holds it.
        """
        with made_and_locked(self.path) as self.hold:
            ours = (self.path / "config.yaml").is_file()
            if not ours and any(entry.name != LOCK for entry in self.path.iterdir()):
                raise UserError(
                    f"{self.path} is not empty and was not begun by this command; choose another name or storage root"
                )
            if ours:
                there, here = (_learnt(tree) for tree in (yaml.safe_load((self.path / "config.yaml").read_text()), self._tree()))
                refuse_differences(self.path, there, _only_changed(there, here))
            else:
                self.keep_config()
            yield self

    def keep_config(self) -> None:
        """Write down what the directory is made with from now on: once nothing that is there was found to be made otherwise.

        Raises:
            TakenOver: if another driver has the directory.
        """
        self.hold.check()
        write_file(self.path / "config.yaml", config_text(self.config))
        write_file(self.path / "versions.json", json.dumps(versions(), indent=1))

    def settled(self) -> dict[str, Apart]:
        """Which prompts each data set goes without that models here were fitted on; none where none were."""
        there = self._begun()
        apart = there[APART] if APART in there else {}
        return {
            name: Apart(frozenset(of["train"]), frozenset(of["test"]))
            for name, of in apart.items()
            if not self._unfitted(f"{DATA_OF}{name}")
        }

    def _unfitted(self, key: str) -> bool:
        """Whether a key of data.json is of a domain that no stage here has trained or measured on yet: its data may still be
        mended."""
        name = key.removeprefix(DATA_OF)
        if name == key or name not in self.config.customize.domains or any(self.path.glob("*/*/**/.*.checkpoints")):
            return False
        reports = [json.loads(file.read_text()) for file in self.path.glob(f"*/*/**/{REPORT}")]
        return not any(look["set"] == name for report in reports for look in report["looks"])

    def refuse_other_inputs(self, fingerprint: str, base: Path, sets: Sequence[QueryData] = ()) -> None:
        """Stop if what is there was trained on other data or from another base model; note what they are.

        Args:
            fingerprint: of all data.
            base: directory of the base model.
            sets: data sets of which some may be added to those that are there; each has a fingerprint of its own.

        Raises:
            UserError: if it was; naming which.
        """
        here = {f"{DATA_OF}{each.name}": each.fingerprint() for each in sets} if sets else {TOGETHER: fingerprint}
        here |= {BASE_MODEL: digest_of([base]), "resources.reward.dtype": self.config.resources.reward.dtype}
        there = {key: value for key, value in self._begun().items() if not self._unfitted(key)}
        earlier = bool(sets) and TOGETHER in there
        compared = here | {TOGETHER: fingerprint}
        if other := [name for name, value in compared.items() if name in there and there[name] != value]:
            hint = (
                f". {self.path} was begun by an earlier version, which noted all data sets as one and chose otherwise what is "
                "measured on: domains are added to it once it has gone on with those that it has"
            )
            raise UserError(
                f"not those that {self.path} was begun with: {', '.join(other)}, although the config is the same otherwise. "
                f"Put the old ones back, choose another name, or remove the directory{hint if earlier else ''}"
            )
        kept = {name: value for name, value in there.items() if not (earlier and name == TOGETHER)}
        apart = {each.name: {"train": sorted(each.apart.train), "test": sorted(each.apart.test)} for each in sets}
        noted = {APART: (there[APART] if APART in there else {}) | apart, BASE: str(base.absolute())} if sets else {}
        self.hold.check()
        write_file(self.path / BEGUN, json.dumps(kept | here | noted))

    def _begun(self) -> dict[str, Any]:
        file = self.path / BEGUN
        found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        return found

    def _tree(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json")


def general_key(strategy: StrategyConfig) -> str:
    """Name of a general stage, by what makes it differ from another."""
    return f"enrichment-{strategy.enrichment:g}-imitation-{strategy.general_imitation:g}"


def _learnt(tree: dict[str, Any]) -> dict[str, Any]:
    return flat({key: value for key, value in tree.items() if key not in SPEED})


def _only_changed(there: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """``here`` without what may be added or grow: strategies and domains that were not there, and the number of seeds."""
    kept = {key: value for key, value in here.items() if key in there or not key.startswith(GROWING)}
    gone = {key: value for key, value in there.items() if key.startswith(GROWING) and (key not in here or key in COUNTED)}
    return kept | gone


def digest(rows: list[dict[str, Any]]) -> str:
    """Of the results, for the card."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
