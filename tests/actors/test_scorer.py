"""The scorer's process without Ray: a weight that breaks in memory is read again, a few bad scores do not count."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actors.process import ProcessSetup
from actors.scorer import EnsembleScorer, Scores, vote
from cluster.roles import shared_out
from rm.config import Aggregate, ScorerConfig
from rm.model import RewardModel
from tokens.errors import UserError
from tokens.guards import BadNumber, GuardsConfig
from tokens.records import Prompt, Rollout


@pytest.fixture
def scorer(tmp_path: Path) -> Iterator[Any]:
    """A scorer of three members, without Ray."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    shape = LlamaConfig(
        vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0,
        bos_token_id=None, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "base")
    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>")
    setup = ProcessSetup("scorer-0", tmp_path / "log", torch.get_num_threads(), "cpu", "float32", 0, 1, False)
    made = EnsembleScorer.__ray_metadata__.modified_class(setup, ScorerConfig(num_members=3))
    made.calibrate_on(rollouts(16))
    for member in range(3):
        model = RewardModel.from_language_model(tmp_path / "base", pooling="last", seed=member, dtype=torch.float32)
        model.save_pretrained(tmp_path / str(member))
        tokenizer.save_pretrained(tmp_path / str(member))
        made.load(member, tmp_path / str(member))
    yield made
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def rollouts(number: int) -> list[Rollout]:
    generator = torch.Generator().manual_seed(number)
    made = []
    for i in range(number):
        ids = tuple(torch.randint(3, 24, (3 + i % 5,), generator=generator).tolist())
        made.append(Rollout(Prompt(f"p{i}", "", ids[:2]), 0, (*ids[2:], 1), "", (-3.0,) * (len(ids) - 1), 0, True))
    return made


RULES = (ScorerConfig(num_members=3), GuardsConfig())


def voted(scorer: Any, batch: Sequence[Rollout], ids: Sequence[int] = (0, 1, 2), rule: Aggregate = "mean_minus_std") -> Scores:
    """What the members of one process come to."""
    return vote([scorer.score(batch, ids)], *RULES, rule)


def break_weight(model: RewardModel) -> None:
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("score.weight")).flatten()[3] = math.nan


def test_a_weight_that_breaks_in_memory_is_read_again_from_its_file(scorer: Any) -> None:
    batch = rollouts(24)
    before = voted(scorer, batch)
    assert (before.dropped, before.reloaded) == (0, 0)
    break_weight(scorer.members[1])
    after = voted(scorer, batch)
    assert (after.dropped, after.reloaded) == (0, 1)
    assert (after.members, after.aggregated) == (before.members, before.aggregated)
    assert voted(scorer, batch) == before


def test_a_file_that_is_broken_too_is_an_error_that_names_it(scorer: Any) -> None:
    file = next(scorer.places[2].glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("score.weight"))
    tensors[name].flatten()[0] = math.nan
    save_file(tensors, file, {"format": "pt"})
    break_weight(scorer.members[2])
    with pytest.raises(UserError, match=r"NaN or infinity in score\.weight"):
        scorer.score(rollouts(24), range(3))


def test_members_that_are_broken_beyond_what_the_guards_allow_are_an_error(scorer: Any) -> None:
    with torch.no_grad():
        scorer.members[1].model.get_input_embeddings().weight.fill_(math.inf)
    scorer._read = lambda member: None  # the file is no better
    with pytest.raises(BadNumber, match="the score of reward model 1 for sequence 0 of the batch is nan"):
        voted(scorer, rollouts(24))


