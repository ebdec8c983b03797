"""Many adapters at once against one after another, and names that cannot be served."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rm import domain_bank
from rm.batches import Encoded, score_sequences
from rm.config import LoraConfig
from rm.domain_bank import (
    DOWNS,
    HEADS,
    UPS,
    GroupedBank,
    MixedBank,
    add_batched,
    add_segments,
    in_units,
    moments_by_domain,
    open_bank,
    weights_of,
)
from rm.lora import add_lora, load_adapter, read_adapter, save_adapter, use_adapter
from rm.model import RewardModel
from tests.rm.conftest import MakeModel
from tokens.errors import UserError
from tokens.offload import move_module
from tokens.ranks import weights_norm

PAD, BOS, EOS = 0, 1, 2
NAMES = ("law", "trade", "keys")  # the last is an attribute of torch's dictionaries of modules
SEQUENCES: list[Encoded] = [((BOS, 5, 6, *range(7, 7 + i)), (*range(20, 20 + 2 * i), EOS)) for i in range(7)]
DOMAINS = [NAMES[i % 3] for i in range(7)]
Adapters = list[tuple[str, Path]]


@pytest.fixture
def adapters(start: MakeModel, tmp_path: Path) -> Callable[[str], Adapters]:
    """Three adapters of unlike ranks, away from zero, for a backbone."""

    def make(name: str) -> Adapters:
        found = []
        for i, domain in enumerate(NAMES):
            model = start(name)
            add_lora(model, LoraConfig(rank=2 + i, alpha=4 + i), seed=i)
            generator = torch.Generator().manual_seed(i)
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.add_(0.3 * torch.randn(p.shape, generator=generator))
            save_adapter(model, tmp_path / name / domain)
            found.append((domain, tmp_path / name / domain))
        return found

    return make


def one_after_another(model: RewardModel, adapters: Adapters, domains: list[str]) -> torch.Tensor:
    """Peft's own arithmetic, a text at a time."""
    for name, path in adapters:
        load_adapter(model, path, f"of_{name}")
    scores = []
    for sequence, domain in zip(SEQUENCES, domains, strict=True):
        use_adapter(model, f"of_{domain}")
        scores.append(score_sequences(model, [sequence], 1, PAD))
    return torch.cat(scores)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", MixedBank),
        ("gpt2", MixedBank),
        ("qwen2", MixedBank),
        ("mixtral", MixedBank),
        ("opt", GroupedBank),
        ("bert", GroupedBank),
    ],
)
def test_a_mixed_batch_scores_as_each_adapter_alone(
    start: MakeModel, adapters: Callable[[str], Adapters], name: str, kind: type
) -> None:
    made = adapters(name)
    bank = open_bank(start(name), made)
    assert isinstance(bank, kind) and bank.names == NAMES
    expected = one_after_another(start(name), made, DOMAINS)
    got = bank.scores(SEQUENCES, DOMAINS, 4, PAD)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    turned = [NAMES[(i + 1) % 3] for i in range(7)]
    assert not torch.allclose(bank.scores(SEQUENCES, turned, 4, PAD), got, atol=1e-2)
    assert torch.equal(bank.scores(SEQUENCES, DOMAINS, 4, PAD), got)  # asking leaves nothing behind


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_responses_of_one_domain_share_their_prompt(
    start: MakeModel, adapters: Callable[[str], Adapters], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [(BOS, *range(5, 5 + 8 + i)) for i in range(3)]
    sequences: list[Encoded] = [(prompt, (20 + j, 21, EOS)) for prompt in prompts for j in range(6)]
    domains = [NAMES[0 if j < 4 else 1 + i % 2] for i in range(3) for j in range(6)]  # a prompt is of two domains
    bank = open_bank(start(name), adapters(name))
    assert isinstance(bank, MixedBank)
    seen: list[tuple[int, ...]] = []
    bank.model.model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    for size in (5, 64):
        seen.clear()
        got = bank.scores(sequences, domains, size, PAD)
        shared = sum(rows * width for rows, width in seen)
        assert size < 64 or seen == [(6, 11 + 4 * 3)], "a row for each prompt and domain"
        with monkeypatch.context() as patched:
            patched.setattr(domain_bank, "shared_passes", lambda *given: None)
            seen.clear()
            expected = bank.scores(sequences, domains, size, PAD)
        assert sum(rows * width for rows, width in seen) > shared
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    table = bank.all_scores(sequences, 64, PAD)
    own = table[torch.arange(len(sequences)), torch.tensor([NAMES.index(domain) for domain in domains])]
    torch.testing.assert_close(own, got, rtol=1e-5, atol=1e-5)


def test_both_ways_to_add_are_the_plain_product() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, ups, downs = (torch.randn(*size, generator=generator) for size in ((5, 3, 4), (5, 3, 6), (3, 4, 2), (3, 2, 6)))
    rows = torch.tensor([2, 2, 0, 1, 1])
    expected = torch.stack([y[b] + x[b] @ ups[rows[b]] @ downs[rows[b]] for b in range(5)])
    for add in (add_batched, add_segments):
        output = y.clone()
        add(output, x, ups, downs, rows)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_every_domain_on_every_text(start: MakeModel, adapters: Callable[[str], Adapters]) -> None:
    bank = open_bank(start("llama"), adapters("llama"))
    assert isinstance(bank, MixedBank)
    table = bank.all_scores(SEQUENCES, 5, PAD)
    for column, name in enumerate(NAMES):
        torch.testing.assert_close(table[:, column], bank.scores(SEQUENCES, [name] * 7, 3, PAD), rtol=1e-4, atol=1e-5)


def test_adapters_move_with_their_backbone_and_show_when_they_break(
    start: MakeModel, adapters: Callable[[str], Adapters]
) -> None:
    made = adapters("llama")
    model = start("llama")
    before = len(list(weights_of(model)))
    bank = open_bank(model, made)
    assert isinstance(bank, MixedBank)
    held = list(weights_of(model))
    layers = sum("lora_A" in name for name in read_adapter(start("llama"), made[0][1])[0])
    assert len(held) == before + 1 + 2 * layers and layers > 0
    assert math.isfinite(weights_norm(held))
    expected = bank.scores(SEQUENCES, DOMAINS, 4, PAD)
    move_module(model, "meta")
    assert {weight.device.type for weight in weights_of(model)} == {"meta"}
    model = start("llama")
    bank = open_bank(model, made)
    assert torch.equal(bank.scores(SEQUENCES, DOMAINS, 4, PAD), expected)
    next(buffer for name, buffer in model.named_buffers() if name.endswith(DOWNS)).fill_(float("nan"))
    assert not math.isfinite(weights_norm(weights_of(model))) and math.isfinite(weights_norm(model.parameters()))
    assert not any(name.endswith((HEADS, UPS, DOWNS)) for name in model.state_dict())


def test_each_domain_has_its_own_unit() -> None:
    scores, domains = torch.tensor([0.0, 2.0, 10.0, 30.0]), ["law", "law", "trade", "trade"]
    units = moments_by_domain(scores, domains)
    assert in_units(scores, domains, units).tolist() == [-1, 1, -1, 1]
    assert in_units(torch.tensor([4.0, 20.0]), ["law", "trade"], units).tolist() == [3, 0]
    with pytest.raises(UserError, match="the domain 'art' has no calibration text, only law, trade have"):
        in_units(scores[:1], ["art"], units)
    with pytest.raises(UserError, match="the scores of the domain 'law' cannot be given a unit"):
        moments_by_domain(scores[:1], ["law"])


def test_names_that_cannot_be_served(start: MakeModel, adapters: Callable[[str], Adapters], tmp_path: Path) -> None:
    made = adapters("llama")
    with pytest.raises(UserError, match="two adapters named law"):
        open_bank(start("llama"), [*made, made[0]])
    with pytest.raises(UserError, match="no adapter to score with"):
        open_bank(start("llama"), [])
    bank = open_bank(start("llama"), made)
    with pytest.raises(UserError, match="no reward model for the domain 'art'; there are keys, law, trade"):
        bank.scores(SEQUENCES, ["art"] * 7, 2, PAD)
    with pytest.raises(UserError, match="trained on another backbone"):
        open_bank(start("qwen2"), made)
    with pytest.raises(UserError, match="no adapter at"):
        open_bank(start("llama"), [("art", tmp_path / "art")])
