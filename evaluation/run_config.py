"""What a run's config.yaml says, for pages: values by dotted key."""

from collections.abc import Mapping

from evaluation.run import Run
from tokens.errors import UserError

TIE = "evaluation.tie"


def flat_config(run: Run) -> dict[str, object]:
    """The config of a run as values by dotted key.

    Source: config.yaml, which a run writes whole, defaults included.

    Args:
        run: as read.

    Returns:
        Values; a list stays one value.

    Raises:
        UserError: if it is no YAML mapping.

    Padding contract: there is none.
    """
    import yaml

    where = run.directory / "config.yaml"
    try:
        tree = yaml.safe_load(run.config)
    except yaml.YAMLError as error:
        raise UserError(f"{where} cannot be read as YAML: {error}. Has it been edited by hand?") from error
    if not isinstance(tree, dict):
        raise UserError(f"{where} must hold keys and values, got {type(tree).__name__}. Has it been edited by hand?")
    return _flat(tree, "")


def tie_of(config: Mapping[str, object]) -> float:
    """Judgements up to this far apart are ties.

    Source: ``evaluation.tie`` of the config.

    Args:
        config: values by dotted key.

    Returns:
        In units of the judge.

    Raises:
        UserError: if the key is missing or no number.

    Padding contract: there is none.
    """
    value = config[TIE] if TIE in config else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"config.yaml: {TIE} must be a number, got {value!r}. Has it been edited by hand?")
    return float(value)


def _flat(tree: Mapping[object, object], prefix: str) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            values |= _flat(value, f"{name}.")
        else:
            values[name] = value
    return values
