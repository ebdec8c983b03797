"""Many adapters on one backbone that score by name: each text of a batch with the adapter of its own domain.

    h_b = W x_b + B_d(b) A_d(b) x_b        d(b) = the domain of text b;  A [D, r, in], B [D, out, r], alpha / r is part of B

W x is computed once for the whole batch, the rest by two batched products, so that a mixed batch costs little more than one
model. Responses of one domain to one prompt stand in one row behind it (``rm.shared_prompts``), where that saves work.

Letters: B sequences, T positions, D domains, H hidden size, r rank, R rows of the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rm.batches import Encoded, score_sequences
from rm.ensemble import Moments
from rm.lora import load_adapter, read_adapter, use_adapter
from rm.model import RewardModel
from rm.shared_prompts import SharedBatch, shared_passes
from tokens.errors import UserError
from tokens.records import SequenceBatch

HEADS, UPS, DOWNS = "domain_heads", "domain_ups", "domain_downs"
"""Buffers of the backbone that hold the adapters of a ``MixedBank``, so that they move with it."""
_PREFIX = "domain_"
"""Of peft's names of adapters: a bare name could be that of an attribute of a module."""


class DomainBank(Protocol):
    """Reward models of several domains in one process."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the domains."""

    def scores(self, sequences: Sequence[Encoded], domains: Sequence[str], batch_size: int, pad_id: int) -> Tensor:
        """Score each sequence with the model of its domain, without gradient.

        Args:
            sequences: B of (prompt ids, response ids).
            domains: of each.
            batch_size: sequences per forward pass.
            pad_id: id written at padding.

        Returns:
            [B] float32 on the CPU.

        Raises:
            UserError: if a domain is not known.
        """


def open_bank(model: RewardModel, adapters: Sequence[tuple[str, Path]]) -> DomainBank:
    """Adapters on one backbone, ready to score.

    Args:
        model: the backbone that they were trained on, on its device; the bank takes it over.
        adapters: name and directory of each, as ``rm.lora.save_adapter`` wrote them.

    Returns:
        ``MixedBank`` where every layer with an adapter sees a row for each text, as in a decoder; else ``GroupedBank``.

    Raises:
        UserError: if a name comes twice, there is no adapter, or one belongs to another backbone.
    """
    names = [name for name, _ in adapters]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"there are two adapters named {', '.join(twice)}: each domain needs a name of its own; rename one")
    if not adapters:
        raise UserError("no adapter to score with: name at least one domain")
    if model.pooled_here and _rows_stay_rows(model):
        return MixedBank(model, adapters)
    return GroupedBank(model, adapters)


