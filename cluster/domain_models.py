"""Reward models of domains by name, and as directories that any program of this house reads."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from actors.customize import ADAPTER, MODEL, REPORT
from cluster.config import RunConfig
from cluster.differences import flat
from cluster.run_directory import is_there
from rm.domain_config import ADAPTERS
from tokens.durable import commit_directory
from tokens.errors import UserError

FOLDER, GENERAL = "domains", "generalize"
"""Of a storage root: one directory a customisation, see ``cluster.domain_directory``, and one a `generalize`."""
BEGUN, BASE, BASE_MODEL = "data.json", "base", "base model"
"""What a customisation was begun with, and its keys for the base model: its directory, and the digest of that."""


@dataclass(frozen=True)
class DomainModel:
    """A customised reward model.

    Args:
        name: of the domain.
        backbone: directory of the model that the adapter belongs to; of the whole model where there is none.
        adapter: directory of the adapter; None for a whole model.
    """

    name: str
    backbone: Path
    adapter: Path | None


def find_domain(root: Path, name: str, *, checked: bool = False) -> DomainModel:
    """The reward model that ``domain:NAME`` means.

    Args:
        root: storage root.
        name: DOMAIN, or RUN/DOMAIN or RUN/STRATEGY/DOMAIN where it would not be clear; of several seeds the first is taken.
        checked: whether it is known that the model below an adapter has not changed; reading all of it takes its time.

    Returns:
        Where it lies.

    Raises:
        UserError: if there is none, or several are meant.
    """
    *place, domain = name.split("/")
    if len(place) > 2 or not all((*place, domain)):
        raise UserError(f"domain:{name} is no name of a domain: expected domain:DOMAIN, domain:RUN/DOMAIN or RUN/STRATEGY/DOMAIN")
    run = place[0] if place else "*"
    strategy = place[1] if len(place) > 1 else "*"
    folder = root / FOLDER
    if not is_there(folder):
        raise UserError(f"domain:{name}: no domain was ever customised in {root}; run `python -m cluster customize` first")
    found = [path for path in sorted(folder.glob(f"{run}/models/{strategy}/seed_0/*")) if path.name == domain]
    if not found:
        known = sorted({path.name for path in folder.glob("*/models/*/seed_0/*") if not path.name.startswith(".")})
        raise UserError(f"domain:{name}: there is no such domain in {folder}; there are {', '.join(known) or 'none'}")
    if len(found) > 1:
        names = ["/".join((path.parts[-5], path.parts[-3], domain)) for path in found]
        raise UserError(
            f"domain:{name} could be {', '.join(names)}: more than one adapter has this name; write which one is meant"
        )
    directory = found[0]
    if (directory / MODEL).is_dir():
        return DomainModel(domain, directory / MODEL, None)
    origin, begun = json.loads((directory / REPORT).read_text())["origin"], directory.parents[3]
    noted = {} if origin else json.loads((begun / BEGUN).read_text())
    backbone = begun / origin if origin else Path(noted[BASE])
    if not backbone.is_dir():
        raise UserError(
            f"domain:{name}: the general reward model that its adapter was trained on is not in {backbone} any more: put it back"
        )
    if noted and not checked and digest_of([backbone]) != noted[BASE_MODEL]:
        raise UserError(
            f"domain:{name}: {backbone} is not the general reward model that its adapter was trained on any more: its weights or "
            "its config have changed. Put the old one back, or customise anew under another name"
        )
    return DomainModel(domain, backbone, directory / ADAPTER)


def with_domain_reward(config: RunConfig, root: Path) -> RunConfig:
    """The config with ``scorer.reward_model`` as the reward models' base: a whole model, adapters merged, in the cache.

    Args:
        config: of the run.
        root: storage root.

    Returns:
        The config itself where none is given.

    Raises:
        UserError: as ``find_domain`` and ``cluster.people_model.export_people``.
    """
    if config.scorer.reward_model is None:
        return config
    begun = _taken_before(config, root)
    return config.model_copy(
        update={
            "reward": config.reward.model_copy(update={"base": begun or str(_resolved(config, config.scorer.reward_model, root))})
        }
    )


def _resolved(config: RunConfig, reward_model: str, root: Path) -> Path:
    kind, _, name = reward_model.partition(":")
    cache = root / "cache"
    if kind == "general":
        return find_general(root, name)
    if kind == "features":
        from cluster.people_model import export_people

        return export_people(Path(name), config.people, cache)
    return export(find_domain(root, name), cache) if kind == "domain" else export_all(find_domains(root, name), cache)


def find_general(root: Path, name: str) -> Path:
    """The reward model that ``general:NAME`` means.

    Args:
        root: storage root.
        name: of a finished `generalize`.

    Returns:
        Directory of the model of its own beta, of the first seed.

    Raises:
        UserError: if there is none.
    """
    folder = root / GENERAL
    card = folder / name / "card.json"
    if not card.is_file():
        known = sorted(path.parent.name for path in folder.glob("*/card.json"))
        raise UserError(
            f"general:{name}: no `python -m cluster generalize` of this name is finished in {folder}; there are "
            f"{', '.join(known) or 'none'}"
        )
    return folder / name / "rewards" / f"beta_{json.loads(card.read_text())['beta']:g}" / "seed_0" / MODEL


def _taken_before(config: RunConfig, root: Path) -> str | None:
    """What a run that is there already has taken for the same name: another model of this name may have been made since."""
    path = root / "runs" / config.name / "config.yaml"
    if not path.is_file():
        return None
    there = flat(yaml.safe_load(path.read_text()))
    name, taken = "scorer.reward_model", "reward.base"
    if name not in there or there[name] != config.scorer.reward_model or not Path(there[taken]).is_dir():
        return None
    return str(there[taken])


def export(found: DomainModel, cache: Path) -> Path:
    """A customised reward model as an ordinary directory that any program of this house reads.

    Args:
        found: where it lies.
        cache: where a merged model is kept, by the digest of its files.

    Returns:
        The model's own directory where it has no adapter, else the merged one.
    """
    if found.adapter is None:
        return found.backbone
    target = cache / f"domain-{digest_of([found.backbone, found.adapter])}"
    if target.is_dir():
        return target
    import torch
    from transformers import AutoTokenizer

    from rm.lora import load_adapter
    from rm.model import RewardModel

    model = RewardModel.from_pretrained(found.backbone, torch.float32)
    load_adapter(model, found.adapter)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(found.backbone).save_pretrained(partial)
    commit_directory(partial, target)
    return target


def find_domains(root: Path, name: str) -> list[DomainModel]:
    """The adapters of one general backbone that ``domains:NAME`` means.

    Args:
        root: storage root.
        name: RUN, or RUN/STRATEGY where it has several.

    Returns:
        One for each domain.

    Raises:
        UserError: if there are none, several strategies, or whole models instead of adapters.
    """
    run, _, strategy = name.partition("/")
    folder = root / FOLDER / run / "models"
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    chosen = [path for path in there if strategy in ("", path)]
    if len(chosen) != 1:
        raise UserError(
            f"domains:{name}: expected one strategy of a customisation, there are {', '.join(there) or 'none'} in {folder}; "
            "write domains:RUN/STRATEGY"
        )
    places = sorted((folder / chosen[0] / "seed_0").glob("[!.]*"))
    found = [find_domain(root, f"{run}/{chosen[0]}/{place.name}", checked=number > 0) for number, place in enumerate(places)]
    whole = [model.name for model in found if model.adapter is None]
    if whole or not found:
        raise UserError(
            f"domains:{name}: {', '.join(whole) or 'no domain'} is a whole model, and many are served as adapters on one "
            "backbone: customise with customize.lora.rank above 0, or name one domain"
        )
    return found


def export_all(found: Sequence[DomainModel], cache: Path) -> Path:
    """A backbone with the adapters of its domains in a folder beside its weights.

    Args:
        found: adapters of one backbone.
        cache: where it is kept, by the digest of its files.

    Returns:
        The directory.
    """
    adapters = [(model.name, model.adapter) for model in found if model.adapter is not None]
    target = cache / f"domains-{digest_of([found[0].backbone, *(path for _, path in adapters)])}"
    if target.is_dir():
        return target
    from rm.checkpoints import is_part_of_model

    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in sorted(found[0].backbone.iterdir()):
        if is_part_of_model(file):
            shutil.copy2(file, partial / file.name)
    for name, path in adapters:
        shutil.copytree(path, partial / ADAPTERS / name)
    commit_directory(partial, target)
    return target


def digest_of(folders: Sequence[Path]) -> str:
    """Of all weights and configs of models.

    Args:
        folders: of the models.

    Returns:
        The first 12 hexadecimal digits of a SHA-256.
    """
    digest = hashlib.sha256()
    files = [file for folder in folders for kind in ("*.safetensors", "*config.json") for file in sorted(folder.glob(kind))]
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:12]
