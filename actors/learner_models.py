"""How the learner's models are loaded, handed to the engines and saved: all weights trained, or adapters on frozen ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from policy.config import PolicyConfig
from tokens.config import AdapterConfig

HEAD = "score"
"""The part of the critic that is trained whole."""


class WholeModels:
    """All weights are trained, in float32; the reference is a frozen model of its own.

    Args:
        config: the policy section.
        sft_dir: the SFT model.
        dtype: of frozen weights.
        ranks: that share the models.
        place: puts a model where it computes.
    """

    def __init__(self, config: PolicyConfig, sft_dir: Path, dtype: Any, ranks: Any, place: Callable[[Any], Any]) -> None:
        self.config, self.sft_dir, self.dtype, self.ranks, self.place = config, sft_dir, dtype, ranks, place
        self._sft: Any = None

    def policy(self, path: Path) -> Any:
        """The policy from a directory: SFT's, or a round's."""
        import torch

        return self.place(self._language_model(path / "policy" if path != self.sft_dir else path, torch.float32))

    def sft(self, policy: Any) -> Any:
        """The SFT model, beside the policy; loaded once."""
        if self._sft is None:
            self._sft = self.frozen(self.sft_dir)
        return self._sft

    def frozen(self, path: Path) -> Any:
        """A language model that is not trained."""
        return self.place(self._language_model(path, self.dtype).requires_grad_(False))

    def critic(self, path: Path) -> Any:
        """The critic from a reward model, or from SFT with a head of zeros."""
        import torch

        return self.place(self._critic(path, torch.float32))

    def saved_critic(self, round_dir: Path, base: Path) -> Any:
        """The critic as a round left it."""
        return self.critic(round_dir / "critic")

    def stream(self, model: Any) -> Iterator[tuple[str, Any]]:
        """A model's weights one whole tensor at a time, on every rank; all must go through them together."""
        return self.ranks.stream(model)

    def save(self, policy: Any, critic: Any, out_dir: Path) -> None:
        """Save both as Hugging Face directories; every rank calls this, rank 0 writes."""
        for name, model in (("policy", policy), ("critic", critic.model)):
            weights = self.ranks.full_state(model)
            if self.ranks.rank == 0:
                model.save_pretrained(out_dir / name, state_dict=weights)

    def _language_model(self, path: Path, dtype: Any) -> Any:
        from policy.library import load

        return self._checked(load(path, dtype, self._attention()).eval())

    def _critic(self, path: Path, dtype: Any) -> Any:
        from policy.critic import Critic
        from tokens.weights import check_finite

        make = Critic.from_language_model if path == self.sft_dir else Critic.from_pretrained
        critic = make(path, dtype, self._attention())
        check_finite(critic.model, path)
        self._checked(critic.model)
        return critic

    def _attention(self) -> str | None:
        from tokens.packing import PACKED

        return PACKED if self.config.packing else None

    def _checked(self, model: Any) -> Any:
        from tokens.packing import check_packing

        if self.config.packing:
            check_packing(model)
        return model


class AdaptedModels(WholeModels):
    """Adapters on frozen weights; the reference is the policy without them.

    Beside the merged models a round holds ``policy_adapter/`` and ``critic_adapter/``: the trained weights as they are, since
    merged ones could not be told apart again.

    Args:
        lora: of policy and critic.
        seed: of the adapters' random half.
    """

    def __init__(self, *arguments: Any, lora: AdapterConfig, seed: int) -> None:
        super().__init__(*arguments)
        self.lora, self.seed = lora, seed

    def policy(self, path: Path) -> Any:
        """SFT with fresh adapters, or with those that a round left."""
        from policy.lora import add_adapters, load_adapters

        model = self._language_model(self.sft_dir, self.dtype)
        add_adapters(model, self.lora, self.seed)
        if path != self.sft_dir:
            load_adapters(model, path / "policy_adapter")
        return self.place(model)

    def sft(self, policy: Any) -> Any:
        """The policy without its adapters: no second model."""
        from tokens.lora import WithoutAdapters

        return WithoutAdapters(policy)

    def critic(self, path: Path) -> Any:
        """The critic with fresh adapters."""
        return self._adapted_critic(path, None)

    def saved_critic(self, round_dir: Path, base: Path) -> Any:
        """The adapters that a round left, on the weights that they were trained on."""
        return self._adapted_critic(base, round_dir / "critic_adapter")

    def stream(self, model: Any) -> Iterator[tuple[str, Any]]:
        """A model's weights with the adapters merged, in the frozen weights' type."""
        from tokens.lora import DEFAULT, merged_stream

        return merged_stream(model, DEFAULT, self.ranks.stream(model))

    def save(self, policy: Any, critic: Any, out_dir: Path) -> None:
        """Save both merged, the merged layers in float32, and their adapters beside them."""
        import torch

        from policy.lora import save_adapters
        from tokens.lora import DEFAULT, merged

        for name, model, head in (("policy", policy, None), ("critic", critic.model, HEAD)):
            weights = self.ranks.full_state(model)
            if self.ranks.rank == 0:
                save_adapters(model, self.lora, out_dir / f"{name}_adapter", weights, head)
                model.save_pretrained(out_dir / name, state_dict=merged(model, DEFAULT, weights, torch.float32))

    def _adapted_critic(self, path: Path, adapters: Path | None) -> Any:
        from policy.lora import add_adapters, load_adapters

        critic = self._critic(path, self.dtype)
        add_adapters(critic.model, self.lora, self.seed + 1, HEAD)
        if adapters is not None:
            load_adapters(critic.model, adapters)
        return self.place(critic)
