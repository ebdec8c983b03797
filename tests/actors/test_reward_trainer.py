"""The reward trainer's process without Ray: a study that a failure ended goes on from where it was saved, to the bit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from actors.fit_saves import FitSaves
from actors.process import ProcessSetup
from actors.reward_trainer import RewardTrainer
from rm.config import ORIGINAL, MetaConfig, RewardConfig
from tokens.guards import GuardsConfig
from tokens.records import Pair

SHAPE = LlamaConfig(
    vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_labels=1,
    initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=1,
)  # fmt: skip


def pairs(seed: int, number: int) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(2, 24, (number, 3, 4), generator=generator).tolist()
    return [Pair(f"{seed}-{i}", tuple(x), (*y, 1), (*z, 1), "") for i, (x, y, z) in enumerate(drawn)]


@pytest.fixture
def own_log() -> Iterator[None]:
    """A process opens its log file in the root logger; here it must not stay there."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


class KilledError(RuntimeError):
    """Stands for the end of the process."""


@pytest.mark.usefixtures("own_log")
def test_a_study_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    base = tmp_path / "base"
    torch.manual_seed(0)
    LlamaForSequenceClassification(SHAPE).save_pretrained(base)
    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>").save_pretrained(base)
    reward = RewardConfig(epochs=2, batch_size=4, microbatch_size=4, lr=1e-2, evaluate_every=2)
    setup = ProcessSetup("reward-0", tmp_path / "log", torch.get_num_threads(), "cpu", "float32", 0, 1, False)
    groups = [[(pair.prompt_ids, side) for side in (pair.chosen_ids, pair.rejected_ids)] for pair in pairs(2, 4)]
    given = (
        setup,
        pairs(0, 16),
        {ORIGINAL: pairs(1, 8)},
        reward,
        MetaConfig(eta=1e-2, samples_per_prompt=2),
        base,
        GuardsConfig(),
        False,
    )
    process = RewardTrainer.__ray_metadata__.modified_class

    def study(out: Path, saves: FitSaves | None, ends_at: int | None = None) -> tuple[Any, int]:
        trainer, seen = process(*given), list[int]()

        def tick(done: int, total: int, unit: str, tokens: int = 0) -> None:
            seen.append(done)
            if ends_at is not None and done >= ends_at * reward.batch_size:
                raise KilledError

        trainer.tick = tick
        found = trainer.study(out, 7, groups, True, 0, saves)
        return (found.report, found.validation, found.scores, found.shifted), len(seen)

    undisturbed, steps = study(tmp_path / "one", None)
    saves = FitSaves(tmp_path / "fits", 3)
    with pytest.raises(KilledError):
        study(tmp_path / "other", saves, ends_at=5)
    saved = [file.name.split(".") for file in sorted(saves.folder.iterdir())]
    assert [(number, kind) for number, _, kind in saved] == [("00000003", "json"), ("00000003", "safetensors")]
    resumed, _ = study(tmp_path / "other", saves)
    assert resumed == undisturbed and steps == len(undisturbed[0].steps) == 8
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
