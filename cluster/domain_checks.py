"""What `customize` refuses: settings that it has no use for, and strategies that the data or the base model do not allow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cluster.config import RunConfig
from tokens.errors import UserError


def check_settings(config: RunConfig) -> None:
    """Refuse what `customize` has no use for, and strategies without their data; before anything is read.

    Raises:
        UserError: naming the keys.
    """
    customize = config.customize
    if not customize.domains:
        raise UserError("customize.domains is empty: name at least one domain and its data, see docs/domains.md")
    needed = [
        name
        for name, strategy in customize.strategies.items()
        if strategy.general or strategy.rehearsal or strategy.penalty == "ewc"
    ]
    if needed and not customize.general:
        raise UserError(
            f"customize.general is empty, and the strategies {', '.join(needed)} learn from general data: name a general data "
            "set, or set their general to false, rehearsal to 0 and penalty to another than ewc"
        )
    more = {"customize.lora.dropout": (customize.lora.dropout, 0)}
    refuse_idle(config, "customize", more, " (adapters are customize.lora, measurements customize.measure_every)")


def refuse_idle(config: RunConfig, command: str, more: Mapping[str, tuple[object, object]], hint: str = "") -> None:
    """Refuse keys of ``reward`` that a command which fits domains side by side has no use for.

    Args:
        config: of the command.
        command: its name.
        more: further keys, with what is given and what may be.
        hint: what is there instead; behind the message.

    Raises:
        UserError: naming the keys.
    """
    reward = config.reward
    idle = {
        "start": (reward.start, "sft"),
        "lora.rank": (reward.lora.rank, 0),
        "contrastive.method": (reward.contrastive.method, "none"),
        "dropout": (reward.dropout, 0),
        "packing": (reward.packing, False),
        "backward_size": (reward.backward_size, None),
        "patience": (reward.patience, None),
        "evaluate_every": (reward.evaluate_every, None),
    }
    values = {f"reward.{key}": pair for key, pair in idle.items()} | dict(more)
    asked = [f"{key} {given!r}" for key, (given, usual) in values.items() if given != usual]
    if asked:
        raise UserError(f"{command} has no use for {', '.join(asked)}: leave it out{hint}")
    if config.resources.reward.num_ranks > 1:
        raise UserError(
            f"resources.reward.num_ranks is {config.resources.reward.num_ranks}: {command} fits each model in one process, and "
            "domains side by side; set it to 1"
        )


def has_language_head(base: Path) -> bool:
    """Whether a model predicts the next token: a language model, or a reward model whose fit left the head beside it.

    Args:
        base: its directory.
    """
    from rm.checkpoints import kind_of
    from rm.imitation import HEAD_FILE

    return (base / HEAD_FILE).is_file() or kind_of(base) == "language model"


def check_base(config: RunConfig, base: Path) -> None:
    """Refuse strategies that need what the base has not: a head to imitate with, or a general reward model's judgement.

    Args:
        config: of the command.
        base: directory of the model that everything starts from.

    Raises:
        UserError: naming the strategy.
    """
    from rm.checkpoints import kind_of

    customize, kind = config.customize, kind_of(base)
    article = "an" if kind == "encoder" else "a"
    asked = [name for name, s in customize.strategies.items() if s.general_imitation or s.domain_imitation]
    if asked and not has_language_head(base):
        raise UserError(
            f"the strategies {', '.join(asked)} have an imitation loss, which needs a model that predicts the next token, and "
            f"{base} holds {article} {kind} without a language head. Start from a causal language model, or from a general "
            "reward model that `customize` made of one (reward.base), or set general_imitation and domain_imitation to 0"
        )
    for name, strategy in customize.strategies.items():
        key = f"customize.strategies.{name}"
        if strategy.general or kind == "reward model":
            continue
        if customize.lora.rank:
            raise UserError(
                f"{key}.general is false and customize.lora.rank {customize.lora.rank}: an adapter is scored on the general "
                f"model that it was trained on, and {base} holds {article} {kind}, which is none. Set general to true, lora.rank "
                "to 0, or reward.base to a general reward model"
            )
        if strategy.penalty == "ewc":
            raise UserError(
                f"{key}.general is false and penalty ewc, which holds what a general model has learned, and {base} holds "
                f"{article} {kind}, which is none. Set general to true, penalty to l2, or reward.base to a general reward model"
            )
