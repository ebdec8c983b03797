"""G2: MetaRM steps against vanilla ones, time and memory. m is the shifted samples' tokens over the pairs'; the limit is 1 + m.

The steps are those of ``benchmarks.ratios.metarm_steps``: all sequences have one length, so that nothing is padded.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu.device import GIB, computing, measured
from benchmarks.gpu.models import multiplying, reward_model, training_flops
from benchmarks.gpu.rows import Row, Scene, row
from benchmarks.ratios.metarm_steps import Steps

PAIRS, LENGTH, MICROBATCH = 8, 512, 8
SHARES = {"m = 1": ("metarm 1", 1.0), "m = 1/4": ("metarm 1/4", 0.25)}
"""Names of the cases, ways of ``Steps`` and m."""


def steps(size: str, recompute: bool, scene: Scene) -> Iterator[Row]:
    """Both m, and what each holds beyond a vanilla step in copies of the weights.

    Args:
        size: of the model.
        recompute: whether layers keep their inputs only.
        scene: of the measurement.
    """
    kind, small = scene.device.kind, scene.settings.small
    model = reward_model("tiny" if small else size, kind, recompute=recompute)
    taken = Steps(model, PAIRS, 16 if small else LENGTH, MICROBATCH)
    ways = {name: taken.ways()[name] for name in ("vanilla", *(way for way, _ in SHARES.values()))}
    with computing(kind):
        found = measured(kind, ways, scene.settings.repetitions)
    tokens = 2 * PAIRS * (16 if small else LENGTH)
    copy = sum(p.numel() * p.element_size() for p in model.parameters()) / GIB
    for name, (way, m) in SHARES.items():
        ours, theirs = found.peaks[way], found.peaks["vanilla"]
        beyond = {} if ours is None or theirs is None else {"copies_beyond_vanilla": (ours - theirs) / copy}
        case = f"MetaRM step, {size}, {name}{', recomputed' if recompute else ''}"
        flops = training_flops(multiplying(model), tokens * (1 + m))
        yield row(("G2", case), found, way, "vanilla", 1 + m, flops, tokens=tokens, **beyond)
