"""Base models that customisations start from: made here from training texts, tuned, or the user's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.experiments.real import pretrain_decoder, pretrain_encoder
from cluster.config import RunConfig
from cluster.inputs import open_source
from cluster.storage import storage_root
from policy.config import SFTConfig
from policy.sft import fit_language_model
from preferences.config import DataConfig
from preferences.encode import encode_prompt, encode_response
from preferences.load import load_preferences
from preferences.queries import load_queries, split_queries
from tokens.errors import UserError
from tokens.shape import ModelShape

if TYPE_CHECKING:
    from preferences.sets import PreferenceSet

SHAPE = ModelShape(vocab_size=2048, hidden_size=96, intermediate_size=288, num_layers=2, num_heads=3, context_length=1024)
"""Of what is pre-trained here: the longest prompt and response of the recipe fit its context."""
TUNED = SFTConfig(epochs=1, lr=5e-4, batch_size=16)
DECODER, ENCODER, PLAIN = "decoder", "encoder", "plain"
TUNED_BASES = ("tuned", "decoder, tuned")
"""Names of the bases made here that were fine-tuned on preferred responses: the sandbox's, and the decoder of dsp."""
MADE = (PLAIN, DECODER, ENCODER, *TUNED_BASES)
"""Names of all bases made here, which no other may have."""


def tuned_base(plain: Path, pairs: PreferenceSet, out: Path, data: DataConfig) -> Path:
    """The plain model fine-tuned on the preferred responses of general pairs, as Alpaca is LLaMA on instructions.

    Args:
        plain: a causal language model.
        pairs: general ones to train on: which response is preferred is what a held-out pair asks.
        out: where it belongs; what is there is taken.
        data: longest prompt and response; longer pairs are left out.
    """
    if out.is_dir():
        return out
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(plain)
    examples = []
    for row in pairs.rows:
        prompt, response = encode_prompt(tokenizer, row["prompt"]), encode_response(tokenizer, row["chosen"])
        if len(prompt) <= data.max_prompt_tokens and len(response) <= data.max_response_tokens:
            examples.append((list(prompt), list(response)))
    partial = out.with_name(f".{out.name}.partial")
    fit_language_model(examples, tokenizer, partial, TUNED.model_copy(update={"model": str(plain)}), seed=0)
    partial.rename(out)
    return out


def sandbox_bases(config: RunConfig, wanted: Collection[str] | None = None) -> dict[str, Path | None]:
    """The sandbox's own language model (None = as the recipe has it), and one tuned on its preferred responses.

    Args:
        config: the recipe on a seed.
        wanted: names of those to make; None = both.
    """
    root = storage_root(config)
    source = open_source(config, root, policy=False)
    if source.recipe is not None and not source.prepared:
        source.recipe(lambda unit, done, total: None)
    if wanted is not None and TUNED_BASES[0] not in wanted:
        return {PLAIN: None}
    train, _ = source.preferences()
    out = root / "cache" / f"tuned-{source.sft_dir.parent.name}"
    return {PLAIN: None, TUNED_BASES[0]: tuned_base(source.sft_dir, train, out, config.data)}


def held_out_prompts(config: RunConfig) -> frozenset[str]:
    """Prompts that ``customize`` measures on, of any of its data sets.

    Args:
        config: the recipe on a seed.
    """
    customize, found = config.customize, set()
    for name, path in {**customize.general, **customize.domains}.items():
        given = load_queries(name, config.data.model_copy(update={"preferences": path, "validation": None}))
        _, test = split_queries(given, customize.test_fraction, config.seed)
        found |= {query.prompt for query in test}
    return frozenset(found)


def dsp_bases(
    config: RunConfig, cache: Path, backbones: Sequence[Path], wanted: Collection[str] | None = None
) -> dict[str, Path | None]:
    """A decoder and an encoder that are pre-trained here, the decoder tuned, and the user's own.

    What is made here has seen no text of a query that is held out on this seed.

    Args:
        config: the recipe on a seed.
        cache: where they are kept.
        backbones: the user's own.
        wanted: names of those to make; None = all. Nothing is made, or read, for the user's own.

    Raises:
        UserError: if two have one name.
    """
    names = [*(path.name for path in backbones), *MADE]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"two bases are named {', '.join(twice)}, and results go by the name of a --backbone's folder: rename one"
        )
    made = [name for name in (DECODER, TUNED_BASES[1], ENCODER) if wanted is None or name in wanted]
    found: dict[str, Path | None] = {**_made_bases(config, cache, made)} if made else {}
    return found | {path.name: path for path in backbones if wanted is None or path.name in wanted}


def _made_bases(config: RunConfig, cache: Path, names: Sequence[str]) -> dict[str, Path]:
    """Those that are made here; all of them need the decoder."""
    own = cache / f"seed_{config.seed}"
    own.mkdir(parents=True, exist_ok=True)
    out = held_out_prompts(config)
    general = next(iter(config.customize.general.values()))
    pairs = load_preferences(config.data.model_copy(update={"preferences": general, "validation": None}))
    known = [row for row, prompt in enumerate(pairs.rows["prompt"]) if prompt not in out]
    pairs = replace(pairs, rows=pairs.rows.select(known))
    texts = with_domain_texts(pairs, next(iter(config.customize.domains.values())), out)
    decoder = pretrain_decoder(texts, own / "decoder", SHAPE)
    make: dict[str, Callable[[], Path]] = {
        DECODER: lambda: decoder,
        TUNED_BASES[1]: lambda: tuned_base(decoder, pairs, own / "decoder-tuned", config.data),
        ENCODER: lambda: pretrain_encoder(texts, decoder, own / "encoder", SHAPE),
    }
    return {name: make[name]() for name in names}


def with_domain_texts(pairs: PreferenceSet, dsp: str, held_out: Collection[str]) -> PreferenceSet:
    """The pairs, and the responses of a file of DSP two by two: texts to pre-train on, whatever is preferred.

    Args:
        pairs: general ones.
        dsp: the file.
        held_out: prompts whose texts are left out.

    Returns:
        Rows of two texts each; where a query has an odd number of responses, the last row's second is empty.
    """
    from datasets import Dataset

    from preferences.queries import DSP_PROMPT

    rows = [{key: row[key] for key in ("id", "prompt", "chosen", "rejected", "domain")} for row in pairs.rows]
    for number, line in enumerate(Path(dsp).expanduser().read_text("utf-8").splitlines()):
        found = json.loads(line)
        prompt, texts = DSP_PROMPT.format(query=found["query"]), [*found["responses"].values()]
        if prompt in held_out:
            continue
        for start in range(0, len(texts), 2):
            first, second = (*texts[start : start + 2], "")[:2]
            rows.append({"id": f"dsp-{number}-{start}", "prompt": prompt, "chosen": first, "rejected": second, "domain": ""})
    return replace(pairs, rows=Dataset.from_list(rows))
