"""C7: a PPO step from prompts to updated weights in the engine, against the last PPO trainer that TRL had (1.12.0).

Same policy, reference, reward and value model, prompts, responses to each, epochs, minibatches, learning rate. The models never
draw a special token, so that every response has as many tokens. Ours are a run's roles, which take a round's steps as the
round takes them, recording included; TRL's trainer is held ready in a process of its own and makes one step of its ``train``.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.ratios.child import ROOT, Child
from benchmarks.ratios.frame import of_all_processes, take_turns
from benchmarks.ratios.rows import Row, Settings, row
from benchmarks.ratios.trl_environment import trl_python
from benchmarks.ratios.whole_run import steps_of, under_way
from cluster.config import RunConfig
from cluster.rounds import Theme
from policy.critic import Critic
from policy.experience import rollout_batch
from policy.ppo import PPO
from policy.sft import make_model
from rm.batches import score_sequences
from rm.model import RewardModel
from sandbox.tokenizer import SPECIALS, make_tokenizer
from tokens.records import Rollout
from tokens.shape import ModelShape

WORDS, EPOCHS, LR, TEMPERATURE = 508, 2, 3e-6, 1.0
"""Words of the vocabulary, and what both sides are told; the learning rate is TRL's default."""
SIZES = {False: (64, 32, 64), True: (8, 8, 8)}
"""Prompts of a step, tokens of each, and of a response; by whether it is to be small."""
SHAPES = {
    False: ModelShape(hidden_size=256, intermediate_size=704, num_layers=4, num_heads=4, context_length=160),
    True: ModelShape(hidden_size=64, intermediate_size=96, num_layers=1, num_heads=1, context_length=32),
}
MICROBATCH, JUDGED = {"defaults": 8, "best": 32}, 8
"""Sequences of TRL's backward pass, at its default and as ours; prompts that only an evaluation would use."""
PHASES = ("sample", "score", "policy", "sync")
"""Of a step, as the run counts them."""


def save_endless(folder: Path, shape: ModelShape) -> None:
    """A model of random weights that never draws a special token, and its tokenizer.

    The first number of the hidden state is 1 at every word, no layer writes to it, and the head of a special token takes a
    thousand times as much from its logit.
    """
    tokenizer = make_tokenizer([f"w{i}" for i in range(WORDS)])
    config = make_model(tokenizer, shape, seed=0).config
    config.tie_word_embeddings = False
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[: len(SPECIALS)] = 0.0
        model.lm_head.weight[: len(SPECIALS), 0] = -1000.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_pairs(path: Path, first: int, number: int, length: int) -> None:
    """Pairs with prompts of so many words, no two alike."""
    rows = [
        {
            "prompt": " ".join(f"w{(i * 7 + j) % WORDS}" for j in range(length)),
            "chosen": f"w{i % WORDS} w1 w2",
            "rejected": f"w{i % WORDS} w3 w4",
        }
        for i in range(first, first + number)
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))


def config_of(folder: Path, settings: Settings) -> RunConfig:
    """A run whose PPO step has all prompts, from the models and pairs in a folder."""
    number, length, response = SIZES[settings.small]
    share = {"num_cpus": 0.25, "threads": settings.threads}
    return RunConfig.model_validate(
        {
            "name": "ppo-step",
            "storage": str(folder / "storage"),
            "data": {
                "preferences": str(folder / "pairs.jsonl"), "validation": str(folder / "judged.jsonl"),
                "validation_split": "train", "max_prompt_tokens": length, "max_response_tokens": response,
            },
            "sft": {"model": str(folder / "policy")},
            "reward": {"batch_size": 8},
            "meta": {"enabled": False, "num_prompts": 8, "samples_per_prompt": 2},
            "scorer": {"num_members": 1, "aggregate": "primary"},
            "rollout": {"temperature": TEMPERATURE, "max_new_tokens": response},
            "policy": {
                "steps_per_round": 10_000, "prompts_per_step": number, "epochs": EPOCHS, "minibatch_size": number,
                "microbatch_size": min(MICROBATCH["best"], number), "lr": LR, "critic_lr": LR, "critic_warmup_steps": 0,
            },
            "evaluation": {"num_prompts": JUDGED, "judge": "ensemble"},
            "rounds": {"num_rounds": 1, "checkpoint_every": None},
            "resources": dict.fromkeys(("rollout", "reward", "scorer", "learner"), share),
        }
    )  # fmt: skip


