"""`adapt`: one person's weights on the reward features, from their answers, as a profile; in this process, without Ray."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.console import Console
from cluster.feature_directory import PROFILES
from cluster.open_features import OpenFeatures, compared_in
from rm.features_config import Towards
from tokens.durable import whole_file
from tokens.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from rm.profiles import Profile


def adapt(
    model: Path, answers: Path, console: Console, name: str | None, towards: Towards | None, l2: float | None, out: Path | None
) -> Path:
    """Fit a person's weights to their answers and write the profile; the answers are read and not kept.

    Args:
        model: of the features.
        answers: a .jsonl file, see ``preferences.raters.read_answers``.
        console: says how sure the profile is.
        name: the person's; None = the answers file's.
        towards: what the weights are drawn to; None = what the model was measured with.
        l2: how strongly; None = likewise.
        out: file to write; None = NAME.json in ``PROFILES`` of the model.

    Returns:
        The profile's file.

    Raises:
        UserError: if the model or an answer cannot be used.
    """
    from preferences.raters import read_answers
    from rm.profiles import read_profile

    name = answers.stem if name is None else name
    check_name(name)
    features = OpenFeatures.at(model)
    l2, towards = features.adaptation(l2, towards)
    out = features.path / PROFILES / f"{name}.json" if out is None else out
    if out.resolve() == answers.resolve():
        raise UserError(f"the profile would be written over the answers {answers}: name another file with --out")
    if out.exists():
        check_owner(read_profile(out), name, out)
    given = read_answers(answers, features.tokenizer)
    given.check_model(features.fingerprint)
    if given.without:
        console.say(
            f"[yellow]note:[/] {given.without} of {len(given.pairs)} answers do not say which model asked: they are taken as any "
            "pair is"
        )
    differences = features.differences(compared_in(given), given.pairs.templated)
    profile = fit_profile(name, differences, features, l2, towards)
    write_private(out, profile.text())
    for line in in_words(profile, differences, features):
        console.say(line)
    console.say(f"Profile: {out} (delete the file to forget the person; the answers in {answers} are not part of it)")
    return out


def fit_profile(name: str, differences: Tensor, features: OpenFeatures, l2: float, towards: Towards) -> Profile:
    """A person's profile.

    Args:
        name: theirs.
        differences: [n, d] float, of the features of their answers.
        features: the model.
        l2: how strongly weights are drawn to ``towards``.
        towards: the mean rater or zero.
    """
    from rm.feature_check import cross_validated
    from rm.person import fit_person
    from rm.profiles import Profile

    origin = features.model.mean_weights if towards == "mean" else None
    person = fit_person(differences, l2, origin)
    accuracy = cross_validated(differences, l2, origin)
    return Profile(name, person, features.fingerprint, len(differences), l2, towards, accuracy)


def in_words(profile: Profile, differences: Tensor, features: OpenFeatures) -> list[str]:
    """How sure a profile is.

    Args:
        profile: of the person.
        differences: [n, d] float, of the features of their answers.
        features: the model.

    Returns:
        Lines for the terminal.
    """
    from rm.feature_check import FEWEST_TO_VALIDATE, ranked_right
    from rm.features import scores
    from rm.person import separable

    by_mean = ranked_right(scores(differences, features.model.mean_weights))
    lines = [f"{profile.name}: d = {profile.d} weights from {profile.num_answers} answers"]
    if profile.accuracy is None:
        lines.append(f"  how well they predict is not known: fewer than {FEWEST_TO_VALIDATE} answers to hold one out of")
    else:
        lines.append(
            f"  they predict {profile.accuracy:.0%} of answers that were left out of the fit; the mean rater's {by_mean:.0%}"
        )
    before = profile.l2**-0.5 * differences.double().norm(dim=1)
    after, differ = profile.person.deviations(differences), before > 0
    if bool(differ.any()):
        left = float((after[differ] / before[differ]).mean())
        lines.append(f"  of what was unknown about such answers, {left:.0%} is left (standard deviation)")
    if separable(differences):
        lines.append(
            "  the answers are separable: some weights explain all of them, and without a penalty they would be infinite. How "
            f"large they are here is what l2 = {profile.l2:g} says; more answers will tell"
        )
    return lines


def check_owner(profile: Profile, name: str, path: Path) -> None:
    """Refuse to go on with, or to replace, somebody else's profile.

    Args:
        profile: that is there.
        name: whose it should be.
        path: of it.

    Raises:
        UserError: naming both.
    """
    if profile.name != name:
        raise UserError(f"{path} is the profile of {profile.name!r}, got {name!r}: name another file with --out")


def write_private(path: Path, text: str) -> None:
    """Replace a file in one step by one that its owner alone can read.

    Args:
        path: to replace; its directory is made if needed.
        text: its new content.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with whole_file(path) as partial:
            partial.touch(mode=0o600)
            partial.write_text(text, "utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): make room, or name another file") from error


def check_name(name: str) -> None:
    """Refuse a name that makes no file.

    Args:
        name: of a person.

    Raises:
        UserError: naming what is allowed.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}", name):
        raise UserError(f"a person's name has letters, digits, blanks, '.', '_' and '-' only, 64 at most, got {name!r}")
