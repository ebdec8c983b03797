"""How well do small reward models do on real human preferences, beside what length and a linear model know, and are the pairs
that they doubt really wrong?

    python -m benchmarks.experiments.real PAIRS --cache DIRECTORY --choose-lr              # learning rates, once
    python -m benchmarks.experiments.real PAIRS --cache DIRECTORY [--backbone DIRECTORY ...] [--folds 5] [--seeds 1 2 3]
    python -m benchmarks.experiments.real PAIRS --cache DIRECTORY --sheet SHEET.md         # for a reader, labels hidden
    python -m benchmarks.experiments.real PAIRS --cache DIRECTORY --answers ANSWERS.txt    # the reader's, beside the labels

PAIRS is any preference data set (docs/data.md). Folds are made by prompt. A small decoder and a small encoder are pre-trained
here on the texts of all pairs, without their labels (so the texts of the test folds are not new to them, their labels are);
every ``--backbone`` is a model directory of the user's own. Beside them stand two baselines: the length of the responses alone,
and a linear model on hashed 1- and 2-grams with the length. Prints a table and appends to benchmarks/results/real.jsonl.

Every pair is judged by the models that did not see its prompt, so their mean is a cross-fitted strength (each model's differences
are divided by their standard deviation first, since decoder and encoder have different units). ``--sheet`` writes pairs for a
reader (``benchmarks.experiments.reading``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.experiments.reading import compared, drawn_for_a_reader, sheet
from cluster.versions import versions
from evaluation.compare import mean_interval
from policy.config import SFTConfig
from preferences.config import DataConfig
from rm.config import MetaConfig, RewardConfig
from tokens.shape import ModelShape

if TYPE_CHECKING:
    from preferences.sets import PreferenceSet

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ModelShape(vocab_size=2048, hidden_size=96, intermediate_size=288, num_layers=2, num_heads=3, context_length=512)
REWARD = RewardConfig(pooling="mean", epochs=1, lr=1e-3, batch_size=32, microbatch_size=16)
ENCODER_LR = 3e-3
"""Both lr were chosen with ``--choose-lr``, which looks at fold 0's training pairs alone: the best of RATES for each."""
RATES = (3e-4, 1e-3, 3e-3)
BASELINES = ("length alone", "linear, 1-2-grams and length")
LIMITS = (320, 192)
"""Longest prompt and response, tokens; longer pairs are left out for all models and baselines alike."""

Model = Callable[[list[int], list[int]], "np.ndarray"]
"""Trains on the first rows; returns score(chosen) - score(rejected) of the second rows."""


def folds_of(prompts: Sequence[str], num_folds: int) -> np.ndarray:
    """[N] int, the fold of each pair: all pairs of a prompt fall into one."""
    return np.array([int(hashlib.sha256(p.encode()).hexdigest(), 16) % num_folds for p in prompts])


def length_baseline(rows: list[dict[str, Any]]) -> Model:
    """Logistic regression on the difference of the responses' lengths (log of characters)."""
    x = np.array([[np.log1p(len(r["chosen"])) - np.log1p(len(r["rejected"]))] for r in rows])
    return _logistic(x)