class MixedBank:
    """Every batch may hold texts of all domains.

    Args:
        model: a decoder with a head on its hidden states.
        adapters: name and directory of each.

    Raises:
        UserError: if an adapter does not fit the model.
    """

    def __init__(self, model: RewardModel, adapters: Sequence[tuple[str, Path]]) -> None:
        self.model, self._names = model, tuple(name for name, _ in adapters)
        self._place = {name: i for i, name in enumerate(self._names)}
        self._rows: Tensor | None = None
        weight = next(model.parameters())
        self.add = add_segments if weight.device.type == "cpu" else add_batched
        model.shares_prompts(1)  # tries it, which the hooks below would disturb
        found = [read_adapter(model, path) for _, path in adapters]
        head = next(name for name, p in model.model.named_parameters() if p is model.head.weight)
        heads = torch.stack([weights[head][0].float() for weights, _ in found]).to(weight.device)  # [D, H]
        model.register_buffer(HEADS, heads, persistent=False)
        rank = max(scale.rank for _, scale in found)
        for path, layer in model.model.named_modules():
            key = f"{path}.lora_A.weight"
            if not any(key in weights for weights, _ in found):
                continue
            if not all(key in weights for weights, _ in found):
                raise UserError(f"the adapters {', '.join(self._names)} are on different layers ({path}): train them alike")
            ups = torch.stack([_padded(w[key], rank, 0).T for w, _ in found])  # [D, in, r]
            downs = torch.stack([_padded(w[f"{path}.lora_B.weight"], rank, 1).T * scale.factor for w, scale in found])
            ups, downs = (x.contiguous().to(weight.device, weight.dtype) for x in (ups, downs))  # [D, r, out] the second
            layer.register_buffer(UPS, ups, persistent=False)
            layer.register_buffer(DOWNS, downs, persistent=False)
            layer.register_forward_hook(self._add)

    @property
    def names(self) -> tuple[str, ...]:
        """See ``DomainBank``."""
        return self._names

    def scores(self, sequences: Sequence[Encoded], domains: Sequence[str], batch_size: int, pad_id: int) -> Tensor:
        """See ``DomainBank``."""
        check_names(self._names, domains)
        scores = torch.zeros(len(sequences))
        device = self.model.get_buffer(HEADS).device
        for taken, batch, rows, heads in self._passes(sequences, [self._place[domain] for domain in domains], batch_size, pad_id):
            with torch.no_grad():
                scores[taken] = self._score(batch.to(device), rows.to(device), heads.to(device)).cpu()
        return scores

    def all_scores(self, sequences: Sequence[Encoded], batch_size: int, pad_id: int) -> Tensor:
        """Score every sequence with every domain's model.

        Args:
            sequences: B of (prompt ids, response ids).
            batch_size: sequences per forward pass; each sequence goes through it D times.
            pad_id: id written at padding.

        Returns:
            [B, D] float32 on the CPU.
        """
        each = [sequence for sequence in sequences for _ in self._names]
        return self.scores(each, list(self._names) * len(sequences), batch_size, pad_id).view(len(sequences), len(self._names))

    def _passes(
        self, sequences: Sequence[Encoded], places: Sequence[int], batch_size: int, pad_id: int
    ) -> Iterator[tuple[list[int], SequenceBatch | SharedBatch, Tensor, Tensor]]:
        """Indices of a forward pass's sequences, their batch, and the domains of the layers' rows [R] and of the sequences [B].
        Rows of a domain stand together."""
        lengths = [len(prompt) + len(response) for prompt, response in sequences]
        shared = shared_passes(sequences, batch_size, places)
        if shared is not None and self.model.shares_prompts(max(lengths)):
            for together in shared:
                rows = sorted(together, key=lambda row: places[row[0]])
                taken = [i for row in rows for i in row]
                batch = SharedBatch.of([[sequences[i] for i in row] for row in rows], pad_id)
                yield taken, batch, torch.tensor([places[row[0]] for row in rows]), torch.tensor([places[i] for i in taken])
            return
        order = sorted(range(len(sequences)), key=lambda i: -lengths[i])
        for start in range(0, len(order), batch_size):
            taken = sorted(order[start : start + batch_size], key=lambda i: places[i])
            own = torch.tensor([places[i] for i in taken])
            yield (
                taken,
                SequenceBatch.from_ids([sequences[i][0] for i in taken], [sequences[i][1] for i in taken], pad_id),
                own,
                own,
            )

    def _score(self, batch: SequenceBatch | SharedBatch, rows: Tensor, heads: Tensor) -> Tensor:
        self._rows = rows
        try:
            features = self.model.features(batch)
        finally:
            self._rows = None
        return (features * self.model.get_buffer(HEADS)[heads]).sum(-1)

    def _add(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The hook of every layer with adapters: ups [D, in, r], downs [D, r, out]."""
        assert self._rows is not None
        ups, downs = layer.get_buffer(UPS), layer.get_buffer(DOWNS)
        self.add(output, inputs[0].to(ups.dtype), ups, downs, self._rows)
        return output


def weights_of(model: RewardModel) -> Iterator[Tensor]:
    """All that decides a model's scores: its parameters, and the adapters of a bank that has taken it over.

    Args:
        model: with or without a bank.
    """
    yield from model.parameters()
    yield from (buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in (HEADS, UPS, DOWNS))


def add_batched(output: Tensor, inputs: Tensor, ups: Tensor, downs: Tensor, rows: Tensor) -> None:
    """y_b += x_b A_d(b) B_d(b), in place, by two batched products: few kernels, whatever the domains.

    Args:
        output: [B, T, out], changed.
        inputs: [B, T, in].
        ups: [D, in, r].
        downs: [D, r, out].
        rows: [B] int64, d(b).
    """
    output.baddbmm_(torch.bmm(inputs, ups[rows]), downs[rows])


def add_segments(output: Tensor, inputs: Tensor, ups: Tensor, downs: Tensor, rows: Tensor) -> None:
    """The same by two products for each run of rows of one domain: on a CPU, larger products are the faster ones.

    Args:
        output: [B, T, out], contiguous, changed.
        inputs: [B, T, in].
        ups: [D, in, r].
        downs: [D, r, out].
        rows: [B] int64, d(b); equal ones beside each other.
    """
    start = 0
    domains, counts = torch.unique_consecutive(rows, return_counts=True)
    for domain, count in zip(domains.tolist(), counts.tolist(), strict=True):
        part = slice(start, start + count)
        output[part].view(-1, output.shape[-1]).addmm_(inputs[part].flatten(0, 1) @ ups[domain], downs[domain])
        start += count


class GroupedBank:
    """Texts of one domain at a time: for models whose layers do not see a row for each text, and for encoders.

    Args:
        model: the backbone.
        adapters: name and directory of each.
    """

    def __init__(self, model: RewardModel, adapters: Sequence[tuple[str, Path]]) -> None:
        self.model, self._names = model, tuple(name for name, _ in adapters)
        device = next(model.parameters()).device
        for name, path in adapters:
            load_adapter(model, path, f"{_PREFIX}{name}")
        model.to(device)

    @property
    def names(self) -> tuple[str, ...]:
        """See ``DomainBank``."""
        return self._names

    def scores(self, sequences: Sequence[Encoded], domains: Sequence[str], batch_size: int, pad_id: int) -> Tensor:
        """See ``DomainBank``."""
        return _by_group(self._names, sequences, domains, self._one, batch_size, pad_id)

    def _one(self, name: str, sequences: Sequence[Encoded], batch_size: int, pad_id: int) -> Tensor:
        use_adapter(self.model, f"{_PREFIX}{name}")
        return score_sequences(self.model, sequences, batch_size, pad_id)


def check_names(known: Sequence[str], asked: Sequence[str]) -> None:
    """Refuse domains that nobody was trained for.

    Args:
        known: names of the bank.
        asked: names that texts carry.

    Raises:
        UserError: naming one that is not known.
    """
    unknown = sorted(set(asked) - set(known))
    if unknown:
        raise UserError(
            f"no reward model for the domain {unknown[0]!r}; there are {', '.join(sorted(known))}. Customise it first, or "
            "give its texts another domain"
        )


def moments_by_domain(scores: Tensor, domains: Sequence[str]) -> dict[str, Moments]:
    """Each domain's zero and unit: mean and standard deviation of its own texts' scores.

    Reward models of different domains have scores of different units; a policy that is paid by all of them would learn from the
    domain with the largest.

    Args:
        scores: [B] float.
        domains: of each.

    Returns:
        By domain.

    Raises:
        UserError: if a domain has fewer than two texts, or all of its scores are equal.
    """
    found = {}
    for name in dict.fromkeys(domains):
        own = scores[torch.tensor([domain == name for domain in domains])]
        try:
            found[name] = Moments.of(own)
        except ValueError as error:
            raise UserError(
                f"the scores of the domain {name!r} cannot be given a unit: {error}, from {len(own)} calibration texts. Raise "
                "evaluation.num_prompts"
            ) from error
    return found


def in_units(scores: Tensor, domains: Sequence[str], units: Mapping[str, Moments]) -> Tensor:
    """Scores in standard deviations of their domain's calibration texts.

    Args:
        scores: [B] float.
        domains: of each.
        units: by domain.

    Returns:
        [B] float.

    Raises:
        UserError: if a domain was not calibrated.
    """
    unknown = sorted(set(domains) - units.keys())
    if unknown:
        raise UserError(
            f"the domain {unknown[0]!r} has no calibration text, only {', '.join(sorted(units))} have: raise "
            "evaluation.num_prompts"
        )
    mean, std = (torch.tensor(values) for values in ([units[d].mean for d in domains], [units[d].std for d in domains]))
    return (scores - mean) / std


def _by_group(
    names: Sequence[str],
    sequences: Sequence[Encoded],
    domains: Sequence[str],
    one: Callable[[str, Sequence[Encoded], int, int], Tensor],
    batch_size: int,
    pad_id: int,
) -> Tensor:
    check_names(names, domains)
    scores = torch.zeros(len(sequences))
    for name in dict.fromkeys(domains):
        own = [i for i, domain in enumerate(domains) if domain == name]
        scores[own] = one(name, [sequences[i] for i in own], batch_size, pad_id)
    return scores


def _padded(weight: Tensor, rank: int, dim: int) -> Tensor:
    """A smaller adapter with zeros up to the largest rank."""
    missing = rank - weight.shape[dim]
    if missing == 0:
        return weight
    shape = [missing if axis == dim else size for axis, size in enumerate(weight.shape)]
    return torch.cat([weight, weight.new_zeros(shape)], dim)


@torch.no_grad()
def _rows_stay_rows(model: RewardModel) -> bool:
    """Whether every linear layer of the backbone is called with [B, T, in]; experts of a mixture see single tokens."""
    shapes: list[tuple[int, ...]] = []
    linear = [
        layer for layer in model.model.base_model.modules() if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
    ]
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape))) for layer in linear]
    device = next(model.parameters()).device
    try:
        batch = SequenceBatch.from_ids([(1, 2), (1, 2)], [(1,), (1,)], 0)
        model(batch.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return len(shapes) == len(linear) and all(shape[:2] == (2, 3) and len(shape) == 3 for shape in shapes)
