"""What every trainer of a library is given here: silence, an ear for its progress, and one way to save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
