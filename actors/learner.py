"""The policy learner: policy, critic and reference, and PPO on the rollouts it is handed."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray

from actors.learner_models import AdaptedModels, WholeModels
from actors.once import Once
from actors.process import STATUS_GROUP, ProcessSetup
from actors.ranks import Rank
from actors.transfer import Parcels, TransferSetup, make_sender
from policy.config import DPOConfig, PolicyConfig
from tokens.guards import ONLY_FINITE, GuardsConfig
from tokens.records import Pair, Rollout

log = logging.getLogger(__name__)

Example = tuple[tuple[int, ...], tuple[int, ...]]
"""Ids of a prompt, and of its response with EOS."""


@ray.remote(concurrency_groups=STATUS_GROUP)
class PolicyLearner(Rank):
    """Holds the policy from round to round; critic and reference change with the round.

    With adapters the frozen weights are not saved with a round: they are ``sft_dir``'s and, where the critic goes on,
    ``critic_base``'s.

    Several ranks share the three models. All of them are given the same calls, and give the same answers; rank 0 writes files.
    """

    about = "trains the policy: PPO, with critic and reference"

    def __init__(
        self,
        setup: ProcessSetup,
        config: PolicyConfig,
        temperature: float,
        sft_dir: Path,
        seed: int,
        transfer: TransferSetup,
        ptx: Sequence[Example] = (),
        guards: GuardsConfig = ONLY_FINITE,
    ) -> None:
        super().__init__(setup)
        from transformers import AutoTokenizer

        self.transfer = transfer
        self.config, self.temperature, self.seed = config, temperature, seed
        self.sft_dir, self.ptx, self.guards = sft_dir, ptx, guards
        self.saved: Path | None = None
        self.critic_base = sft_dir
        self.tokenizer = AutoTokenizer.from_pretrained(sft_dir)
        self.ppo: Any = None
        self.policy: Any = None
        self.sft: Any = None
        self.updates: Once[dict[str, float]] = Once()

    def load(self, engines: Sequence[Any], saved: Path | None, critic_base: Path) -> None:
        """Load the models, once the ranks are together and before anything else is asked, and meet the engines.

        Args:
            engines: the rollout engines' handles; they must be up, and idle.
            saved: as in ``restore``, as is ``critic_base``.
        """
        self.models = self._models()
        self.restore(saved, critic_base)
        self.sender = make_sender(self.named_weights, self.ranks, engines, self.transfer)

    def restore(self, saved: Path | None, critic_base: Path) -> None:
        """Be where a save left the learner, whatever it has done since; ``begin_round`` must follow before anything is learned.

        Weights, both optimizers, the KL controller, the reward moments and the counters come back. What is drawn at random
        follows from seed and counters. The old models are let go first, so that there is room.

        Args:
            saved: a directory that ``save`` wrote; None = the beginning, with the SFT policy.
            critic_base: with adapters, what those of a saved critic were trained on.
        """
        self.updates.forget()
        self.ppo = self.policy = self.sft = None
        gc.collect()
        self.saved, self.critic_base = saved, critic_base
        self.policy = self.models.policy(self.sft_dir if saved is None else saved)
        self.sft = self.models.sft(self.policy)
        if self.setup.offload:
            self.move("sft", "cpu")

    def move(self, part: str, device: str) -> None:
        """Move the policy alone, or what only training needs: critic, reference, SFT model and both optimizers' moments."""
        from tokens.offload import move_module

        if part == "policy" and self.policy is not None:
            move_module(self.policy, device)
        if part == "sft" or (part == "training" and self.sft is not None and not self.setup.offload):
            move_module(self.sft, device)
        if part == "training" and self.ppo is not None:
            self.ppo.move_training_state(device)

    def _models(self) -> WholeModels:
        common = (self.config, self.sft_dir, self.dtype(), self.ranks, self.place)
        if self.config.lora.rank:
            return AdaptedModels(*common, lora=self.config.lora, seed=self.seed)
        return WholeModels(*common)

    def begin_round(
        self, index: int, calibration: Sequence[float] | None, critic: Path | None, policy: Path | None, reference: Path | None
    ) -> None:
        """Set the round up.

        Args:
            index: of the round.
            calibration: PPO scores of S_k, which the running reward moments start from; None = they go on.
            critic: reward model, or the SFT model, that the critic starts from; None = it goes on.
            policy: weights that the policy restarts from; None = it goes on.
            reference: model of the KL; None = it stays (at first, and where the policy restarts: SFT).
        """
        import torch

        if self.ppo is None:
            self.ppo = self._ppo(critic)
        if policy is not None:
            self.policy = self.models.policy(policy)
            self.sft = self.models.sft(self.policy)
        restarted = self.sft if policy is not None else None
        self.ppo.begin_round(
            index,
            None if calibration is None else torch.tensor(list(calibration)),
            policy=self.policy if policy is not None else None,
            critic=self.models.critic(critic) if critic is not None else None,
            reference=self.models.frozen(reference) if reference is not None else restarted,
        )

    def _ppo(self, critic: Path | None) -> Any:
        """PPO as it begins: from SFT, or as the save that was restored has it."""
        from safetensors.torch import load_file

        from policy.ppo import PPO

        if critic is not None:
            first = self.models.critic(critic)
        else:
            assert self.saved is not None
            first = self.models.saved_critic(self.saved, self.critic_base)
        ppo = PPO(
            self.policy,
            first,
            self.sft,
            self.config,
            temperature=self.temperature,
            pad_id=self.tokenizer.pad_token_id,
            seed=self.seed,
            ranks=self.ranks,
            reference_rests=self.setup.offload,
            ptx=self.ptx,
            guards=self.guards,
        )
        if self.saved is not None:
            ppo.load_state(load_file(self.saved / "learner.safetensors"), json.loads((self.saved / "learner.json").read_text()))
        return ppo

    def warm_up(self, rollouts: Sequence[Rollout], scores: Sequence[float], steps: int) -> list[float]:
        """Update the critic alone.

        Returns:
            The value loss of each step.
        """
        import torch

        with self.compute():
            return list(self.ppo.warm_up_critic(rollouts, torch.tensor(list(scores)), steps))

    def update(
        self, rollouts: Sequence[Rollout], scores: Sequence[float], sampler_bound: float | None, number: int
    ) -> dict[str, float]:
        """One PPO update; asked for twice, it is made once, and answered for twice.

        Args:
            rollouts: B of them, sampled from the current weights.
            scores: B scores.
            sampler_bound: largest difference allowed between the engines' and the learner's log-prob of a token; None = any.
            number: of the update, counted over all rounds.

        Returns:
            Metrics by name.

        Raises:
            BadNumber: as ``PPO.update``.
            OutOfDate: if a later update is done.
        """
        return self.updates(number, lambda: self._update(rollouts, scores, sampler_bound))

    def _update(self, rollouts: Sequence[Rollout], scores: Sequence[float], sampler_bound: float | None) -> dict[str, float]:
        import torch

        with self.compute():
            metrics = self.ppo.update(
                rollouts,
                torch.tensor(list(scores)),
                lambda done, total: self.tick(done, total, "minibatches"),
                sampler_bound,
            )
        return dict(metrics.as_dict())

    def prefer(self, pairs: Sequence[Pair], dpo: DPOConfig, out_dir: Path, seed: int) -> list[dict[str, float]]:
        """Train the policy by DPO, in one process, in place of PPO.

        Args:
            pairs: D.
            dpo: how.
            out_dir: of the round.
            seed: of the order of the pairs.

        Returns:
            Metrics by name, about twenty times.
        """
        from policy.dpo import fit_dpo

        setup, self.policy = self.setup, None  # room for the one that is trained
        rows = fit_dpo(
            self.sft_dir,
            pairs,
            self.tokenizer,
            out_dir / "policy",
            dpo,
            seed,
            setup.dtype == "bfloat16",
            setup.recompute_activations,
            lambda done, total: self.tick(done, total, "steps"),
        )
        self.policy = self.models.policy(out_dir)
        return rows

    def named_weights(self) -> Iterator[tuple[str, Any]]:
        """The policy's weights, one whole tensor at a time; all ranks must go through them together."""
        return self.models.stream(self.policy)

    def send(self, *awake: None) -> Parcels:
        """Send the policy's weights to the engines, or lay them out for them; all ranks are asked.

        Args:
            awake: answers of what must have happened before; Ray waits for them.

        Returns:
            From rank 0, what was laid out, and how many bytes were sent.
        """
        return self.sender.send()

    def statistics(self, rollouts: Sequence[Rollout]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Log-probability of each response under the policy and under the SFT model, at the sampler's temperature.

        Returns:
            B sums under the policy, B sums under SFT; nats.
        """
        from policy.statistics import sequence_statistics
        from tokens.offload import present

        with present(self.sft, self.setup.device) if self.setup.offload else nullcontext(), self.compute():
            sums = sequence_statistics(
                self.policy,
                self.sft,
                rollouts,
                self.tokenizer.pad_token_id,
                self.temperature,
                self.config.microbatch_size,
                self.ranks,
                self.config.microbatch_tokens,
            )
        return tuple(sums.policy_logprob.tolist()), tuple(sums.sft_logprob.tolist())

    def save(self, out_dir: Path) -> None:
        """Save policy and critic as Hugging Face directories, and what the next round continues from.

        Args:
            out_dir: of the round.
        """
        from safetensors.torch import save_file

        self.models.save(self.policy, self.ppo.critic, out_dir)
        tensors, values = self.ppo.state()
        if self.ranks.rank:
            return
        for name in ("policy", "critic"):
            self.tokenizer.save_pretrained(out_dir / name)
        save_file(tensors, out_dir / "learner.safetensors")
        (out_dir / "learner.json").write_text(json.dumps(values))
