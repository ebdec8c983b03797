"""What every trainer of a library is given here: silence, an ear for its progress, and one way to save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokens.errors import UserError
from tokens.weights import check_finite

if TYPE_CHECKING:
    import torch
    import transformers
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def listen(
    trainer: transformers.Trainer,
    on_progress: Callable[[int, int], None] | None,
    name: str,
    on_value: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Silence a trainer, pass its progress on, and follow what it logs under one name.

    Source: none; a callback of transformers' ``Trainer``.

    Args:
        trainer: about to train.
        on_progress: called with (steps done, steps in all).
        name: of the logged value, as ``loss``.
        on_value: called with (steps done, the value).

    Returns:
        The list that the values will be written to.

    Padding contract: there is none.
    """
    import transformers

    values: list[float] = []

    class Listener(transformers.TrainerCallback):
        def on_step_end(self, args: object, state: transformers.TrainerState, control: object, **kwargs: object) -> None:
            if on_progress is not None:
                on_progress(state.global_step, state.max_steps)

        def on_log(self, args: object, state: transformers.TrainerState, control: object, **kwargs: object) -> None:
            last = state.log_history[-1]
            if name in last:
                values.append(float(last[name]))
                if on_value is not None:
                    on_value(state.global_step, values[-1])

    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(Listener())
    return values


def load(path: str | Path, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """A language model as it was saved, whole.

    Source: none; transformers' ``from_pretrained``, which draws weights that are missing at random.

    Args:
        path: a Hugging Face directory with safetensors weights.
        dtype: of the weights.
        attention: transformers' attn_implementation; None = its default.

    Returns:
        The model, on the CPU.

    Raises:
        UserError: if weights are missing, or NaN or infinity are among them.

    Padding contract: there is none.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=attention, use_safetensors=True, output_loading_info=True
    )
    model: PreTrainedModel = loaded[0]
    missing: set[str] = loaded[1]["missing_keys"]
    if missing:
        raise UserError(f"the language model in {path} lacks weights: {', '.join(sorted(missing)[:5])}. It was not saved whole")
    check_finite(model, path)
    return model


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out_dir: Path) -> None:
    """Write weights as safetensors, the tokenizer, and a generation config that holds the special ids and nothing else.

    Source: none; transformers' ``save_pretrained``.

    Args:
        model: trained.
        tokenizer: its own.
        out_dir: a directory, which then is a Hugging Face one.

    Padding contract: there is none.
    """
    from transformers import GenerationConfig

    model.config.use_cache = True
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
