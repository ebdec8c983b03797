"""A judge by its name on the command line, checked before it is asked anything."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from cluster.config import RunConfig
from cluster.endpoint_options import EndpointOptions
from cluster.judges import EnsembleJudge, GoldJudge, Judge, RewardJudge
from cluster.load_config import load_config
from tokens.errors import UserError


def open_judge(
    judge: str,
    sandbox: RunConfig | None,
    templated: bool,
    options: EndpointOptions,
    stack: ExitStack,
    tie: float | None = None,
    *,
    on_gpu: bool = True,
) -> Judge:
    """Who is asked.

    Args:
        judge: gold, gold:CONFIG.yaml, reward:DIR, ensemble:DIR or openai:BASE_URL#MODEL.
        sandbox: whose gold ``gold`` means; None = there is none.
        templated: whether prompts are rendered with the judge's chat template.
        options: of an endpoint.
        stack: closes its connections.
        tie: scores closer than this are ties, and an endpoint may say so; None = there are no ties.
        on_gpu: whether reward models may take a GPU.

    Returns:
        The judge; weights are not read yet.

    Raises:
        UserError: if it cannot be asked.
    """
    kind, _, rest = judge.partition(":")
    if kind == "reward":
        return RewardJudge(Path(rest).expanduser(), templated, tie, on_gpu)
    if kind == "ensemble":
        return EnsembleJudge([RewardJudge(member, templated, tie, on_gpu) for member in find_members(rest)], tie)
    if kind == "openai":
        from cluster.endpoint_judge import EndpointJudge

        base_url, _, model = rest.partition("#")
        return stack.enter_context(closing(EndpointJudge(base_url, model, options, ties=tie is not None)))
    from sandbox.world import World

    if rest:
        sandbox = load_config(Path(rest))
    if sandbox is None:
        raise UserError("the judge gold knows the sandbox's prompts only: give sandbox:CONFIG.yaml as PAIRS, or gold:CONFIG.yaml")
    digest = hashlib.sha256(sandbox.world.model_dump_json().encode()).hexdigest()
    return GoldJudge(World(sandbox.world).gold, digest, tie)


def find_members(names: str) -> list[Path]:
    """The reward models that ``ensemble:NAMES`` means.

    Args:
        names: a directory of models, that of a strength run, or several models (or reward runs) with commas between.

    Returns:
        Their directories.

    Raises:
        UserError: if a directory is not there, or holds adapters or nothing.
    """
    given = [Path(name).expanduser() for name in names.split(",")]
    absent = [path for path in given if not path.is_dir()]
    if absent or not names:
        raise UserError(
            f"ensemble:{names}: no such directory {absent[0] if absent else ''}; expected ensemble:DIR or DIR,DIR,..."
        )
    if len(given) > 1:
        return given
    folder = given[0] / "members" if (given[0] / "members").is_dir() else given[0]
    places = sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_dir())
    found = [path for path in places if _is_model(path) and not path.name.startswith(".") and path.name != "model"]
    adapters = [path for path in places if (path / "adapter_config.json").is_file() or (path / "heads.safetensors").is_file()]
    if adapters:
        raise UserError(
            f"{adapters[0]} is an adapter or a trunk with heads, and a judge needs whole reward models: train the ensemble with "
            "strength.members full"
        )
    if not found:
        raise UserError(f"ensemble:{names}: there is no reward model in {folder}{_names(folder)}")
    return found


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / "model" / "config.json").is_file()


def _names(folder: Path) -> str:
    names: Sequence[str] = sorted(path.name for path in folder.iterdir())
    return f" (it holds {', '.join(names[:6])}{' ...' if len(names) > 6 else ''})" if names else " (it is empty)"