def test_one_bad_score_of_an_ensemble_does_not_count(scorer: Any) -> None:
    batch = rollouts(24)
    before = voted(scorer, batch)
    with torch.no_grad():
        scorer.members[1].model.get_input_embeddings().weight[2] = math.inf  # a token that one response alone has
    odd = Rollout(batch[5].prompt, 0, (2, 1), "", (-1.0, -1.0), 0, True)
    scorer._read = lambda member: None  # the file is no better
    after = voted(scorer, [*batch[:5], odd, *batch[6:]])
    assert (after.dropped, after.reloaded) == (1, 1)
    assert after.members[5][1] == pytest.approx((after.members[5][0] + after.members[5][2]) / 2)
    assert after.std[5] == pytest.approx(abs(after.members[5][0] - after.members[5][2]) / 2)
    assert after.aggregated[5] == pytest.approx(after.mean[5] - after.std[5])
    assert [after.aggregated[i] for i in range(24) if i != 5] == [before.aggregated[i] for i in range(24) if i != 5]


def test_an_ensemble_that_is_not_whole_scores_nothing(scorer: Any, tmp_path: Path) -> None:
    places, calibration, batch = dict(scorer.places), list(scorer.calibration), rollouts(24)
    whole = voted(scorer, batch)
    scorer.members.clear()
    with pytest.raises(UserError, match="gone"):
        scorer.hold(calibration, places | {1: tmp_path / "gone"})
    with pytest.raises(RuntimeError, match=r"holds members \[0\] of the ensemble, expected \[0, 1, 2\]"):
        voted(scorer, batch)
    scorer.hold(calibration, places)
    assert voted(scorer, batch) == whole


def test_held_out_members_judge_and_pay_nobody(scorer: Any) -> None:
    batch = rollouts(24)
    before = voted(scorer, batch)
    for judge, twin in ((-1, 0), (-2, 2)):
        scorer.load(judge, scorer.places[twin])
    assert voted(scorer, batch) == before, "what PPO is paid does not know them"
    judged = voted(scorer, batch, (-1, -2), "mean")
    assert judged.ids == (-2, -1)
    expected = [(row[2] + row[0]) / 2 for row in before.members]
    assert list(judged.mean) == pytest.approx(expected) and judged.aggregated == judged.mean
    assert list(judged.std) == pytest.approx([abs(row[2] - row[0]) / 2 for row in before.members])
    with pytest.raises(RuntimeError, match=r"holds members \[-2, -1\] of the ensemble, expected \[-3, -2, -1\]"):
        scorer.score(batch, (-1, -2, -3))


@pytest.mark.parametrize("number", [2, 3, 40])
def test_shares_of_a_batch_come_to_what_the_whole_does(scorer: Any, number: int) -> None:
    batch = [rollout for rollout in rollouts(24) for _ in range(2)]  # two responses to each prompt
    shares = shared_out(batch, number)
    assert [rollout for share in shares for rollout in share] == batch and len(shares) == min(number, 24)
    assert all(share and share[0].prompt.id != before[-1].prompt.id for before, share in itertools.pairwise(shares))
    tokens = [sum(len(r.prompt.token_ids) + len(r.response_ids) for r in share) for share in shares]
    assert max(tokens) <= sum(tokens) / len(shares) + 2 * 7, "no share is longer than its part by more than a prompt"
    whole, together = voted(scorer, batch), vote([scorer.score(share, range(3)) for share in shares], *RULES, "mean_minus_std")
    assert together.ids == whole.ids and together.aggregated == pytest.approx(whole.aggregated, abs=1e-5)
    assert torch.tensor(together.members).allclose(torch.tensor(whole.members), atol=1e-5)


def test_what_was_reloaded_in_any_process_is_counted_once_for_each(scorer: Any) -> None:
    batch = rollouts(24)
    whole = voted(scorer, batch)
    break_weight(scorer.members[1])
    first = scorer.score(batch[:10], range(3))
    break_weight(scorer.members[2])
    both = vote([first, scorer.score(batch[10:], range(3))], *RULES, "mean_minus_std")
    assert both.reloaded == 2 and both.aggregated == pytest.approx(whole.aggregated, abs=1e-5)


def test_a_single_rollout_or_none_is_one_share() -> None:
    assert shared_out([], 3) == [[]] and [len(share) for share in shared_out(rollouts(1), 3)] == [1]
