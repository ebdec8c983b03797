"""The configs and the Python of docs/domains.md: they load, and the names in one are those of the others."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from actors.customize import ADAPTER, MODEL, REPORT
from cluster.config import RunConfig
from cluster.domain_checks import check_settings
from cluster.domain_directory import DomainDirectory
from cluster.domain_models import FOLDER, find_domain
from cluster.load_config import load_config

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "domains.md").read_text("utf-8")
RUN = "law_policy"


@pytest.fixture
def configs(tmp_path: Path) -> dict[str, RunConfig]:
    """Every block of YAML of the page, by its name."""
    found = {}
    for number, text in enumerate(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)):
        (tmp_path / f"{number}.yaml").write_text(text)
        config = load_config(tmp_path / f"{number}.yaml", ["--storage", str(tmp_path)])
        found[config.name] = config
    return found


@pytest.fixture
def customised(configs: dict[str, RunConfig], tmp_path: Path) -> Path:
    """A storage root as the page's commands leave it, without weights."""
    for config in configs.values():
        for name, strategy in config.customize.strategies.items():
            directory = DomainDirectory(config)
            (directory.general(strategy, 0) / MODEL).mkdir(parents=True, exist_ok=True)
            origin = str((directory.general(strategy, 0) / MODEL).relative_to(directory.path))
            for domain in config.customize.domains:
                place = directory.domain(name, 0, domain)
                (place / (ADAPTER if config.customize.lora.rank else MODEL)).mkdir(parents=True)
                (place / REPORT).write_text(json.dumps({"origin": origin}))
    return tmp_path


def test_every_config_is_one(configs: dict[str, RunConfig]) -> None:
    assert set(configs) == {"law", "desk", "ours", RUN}
    for name in configs.keys() - {RUN}:
        check_settings(configs[name])
    commands = re.findall(r"python -m cluster (?:customize|run) (\S+)\.yaml", PAGE)
    assert set(commands) - {"configs/domains"} == set(configs), "and the page has the files that its commands name"


def test_the_domains_that_the_page_asks_for_are_there(configs: dict[str, RunConfig], customised: Path) -> None:
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code is not None
    for module, name in re.findall(r"^from (\S+) import (\w+)$", code[1], re.MULTILINE):
        assert hasattr(import_module(module), name)
    asked = re.search(r'find_domain\(root, f"(\S+)/\{domain\}"\) for domain in \("(\w+)", "(\w+)"\)', code[1])
    assert asked is not None
    strategy, *domains = asked.groups()
    found = [find_domain(customised, f"{strategy}/{domain}") for domain in domains]
    assert all(model.adapter is not None for model in found) and len({model.backbone for model in found}) == 1
    assert found[0].backbone.is_relative_to(customised / FOLDER / "desk")


def test_a_policy_of_the_page_is_paid_by_a_domain_of_the_page(configs: dict[str, RunConfig], customised: Path) -> None:
    run, law = configs[RUN], configs["law"]
    asked = {str(run.scorer.reward_model), *re.findall(r"--scorer\.reward_model (domain:\S+)", PAGE)}
    assert len(asked) == 2
    for name in asked:
        found = find_domain(customised, name.removeprefix("domain:"))
        assert (found.adapter is None) == name.startswith("domain:law/")
    assert run.sft.model == law.reward.base and run.reward.pooling == law.reward.pooling
