"""The quickstart's ascent step does something: without it the same reward model comes out otherwise."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

from cluster.inputs import Inputs
from cluster.load_config import load_config
from cluster.sandbox_source import SandboxSource
from evaluation.records import MetaRow, read_rows
from rm.model import RewardModel
from rm.records import RewardFit
from rm.training import fit_reward_model
from tests.cluster.command import ROOT, TINY, Command

QUICKSTART = load_config(ROOT / "configs" / "quickstart.yaml")
Groups = list[list[tuple[tuple[int, ...], tuple[int, ...]]]]


def fit(eta: float, inputs: Inputs, groups: Groups) -> tuple[dict[str, torch.Tensor], RewardFit]:
    model = RewardModel.from_language_model(inputs.sft_dir, pooling=QUICKSTART.reward.pooling, seed=0, dtype=torch.float32)
    meta = QUICKSTART.meta.model_copy(update={"eta": eta})
    report = fit_reward_model(model, inputs.pairs, groups, QUICKSTART.reward, meta, seed=0, pad_id=0, on_step=lambda step: None)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, report


def test_the_quickstarts_eta_raises_j_and_changes_the_reward_model(
    tiny_run: tuple[Path, subprocess.CompletedProcess[str]], command: Command
) -> None:
    inputs = SandboxSource(load_config(TINY), command.storage / "cache").load()
    prompts = {p.id: p.token_ids for p in inputs.meta_prompts}
    groups: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for row in read_rows(tiny_run[0] / "rounds" / "round_000" / "meta_rollouts.parquet", MetaRow):
        groups.setdefault(row.prompt_id, []).append((prompts[row.prompt_id], row.token_ids))
    with_eta, report = fit(QUICKSTART.meta.eta, inputs, list(groups.values()))
    without, flat = fit(0.0, inputs, list(groups.values()))
    with_ascent, without_ascent = report.as_dict(), flat.as_dict()
    assert with_ascent["J_before"] is not None and with_ascent["J_after"] is not None
    assert with_ascent["J_after"] > with_ascent["J_before"] + 1e-4, "J must measurably rise at theta'"
    assert without_ascent["J_after"] == without_ascent["J_before"]
    assert max(float((with_eta[name] - without[name]).abs().max()) for name in without) > 1e-4