def linear_baseline(rows: list[dict[str, Any]]) -> Model:
    """Logistic regression on the difference of hashed 1- and 2-gram counts of the responses, and of their lengths."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import HashingVectorizer

    words = HashingVectorizer(ngram_range=(1, 2), n_features=2**16, norm="l2", alternate_sign=True)
    grams = words.transform([r["chosen"] for r in rows]) - words.transform([r["rejected"] for r in rows])
    length = csr_matrix([[np.log1p(len(r["chosen"])) - np.log1p(len(r["rejected"]))] for r in rows])
    return _logistic(hstack([grams, length]).tocsr())


def _logistic(x: Any) -> Model:
    from sklearn.linear_model import LogisticRegression

    def fit(train: list[int], test: list[int]) -> np.ndarray:
        # Both orders of every pair: no order is special, so there is no intercept.
        import scipy.sparse

        stack = scipy.sparse.vstack if scipy.sparse.issparse(x) else np.vstack
        both = stack([x[train], -x[train]])
        labels = np.r_[np.ones(len(train)), np.zeros(len(train))]
        model = LogisticRegression(fit_intercept=False, max_iter=2000).fit(both, labels)
        return np.asarray(model.decision_function(x[test]))

    return fit


def reward_model(rows: PreferenceSet, backbone: Path, seed: int, reward: RewardConfig = REWARD) -> Model:
    """A reward model on a backbone, its own tokenizer reading the texts."""
    import torch
    from transformers import AutoTokenizer

    from preferences.encode import encode_pairs
    from rm.batches import pair_sequences, score_sequences
    from rm.checkpoints import kind_of
    from rm.model import RewardModel
    from rm.training import fit_reward_model

    tokenizer = AutoTokenizer.from_pretrained(backbone)
    if kind_of(backbone) == "encoder":  # pools by its own module
        reward = reward.model_copy(update={"pooling": "last"})
    pairs, dropped = encode_pairs(rows, tokenizer, 10**6, 10**6, False)
    assert not dropped

    def fit(train: list[int], test: list[int]) -> np.ndarray:
        pad = tokenizer.pad_token_id
        model = RewardModel.from_any(backbone, pooling=reward.pooling, seed=seed, dtype=torch.float32, pad_id=pad)
        own = [pairs[i] for i in train]
        fit_reward_model(model, own, None, reward, MetaConfig(enabled=False), seed, pad, lambda step: None)
        chosen, rejected = score_sequences(model, pair_sequences([pairs[i] for i in test]), 64, pad).chunk(2)
        return (chosen - rejected).numpy()

    return fit


def pretrain_decoder(rows: PreferenceSet, out: Path, shape: ModelShape = SHAPE) -> Path:
    """A small Llama of a shape, and its tokenizer, from the texts of both sides that fit its context; a side may be empty."""
    from policy.sft import fit_language_model, train_tokenizer
    from preferences.encode import encode_prompt, encode_response

    if out.is_dir():
        return out
    partial = out.with_name(f".{out.name}.partial")
    texts = [row[side] for row in rows.rows for side in ("prompt", "chosen", "rejected")]
    tokenizer = train_tokenizer(texts, shape.vocab_size, partial)
    examples = [
        (list(encode_prompt(tokenizer, row["prompt"])), list(encode_response(tokenizer, row[side])))
        for row in rows.rows
        for side in ("chosen", "rejected")
        if row[side]
    ]
    examples = [(prompt, ids) for prompt, ids in examples if len(prompt) + len(ids) <= shape.context_length]
    config = SFTConfig(shape=shape, epochs=2, lr=3e-3, batch_size=16)
    print("decoder:", fit_language_model(examples, tokenizer, partial, config, seed=0), flush=True)
    partial.rename(out)
    return out


def pretrain_encoder(rows: PreferenceSet, decoder: Path, out: Path, shape: ModelShape = SHAPE) -> Path:
    """A small BERT on the same texts with the same vocabulary and a mask token, by transformers' own collator."""
    from datasets import Dataset
    from transformers import (
        AutoTokenizer,
        BertConfig,
        BertForMaskedLM,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from preferences.encode import encode_prompt, encode_response

    if out.is_dir():
        return out
    partial = out.with_name(f".{out.name}.partial")
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    set_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            max_position_embeddings=shape.context_length,
            type_vocab_size=1,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    ids = [
        [*encode_prompt(tokenizer, row["prompt"]), *encode_response(tokenizer, row[side])]
        for row in rows.rows
        for side in ("chosen", "rejected")
        if row[side]
    ]
    ids = [each for each in ids if len(each) <= shape.context_length]
    arguments = TrainingArguments(
        output_dir=str(partial),
        num_train_epochs=4,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to="none",
        logging_steps=100,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    data = Dataset.from_dict({"input_ids": ids})
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=DataCollatorForLanguageModeling(tokenizer))
    trainer.train()
    trainer.save_model(str(partial))
    tokenizer.save_pretrained(partial)
    partial.rename(out)
    return out


def short_enough(rows: PreferenceSet, decoder: Path) -> PreferenceSet:
    """The pairs within LIMITS, as the decoder's tokenizer counts them."""
    from dataclasses import replace

    from transformers import AutoTokenizer

    from preferences.encode import encode_pairs

    kept, _ = encode_pairs(rows, AutoTokenizer.from_pretrained(decoder), *LIMITS, True)
    ids = {pair.id for pair in kept}
    return replace(rows, rows=rows.rows.filter(lambda row: row["id"] in ids, keep_in_memory=True, load_from_cache_file=False))


def main() -> None:
    """Pre-train, cross-validate, print."""
    import torch
    from datasets import disable_progress_bars

    from preferences.load import load_preferences

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs")
    parser.add_argument("--backbone", type=Path, action="append", default=[], help="a model directory; may come several times")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--cache", type=Path, required=True, help="directory for the pre-trained backbones")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--choose-lr", action="store_true", help="only compare learning rates within fold 0's training pairs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of heads and orders")
    parser.add_argument("--sheet", type=Path, help="only write a reader's sheet from the strengths of an earlier call")
    parser.add_argument("--answers", type=Path, help="only compare a reader's answers: a line a pair, NUMBER and A, B or -")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bars()  # type: ignore[no-untyped-call]
    options.cache.mkdir(parents=True, exist_ok=True)
    for left in options.cache.glob(".*.partial"):
        shutil.rmtree(left)
    everything = load_preferences(DataConfig(preferences=options.pairs, drop_bad=True), None)
    rows = _prepare(everything, options.cache)
    texts = [dict(row) for row in rows.rows]
    if options.sheet or options.answers:
        strengths = json.loads((options.cache / "strengths.json").read_text())
        shown = drawn_for_a_reader(strengths["mu"])
        if options.sheet:
            options.sheet.write_text(sheet(texts, shown))
        else:
            print(compared(options.answers.read_text(), shown, strengths["mu"]))
        return
    decoder = pretrain_decoder(rows, options.cache / "decoder")
    encoder = pretrain_encoder(rows, decoder, options.cache / "encoder")
    fold = folds_of([row["prompt"] for row in texts], options.folds)
    if options.choose_lr:
        choose(rows, texts, fold, [decoder, encoder])
        return
    encoders = REWARD.model_copy(update={"lr": ENCODER_LR})
    models: dict[str, list[Model]] = {
        "length alone": [length_baseline(texts)],
        "linear, 1-2-grams and length": [linear_baseline(texts)],
        "decoder": [reward_model(rows, decoder, seed) for seed in options.seeds],
        "encoder": [reward_model(rows, encoder, seed, encoders) for seed in options.seeds],
    } | {path.name: [reward_model(rows, path, seed) for seed in options.seeds] for path in options.backbone}
    differences = cross_validated(models, fold, options.folds)
    learnt = np.concatenate([d / d.std(1, keepdims=True) for name, d in differences.items() if name not in BASELINES])
    differences["all models, one vote"] = learnt.mean(0, keepdims=True)
    strengths = {"mu": learnt.mean(0).tolist(), "sigma": learnt.std(0).tolist(), "num_models": len(learnt)}
    (options.cache / "strengths.json").write_text(json.dumps(strengths))
    right = {name: _by_fold(d, fold, options.folds) for name, d in differences.items()}
    print(table(right))
    print(by_strength(learnt.mean(0), learnt.std(0), np.array(differences["length alone"][0])))
    record = {
        "id": "real",
        "pairs": Path(options.pairs).name,
        "num_pairs": len(texts),
        "num_left_out": len(everything) + len(everything.dropped) - len(texts),
        "folds": options.folds,
        "seeds": options.seeds,
        "accuracy": right,
        "negative": float((learnt.mean(0) < 0).mean()),
        "versions": versions(),
    }
    with (ROOT / "benchmarks" / "results" / "real.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def cross_validated(models: dict[str, list[Model]], fold: np.ndarray, num_folds: int) -> dict[str, np.ndarray]:
    """[seeds, N] by model: score(chosen) - score(rejected) of every pair by fits that did not see its fold."""
    differences = {name: np.full((len(fits), len(fold)), np.nan) for name, fits in models.items()}
    for index in range(num_folds):
        train, test = np.flatnonzero(fold != index).tolist(), np.flatnonzero(fold == index).tolist()
        for name, fits in models.items():
            for seed, fit in enumerate(fits):
                differences[name][seed, test] = fit(train, test)
            share = (differences[name][:, test] > 0).mean()
            print(f"fold {index}: {name} {share:.3f} on {len(test)} pairs", flush=True)
    return differences


def _by_fold(differences: np.ndarray, fold: np.ndarray, num_folds: int) -> list[float]:
    """Share ranked as labelled in each fold, the mean over seeds."""
    return [float((differences[:, fold == index] > 0).mean()) for index in range(num_folds)]


def by_strength(mu: np.ndarray, sigma: np.ndarray, length: np.ndarray) -> str:
    """Ten groups, lowest strength first: strength, disagreement, and how often the longer response was chosen."""
    lines = ["| tenth | mean mu | mean sigma | longer response chosen |", "|---|---|---|---|"]
    for number, group in enumerate(np.array_split(np.argsort(mu, kind="stable"), 10), 1):
        longer = (length[group] > 0).mean()
        lines.append(f"| {number} | {mu[group].mean():+.2f} | {sigma[group].mean():.2f} | {longer:.2f} |")
    return "\n".join(lines)


def choose(rows: PreferenceSet, texts: list[dict[str, Any]], fold: np.ndarray, backbones: Sequence[Path]) -> None:
    """Accuracy of every learning rate on a fifth of fold 0's training prompts."""
    inner = folds_of(["inner " + row["prompt"] for row in texts], 5)
    train = np.flatnonzero((fold != 0) & (inner != 0)).tolist()
    test = np.flatnonzero((fold != 0) & (inner == 0)).tolist()
    for backbone in backbones:
        for lr in RATES:
            fit = reward_model(rows, backbone, 0, REWARD.model_copy(update={"lr": lr}))
            print(f"{backbone.name}, lr {lr:g}: {(fit(train, test) > 0).mean():.3f} of {len(test)} pairs", flush=True)


def _prepare(everything: PreferenceSet, cache: Path) -> PreferenceSet:
    """Pairs short enough, by a tokenizer that is made of them all."""
    from policy.sft import train_tokenizer

    directory = cache / "counting"
    texts = [row[side] for row in everything.rows for side in ("prompt", "chosen", "rejected")]
    train_tokenizer(texts, SHAPE.vocab_size, directory)
    return short_enough(everything, directory)


def table(right: dict[str, list[float]]) -> str:
    """Accuracy of each model, and its paired difference to length alone, with 95% t-intervals over the folds."""
    lines = ["| model | accuracy (95% interval) | above length alone |", "|---|---|---|"]
    base = right["length alone"]
    for name, values in right.items():
        mean, low, high = mean_interval(values)
        gain = mean_interval([a - b for a, b in zip(values, base, strict=True)])
        above = "" if values is base else f"{gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]"
        lines.append(f"| {name} | {mean:.3f} [{low:.3f}, {high:.3f}] | {above} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
