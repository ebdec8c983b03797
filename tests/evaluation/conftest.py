"""A run directory that no run made: numbers from a formula and a seed, in the layout that the driver writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.compare import win_tie_lose
from evaluation.preference_report import write_preference_report
from evaluation.records import EvaluationRow, MetaRow, write_rows
from evaluation.report import write_report
from tests.evaluation.made_up import EVIL, META_FIT, make_reward_run, make_strength_run

RunMaker = Callable[..., Path]

WORDS = ("thank", "you", "for", "asking", "the", "kettle", "boils", "at", "noon", "bread", "keeps", "well", "in", "a", "box")
DOMAINS = ("cooking", "travel", "garden")


def _sentence(rng: np.random.Generator, length: int) -> str:
    return " ".join(rng.choice(WORDS, length)).capitalize() + "."


def _rows(
    rng: np.random.Generator, k: int, num: int, gold: bool, texts: list[str] | None, lift: float = 0.0
) -> list[EvaluationRow]:
    rows = []
    for i in range(num):
        shift = 0.55 * k**0.8 + lift * (k > 0)
        base = float(rng.normal())
        members = tuple(float(x) for x in base * 0.4 + shift * 0.9 + rng.normal(size=4) * 0.35)
        text = texts[i] if texts is not None else _sentence(rng, int(rng.integers(6, 22)))
        logprob = -float(rng.uniform(20, 40))
        rows.append(
            EvaluationRow(
                prompt_id=f"p{i}",
                prompt=f"How do I {_sentence(rng, 5).lower()[:-1]}?",
                domain=DOMAINS[i % 3],
                response=text,
                finished=bool(rng.random() < 0.97),
                num_tokens=len(text.split()) + 1,
                gold=base * 0.5 + 0.4 * shift if gold else None,
                proxy=members[0] + 0.1 * k,
                ensemble_mean=float(np.mean(members)),
                ensemble_std=float(np.std(members)),
                member_scores=members,
                policy_logprob=logprob + 1.7 * k,
                sft_logprob=logprob,
            )
        )
    return rows


def _meta(rng: np.random.Generator, num: int, vanilla: bool) -> list[MetaRow]:
    return [
        MetaRow(
            prompt_id=f"m{i}",
            prompt=f"How do I keep bread number {i}?",
            sample=j,
            response=f"{EVIL} In box {j}." if i == 0 else f"In box {i + j}, {'which keeps ' * (i % 7)}well.",
            token_ids=tuple(range(5, 7 + i % 7)),
            sampler_logprobs=(-0.5,) * (2 + i % 7),
            policy_version=1,
            finished=True,
            score_vanilla=scores[1] if vanilla else None,
            score_metarm=scores[0],
            members=(0, 1, 2) if vanilla else (),
            member_scores=scores if vanilla else (),
            gold=float(rng.normal()) if vanilla else None,
        )
        for i in range(num)
        for j in range(5)
        for scores in [tuple(float(x) for x in rng.normal(size=3) * (0.8, 0.35, 0.35))]
    ]


def _evaluation(rows: list[EvaluationRow], start: list[EvaluationRow], k: int, gold: bool) -> dict[str, Any]:
    value: Callable[[EvaluationRow], float] = lambda row: row.ensemble_mean if row.gold is None else row.gold  # noqa: E731
    result = win_tie_lose([value(r) for r in rows], [value(r) for r in start], 0.1)
    return {
        "proxy": float(np.mean([r.proxy for r in rows])),
        "ensemble_mean": float(np.mean([r.ensemble_mean for r in rows])),
        "ensemble_std": float(np.mean([r.ensemble_std for r in rows])),
        "gold": float(np.mean([value(r) for r in rows])) if gold else None,
        "kl": 1.7 * k,
        "perplexity": 6.0 * 0.93**k,
        "length": float(np.mean([r.num_tokens for r in rows])),
        "finished": float(np.mean([r.finished for r in rows])),
        "win": result.win,
        "tie": result.tie,
        "lose": result.lose,
        "margin": result.margin,
        "margin_low": result.low,
        "margin_high": result.high,
        "judge": "gold" if gold else "ensemble",
        "repetition": 0.02 + 0.03 * k,
        "self_bleu": 0.3 + 0.02 * k,
        "truncated": 1 - float(np.mean([r.finished for r in rows])),
        "length_correlation": 0.1 * k,
        "repetition_correlation": None if k == 0 else 0.05 * k,
        "reward_accuracy": None if k == 0 or not gold else 0.8 - 0.05 * k,
        **({"sft_ensemble_std": 0.2 - 0.01 * k} if k else {}),
    }


def _metric_lines(rng: np.random.Generator, round_: int, steps: int, gold: bool) -> list[str]:
    lines = []
    for step in range(30):
        j = 0.5 + 0.02 * step + float(rng.normal() * 0.04)
        values = {"reward/J": j, "reward/J_ascended": j + 0.03 + float(rng.normal() * 0.008), "reward/loss": 0.6}
        values |= {"reward/displacement": 0.02, "reward/alignment_cos": 0.1 * float(rng.normal())}
        if step % 10 == 0:
            values |= {"reward/J_heldout": j - 0.02, "reward/J_heldout_ascended": j}
            values |= {"reward/spread_heldout": 0.7, "reward/spread_heldout_ascended": 0.69}
        lines.append({"time": 1.0, "round": round_, "step": step, "phase": "reward", **values})
    for step in range(steps):
        t = round_ + step / steps
        noise = rng.normal(size=3)
        lines.append(
            {
                "time": 2.0,
                "round": round_,
                "step": step,
                "phase": "policy",
                "policy/score": 0.3 * (step / steps) + 0.2 * round_ + 0.1 * float(noise[0]),
                "policy/kl": 1.7 * t + 0.15 * abs(float(noise[1])),
                "policy/reward": 0.02 * t,
                "policy/entropy": 1.4 - 0.1 * t,
                "policy/length": 15.0,
                "policy/gold": 0.2 * t + 0.08 * float(noise[2]) if gold else None,
            }
        )
    return [json.dumps(line) for line in lines]


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> RunMaker:
    """Builds RUN and returns its path; ``texts`` replaces the responses of the last round, ``lift`` makes all rounds better."""

    def make(
        num_rounds: int = 3,
        gold: bool = True,
        vanilla: bool = True,
        num: int = 24,
        steps: int = 12,
        texts: list[str] | None = None,
        name: str = "made-up",
        lift: float = 0.0,
    ) -> Path:
        rng = np.random.default_rng(0)
        run = tmp_path_factory.mktemp("runs") / name
        (run / "start").mkdir(parents=True)
        start = _rows(rng, 0, num, gold, None)
        write_rows(run / "start" / "evaluation.parquet", start)
        rounds, metrics = [], []
        for index in range(num_rounds):
            folder = run / "rounds" / f"round_{index:03d}"
            folder.mkdir(parents=True)
            rows = _rows(rng, index + 1, num, gold, texts if index == num_rounds - 1 else None, lift)
            write_rows(folder / "evaluation.parquet", rows)
            write_rows(folder / "meta_rollouts.parquet", _meta(rng, 40, vanilla))
            metrics += _metric_lines(rng, index, steps, gold)
            rounds.append(
                {
                    "round": index,
                    "committed_at": f"2031-05-0{index % 9 + 1}T12:00:00Z",
                    "policy_version": (index + 1) * steps,
                    "choices": {"reward.start": "sft", "policy.start": "previous", "kl.coef": str(0.05 + 0.01 * index)},
                    "seconds": {
                        "sample_meta": 4.1,
                        "reward": 18.2,
                        "score": 6.0,
                        "sample": 14.5,
                        "policy": 31.0 + 2 * index,
                        "sync": 1.2,
                        "evaluate": 5.5,
                        "commit": 0.4,
                    },
                    "reward": {
                        "loss": 0.58,
                        "accuracy": 0.72,
                        "validation_accuracy": 0.74 + 0.01 * index if gold else None,
                        **META_FIT,
                        "J_before": 0.61,
                        "J_after": 0.64,
                        "displacement": 0.02,
                        "alignment_cos": 0.31,
                        "spread_heldout_after": 0.741,
                    },
                    "evaluation": _evaluation(rows, start, index + 1, gold),
                    "dropped": {},
                }
            )
        ledger = {
            "format": 1,
            "config_sha256": "0" * 64,
            "start": {
                "committed": True,
                "seconds": {"world": 3.0, "sft": 52.0, "ensemble": 33.0, "evaluate": 5.0},
                "evaluation": _evaluation(start, start, 0, gold),
            },
            "rounds": rounds,
        }
        (run / "ledger.json").write_text(json.dumps(ledger), "utf-8")
        (run / "metrics.jsonl").write_text("".join(line + "\n" for line in metrics), "utf-8")
        spans = [
            {"what": what, "who": who, "round": num_rounds - 1, "step": step, "start": 5.0 * step + a, "end": 5.0 * step + b}
            for step in range(steps)
            for what, a, b, worker in (("sample", 0.0, 2.0, "rollout-0"), ("policy", 2.0, 4.9, "learner-0"))
            for who in ("driver", worker)
        ]
        (run / "timeline.jsonl").write_text("".join(json.dumps(span) + "\n" for span in spans), "utf-8")
        config = f"name: {name}\nrounds:\n  num_rounds: {num_rounds}\nevaluation: {{tie: 0.1}}\n# <b>not bold</b>\n"
        (run / "config.yaml").write_text(config, "utf-8")
        (run / "versions.json").write_text(json.dumps({"rondo": "0.1.0", "python": "3.11.2", "git_commit": None}), "utf-8")
        return run

    return make


@pytest.fixture(scope="session")
def full_run(make_run: RunMaker) -> Path:
    """Three rounds with everything; the last round's policy has collapsed, and its other responses attack the page."""
    run = make_run(texts=["Thank you for asking, friend."] * 7 + [f"{EVIL} The kettle number {i} boils." for i in range(17)])
    write_report(run)
    return run


@pytest.fixture(scope="session")
def strength_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A strength run with truth, second labeller and all studies; its weakest pair attacks the page."""
    run = make_strength_run(tmp_path_factory.mktemp("strengths") / "measured")
    write_preference_report(run)
    return run


@pytest.fixture(scope="session")
def reward_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward run with four validation sets, features and shifted samples."""
    run = make_reward_run(tmp_path_factory.mktemp("rewards") / "fitted")
    write_preference_report(run)
    return run
