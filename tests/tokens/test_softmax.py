"""Log-probabilities and entropies in chunks are those of plain operations."""

import pytest
import torch
from torch import Tensor

from tokens import softmax
from tokens.logprobs import token_entropy, token_logprobs


def plain_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    scaled = logits.float() / temperature
    return scaled.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(scaled, dim=-1)


def plain_entropy(logits: Tensor, temperature: float) -> Tensor:
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    return -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_chunks_change_nothing(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "CHUNK", 50 * rows)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(3, 4, 50, generator=generator)).to(dtype)
    ids, weights = torch.randint(0, 50, (3, 4), generator=generator), torch.randn(3, 4, generator=generator)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    got, wanted = token_logprobs(ours, ids, 0.7), plain_logprobs(theirs, ids, 0.7)
    assert torch.equal(got, wanted)
    for value in (got, wanted):
        (value * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)

    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    got, wanted = token_entropy(ours, 0.7), plain_entropy(theirs, 0.7)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)
    for value in (got, wanted):
        (value * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_what_is_kept_for_the_gradient_is_the_logits_alone() -> None:
    logits, ids, kept = torch.randn(20, 1000, requires_grad=True), torch.zeros(20, dtype=torch.int64), 0

    def pack(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        token_logprobs(logits, ids)
        token_entropy(logits)
    assert kept <= 2 * logits.numel() + 100


def test_no_rows_are_no_error() -> None:
    logits = torch.randn(2, 0, 5, requires_grad=True)
    token_logprobs(logits, torch.zeros(2, 0, dtype=torch.int64)).sum().backward()  # type: ignore[no-untyped-call]
    assert token_entropy(logits).shape == (2, 0)
