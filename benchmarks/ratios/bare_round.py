"""The phases of a round that a run has committed, done again: one after another, each by the bare functions.

No Ray, no other process but vLLM's, no journal, nothing synced to disk; models are loaded and inputs read before a phase's clock
starts. The engine samples from the SFT policy, and its seconds are counted for as many tokens as the round sampled.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from actors.reward_trainer import group_by_prompt
from actors.rollout import occurrences, prompt_seed
from benchmarks.ratios.bare_vllm import BareEngine
from cluster.judging import EVALUATION_SEED
from cluster.recorded import read_rollouts, read_scores
from cluster.rounds import Theme
from cluster.sampling import draw
from cluster.seeds import derive
from evaluation.records import EvaluationRow, MetaRow, read_rows
from policy.critic import Critic
from policy.library import load
from policy.ppo import PPO
from policy.statistics import sequence_statistics
from rm.batches import pair_sequences, score_sequences
from rm.ensemble import aggregate
from rm.model import RewardModel
from rm.training import fit_reward_model
from tokens.records import Prompt, Rollout


class BareRound:
    """A round's inputs and models, as the round began with them.

    Args:
        theme: of the run, which kept the rollouts of its steps.
        index: of the round.
        engine: vLLM with the SFT policy.
    """

    def __init__(self, theme: Theme, index: int, engine: BareEngine) -> None:
        self.config, self.inputs, self.index, self.engine = theme.config, theme.inputs, index, engine
        self.place = theme.directory.round_path(index)
        self.before = theme.directory.round_path(index - 1) if index else None
        self.steps = [read_rollouts(path) for path in sorted((self.place / "steps").glob("*.parquet"))]
        self.scores = [read_scores(path) for path in sorted((self.place / "steps").glob("*.json"))]
        rows = read_rows(self.place / "meta_rollouts.parquet", MetaRow)
        prompts = {prompt.id: prompt for prompt in self.inputs.meta_prompts}
        self.shifted = [
            Rollout(prompts[r.prompt_id], r.sample, r.token_ids, r.response, r.sampler_logprobs, r.policy_version, r.finished)
            for r in rows
        ]
        given, scorer = torch.tensor([r.member_scores for r in rows]), self.config.scorer
        self.calibration = aggregate(given, scorer.aggregate, scorer.std_coef)
        start = theme.directory.start_path / "members"
        folders = [self.place / "reward", *(start / str(member) for member in range(1, scorer.num_members))]
        self.members = [RewardModel.from_pretrained(folder, torch.float32) for folder in folders]
        self.reward = RewardModel.from_any(
            self.inputs.base_dir, pooling=self.config.reward.pooling, seed=self.reward_seed, dtype=torch.float32, pad_id=self.pad
        )
        self.sft = load(self.inputs.sft_dir, torch.float32).eval()
        self.ppo = self._ppo()
        self.judged = theme.sft.rollouts
        self.asking, self.sampled = 0.0, 0
        engine.forget()

    @property
    def reward_seed(self) -> int:
        """Of the reward model's fit."""
        return derive(self.config.seed, "reward", self.index)

    @cached_property
    def pad(self) -> int:
        """Id at padding."""
        from transformers import AutoTokenizer

        return int(AutoTokenizer.from_pretrained(self.inputs.sft_dir).pad_token_id)

    def _ppo(self) -> PPO:
        """As the round began with it."""
        sft, before = self.inputs.sft_dir, self.before
        policy = load(sft if before is None else before / "policy", torch.float32).eval()
        first = Critic.from_pretrained((self.place / "reward") if before is None else before / "critic", torch.float32)
        settings, temperature = self.config.policy, self.config.rollout.temperature
        ppo = PPO(
            policy, first, self.sft, settings, temperature, self.pad, self.config.seed,
            guards=self.config.guards,
        )  # fmt: skip
        if before is not None:
            ppo.load_state(load_file(before / "learner.safetensors"), json.loads((before / "learner.json").read_text()))
        ppo.begin_round(self.index, self.calibration, critic=Critic.from_pretrained(self.place / "reward", torch.float32))
        return ppo

    def phases(self) -> dict[str, Callable[[], None]]:
        """By the run's own names."""
        return {
            "sample_meta": self.sample_shifted, "reward": self.fit_reward, "score": self.score, "sample": self.sample,
            "policy": self.learn, "sync": self.copy, "evaluate": self.evaluate, "commit": self.write,
        }  # fmt: skip

    def seconds(self) -> dict[str, float]:
        """Of each phase, by the run's own names; what of it was sampling, for as many tokens as the round sampled then."""
        found: dict[str, float] = {}
        for name, phase in self.phases().items():
            self.asking, self.sampled = 0.0, 0
            began = time.perf_counter()
            phase()
            whole = time.perf_counter() - began
            found[name] = whole + (self.asking * (self._tokens(name) / self.sampled - 1.0) if self.sampled else 0.0)
        return found

    def _tokens(self, phase: str) -> int:
        """That the round sampled in a phase."""
        if phase == "evaluate":
            return sum(row.num_tokens for row in read_rows(self.place / "evaluation.parquet", EvaluationRow))
        steps = self.steps if phase == "sample" else [self.shifted]
        return sum(len(rollout.response_ids) for step in steps for rollout in step)

    def _ask(self, prompts: Sequence[Prompt], samples: int, seed: int) -> list[list[int]]:
        times = occurrences(prompts)
        requests = [(p.token_ids, prompt_seed(seed, p.id, before)) for p, before in zip(prompts, times, strict=True)]
        began = time.perf_counter()
        answer = self.engine.sample(requests, samples)
        self.asking += time.perf_counter() - began
        self.sampled += sum(map(len, answer))
        return answer

    def sample_shifted(self) -> None:
        """S_k."""
        meta, seed = self.config.meta, self.config.seed
        number = min(meta.num_prompts, len(self.inputs.meta_prompts))
        prompts = draw(seed, self.inputs.meta_prompts, 0, number, "meta", self.index)
        self._ask(prompts, meta.samples_per_prompt, derive(seed, "meta", self.index))

    def fit_reward(self) -> None:
        """r_k on D and S_k, and its scores of the validation pairs."""
        config = self.config
        groups = group_by_prompt(self.shifted) if config.meta.enabled else None
        fit_reward_model(
            self.reward, self.inputs.pairs, groups, config.reward, config.meta, self.reward_seed, self.pad, lambda step: None,
            guards=config.guards,
        )  # fmt: skip
        score_sequences(self.reward, pair_sequences(self.inputs.validation), config.reward.microbatch_size, self.pad)

    def score(self) -> None:
        """SFT's samples by the new member; S_k and the steps' rollouts by all."""
        self._score(self.judged, self.members[:1])
        for rollouts in (self.shifted, *self.steps):
            self._score(rollouts, self.members)

    def _score(self, rollouts: Sequence[Rollout], members: Sequence[RewardModel]) -> None:
        given = [(r.prompt.token_ids, r.response_ids) for r in rollouts]
        for member in members:
            score_sequences(member, given, self.config.scorer.batch_size, self.pad)

    def sample(self) -> None:
        """The steps' rollouts."""
        policy, seed = self.config.policy, self.config.seed
        for step in range(len(self.steps)):
            first = step * policy.prompts_per_step
            prompts = draw(seed, self.inputs.policy_prompts, first, policy.prompts_per_step, "policy", self.index)
            self._ask(prompts, policy.samples_per_prompt, derive(seed, "policy", self.index, step))

    def learn(self) -> None:
        """The new critic's warm-up, and every update."""
        steps = [(rollouts, torch.tensor(scores.aggregated)) for rollouts, scores in zip(self.steps, self.scores, strict=True)]
        self.ppo.warm_up_critic(*steps[0], self.config.policy.critic_warmup_steps)
        for rollouts, scores in steps:
            self.ppo.update(rollouts, scores)

    @torch.no_grad()
    def copy(self) -> None:
        """The policy's weights, once in memory for each step."""
        for _ in self.steps:
            for tensor in self.ppo.policy.parameters():
                tensor.clone()

    def evaluate(self) -> None:
        """The evaluation's responses, their scores, log-probs under policy and SFT, and the truth."""
        prompts = self.inputs.eval_prompts[: self.config.evaluation.num_prompts]
        answer = self._ask(prompts, 1, EVALUATION_SEED)
        rollouts = [Rollout(p, 0, tuple(ids), "", (0.0,) * len(ids), 0, True) for p, ids in zip(prompts, answer, strict=True)]
        self._score(rollouts, self.members)
        given = (rollouts, self.pad, self.config.rollout.temperature, self.config.policy.microbatch_size)
        sequence_statistics(self.ppo.policy, self.sft, *given)
        if self.inputs.gold is not None:
            for rollout in self.judged:
                self.inputs.gold(rollout.prompt.text, rollout.text)

    def write(self) -> None:
        """Policy, critic and what moves between updates, to disk but not waiting for it."""
        with TemporaryDirectory() as name:
            self.ppo.policy.save_pretrained(Path(name) / "policy")
            self.ppo.critic.model.save_pretrained(Path(name) / "critic")
            save_file(self.ppo.state().tensors, Path(name) / "learner.safetensors")

    def agreement(self) -> str:
        """How near all this came to what the round left."""
        policy = load(self.place / "policy", torch.float32)
        gaps = [farthest(self.ppo.policy, policy), farthest(self.reward, self.members[0])]
        return f"weights as the round's: policy to {gaps[0]:.0e}, reward model to {gaps[1]:.0e}"


def farthest(one: nn.Module, other: nn.Module) -> float:
    """Largest difference of a weight."""
    theirs: dict[str, Tensor] = other.state_dict()
    return max(float((tensor - theirs[name]).abs().max()) for name, tensor in one.state_dict().items())
