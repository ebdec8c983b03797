"""Weights & Biases, MLflow and Trackio as trackers: numbers and the config go out, no text, no code, nothing of the machine."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from cluster.trackers import Beginning, Numbers, Tracker

PROJECT = "rondo"
MLFLOW_URI = "MLFLOW_TRACKING_URI"
PARAMS_AT_ONCE, LONGEST_PARAM = 100, 6000
"""What MLflow takes in one call, and in one value."""


def from_environment(name: str, otherwise: str) -> str:
    """A variable of the environment that is the tracker's own, else what stands here.

    Args:
        name: of the variable.
        otherwise: where it is not set, or empty.
    """
    return os.environ.get(name) or otherwise


class Wandb:
    """A run of Weights & Biases. WANDB_MODE=offline keeps it on this machine.

    Args:
        begin: what it is told at the start.
    """

    def __init__(self, begin: Beginning) -> None:
        import wandb

        self.id = begin.known or secrets.token_hex(8)
        begin.folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, x_disable_meta=True, x_disable_stats=True,
            x_save_requirements=False,
        )  # fmt: skip
        self.run: Any = wandb.init(
            project=from_environment("WANDB_PROJECT", PROJECT),
            name=begin.name,
            id=self.id,
            resume="allow",
            dir=from_environment("WANDB_DIR", str(begin.folder)),
            config=dict(begin.config),
            allow_val_change=True,
            settings=settings,
        )
        self.named: set[str] = set()

    def log(self, row: Numbers) -> None:
        """Draw a row, against the steps of its phase."""
        axis = f"step/{row.phase}"
        for name in row.values.keys() - self.named:
            self.run.define_metric(name, step_metric=axis)
            self.named.add(name)
        self.run.log({**row.values, axis: row.step})

    def close(self, well: bool) -> None:
        """Send the rest."""
        self.run.finish(exit_code=0 if well else 1)


class MLflow:
    """A run of MLflow: on the server of MLFLOW_TRACKING_URI, else in a database beside the runs.

    Args:
        begin: what it is told at the start.
    """

    def __init__(self, begin: Beginning) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        begin.folder.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(from_environment(MLFLOW_URI, f"sqlite:///{begin.folder.absolute() / 'mlflow.db'}"))
        if begin.known is not None:
            self.id = begin.known
            self.client.update_run(self.id, status="RUNNING")
            return
        name = from_environment("MLFLOW_EXPERIMENT_NAME", PROJECT)
        there = self.client.get_experiment_by_name(name)
        artifacts = None if MLFLOW_URI in os.environ else (begin.folder.absolute() / "mlflow").as_uri()
        experiment = self.client.create_experiment(name, artifacts) if there is None else there.experiment_id
        self.id = str(self.client.create_run(experiment, run_name=begin.name).info.run_id)
        params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in begin.config.items()]
        for start in range(0, len(params), PARAMS_AT_ONCE):
            self.client.log_batch(self.id, params=params[start : start + PARAMS_AT_ONCE])

    def log(self, row: Numbers) -> None:
        """Draw a row."""
        from mlflow.entities import Metric

        at = int(row.seconds * 1000)
        self.client.log_batch(self.id, metrics=[Metric(name, value, at, row.step) for name, value in row.values.items()])

    def close(self, well: bool) -> None:
        """Mark the run as ended."""
        self.client.set_terminated(self.id, "FINISHED" if well else "FAILED")


class Trackio:
    """A run of Trackio, in a database of this machine (TRACKIO_DIR).

    Args:
        begin: what it is told at the start.
    """

    def __init__(self, begin: Beginning) -> None:
        import trackio

        self.id = begin.known or f"{begin.name}-{secrets.token_hex(4)}"
        self.run: Any = trackio.init(
            project=PROJECT,
            name=self.id,
            config=dict(begin.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, row: Numbers) -> None:
        """Draw a row."""
        self.run.log(dict(row.values), step=row.step)

    def close(self, well: bool) -> None:
        """Write the rest."""
        self.run.finish()


KINDS: Mapping[str, Callable[[Beginning], Tracker]] = {"wandb": Wandb, "mlflow": MLflow, "trackio": Trackio}
"""By their names in ``report_to``."""
