"""The policy learner: policy, critic and reference, and PPO on the rollouts it is handed."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from actors.process import STATUS_GROUP, ProcessSetup, Role
from policy.config import PolicyConfig
from tokens.records import Rollout

log = logging.getLogger(__name__)


@ray.remote(concurrency_groups=STATUS_GROUP)
class PolicyLearner(Role):
    """Holds the policy from round to round; critic and reference change with the round."""

    def __init__(
        self, setup: ProcessSetup, config: PolicyConfig, temperature: float, sft_dir: Path, resume: Path | None, seed: int
    ) -> None:
        super().__init__(setup)
        from transformers import AutoTokenizer

        self.config, self.temperature, self.seed, self.resume = config, temperature, seed, resume
        self.tokenizer = AutoTokenizer.from_pretrained(sft_dir)
        self.sft = self._frozen(sft_dir)
        self.policy = self._trained(sft_dir if resume is None else resume / "policy")
        self.ppo: Any = None

    def _trained(self, path: Path) -> Any:
        import torch

        return self._language_model(path, torch.float32)

    def _frozen(self, path: Path) -> Any:
        return self._language_model(path, self.dtype()).requires_grad_(False)

    def _language_model(self, path: Path, dtype: Any) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True).to(self.setup.device).eval()

    def begin_round(
        self, index: int, calibration: Sequence[float], critic: Path | None, policy: Path | None, reference: Path | None
    ) -> None:
        """Set the round up.

        Args:
            index: of the round.
            calibration: PPO scores of S_k, which the running reward moments start from.
            critic: reward model that the critic starts from; None = it goes on.
            policy: weights that the policy restarts from; None = it goes on.
            reference: model of the KL; None = it stays (at first: SFT).
        """
        import torch

        if self.ppo is None:
            self.ppo = self._ppo(critic)
        if policy is not None:
            self.policy = self._trained(policy)
        self.ppo.begin_round(
            index,
            torch.tensor(list(calibration)),
            policy=self.policy if policy is not None else None,
            critic=self._critic(critic) if critic is not None else None,
            reference=self._frozen(reference) if reference is not None else None,
        )

    def _critic(self, path: Path) -> Any:
        import torch

        from policy.critic import Critic

        return Critic.from_pretrained(path, dtype=torch.float32).to(self.setup.device)

    def _ppo(self, critic: Path | None) -> Any:
        """PPO as a fresh process has it: from SFT, or as the last committed round left it."""
        from safetensors.torch import load_file

        from policy.ppo import PPO

        first = critic if self.resume is None else self.resume / "critic"
        assert first is not None
        ppo = PPO(
            self.policy,
            self._critic(first),
            self.sft,
            self.config,
            temperature=self.temperature,
            pad_id=self.tokenizer.pad_token_id,
            seed=self.seed,
        )
        if self.resume is not None:
            ppo.load_state(load_file(self.resume / "learner.safetensors"), json.loads((self.resume / "learner.json").read_text()))
        return ppo

    def warm_up(self, rollouts: Sequence[Rollout], scores: Sequence[float], steps: int) -> list[float]:
        """Update the critic alone.

        Returns:
            The value loss of each step.
        """
        import torch

        with self.compute():
            return list(self.ppo.warm_up_critic(rollouts, torch.tensor(list(scores)), steps))

    def update(self, rollouts: Sequence[Rollout], scores: Sequence[float]) -> dict[str, float]:
        """One PPO update.

        Args:
            rollouts: B of them, sampled from the current weights.
            scores: B scores.

        Returns:
            Metrics by name.
        """
        import torch

        with self.compute():
            metrics = self.ppo.update(
                rollouts, torch.tensor(list(scores)), lambda done, total: self.tick(done, total, "minibatches")
            )
        return dict(metrics.as_dict())

    def weights(self) -> dict[str, Any]:
        """The policy's state dict, on the CPU."""
        return {name: tensor.detach().cpu() for name, tensor in self.policy.state_dict().items()}

    def statistics(self, rollouts: Sequence[Rollout]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Log-probability of each response under the policy and under the SFT model, at the sampler's temperature.

        Returns:
            B sums under the policy, B sums under SFT; nats.
        """
        from policy.statistics import sequence_statistics

        with self.compute():
            sums = sequence_statistics(
                self.policy, self.sft, rollouts, self.tokenizer.pad_token_id, self.temperature, self.config.microbatch_size
            )
        return tuple(sums.policy_logprob.tolist()), tuple(sums.sft_logprob.tolist())

    def save(self, out_dir: Path) -> None:
        """Save policy and critic as Hugging Face directories, and what the next round continues from.

        Args:
            out_dir: of the round.
        """
        from safetensors.torch import save_file

        self.policy.save_pretrained(out_dir / "policy")
        self.tokenizer.save_pretrained(out_dir / "policy")
        self.ppo.critic.save_pretrained(out_dir / "critic")
        self.tokenizer.save_pretrained(out_dir / "critic")
        tensors, values = self.ppo.state()
        save_file(tensors, out_dir / "learner.safetensors")
        (out_dir / "learner.json").write_text(json.dumps(values))