def child(python: Path, theme: Theme, reward: Path, case: str, folder: Path, settings: Settings) -> Child:
    """TRL's trainer in a process of its own, from the same models; ready when it answers."""
    number, _, response = SIZES[settings.small]
    given: dict[str, Any] = {
        "policy": str(theme.inputs.sft_dir), "reward": str(reward), "threads": settings.threads, "response_length": response,
        "prompts": [list(prompt.token_ids) for prompt in theme.inputs.policy_prompts], "temperature": TEMPERATURE,
        "epochs": EPOCHS, "lr": LR, "output_dir": str(folder / case), "microbatch": min(MICROBATCH[case], number),
    }  # fmt: skip
    command = [str(python), "-P", str(ROOT / "benchmarks" / "ratios" / "trl_ppo.py"), json.dumps(given)]
    return Child(f"TRL ({case})", command, {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"})


def products(settings: Settings) -> Callable[[], None]:
    """The matrix products of a step's linear layers, a microbatch at a time: no step that makes these passes takes less.

    That is a forward pass of all tokens for each of sampling, reward, policy, reference and values, and a forward and a backward
    pass of policy and critic in each epoch; a language model's head at the responses alone.
    """
    number, length, response = SIZES[settings.small]
    shape = SHAPES[settings.small]
    hidden, inner = shape.hidden_size, shape.intermediate_size
    body = [(hidden, hidden)] * 4 + [(hidden, inner)] * 2 + [(inner, hidden)]
    size = min(MICROBATCH["best"], number)
    rows, read = size * (length + response), size * response
    layers = [(rows, *each) for _ in range(shape.num_layers) for each in body]
    head = (read, hidden, WORDS + len(SPECIALS))
    # sampling, policy, reference read words; reward and critic do not
    forward = 3 * [*layers, head] + 2 * layers
    learnt = EPOCHS * [*layers, head, *layers]
    given = {each: (torch.randn(each[:2]), torch.randn(each[1:])) for each in {*layers, head}}

    def multiply() -> None:
        for _ in range(number // size):
            for each in (*forward, *learnt):
                given[each][0] @ given[each][1]
            for each in learnt:
                left, right = given[each]
                out = torch.empty(each[0], each[2]).fill_(1.0)
                out @ right.T  # the gradient of what came in
                left.T @ out  # of the weights

    return multiply


def learning_share(theme: Theme, reward: Path, rollouts: Sequence[Rollout], repetitions: int) -> float:
    """Which part of an update the log-probs and values before it are, measured on the update alone, in this process."""
    policy, reference = (LlamaForCausalLM.from_pretrained(theme.inputs.sft_dir, dtype=torch.float32) for _ in range(2))
    config = theme.config.policy
    ppo = PPO(policy, Critic.from_pretrained(reward, torch.float32), reference, config, TEMPERATURE, 0, seed=0)
    scores = torch.arange(len(rollouts), dtype=torch.float32)
    ppo.begin_round(0, scores)
    batch = rollout_batch(rollouts, 0)
    turns = take_turns(
        {"before": partial(ppo.evaluate, batch, config.microbatch_size), "all": partial(ppo.update, rollouts, scores)},
        repetitions,
    )
    return turns.ratio("before", "all").middle


def agreement(theme: Theme, reward: Path, rollouts: Sequence[Rollout], other: Child) -> str:
    """How far both sides' own functions agree about responses of the last step."""
    asked = {
        "prompts": [list(r.prompt.token_ids) for r in rollouts],
        "responses": [list(r.response_ids) for r in rollouts],
    }
    theirs = other.ask(asked)
    _, logprobs = theme.wait("evaluate", theme.roles.learner.statistics(rollouts))
    given = [(r.prompt.token_ids, r.response_ids) for r in rollouts]
    rewards = score_sequences(RewardModel.from_pretrained(reward, torch.float32), given, 32, 0).tolist()
    gaps = [max(abs(a - b) for a, b in zip(x, theirs[y], strict=True)) for x, y in ((logprobs, "logprobs"), (rewards, "rewards"))]
    tokens = sum(len(r.response_ids) for r in rollouts)
    return (
        f"{tokens} tokens learnt {EPOCHS} times on both sides; log-prob of a response under the reference to {gaps[0]:.0e} of "
        f"{max(map(abs, logprobs)):.0f} nats, its reward to {gaps[1]:.0e} of {max(map(abs, rewards)):.2g}"
    )


def measure(settings: Settings) -> Iterator[Row]:
    """Against its defaults and its best setting."""
    python = trl_python()
    number, length, response = SIZES[settings.small]
    with TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        save_endless(folder / "policy", SHAPES[settings.small])
        write_pairs(folder / "pairs.jsonl", 0, number, length - 1)  # and BOS
        write_pairs(folder / "judged.jsonl", number, JUDGED, length - 1)
        theme = stack.enter_context(under_way(config_of(folder, settings), folder / "storage"))
        step, reward = stack.enter_context(steps_of(theme, 0))
        others = {case: child(python, theme, reward, case, folder, settings) for case in MICROBATCH}
        for other in others.values():
            stack.callback(other.end)
        seconds: list[dict[str, float]] = []

        def ours() -> None:
            began = dict(theme.wait.seconds)
            start = time.perf_counter()
            step()
            took = {phase: theme.wait.seconds[phase] - (began[phase] if phase in began else 0.0) for phase in PHASES}
            seconds.append(took | {"record": time.perf_counter() - start - sum(took.values())})

        turns = take_turns(
            {"ours": ours, **{case: partial(other.ask, None) for case, other in others.items()}, "products": products(settings)},
            settings.repetitions,
            of_all_processes,
        )
        rollouts = theme.wait("sample", theme.roles.rollout.sample(theme.inputs.policy_prompts, 1, 0, theme.version))
        equality = agreement(theme, reward, rollouts, others["best"])
        before = learning_share(theme, reward, rollouts, min(3, settings.repetitions))
    figures = shares(seconds[1:], before) | {"response_tokens": number * response}
    for case, words in (("PPO step", "defaults"), ("PPO step, against TRL's best", "best")):
        limit = turns.ratio("products", words).middle
        yield row(("C7", case), turns, ("ours", words), settings, limit, equality, **figures)


def shares(seconds: Sequence[dict[str, float]], before: float) -> dict[str, float]:
    """Of each phase in the median step; what is left of it writes down what is learned from.

    Args:
        seconds: of each phase, step by step.
        before: which part of the policy's phase the log-probs are.
    """
    middle = {phase: statistics.median(each[phase] for each in seconds) for phase in (*PHASES, "record")}
    policy = middle.pop("policy")
    parts = middle | {"logprobs": before * policy, "learn": (1 - before) * policy}
    total = sum(parts.values())
    order = ("sample", "score", "logprobs", "learn", "sync", "record")
    return {f"{phase}_share": round(parts[phase] / total, 3) for phase in order}
