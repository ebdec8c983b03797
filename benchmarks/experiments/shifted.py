"""Policies at a chosen distance from SFT, and samples of them: what a reward model meets after some rounds.

A policy is moved by PPO against a reward model of its own, fitted on pairs that no model under test sees, and is kept when the KL
of what it samples first passes 1, 3 and 6 nats per response. KL 0 is SFT itself, which is the papers' first round.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.experiments.common import Lab, drawn, fit, relabelled
from cluster.seeds import derive
from policy.config import PolicyConfig
from policy.critic import Critic
from policy.experience import rollout_batch
from policy.ppo import PPO
from policy.statistics import sequence_statistics
from rm.batches import Encoded, score_sequences
from rm.model import RewardModel
from tokens.durable import commit_directory, write_file
from tokens.logprobs import response_logprobs
from tokens.records import Prompt, Rollout

LEVELS = (1.0, 3.0, 6.0)
"""Nats per response at which a policy is kept."""
SHIFTS = ("0", *(f"{level:g}" for level in LEVELS))
SHIFT_SEEDS = 100
"""Added to a seed for the reward model and the PPO that shift its policy."""
MOVER_PAIRS, MOVERS = 2000, 3
"""Pairs at the end of the training split that only the shifting reward models see, and how many of those vote."""
SHIFT_COEF, SHIFT_BATCH, SHIFT_STEPS = 0.03, 128, 60
SAMPLES, JUDGED = 8, 6
"""Responses per prompt that are drawn, and how many of them a reward model is judged on."""
BATCH = 512


@dataclass(frozen=True)
class Measured:
    """Whether a policy that moved still writes.

    Args:
        kl: to SFT, nats per response.
        length: mean tokens.
        finished: share that ended by themselves.
        distinct: different responses to one prompt, as a share of its samples.
        gold: mean gold reward.
    """

    kl: float
    length: float
    finished: float
    distinct: float
    gold: float


@dataclass(frozen=True)
class Samples:
    """What one policy answers.

    Args:
        shift: name of the distance: "0", "1", "3", "6".
        groups: S, a row of SAMPLES responses per training prompt.
        evaluation: JUDGED responses to each prompt that nothing was trained on.
        gold: of ``evaluation``, a row per prompt.
        policy_dir: the policy's directory.
        measured: on the evaluation samples.
    """

    shift: str
    groups: list[list[Encoded]]
    evaluation: list[list[Encoded]]
    gold: list[list[float]]
    policy_dir: Path
    measured: Measured


def language_model(path: Path) -> PreTrainedModel:
    """A policy in evaluation mode."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    return model.eval()


@torch.no_grad()
def sample(lab: Lab, model: PreTrainedModel, prompts: Sequence[Prompt], k: int, seed: int) -> list[Rollout]:
    """``k`` responses to each prompt, prompt after prompt, at the recipe's temperature; the caller's generator is left alone."""
    asked = [(prompt, index) for prompt in prompts for index in range(k)]
    rollouts: list[Rollout] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(asked), BATCH):
            part = asked[start : start + BATCH]
            ids = _respond(lab, model, [prompt.token_ids for prompt, _ in part])
            texts = lab.tokenizer.batch_decode(ids, skip_special_tokens=True)
            rows = [
                Rollout(prompt, index, tuple(row), text, (0.0,) * len(row), 0, row[-1] == lab.tokenizer.eos_token_id)
                for (prompt, index), row, text in zip(part, ids, texts, strict=True)
            ]
            batch = rollout_batch(rows, lab.pad_id)
            logprobs = response_logprobs(model, batch, lab.config.rollout.temperature)
            rollouts += [
                replace(row, sampler_logprobs=tuple(values[mask].tolist()))
                for row, values, mask in zip(rows, logprobs, batch.response_mask, strict=True)
            ]
    return rollouts


