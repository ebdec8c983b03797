"""One arm with one seed: the run by the command that users start, then its policies on test prompts that no run saw."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.on_test_prompts import Judged, against_sft, answers, policies_of, prompts_of
from benchmarks.reproduce.arms import Arm
from cluster.config import RunConfig
from cluster.load_config import load_config
from cluster.sandbox_source import SandboxSource
from cluster.storage import storage_root
from evaluation.best import best_of
from evaluation.best_of_n import pick_best
from preferences.encode import encode_prompt, encode_response
from rm.batches import score_sequences
from rm.ensemble import aggregate
from rm.model import RewardModel
from sandbox.world import World

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "reproduce.yaml"


def play(name: str, arm: Arm, seed: int, recipe: Path = RECIPE, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Run what is not there yet of it, and judge every round.

    Args:
        name: of the arm.
        arm: its keys.
        seed: of the run; worlds and SFT policies are shared by all seeds.
        recipe: what the keys come on top of.
        environment: of the command.

    Returns:
        The arm's row, as ``row_of``.

    Raises:
        RuntimeError: if the run did not end well; with its last words.
    """
    words = words_of(name, arm, seed)
    command = [sys.executable, "-m", "cluster", "run", str(recipe), *words]
    done = subprocess.run(command, cwd=ROOT, env=dict(environment), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{name}, seed {seed}: the run ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return row_of(name, arm, seed, load_config(recipe, words), recipe)


def digest_of(recipe: Path) -> str:
    """Of what a recipe says, whatever its comments and the order of its keys."""
    said = json.dumps(yaml.safe_load(recipe.read_text(encoding="utf-8")), sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def words_of(name: str, arm: Arm, seed: int) -> list[str]:
    """The keys of a run, on the command line."""
    slug = "".join(character if character.isalnum() else "-" for character in name.lower())
    return [*arm.keys, "--seed", str(seed), "--name", f"reproduce-{slug}-{seed}"]


def row_of(name: str, arm: Arm, seed: int, config: RunConfig, recipe: Path = RECIPE) -> dict[str, Any]:
    """The row of a run that is there.

    Args:
        name: of the arm.
        arm: its keys.
        seed: of the run.
        config: of the run.
        recipe: that the run's keys came on top of.

    Returns:
        Of each round its number, "validation" (the judge's mean on validation prompts above SFT's, which the best round is chosen
        by), win, tie, lose, margin and gold on test prompts, the same "elsewhere" where the arm asks for it, kl (nats), proxy and
        perplexity under SFT on validation prompts; round -1 is SFT. Of the run KL and score of each PPO step, and what it ran on.
    """
    run = storage_root(config) / "runs" / config.name
    source = SandboxSource(config, storage_root(config) / "cache")
    sft = source.load().sft_dir
    ledger = json.loads((run / "ledger.json").read_text())
    policies = policies_of(run)
    here = judged(run, sft, policies, source.world, prompts_of(source.world, arm.prompts == "train"), config)
    rounds: list[dict[str, Any]] = [{"round": -1, "gold": here[0].gold}]
    for entry, gain, found in zip(ledger["rounds"], best_of(ledger).gains, here[1:], strict=True):
        seen = {key: entry["evaluation"][key] for key in ("kl", "proxy", "perplexity")}
        rounds.append({"round": entry["round"], "validation": gain, **_columns(found), **seen})
    if arm.elsewhere:
        others = judged(run, sft, policies, source.world, prompts_of(source.world, arm.prompts != "train"), config)
        rounds[0]["elsewhere"] = {"gold": others[0].gold}
        for each, found in zip(rounds[1:], others[1:], strict=True):
            each["elsewhere"] = _columns(found)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["phase"] == "policy" and "policy/kl" in row]
    return {
        "arm": name, "seed": seed, "keys": list(arm.keys), "recipe": digest_of(recipe), "rounds": rounds,
        "step_kl": [row["policy/kl"] for row in steps], "step_score": [row["policy/score"] for row in steps],
        "versions": json.loads((run / "versions.json").read_text()),
    }  # fmt: skip


def _columns(one: Judged) -> dict[str, float]:
    return {"win": one.win, "tie": one.tie, "lose": one.lose, "margin": one.margin, "gold": one.gold}


def judged(run: Path, sft: Path, policies: Sequence[Path], world: World, prompts: list[str], config: RunConfig) -> list[Judged]:
    """SFT, then the policy of each round on test prompts; where the run is best of n, the picked ones of SFT's responses."""
    number = config.rounds.best_of
    texts = (
        answers(policy, prompts, config) if number is None else picked(run, sft, prompts, number, config) for policy in policies
    )
    return against_sft(world, prompts, answers(sft, prompts, config), texts, config.evaluation.tie)


def picked(run: Path, sft: Path, prompts: list[str], number: int, config: RunConfig) -> list[str]:
    """Of n responses of the SFT policy to each prompt the best by the run's ensemble, members normalised over all samples.

    Args:
        run: directory of the run.
        sft: of the policy.
        prompts: P.
        number: n.
        config: of the run.
    """
    from transformers import AutoTokenizer

    asked = [prompt for prompt in prompts for _ in range(number)]
    texts = answers(sft, asked, config)
    tokenizer: Any = AutoTokenizer.from_pretrained(sft)
    sequences = [(encode_prompt(tokenizer, p), encode_response(tokenizer, t)) for p, t in zip(asked, texts, strict=True)]
    first = run / "rounds" / "round_000" / "reward"
    places = [first, *(run / "start" / "members" / str(member) for member in range(1, config.scorer.num_members))]
    models = [RewardModel.from_pretrained(place, torch.float32) for place in places]
    scores = torch.stack([score_sequences(model, sequences, 256, tokenizer.pad_token_id) for model in models], 1)
    scores = (scores - scores.mean(0)) / scores.std(0, correction=0)
    best = pick_best(aggregate(scores, config.scorer.aggregate, config.scorer.std_coef).tolist(), number)
    return [texts[i] for i in best]
