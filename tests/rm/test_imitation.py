"""The imitation loss against transformers' own language-modelling loss, and which models can have one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rm.imitation import LanguageHead, imitation_loss
from rm.model import RewardModel
from tests.rm.conftest import BACKBONES, DECODER, MakeModel
from tokens.errors import UserError
from tokens.records import SequenceBatch

PAD, BOS, EOS = 0, 1, 2
PROMPTS = [(BOS, 5, 6), (BOS, 7), (BOS, 8, 9, 10, 11)]
RESPONSES = [(20, 21, EOS), (22, 23, 24, 25, 26, EOS), (27,)]
BATCH = SequenceBatch.from_ids(PROMPTS, RESPONSES, PAD)
Backbone = Callable[[str], Path]


def loss_of(model: RewardModel, head: LanguageHead, imitated: str) -> torch.Tensor:
    _, hidden, batch = model.states(BATCH)
    return imitation_loss(hidden, batch, head, imitated, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("imitated", ["sequence", "response"])
def test_it_is_the_mean_over_sequences_of_transformers_loss(
    backbone: Backbone, start: MakeModel, name: str, imitated: str
) -> None:
    language = AutoModelForCausalLM.from_pretrained(backbone(name), dtype=torch.float32).eval()
    losses = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.tensor([[*prompt, *response]])
        labels = ids.clone()
        if imitated == "response":
            labels[:, : len(prompt)] = -100
        losses.append(language(input_ids=ids, labels=labels).loss)
    model = start(name)
    head = LanguageHead.load(backbone(name), model)
    assert head.tied == (name == "gpt2")
    torch.testing.assert_close(loss_of(model, head, imitated), torch.stack(losses).mean(), rtol=0, atol=1e-5)


def test_padding_and_microbatches_change_nothing(backbone: Backbone, start: MakeModel) -> None:
    model = start("llama")
    head = LanguageHead.load(backbone("llama"), model)
    whole = loss_of(model, head, "sequence")
    parts = []
    for row in range(3):
        _, hidden, batch = model.states(BATCH.rows(torch.tensor([row])))
        parts.append(imitation_loss(hidden, batch, head, "sequence", 3))
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=0, atol=1e-6)
    left = SequenceBatch(
        *(torch.nn.functional.pad(x, (3, 0)) for x in (BATCH.input_ids, BATCH.attention_mask, BATCH.response_mask))
    )
    _, hidden, batch = model.states(left)
    torch.testing.assert_close(imitation_loss(hidden, batch, head, "sequence", 3), whole, rtol=0, atol=1e-6)


def test_scores_beside_it_are_the_models_own(start: MakeModel) -> None:
    model = start("llama", "mean")
    scores, _, _ = model.states(BATCH)
    torch.testing.assert_close(scores, model(BATCH), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_head_is_kept_beside_its_model(backbone: Backbone, start: MakeModel, tmp_path: Path, name: str) -> None:
    model = start(name)
    head = LanguageHead.load(backbone(name), model)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    loss_of(model, head, "sequence").backward()
    optimizer.step()
    expected = float(loss_of(model, head, "sequence").detach())
    model.save_pretrained(tmp_path)
    head.save(tmp_path)
    again = RewardModel.from_pretrained(tmp_path, torch.float32)
    found = LanguageHead.load(tmp_path, again)
    assert found.tied == head.tied
    assert float(loss_of(again, found, "sequence").detach()) == pytest.approx(expected, abs=1e-6)


def test_models_without_a_language_head_are_refused(backbone: Backbone, start: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds an encoder without a language head"):
        LanguageHead.load(backbone("bert"), start("bert"))
    model = start("llama")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds a reward model without a language head"):
        LanguageHead.load(tmp_path, model)
    with pytest.raises(UserError, match="a decoder is needed"):
        start("bert").states(BATCH)


def test_logits_that_are_more_than_a_linear_layer_are_refused(backbone: Backbone, start: MakeModel) -> None:
    assert "gemma2" in BACKBONES  # it caps its logits
    with pytest.raises(UserError, match=r"Gemma2ForCausalLM .* more than one linear layer"):
        LanguageHead.load(backbone("gemma2"), start("gemma2"))


def test_tied_weights_are_one_parameter(tmp_path: Path) -> None:
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=True)).save_pretrained(tmp_path)
    model = RewardModel.from_any(tmp_path, pooling="last", seed=0, dtype=torch.float32)
    head = LanguageHead.load(tmp_path, model)
    assert head.tied and not list(head.parameters())
    loss_of(model, head, "response").backward()
    embeddings = model.model.get_input_embeddings().weight
    assert embeddings.grad is not None and bool((embeddings.grad[30:40].abs().sum(1) > 0).all())  # words that never stood there


def test_sequences_without_a_token_to_predict_are_refused(backbone: Backbone, start: MakeModel) -> None:
    head = LanguageHead.load(backbone("llama"), start("llama"))
    mask = torch.tensor([[True]])
    alone = SequenceBatch(torch.tensor([[5]]), mask, mask)
    with pytest.raises(ValueError, match="another precedes"):
        imitation_loss(torch.zeros(1, 1, 32), alone, head, "sequence", 1)
