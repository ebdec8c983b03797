"""PPO-max on whole responses: policy, critic, reference, their optimizers, and all that moves between updates.

Letters: B rollouts, T positions (prompt + response + padding).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count, islice
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from policy.config import PolicyConfig
from policy.critic import Critic
from policy.experience import (
    Evaluation,
    Experience,
    chunks,
    experience,
    rollout_batch,
    sampler_logprobs,
    shaped_scores,
)
from policy.guards import PROBED, check_collapse, check_sampler, check_views
from policy.kl import kl_controller, kl_estimate
from policy.metrics import Sums, UpdateMetrics, update_metrics
from policy.microbatches import divide
from policy.objective import critic_loss, cut, policy_terms, ptx_batch, ptx_loss, value_clip
from policy.optimizers import NamedAdamW
from policy.rewards import RunningMoments
from tokens.guards import FINITE, ONLY_FINITE, BadNumber, GuardsConfig
from tokens.logprobs import response_logprobs
from tokens.masked import masked_sum
from tokens.offload import move_module, present
from tokens.ranks import ALONE, Ranks, weights_norm
from tokens.records import Rollout, SequenceBatch

_Model = TypeVar("_Model", bound=nn.Module)

Progress = Callable[[int, int], None]
"""Called with (minibatches done, minibatches in all)."""


def silent(done: int, total: int) -> None:
    """A progress callback that shows nothing."""


class PPOState(NamedTuple):
    """All that moves between updates, apart from the models' weights.

    Args:
        tensors: optimizer moments and step counts; fit for safetensors.
        values: the KL controller, the score moments and the counters; fit for JSON.
    """

    tensors: dict[str, Tensor]
    values: dict[str, dict[str, float]]


class PPO:
    """The policy learner, on whatever device the models are.

    Several ranks may share the models. All of them must then make the same calls with the same arguments: each computes on its
    share of the rows, and holds the same experience, counters and metrics as the others.

    Source: Schulman et al. 2017 (arXiv:1707.06347); Secrets of RLHF I (arXiv:2307.04964), PPO-max.

    Args:
        policy: the language model to train.
        critic: usually the round's reward model (``Critic.from_pretrained``).
        reference: the model that KL is measured against; frozen here. May be the policy without its adapters.
        config: the policy section.
        temperature: the sampler's; applied to policy and reference alike.
        pad_id: id written at padding.
        seed: of the minibatch order.
        ranks: that share the models, which ``ranks.shard`` has cut up already.
        ptx: prompt and response ids of the texts that ``ptx_coef`` is about; not used where that is 0.
        reference_rests: True keeps the reference in host memory but while old log-probs are computed.
        guards: what counts as a number gone wrong.

    Raises:
        ValueError: if the reference is the policy itself, ``minibatch_size`` or (where it counts) ``ptx_batch_size`` is not a
            multiple of the number of ranks, or ``ptx_coef`` is above 0 and there are no texts.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        critic: Critic,
        reference: nn.Module,
        config: PolicyConfig,
        temperature: float,
        pad_id: int,
        seed: int,
        ranks: Ranks = ALONE,
        ptx: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
        reference_rests: bool = False,
        guards: GuardsConfig = ONLY_FINITE,
    ) -> None:
        shared = {"minibatch_size": config.minibatch_size} | (
            {"ptx_batch_size": config.ptx_batch_size} if config.ptx_coef else {}
        )
        for name, size in shared.items():
            if size % ranks.size:
                raise ValueError(f"{name} {size} is not a multiple of the number of ranks, {ranks.size}")
        if config.ptx_coef and not ptx:
            raise ValueError(f"ptx_coef is {config.ptx_coef:g} and there are no texts for it")
        self.ranks = ranks
        self.config = config
        self.temperature = temperature
        self.pad_id = pad_id
        self.seed = seed
        self.ptx = ptx
        self.reference_rests = reference_rests
        self.guards = guards
        self.moments = RunningMoments()
        self.level = RunningMoments()
        """Of the scores that this policy's samples got from this reward model; the moments may start from another's."""
        self.kl = kl_controller(config.kl)
        self.round = 0
        self.num_updates = 0
        self._set_policy(policy)
        self._set_critic(critic)
        self._set_reference(reference)

    def begin_round(
        self,
        round_index: int,
        score_calibration: Tensor | None,
        policy: PreTrainedModel | None = None,
        critic: Critic | None = None,
        reference: nn.Module | None = None,
    ) -> None:
        """Start a round: models that are given replace the old ones, and the score moments are measured anew where scores are.

        Optimizer moments restart with their model; the KL controller and the update counter go on.

        Args:
            round_index: for error messages.
            score_calibration: [n] float, r_k's scores of S_k; None where the reward model is the old one: the moments go on.
            policy: given where the policy restarts (``policy.start: sft``).
            critic: given where the critic restarts from r_k (``policy.critic_start: reward``).
            reference: given where KL is re-anchored (``policy.reference: previous``), and in the first round of a resumed run.

        Raises:
            ValueError: if there are no scores or one is not finite, or the reference is the policy itself.
        """
        if score_calibration is not None:
            moments = RunningMoments()
            moments.update(score_calibration)
            self.moments = moments
        if score_calibration is not None or policy is not None:
            self.level = RunningMoments() if policy is not None else self.moments.copy()
        self.round = round_index
        if policy is not None:
            self._set_policy(policy)
        if critic is not None:
            self._set_critic(critic)
        if reference is not None:
            self._set_reference(reference)

    @torch.no_grad()
    def evaluate(self, batch: SequenceBatch, microbatch: int) -> Evaluation:
        """Log-probs under policy and reference, and values, without gradient.

        Args:
            batch: B sequences, on any device.
            microbatch: sequences per forward pass, where ``microbatch_tokens`` does not say how many.

        Returns:
            The evaluation, [B, T] each, on the policy's device.

        Padding contract: equal for a batch with more padding.
        """
        width, device = batch.input_ids.shape[1], self.policy.device
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        everyone = torch.arange(len(batch), device=batch.input_ids.device)
        division = divide(batch.lengths(), everyone, self.ranks, microbatch, self.config.microbatch_tokens, self.config.packing)
        for index in division.rows():
            part = batch.rows(index).to(device)
            views = (
                response_logprobs(self.policy, part, self.temperature),
                response_logprobs(self.reference, part, self.temperature),
                self.critic(part),
            )
            logprobs, ref_logprobs, values = (nn.functional.pad(x, (0, width - x.shape[1])) for x in views)
            parts.append((logprobs, ref_logprobs, values))
        return Evaluation(*(division.whole(torch.cat(each)) for each in zip(*parts, strict=True)))

    def update(
        self,
        rollouts: Sequence[Rollout],
        scores: Tensor,
        on_progress: Progress = silent,
        sampler_bound: float | None = None,
    ) -> UpdateMetrics:
        """One PPO update of policy and critic on one batch of rollouts.

        Args:
            rollouts: B rollouts, sampled by the current policy, or by one that is at most ``max_lag`` updates older.
            scores: [B] float, the reward model's units.
            on_progress: told after each minibatch.
            sampler_bound: largest difference allowed between the engine's and the learner's log-prob of a token, nats; None where
                the two cannot be compared.

        Returns:
            The update's metrics.

        Raises:
            ValueError: if there are not as many scores as rollouts.
            BadNumber: if a number is not finite or beyond its limit; names round, update and minibatch, and says whether weights
                have moved. Where they have not, everything is as it was before the call, bit for bit.

        Padding contract: more padding changes nothing.
        """
        where, sums = f"round {self.round}, update {self.num_updates}", Sums()
        with self._undoing(sums):
            scores = self._checked(rollouts, scores, where)
            check_collapse(rollouts, scores, self.level, self.guards.collapse, where)
            self.moments.update(scores)
            self.level.update(scores)
            data = self._experience(rollouts, scores, self.moments, self.config.lam, where)
            if sampler_bound is not None:
                check_sampler(rollouts, self._gaps(rollouts, data), sampler_bound, where)
            steps = self.config.epochs * math.ceil(len(rollouts) / self.config.minibatch_size)
            for number, minibatch in enumerate(self._minibatches(len(rollouts), self.config.epochs, "update")):
                if not self._step(data, minibatch, number, steps, sums):
                    break
                on_progress(number + 1, steps)
            sums.update_kl = self._moved(data, where)
        sums = sums.together(self.ranks, self.policy.device)
        metrics = update_metrics(rollouts, scores, data, sums, self.moments, self.kl.coef, steps, self.config)
        self.kl.update(metrics.kl, len(rollouts))
        self.num_updates += 1
        return metrics

    def warm_up_critic(self, rollouts: Sequence[Rollout], scores: Tensor, steps: int) -> list[float]:
        """Fit the critic to the rollouts' Monte Carlo returns before the policy moves.

        The targets use lambda = 1, so they do not depend on a critic that is still wrong, and the error without its
        clip, so that it may move far. Score moments are read as the following ``update`` of the same rollouts will, and left
        alone.

        Args:
            rollouts: B rollouts.
            scores: [B] float, the reward model's units, finite.
            steps: optimizer steps, each on one minibatch.

        Returns:
            The value loss of each step, before the step.

        Raises:
            ValueError: if there are not as many scores as rollouts.
            BadNumber: if a number is not finite, as for ``update``.

        Padding contract: more padding changes nothing.
        """
        losses: list[float] = []
        done = Sums()
        with self._undoing(done):
            where = f"round {self.round}, critic warm-up"
            scores = self._checked(rollouts, scores, where)
            moments = self.moments.copy()
            moments.update(scores)
            data = self._experience(rollouts, scores, moments, 1.0, where)
            learnable = (m for m in self._minibatches(len(rollouts), None, "warm-up") if bool(data.learned[m].any()))
            for minibatch in islice(learnable, steps):
                where = f"round {self.round}, critic warm-up step {len(losses)}"
                sums, denominator = Sums(), data.learned[minibatch].sum()
                for index in self._microbatches(data.batch, minibatch):
                    self._critic_backward(data, index, denominator, math.inf, sums, where)
                self.critic_optimizer.clip("critic", where)
                self.critic_optimizer.step()
                done.minibatches += 1
                losses.append(sums.together(self.ranks, self.policy.device).value_loss)
        return losses

    def state(self) -> PPOState:
        """All that moves between updates, apart from the weights (save those with ``save_pretrained``).

        Where ranks share the models, rank 0 has the tensors and the others none.
        """
        tensors = {f"policy/{name}": x for name, x in self.policy_optimizer.state().items()}
        tensors |= {f"critic/{name}": x for name, x in self.critic_optimizer.state().items()}
        counters: dict[str, float] = {"round": self.round, "num_updates": self.num_updates}
        return PPOState(
            tensors, {"kl": self.kl.state(), "moments": self.moments.state(), "level": self.level.state(), "counters": counters}
        )

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, dict[str, float]]) -> None:
        """Take over a saved state. The models must already hold the weights that were saved with it.

        Args:
            tensors: ``PPOState.tensors``.
            values: ``PPOState.values``.

        Raises:
            ValueError: if the optimizer state does not fit the models.
        """
        for prefix, optimizer in (("policy/", self.policy_optimizer), ("critic/", self.critic_optimizer)):
            optimizer.load({name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)})
        self.kl.load(values["kl"])
        self.moments.load(values["moments"])
        self.level.load(values["level"])
        self.round, self.num_updates = int(values["counters"]["round"]), int(values["counters"]["num_updates"])

    def move_training_state(self, device: torch.device | str) -> None:
        """Move what only training needs: critic, reference, and the moments of both optimizers. The policy stays where it is.

        Source: none needed.

        Args:
            device: to move to; the host's memory, or back to the policy's device before anything else is called.

        Padding contract: there is none.
        """
        for module in (self.critic,) if self.reference_rests else (self.critic, self.reference):
            move_module(module, device)
        for optimizer in (self.policy_optimizer, self.critic_optimizer):
            optimizer.move(device)

    def _set_policy(self, policy: PreTrainedModel) -> None:
        self.policy = _settled(policy)
        self.policy_optimizer = NamedAdamW(policy, self.config.lr, self.config.max_grad_norm)

    def _set_critic(self, critic: Critic) -> None:
        self.critic = _settled(critic)
        self.critic_optimizer = NamedAdamW(critic, self.config.critic_lr, self.config.max_grad_norm)

    def _set_reference(self, reference: nn.Module) -> None:
        if reference is self.policy:
            raise ValueError("the reference must be a model of its own: freezing the policy would stop its training")
        self.reference = _settled(reference).requires_grad_(False)
        if self.reference_rests:
            move_module(self.reference, "cpu")

    def _checked(self, rollouts: Sequence[Rollout], scores: Tensor, where: str) -> Tensor:
        if scores.shape != (len(rollouts),):
            raise ValueError(f"need one score per rollout ({len(rollouts)}), got {tuple(scores.shape)}: {scores.tolist()}")
        if len(rollouts) % self.ranks.size:
            raise ValueError(f"{len(rollouts)} rollouts are not a multiple of the number of ranks, {self.ranks.size}")
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise BadNumber(f"the score of rollout {bad[0]}", scores[bad[0]].item(), FINITE, where)
        return scores.detach().to(self.policy.device)

    def _experience(
        self, rollouts: Sequence[Rollout], scores: Tensor, moments: RunningMoments, lam: float, where: str
    ) -> Experience:
        batch = rollout_batch(rollouts, self.pad_id).to(self.policy.device)
        with present(self.reference, self.policy.device) if self.reference_rests else nullcontext():
            old = self.evaluate(batch, self.config.microbatch_size)
        check_views(old, where)
        finished = torch.tensor([r.finished for r in rollouts], device=scores.device)
        shaped = shaped_scores(scores, finished, batch.response_mask.sum(-1), moments, self.config)
        learned = finished | (self.config.truncated != "mask")
        coef = self.kl.coef if self.config.kl.place == "reward" else 0.0
        return experience(batch, old, shaped, sampler_logprobs(rollouts, batch), learned, coef, self.config, lam)

    def _minibatches(self, num_rollouts: int, epochs: int | None, phase: str) -> Iterator[Tensor]:
        """Shuffled row numbers, without end where ``epochs`` is None.

        The order depends on the seed and the update counter alone: no generator to checkpoint.
        """
        entropy = random.Random(f"{phase}/{self.seed}/{self.num_updates}").getrandbits(63)
        generator = torch.Generator().manual_seed(entropy)
        for _ in count() if epochs is None else range(epochs):
            order = torch.randperm(num_rollouts, generator=generator).to(self.policy.device)
            yield from chunks(order, self.config.minibatch_size)

    def _microbatches(self, batch: SequenceBatch, minibatch: Tensor) -> list[Tensor]:
        """This rank's rows of a minibatch, like lengths together, so that little is spent on padding."""
        config = self.config
        at_once = (config.microbatch_size, config.microbatch_tokens, config.packing)
        return divide(batch.lengths(), minibatch, self.ranks, *at_once).rows()

    def _step(self, data: Experience, minibatch: Tensor, number: int, steps: int, sums: Sums) -> bool:
        """One optimizer step of policy and critic; the denominator is the minibatch's, whatever the microbatches and ranks.

        Returns:
            False where the policy has moved too far already: then no step was taken, and none should follow.
        """
        where = f"round {self.round}, update {self.num_updates}, minibatch {number}"
        denominator = data.learned[minibatch].sum()
        if not int(denominator):
            return True  # every response of it was cut, and those are not learned from
        before = sums.approx_kl
        for index in self._microbatches(data.batch, minibatch):
            self._policy_backward(data, index, denominator, sums, where)
            self._critic_backward(data, index, denominator, value_clip(self.config), sums, where)
        sums.tokens += int(denominator)
        sums.seen += 1
        if self._moved_too_far(sums.approx_kl - before, int(denominator)):
            self._clear()
            return False
        if self.config.ptx_coef:
            self._ptx_backward(self.num_updates * steps + number, sums, where)
        sums.grad_norm += self.policy_optimizer.clip("policy", where)
        sums.critic_grad_norm += self.critic_optimizer.clip("critic", where)
        self.policy_optimizer.step()
        self.critic_optimizer.step()
        sums.minibatches += 1
        return True

    def _moved_too_far(self, approx_kl: float, num_tokens: int) -> bool:
        """Whether the minibatch's mean KL(before the update || now) is over the limit; the ranks agree on it."""
        limit = self.config.max_update_kl
        if limit is None:
            return False
        return self.ranks.sum(torch.tensor(approx_kl, dtype=torch.float64, device=self.policy.device)).item() > limit * num_tokens

    def _policy_backward(self, data: Experience, index: Tensor, denominator: Tensor, sums: Sums, where: str) -> None:
        terms = policy_terms(self.policy, data, index, denominator, self.config, self.temperature, self.kl.coef)
        self._backward(terms.loss, "the policy loss", where)
        sums.loss += terms.surrogate.loss.item()
        sums.clipped += terms.surrogate.num_clipped.item()
        sums.approx_kl += terms.surrogate.approx_kl.item()
        sums.ratio_max = max(sums.ratio_max, terms.surrogate.ratio_max.item())
        sums.exact_entropy += 0.0 if terms.entropy is None else terms.entropy.item()

    def _critic_backward(self, data: Experience, index: Tensor, denominator: Tensor, clip: float, sums: Sums, where: str) -> None:
        result = critic_loss(self.critic, data, index, denominator, self.config, clip)
        self._backward(result.loss, "the value loss", where)
        sums.value_loss += result.loss.item()
        sums.value_clipped += result.num_clipped.item()

    def _ptx_backward(self, number: int, sums: Sums, where: str) -> None:
        """Add the gradient of the language-modelling loss on this optimizer step's texts."""
        entropy = random.Random(f"ptx/{self.seed}").getrandbits(63)
        order = torch.randperm(len(self.ptx), generator=torch.Generator().manual_seed(entropy))
        batch = ptx_batch(self.ptx, number, self.config.ptx_batch_size, order, self.pad_id).to(self.policy.device)
        denominator = batch.response_mask.sum()
        for index in self._microbatches(batch, torch.arange(len(batch), device=batch.input_ids.device)):
            loss = ptx_loss(self.policy, batch.rows(index), denominator)
            self._backward(self.config.ptx_coef * loss, "the ptx loss", where)
            sums.ptx_loss += loss.item()

    def _backward(self, loss: Tensor, what: str, where: str) -> None:
        """Every rank looks at the sum, so that all of them give up, or none: one that waits for the others waits for ever."""
        total = self.ranks.sum(loss)
        if not bool(total.isfinite()):
            raise BadNumber(what, total.item(), FINITE, where)
        torch.autograd.backward(loss)

    def _gaps(self, rollouts: Sequence[Rollout], data: Experience) -> Tensor:
        """[B] float64, the largest difference between an engine's and the learner's log-prob of a token of each rollout, nats."""
        differences = (sampler_logprobs(rollouts, data.batch) - data.old.logprobs.double()).abs()
        return torch.where(data.batch.response_mask, differences, 0.0).amax(-1)

    @torch.no_grad()
    def _moved(self, data: Experience, where: str) -> float | None:
        """How far an update has moved the policy: mean k3 per token of KL(before || after), on some of its rollouts.

        Raises:
            BadNumber: if that is too far, or a weight is not finite.
        """
        norm, limit = weights_norm(p for p in self._weights() if p.requires_grad), self.guards.update_kl
        if not math.isfinite(norm):
            raise BadNumber("the norm of the weights of policy and critic", norm, FINITE, where)
        if limit is None:
            return None
        rows = torch.arange(self.ranks.size * math.ceil(len(data.batch) / PROBED / self.ranks.size), device=self.policy.device)
        total = torch.zeros((), dtype=torch.float64, device=self.policy.device)
        for index in self._microbatches(data.batch, rows):
            part = data.batch.rows(index)
            now, before = response_logprobs(self.policy, part, self.temperature), cut(data.old.logprobs, index, part)
            total += masked_sum(kl_estimate(before.double(), now.double(), "k3"), part.response_mask)
        moved = self.ranks.sum(total).item() / int(data.batch.response_mask[rows].sum())
        if not moved <= limit:
            expected = f"at most {limit:g} nats per token (guards.update_kl); policy.lr may be too high"
            raise BadNumber("the KL of the policy before an update to that after it", moved, expected, where)
        return moved

    def _weights(self) -> Iterator[nn.Parameter]:
        yield from self.policy.parameters()
        yield from self.critic.parameters()

    @contextmanager
    def _undoing(self, sums: Sums) -> Iterator[None]:
        """Where a number goes wrong, leave no gradient and no score of the batch behind, and say whether weights have moved."""
        moments, level = self.moments.copy(), self.level.copy()
        try:
            yield
        except BadNumber as bad:
            self._clear()
            self.moments, self.level = moments, level
            moved = sums.minibatches > 0
            broken = not math.isfinite(weights_norm(self._weights()))
            raise bad.found(undo=moved or broken) from None

    def _clear(self) -> None:
        self.policy_optimizer.clear()
        self.critic_optimizer.clear()


def _settled(model: _Model) -> _Model:
    """Without dropout, and with every parameter in memory of its own.

    Dropout would make the first ratio differ from 1. Weights read from a file lie at any offset of it, and CPU kernels round
    differently by alignment: a resumed run would differ in the last bit from one that never stopped. Shards have such memory.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.clone()
    return model.train(False)