def _respond(lab: Lab, model: Any, prompts: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Sampled ids of each, cut after EOS."""
    width, pad, eos = max(map(len, prompts)), lab.pad_id, lab.tokenizer.eos_token_id
    out = model.generate(
        input_ids=torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts]),
        do_sample=True,
        temperature=lab.config.rollout.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=lab.config.rollout.max_new_tokens,
    )[:, width:].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in out]


def measure(lab: Lab, model: PreTrainedModel, sft: PreTrainedModel, rollouts: Sequence[Rollout]) -> Measured:
    """Distance from SFT and signs of collapse, on what the policy sampled."""
    by_prompt: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        by_prompt.setdefault(rollout.prompt.id, []).append(rollout)
    sums = sequence_statistics(model, sft, rollouts, lab.pad_id, lab.config.rollout.temperature, BATCH)
    return Measured(
        kl=sums.kl(),
        length=fmean(len(r.response_ids) for r in rollouts),
        finished=fmean(r.finished for r in rollouts),
        distinct=fmean(len({r.response_ids for r in group}) / len(group) for group in by_prompt.values()),
        gold=fmean(lab.world.gold(r.prompt.text, r.text) for r in rollouts),
    )


def optimise(
    lab: Lab,
    start: PreTrainedModel,
    movers: Sequence[RewardModel],
    config: PolicyConfig,
    seed: int,
    before_step: Callable[[int, PreTrainedModel, list[Rollout]], bool],
) -> PreTrainedModel:
    """PPO of ``start`` (in place) against the mean of normalised scores; KL to SFT; the critic starts from the first model.

    Args:
        lab: prompts are the training prompts.
        start: the policy.
        movers: reward models; each is brought to mean 0 and standard deviation 1 on the first rollouts.
        config: PPO's; ``steps_per_round`` steps at most.
        seed: of prompts, samples and minibatches.
        before_step: sees step, policy and its rollouts before the update; True ends the run there.

    Returns:
        The policy.
    """
    sft = language_model(lab.files.sft_dir)
    ppo = PPO(
        start, Critic(deepcopy(movers[0].model)), sft, config, lab.config.rollout.temperature, lab.pad_id, derive(seed, "ppo")
    )
    prompts, units = lab.prompts("train"), None
    for step in range(config.steps_per_round):
        asked = drawn(prompts, config.prompts_per_step, derive(seed, "prompts", step), "ppo")
        rollouts = sample(lab, start, asked, config.samples_per_prompt, derive(seed, "rollouts", step))
        if before_step(step, start, rollouts):
            break
        rows = [(r.prompt.token_ids, r.response_ids) for r in rollouts]
        raw = torch.stack([score_sequences(mover, rows, BATCH, lab.pad_id) for mover in movers])  # [M, B]
        if units is None:
            units = raw.mean(1, keepdim=True), raw.std(1, keepdim=True)
        scores = ((raw - units[0]) / units[1]).mean(0)
        if step == 0:
            ppo.begin_round(0, scores)
            ppo.warm_up_critic(rollouts, scores, config.critic_warmup_steps)
        ppo.update(rollouts, scores)
    start.requires_grad_(False)
    return start


def shifted_samples(lab: Lab, seed: int, shift: str) -> Samples:
    """One distance of one seed; all are made together, once, and kept on disk. Policies, prompts and samples are its own."""
    root = lab.cache / f"shifted-{seed}"
    if not root.is_dir():
        partial = root.with_name(f".{root.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        _make(lab, seed, partial)
        commit_directory(partial, root)
    return _read(lab, root, seed, shift)


def _make(lab: Lab, seed: int, root: Path) -> None:
    pairs = lab.pairs("train")[-MOVER_PAIRS:]
    own = SHIFT_SEEDS + seed
    flip_rate = lab.config.world.flip_rate
    movers = [
        fit(lab, [p.pair for p in relabelled(pairs, flip_rate, derive(own, "mover", m))], derive(own, "mover", m))[0]
        for m in range(MOVERS)
    ]
    settings = {"steps_per_round": SHIFT_STEPS, "prompts_per_step": SHIFT_BATCH, "kl": {"coef": SHIFT_COEF}}
    config = PolicyConfig.model_validate(lab.config.policy.model_dump() | settings)
    sft, waiting = language_model(lab.files.sft_dir), list(LEVELS)
    _keep(lab, seed, sft, sft, root / "0")

    def keep(step: int, policy: PreTrainedModel, rollouts: list[Rollout]) -> bool:
        kl = sequence_statistics(policy, sft, rollouts, lab.pad_id, lab.config.rollout.temperature, BATCH).kl()
        while waiting and kl >= waiting[0]:
            _keep(lab, seed, policy, sft, root / f"{waiting.pop(0):g}", step)
        return not waiting

    optimise(lab, language_model(lab.files.sft_dir), movers, config, own, keep)
    if waiting:
        raise RuntimeError(f"seed {seed}: KL {waiting[0]:g} was not reached in {SHIFT_STEPS} steps")


def _prompts(lab: Lab, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    return drawn(lab.prompts("train"), lab.config.meta.num_prompts, seed, "S"), lab.prompts("test")


def _keep(lab: Lab, seed: int, policy: PreTrainedModel, sft: PreTrainedModel, out: Path, step: int = 0) -> None:
    policy.save_pretrained(out / "policy")
    train, test = (
        sample(lab, policy, prompts, SAMPLES, derive(seed, "samples", name))
        for prompts, name in zip(_prompts(lab, seed), ("S", "evaluation"), strict=True)
    )
    facts = {"step": step, "measured": vars(measure(lab, policy, sft, test))}
    ids = {name: [r.response_ids for r in rollouts] for name, rollouts in (("S", train), ("evaluation", test))}
    write_file(out / "samples.json", json.dumps(facts | ids))


def _read(lab: Lab, root: Path, seed: int, name: str) -> Samples:
    stored = json.loads((root / name / "samples.json").read_text(encoding="utf-8"))

    def groups(prompts: Sequence[Prompt], rows: Sequence[Sequence[int]]) -> list[list[Encoded]]:
        flat = [(prompts[index // SAMPLES].token_ids, tuple(row)) for index, row in enumerate(rows)]
        return [flat[start : start + SAMPLES] for start in range(0, len(flat), SAMPLES)]

    train, test = _prompts(lab, seed)
    evaluation = [group[:JUDGED] for group in groups(test, stored["evaluation"])]
    responses = [list(response) for group in evaluation for _, response in group]
    texts = iter(list(lab.tokenizer.batch_decode(responses, skip_special_tokens=True)))
    gold = [[lab.world.gold(prompt.text, next(texts)) for _ in group] for prompt, group in zip(test, evaluation, strict=True)]
    return Samples(name, groups(train, stored["S"]), evaluation, gold, root / name / "policy", Measured(**stored["measured"]))
