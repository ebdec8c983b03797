"""What `features` learns from and is measured on: labels with their raters, some raters and some prompts held out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actors.features import Labels, NewRater
from cluster.config import RunConfig
from cluster.console import Console
from cluster.inputs import Source, open_source
from cluster.seeds import derive
from preferences.pool import PoolPair, pool_of
from tokens.errors import UserError
from tokens.records import Pair

if TYPE_CHECKING:
    from cluster.sandbox_source import SandboxSource
    from preferences.sets import DroppedRow, PreferenceSet

FEWEST_RATERS = 2


@dataclass(frozen=True)
class FeatureData:
    """All labels.

    Args:
        base: model directory to start from.
        raters: m names, those that are trained on.
        train: their labels of training prompts.
        tests: their labels of held-out prompts; may be none.
        new: the raters held out, those without a label of a held-out prompt left out.
        dropped: rows left out, counted by reason.
        pool: training pairs for `ask` to show; none of conversations, which a chat template has rendered.
    """

    base: Path
    raters: tuple[str, ...]
    train: Labels
    tests: Labels
    new: tuple[NewRater, ...]
    dropped: dict[str, int]
    pool: tuple[PoolPair, ...]

    def sha256(self) -> str:
        """Of everything that is trained and measured on."""
        return hashlib.sha256(repr((self.raters, self.train, self.tests, self.new)).encode()).hexdigest()


def check_settings(config: RunConfig) -> None:
    """Refuse what `features` has no use for; before anything is read.

    Raises:
        UserError: naming the keys.
    """
    reward, data = config.reward, config.data
    idle = {
        "reward.start": (reward.start, "sft"),
        "reward.contrastive.method": (reward.contrastive.method, "none"),
        "reward.dropout": (reward.dropout, 0),
        "reward.lora.dropout": (reward.lora.dropout, 0),
        "reward.backward_size": (reward.backward_size, None),
        "reward.patience": (reward.patience, None),
        "reward.evaluate_every": (reward.evaluate_every, None),
        "meta.samples": (config.meta.samples, None),
        "data.denoise.method": (data.denoise.method, "none"),
        "resources.reward.num_ranks": (config.resources.reward.num_ranks, 1),
    }
    asked = [f"{key} {given!r}" for key, (given, usual) in idle.items() if given != usual]
    if asked:
        raise UserError(f"features has no use for {', '.join(asked)}: leave it out (docs/people.md says what features knows)")


def load_data(config: RunConfig, root: Path, console: Console) -> FeatureData:
    """Read, check, split and encode the labels; the sandbox's world is built first where it is asked for and missing.

    Args:
        config: of the command.
        root: storage root.
        console: shows what is read.

    Returns:
        The data.

    Raises:
        UserError: if labels cannot be used, or too few raters are left.
    """
    from cluster.sandbox_source import SandboxSource
    from preferences.raters import RATER, check_raters
    from preferences.sets import count_reasons

    source, features = open_source(config, root, policy=False), config.features
    if isinstance(source, SandboxSource):
        train, validation = sandbox_labels(config, source, console)
    else:
        train, validation = source.preferences()
    train = check_raters(train, features.fewest_labels, config.data.drop_bad)
    if len(validation):
        validation = check_raters(validation, 1, config.data.drop_bad)
    names = list(dict.fromkeys(train.rows[RATER]))
    (seen, too_long), (tests, too_long_too) = _encoded(source, train), _encoded(source, validation)
    few = [name for name in names if name not in seen or len(seen[name]) < features.fewest_labels]
    names = [name for name in names if name not in few]
    held_out = _held_out(names, features.held_out_raters, config.seed)
    kept = tuple(name for name in names if name not in held_out)
    dropped = Counter(count_reasons((*train.dropped, *validation.dropped, *too_long, *too_long_too)))
    dropped["held-out label of a rater whom nothing is trained on"] += sum(
        len(pairs) for name, pairs in tests.items() if name not in names
    )
    dropped["label of a rater whom too few fitting labels are left"] += sum(len(seen[name]) for name in few if name in seen)
    new = tuple(NewRater(name, seen[name], tests[name]) for name in names if name in held_out and name in tests)
    data = FeatureData(
        base=source.base_dir,
        raters=kept,
        train=_labels(kept, seen),
        tests=_labels(kept, tests),
        new=new,
        dropped={reason: count for reason, count in dropped.items() if count},
        pool=() if train.templated else pool_of(train.rows.select_columns(["prompt", "chosen", "rejected"]), features.pool),
    )
    left = f", {sum(data.dropped.values()):,} left out" if data.dropped else ""
    console.say(
        f"  {len(data.train.pairs):,} labels of {len(kept)} raters to train on, {len(data.tests.pairs):,} held out; {len(new)} "
        f"raters held out{left}"
    )
    return data


def sandbox_labels(config: RunConfig, source: SandboxSource, console: Console) -> tuple[PreferenceSet, PreferenceSet]:
    """Labels of all users: of training pairs with their errors, and of held-out pairs without.

    Args:
        config: of the command.
        source: the sandbox's.
        console: shows the world being built.

    Returns:
        Training and held-out labels, with a column ``rater``.
    """
    from cluster.sandbox_source import rated_set
    from sandbox.raters import RatedPair, rate, some

    features, world, seed = config.features, source.world, derive(config.seed, "raters")
    if not source.prepared:
        with console.bar("prepare the sandbox") as bar:
            assert source.recipe is not None
            source.recipe(lambda unit, done, total: bar.update(done, total, unit))
    pairs, held_out = source.files.pairs("train"), source.files.pairs("validation")
    train: list[RatedPair] = []
    tests: list[RatedPair] = []
    for user in world.users:
        shown, errors = some(pairs, features.labels_per_rater, user, seed, "labels")
        train += rate(world, shown, user, errors)
        shown, _ = some(held_out, features.tests_per_rater, user, seed, "tests")
        tests += rate(world, shown, user, None)
    return rated_set(train), rated_set(tests)


def _held_out(names: Sequence[str], number: int, seed: int) -> frozenset[str]:
    """Raters with the smallest SHA-256 of seed and name, so that the order of rows plays no part."""
    if len(names) - number < FEWEST_RATERS:
        raise UserError(
            f"there are {len(names)} raters and features.held_out_raters is {number}: at least {FEWEST_RATERS} must be left to "
            "train on. Lower features.held_out_raters or add raters; for one rater there is `python -m cluster reward`"
        )
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    return frozenset(ranked[:number])


def _encoded(source: Source, labels: PreferenceSet) -> tuple[dict[str, tuple[Pair, ...]], tuple[DroppedRow, ...]]:
    """Pairs of each rater, and what does not fit into data.max_*_tokens and was left out."""
    from preferences.raters import RATER

    if not len(labels):
        return {}, ()
    rater = dict(zip(labels.rows["id"], labels.rows[RATER], strict=True))
    found: dict[str, list[Pair]] = {}
    pairs, dropped = source.encode_listing(labels)
    for pair in pairs:
        found.setdefault(rater[pair.id], []).append(pair)
    return {name: tuple(own) for name, own in found.items()}, dropped


def _labels(raters: Sequence[str], by_rater: Mapping[str, Sequence[Pair]]) -> Labels:
    pairs: list[Pair] = []
    index: list[int] = []
    for place, name in enumerate(raters):
        if name in by_rater:
            pairs += by_rater[name]
            index += [place] * len(by_rater[name])
    return Labels(tuple(pairs), tuple(index))
