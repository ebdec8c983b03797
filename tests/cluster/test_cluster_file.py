"""The cluster file is one that Ray accepts, and one on which the roles can be placed."""

from __future__ import annotations

import copy

import pytest
import yaml

from tests.cluster.command import ROOT

FILE = ROOT / "ray_config.yaml"


def test_ray_accepts_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(FILE.read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    with pytest.raises(Exception, match="ppo"):
        validate_config(prepare_config(config | {"ppo": 1}))


def test_the_head_trains_nothing_and_the_dashboard_is_not_open() -> None:
    config = yaml.safe_load(FILE.read_text())
    assert config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] == 0
    start = config["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start and "RAY_AUTH_MODE=token" in start
