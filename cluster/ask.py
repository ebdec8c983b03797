"""``python -m cluster ask``: asks one person which of two responses they prefer, and keeps their profile up to date.

Letters: N pairs of the pool, d reward features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.adapt import check_name, check_owner, write_private
from cluster.ask_page import AskServer
from cluster.ask_terminal import ask_in_terminal, sure
from cluster.console import Console
from cluster.feature_directory import PROFILES, model_directory
from cluster.interview import Given, Interview, Pool, signed
from cluster.open_features import Compared, OpenFeatures, compared_in
from preferences.pool import POOL, PoolPair, pair_key, read_pool
from preferences.raters import read_answers
from preferences.sources import shorten
from rm.features import check_directory
from rm.features_config import By, Towards
from rm.profiles import Profile, read_profile
from tokens.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from rm.person import Person


@dataclass(frozen=True)
class Asking:
    """What `ask` was told.

    Args:
        model: directory of the features.
        name: the person's.
        by: the way to choose the next pair.
        pairs: file of pairs to ask about; None = the model's own pool.
        answers: file that keeps the answers; None = they are not kept.
        towards: of a new profile; None = what the model was measured with.
        l2: likewise.
        seed: of the choice and of which response stands first.
        out: file of the profile; None = NAME.json in ``PROFILES`` of the model.
    """

    model: Path
    name: str
    by: By = "information"
    pairs: Path | None = None
    answers: Path | None = None
    towards: Towards | None = None
    l2: float | None = None
    seed: int = 0
    out: Path | None = None


def ask(asking: Asking, terminal: bool, port: int, console: Console) -> Path:
    """Ask until the person is done; the same command again goes on.

    Args:
        asking: whom, about what.
        terminal: True asks on the terminal, False on a page.
        port: of the page; 0 = any free one.
        console: to say and ask on.

    Returns:
        The profile's file.

    Raises:
        UserError: if an input is wrong, or the port is taken.
    """
    if terminal and port:
        raise UserError(f"--terminal asks without a page, got --port {port}: leave one of them out")
    interview, profile = prepare(asking, console)
    console.say(f"[bold]{asking.name}[/]: {sure(interview)}")
    if terminal:
        ask_in_terminal(interview, console)
    else:
        kept = "Your answers are not kept." if asking.answers is None else f"Your answers are kept in {asking.answers}."
        with AskServer(interview, asking.name, str(profile), kept, port) as server:
            console.say(f"Open {server.link} in a browser on this machine. Ctrl-C stops; every answer is in the profile at once.")
            server.serve_forever()
    if profile.exists():
        console.say(f"{sure(interview)}. Profile: {profile} (delete the file to forget the person)")
    else:
        console.say("No answer was given, and no profile was written.")
    return profile


def prepare(asking: Asking, console: Console) -> tuple[Interview, Path]:
    """Read everything, compute the pool's features, and begin or go on.

    Args:
        asking: whom, about what.
        console: to show progress on.

    Returns:
        The interview, and the profile's file.

    Raises:
        UserError: if an input is wrong.
    """
    check_name(asking.name)
    place = model_directory(asking.model.expanduser())
    check_directory(place)
    pairs = read_pool(place / POOL if asking.pairs is None else asking.pairs)
    features = OpenFeatures.at(place)
    l2, towards = features.adaptation(asking.l2, asking.towards)
    out = place / PROFILES / f"{asking.name}.json" if asking.out is None else asking.out
    before = read_profile(out, features.fingerprint, features.model.d) if out.exists() else None
    if before is not None:
        check_owner(before, asking.name, out)
        l2, towards = before.l2, before.towards
    kept = None if asking.answers is None else _Kept.read(asking.answers, out, features.fingerprint, before)
    if before is not None and kept is None:
        console.say(f"{out} goes on; which pairs were asked about before is not known, and one may come again (see --answers)")
    with _writing(out):
        out.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with console.bar("features of the pool", "pairs") as bar:
        shown = [Compared(pair.prompt, pair.a, pair.b, f"the pair of the prompt {shorten(pair.prompt)}") for pair in pairs]
        pool = Pool(pairs, features.differences(shown))
        bar.update(len(pairs), len(pairs))
    old = pool.differences[:0] if kept is None else features.differences(kept.answered)
    earlier = before.num_answers if before is not None and kept is None else len(old)

    def keep(person: Person, given: Sequence[Given]) -> None:
        if kept is not None:
            kept.write([_answer(pool, each) for each in given if each.preferred is not None], features.fingerprint)
        number = earlier + len(signed(pool, given))
        write_private(out, Profile(asking.name, person, features.fingerprint, number, l2, towards).text())

    fit = _Fit(old, l2, features.model.mean_weights.double() if towards == "mean" else None, before if kept is None else None)
    return Interview(pool, _asked(pairs, kept), fit, asking.by, asking.seed, earlier, keep), out


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What the disk refuses is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): make room, or name another file") from error


@dataclass(frozen=True, eq=False)
class _Fit:
    """The person: of all answers where they are known, else on top of the profile that the earlier ones left.

    Args:
        old: [n, d] differences of the answers that were kept.
        l2: of the fit.
        origin: [d], or None for zero.
        before: the profile to go on from; None = none.
    """

    old: Tensor
    l2: float
    origin: Tensor | None
    before: Profile | None

    def __call__(self, differences: Tensor) -> Person:
        import torch

        from rm.asking import updated
        from rm.person import fit_person

        try:
            if self.before is not None:
                return updated(self.before.person, differences)
            return fit_person(torch.cat([self.old, differences]), self.l2, self.origin)
        except ValueError as error:
            raise UserError(f"the person cannot be fitted to this ({error}): try a new profile with a larger --l2") from error


def _asked(pairs: Sequence[PoolPair], kept: _Kept | None) -> Tensor:
    import torch

    answered = set() if kept is None else {pair_key(each.prompt, each.first, each.second) for each in kept.answered}
    return torch.tensor([pair_key(pair.prompt, pair.a, pair.b) in answered for pair in pairs])


def _answer(pool: Pool, given: Given) -> tuple[str, str, str]:
    """Prompt, chosen and rejected."""
    pair = pool.pairs[given.pair]
    return (pair.prompt, pair.a, pair.b) if given.preferred == "a" else (pair.prompt, pair.b, pair.a)


@dataclass(frozen=True)
class _Kept:
    """The file of answers, where the person wants one.

    Args:
        path: of it.
        lines: that it held at the beginning.
        answered: what each compared.
    """

    path: Path
    lines: tuple[str, ...]
    answered: tuple[Compared, ...]

    @classmethod
    def read(cls, path: Path, profile: Path, mark: str, before: Profile | None) -> _Kept:
        """What is in it; it must hold what the profile was fitted to.

        Raises:
            UserError: if it does not, or belongs to another model.
        """
        if path.suffix != ".jsonl":
            raise UserError(f"--answers {path}: expected a name that ends in .jsonl")
        lines: tuple[str, ...] = ()
        answered: tuple[Compared, ...] = ()
        if path.exists() and path.stat().st_size:
            answers = read_answers(path)
            answers.check_model(mark)
            lines = tuple(line for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
            answered = tuple(compared_in(answers))
        if before is not None and before.num_answers > len(answered):
            raise UserError(
                f"{path} holds {len(answered)} answers, and {profile} was fitted to {before.num_answers}, some of which were not "
                "kept: go on without --answers, or remove the profile to begin again"
            )
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return cls(path, lines, answered)

    def write(self, added: Sequence[tuple[str, str, str]], mark: str) -> None:
        """What was there, and what came."""
        keys = ("prompt", "chosen", "rejected", "model")
        new = [json.dumps(dict(zip(keys, (*texts, mark), strict=True)), ensure_ascii=False) for texts in added]
        write_private(self.path, "".join(f"{line}\n" for line in (*self.lines, *new)))
