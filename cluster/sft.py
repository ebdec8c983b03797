"""``python -m cluster sft``: the first stage, a language model fine-tuned on texts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.console import Console
from cluster.plan import Bundle
from cluster.preflight import check_nodes
from cluster.run import connected
from cluster.run_directory import now, space_errors
from cluster.seeds import derive
from cluster.sft_directory import SFTDirectory
from cluster.stage import Stage
from cluster.storage import storage_root
from cluster.texts import Texts, sft_texts
from cluster.waiting import Waiter
from policy.config import SFTConfig
from preferences.texts import Example, fingerprint

FIT = "fit.json"


def sft(config: RunConfig, console: Console) -> Path:
    """Train the model that the config describes, and save it with its tokenizer as a Hugging Face directory.

    Args:
        config: of the command.
        console: to show progress on.

    Returns:
        STORAGE/sft/NAME.

    Raises:
        UserError: if an input is wrong, there is no room, or a finished model was trained on other texts; before any process
            starts where that can be known.
        RoleFailed: if the training failed; nothing is left but its log.
    """
    directory = SFTDirectory(config)
    directory.inspect()
    texts = sft_texts(config, storage_root(config) / "cache")
    digest = fingerprint(texts.examples, texts.held_out)
    directory.refuse_other(digest)
    with space_errors(directory.path), directory.open() as draft:
        console.say(f"[bold]Rondo[/] SFT model {config.name} in {directory.path}")
        if directory.card is not None:
            console.say("It is done; nothing to do. Choose another name to train another.")
            return directory.path
        console.say(f"{len(texts.examples):,} texts to train on, {len(texts.held_out):,} held out: {texts.source}")
        with connected(config, console) as fixed:
            card = train(config, console, directory, texts, draft, fixed)
        directory.commit(draft, {**card, "data_sha256": digest})
    for line in findings(card):
        console.say(line)
    console.say(f"Model: {directory.path}; `run` takes it with --sft.model {directory.path}")
    return directory.path


@dataclass(frozen=True)
class TextsFit:
    """Trains the model into a directory, and leaves beside it what the fit came to; runs in the learner's place."""

    texts: Texts
    sft: SFTConfig
    seed: int
    out: Path
    bfloat16: bool

    def __call__(self, on_progress: Callable[[str, int, int], None]) -> Path:
        """Train it."""
        from policy.sft import fit_language_model

        curve: list[dict[str, float]] = []
        start = None if self.texts.start is None else str(self.texts.start)
        fit = fit_language_model(
            _lists(self.texts.examples),
            self.texts.tokenizer,
            self.out,
            self.sft.model_copy(update={"model": start}),
            self.seed,
            lambda done, total: on_progress("SFT steps", done, total),
            held_out=_lists(self.texts.held_out),
            bfloat16=self.bfloat16,
            on_loss=lambda step, loss: curve.append({"step": step, "loss": loss}),
        )
        (self.out / FIT).write_text(json.dumps({"fit": fit, "curve": curve}))
        return self.out


def _lists(examples: tuple[Example, ...]) -> list[tuple[list[int], list[int]]]:
    return [(list(prompt), list(response)) for prompt, response in examples]


def sft_bundle(config: RunConfig) -> Bundle:
    """What the training asks for: the learner's share, in one process whatever the number of its ranks.

    Args:
        config: of the command.
    """
    share = config.resources.learner
    return Bundle("learner", "learner-0", share.num_cpus, share.num_gpus, 0, "SFT model, AdamW", labels=share.labels)


def train(config: RunConfig, console: Console, directory: SFTDirectory, texts: Texts, draft: Path, fixed: bool) -> dict[str, Any]:
    """Train in a Ray actor.

    Args:
        config: of the command.
        console: shows it.
        directory: of the logs.
        texts: to learn from.
        draft: to write to.
        fixed: True on a cluster that cannot grow.

    Returns:
        The card.
    """
    wait = Waiter(console, directory.logs, config.resources.deadline_s)
    wait.begin("sft")
    seed, dtype = derive(config.seed, "sft"), config.resources.learner.dtype
    stage = Stage(config, [sft_bundle(config)], directory.logs, console.say, fixed)
    try:
        stage.wait_for_room()
        check_nodes(stage.nodes(), storage_root(config), wait)
        with console.bar("SFT model", "steps") as bar:
            _, pending = stage.prepare(TextsFit(texts, config.sft, seed, draft, dtype == "bfloat16"))
            wait("sft", pending, bar)
    finally:
        stage.close()
    found = json.loads((draft / FIT).read_text())
    (draft / FIT).unlink()
    losses = {when: found["fit"].pop(f"held_out_{when}") for when in ("before", "after")} if texts.held_out else {}
    return {
        "name": config.name,
        "finished_at": now(),
        "start": None if texts.start is None else str(texts.start),
        "data": texts.source,
        "num_texts": len(texts.examples),
        "num_held_out": len(texts.held_out),
        "dropped": texts.dropped,
        "settings": config.sft.model_dump(mode="json"),
        "dtype": dtype,
        "seed": seed,
        "fit": found["fit"],
        "held_out": {when: {"loss": loss, "perplexity": math.exp(loss)} for when, loss in losses.items()},
        "curve": found["curve"],
        "seconds": {phase: round(value, 3) for phase, value in wait.seconds.items()},
    }


def findings(card: dict[str, Any]) -> list[str]:
    """What the terminal shows of the finished model."""
    lines = [f"  training loss {card['fit']['first_loss']:.3f} -> {card['fit']['loss']:.3f} nats per token"]
    if card["held_out"]:
        before, after = card["held_out"]["before"], card["held_out"]["after"]
        lines.append(
            f"  held-out loss {before['loss']:.3f} -> {after['loss']:.3f}, perplexity {before['perplexity']:.2f} -> "
            f"{after['perplexity']:.2f} ({card['num_held_out']:,} texts)"
        )
    return lines
