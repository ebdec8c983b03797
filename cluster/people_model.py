"""A feature model and the people whose reward counts, as a reward model's directory that every role reads."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from cluster.inputs import SANDBOX
from cluster.open_features import OpenFeatures
from rm.people_config import PeopleConfig
from sandbox.config import WorldConfig
from tokens.durable import commit_directory
from tokens.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from rm.features import FeatureModel

MIXTURE = "mixture"
"""Name of the mixture of raters among the people."""


def export_people(directory: Path, people: PeopleConfig, cache: Path) -> Path:
    """An ordinary reward model, which scores as the mean of those who count does, with everybody's heads beside its weights.

    Args:
        directory: of the feature model, or what `features` wrote it into.
        people: whose reward counts; its profiles must be of this model.
        cache: where it is kept, by the digest of the model and of what the people are.

    Returns:
        The directory.

    Raises:
        UserError: if there is no such model, rater or profile, or a name comes twice.
    """
    from rm.features import BACKBONE
    from rm.people import People

    opened = OpenFeatures.at(directory)
    model, which = opened.model, opened.fingerprint
    names, weights, counting = everybody(model, which, people)
    heads = (weights @ model.projection.detach()).contiguous()
    truth = users_of(opened.path)
    known = People(names, heads, counting, people.group or "mean", people.quantile, truth, len(model.raters))
    said = json.dumps([which, names, counting, people.group, people.quantile, truth])
    digest = hashlib.sha256(said.encode() + heads.numpy().tobytes()).hexdigest()[:12]
    target = cache / f"people-{digest}"
    if target.is_dir():
        return target
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(opened.path / BACKBONE, partial)
    model.reward_model(weights[list(counting)].mean(0)).save_pretrained(partial)
    known.save(partial)
    commit_directory(partial, target)
    return target


def users_of(model: Path) -> str | None:
    """The sandbox whose users a feature model's raters are, see ``WorldConfig.truth``.

    Args:
        model: as `features` left it in its directory, beside the config that it was made with.

    Returns:
        None where they are other people, or nobody knows: the model was moved, or comes from elsewhere.
    """
    path = model.parent / "config.yaml"
    if not path.is_file():
        return None
    tree = yaml.safe_load(path.read_text())
    sandbox = tree["data"]["preferences"] == SANDBOX
    return WorldConfig.model_validate(tree["world"]).truth if sandbox else None


def everybody(model: FeatureModel, fingerprint: str, people: PeopleConfig) -> tuple[tuple[str, ...], Tensor, tuple[int, ...]]:
    """Everybody whose reward is known, and whose counts.

    Args:
        model: gives the raters.
        fingerprint: of the model.
        people: gives the profiles, and says who counts.

    Returns:
        [m] names: the raters, then the people of profiles, then the mixture; [m, d] float32 weights; indices of those who count.

    Raises:
        UserError: if somebody is not known, or two have one name.
    """
    import torch

    from rm.features import rater_index
    from rm.profiles import read_profile

    names, weights = list(model.raters), list(model.weights.detach())
    files = [people.profile] if people.profile is not None else [name for name in people.members if name.endswith(".json")]
    places = {}
    for file in files:
        profile = read_profile(Path(file), fingerprint, model.d)
        if profile.name in names:
            raise UserError(f"{file} is the profile of {profile.name!r}, and somebody else has that name: rename one of them")
        places[file] = len(names)
        names.append(profile.name)
        weights.append(profile.person.weights.float())
    if people.mixture:
        total = sum(people.mixture.values())
        parts = [model.weights_of(name) * (share / total) for name, share in people.mixture.items()]
        if MIXTURE in names:
            raise UserError(f"a rater is named {MIXTURE!r}, as people.mixture is here: rename the rater")
        names.append(MIXTURE)
        weights.append(torch.stack(parts).sum(0))
    if people.group is None:
        counting = [len(names) - 1]
    elif people.members:
        counting = [places[name] if name in places else rater_index(model.raters, name) for name in people.members]
    else:
        counting = list(range(len(model.raters)))
    if len(set(counting)) < len(counting):
        raise UserError("people.members names somebody twice: everybody counts once")
    return tuple(names), torch.stack(weights), tuple(counting)
