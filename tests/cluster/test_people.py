"""Whose reward counts: found and exported, refused where nobody is meant, scored, paid by, and told for whom it is better."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from actors.process import ProcessSetup
from actors.reward_trainer import RewardTrainer
from actors.scorer import EnsembleScorer, vote
from cluster.baselines import BestOfN, theme_of
from cluster.domain_models import with_domain_reward
from cluster.for_people import BestOfNForPeople, ForPeople, golds_of, theme_for
from cluster.inputs import check_domains, open_source
from cluster.load_config import checked, load_config
from cluster.people_model import export_people, users_of
from cluster.rounds import Theme
from cluster.run_directory import config_text
from cluster.sandbox_source import WorldRecipe
from evaluation.records import PEOPLE, PersonRow, read_rows
from rm.batches import score_sequences
from rm.config import MetaConfig, ScorerConfig
from rm.features import BACKBONE, FeatureModel, fingerprint
from rm.model import RewardModel
from rm.people import People
from rm.people_config import PeopleConfig
from rm.person import fit_person
from rm.profiles import Profile
from sandbox.tokenizer import make_tokenizer
from sandbox.world import World
from tests.cluster.command import TINY, Command
from tokens.durable import write_file
from tokens.errors import UserError
from tokens.guards import GuardsConfig
from tokens.records import Pair, Prompt, Rollout

RATERS, D = ("user-000", "user-001", "user-002", "user-003"), 3
PAID: dict[str, Any] = {"meta": {"enabled": False}, "scorer": {"num_members": 1, "aggregate": "primary"}}


def feature_model(backbone: Path, folder: Path, pooling: Any = "last") -> Path:
    """Random features and raters on a language model, saved with its tokenizer."""
    generator = torch.Generator().manual_seed(1)
    model = RewardModel.from_language_model(backbone, pooling=pooling, seed=0, dtype=torch.float32)
    projection = torch.randn(D, model.head.in_features, generator=generator)
    FeatureModel(model, projection, RATERS, torch.randn(len(RATERS), D, generator=generator)).save(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder / BACKBONE)
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    tokenizer = make_tokenizer([f"w{i}" for i in range(30)])
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return feature_model(folder / "base", folder / "model")


def profile(features: Path, path: Path, name: str = "me", d: int = D, model: str | None = None) -> Path:
    """Somebody who was fitted to five random answers."""
    rows = torch.randn(5, d, generator=torch.Generator().manual_seed(2))
    person = fit_person(rows, 1.0)
    write_file(path, Profile(name, person, model or fingerprint(features), 5, 1.0, "zero").text())
    return path


def rollouts(number: int = 12) -> list[Rollout]:
    return [
        Rollout(Prompt(f"p{i}", "w1 w2", (1, 5 + i % 3), ""), 0, (6 + i, 7 + i % 4, 2), "w3", (-1.0,) * 3, 0, True)
        for i in range(number)
    ]


def scores_of(folder: Path) -> torch.Tensor:
    asked = [(r.prompt.token_ids, r.response_ids) for r in rollouts()]
    return score_sequences(RewardModel.from_pretrained(folder, torch.float32), asked, 4, 0)


def test_a_person_a_mixture_and_a_group_are_ordinary_reward_models(features: Path, tmp_path: Path) -> None:
    model, cache = FeatureModel.load(features, torch.float32), tmp_path / "cache"
    asked = [(r.prompt.token_ids, r.response_ids) for r in rollouts()]
    phi = model.features(asked, 4, 0)
    mine = profile(features, tmp_path / "me.json")
    weights = fit_person(torch.randn(5, D, generator=torch.Generator().manual_seed(2)), 1.0).weights.float()
    person = export_people(features, PeopleConfig(profile=str(mine)), cache)
    torch.testing.assert_close(scores_of(person), phi @ weights, rtol=1e-3, atol=1e-4)
    mixture = export_people(features, PeopleConfig(mixture={"user-000": 1.0, "user-002": 3.0}), cache)
    mixed = 0.25 * model.weights_of("user-000") + 0.75 * model.weights_of("user-002")
    torch.testing.assert_close(scores_of(mixture), phi @ mixed.detach(), rtol=1e-3, atol=1e-4)
    group = export_people(features, PeopleConfig(group="min", members=("user-001", str(mine))), cache)
    known = People.load(group)
    assert known.names == (*RATERS, "me") and known.counting == (1, 4) and known.group == "min"
    assert export_people(features, PeopleConfig(group="min", members=("user-001", str(mine))), cache) == group != person
    everybody = People.load(export_people(features, PeopleConfig(group="quantile", quantile=0.25), cache))
    assert everybody.counting == (0, 1, 2, 3) and everybody.quantile == 0.25
    assert not list(cache.glob(".*")), "nothing half made is left"


def test_people_who_are_not_known_are_refused(features: Path, tmp_path: Path) -> None:
    cases = {
        "no rater is named 'user-9'": PeopleConfig(mixture={"user-9": 1.0}),
        "d = 5 and the model has d = 3": PeopleConfig(profile=str(profile(features, tmp_path / "wide.json", d=5))),
        "is a profile of the model 000000000000": PeopleConfig(
            profile=str(profile(features, tmp_path / "other.json", model="0" * 64))
        ),
        "somebody else has that name": PeopleConfig(profile=str(profile(features, tmp_path / "twin.json", name="user-000"))),
        "names somebody twice": PeopleConfig(group="mean", members=("user-000", "user-000")),
    }
    for words, people in cases.items():
        with pytest.raises(UserError, match=words):
            export_people(features, people, tmp_path / "cache")
    with pytest.raises(UserError, match="holds no feature model"):
        export_people(tmp_path, PeopleConfig(group="mean"), tmp_path / "cache")


def test_the_scorer_pays_the_group_and_knows_everybody(features: Path, tmp_path: Path) -> None:
    place = export_people(features, PeopleConfig(group="min", members=("user-000", "user-003")), tmp_path / "cache")
    setup = ProcessSetup("scorer-0", tmp_path / "log", torch.get_num_threads(), "cpu", "float32", 0, 1, False)
    scorer = EnsembleScorer.__ray_metadata__.modified_class(setup, ScorerConfig(num_members=1, aggregate="primary"))
    scorer.calibrate_on(rollouts())
    scorer.load(0, place)
    told = scorer.by_person(rollouts())
    z = torch.tensor(told.scores)
    assert told.names == RATERS and z.shape == (12, 4)
    torch.testing.assert_close(z.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(4), atol=1e-4, rtol=0)
    lowest = z[:, [0, 3]].amin(1)
    paid = torch.tensor(vote([scorer.score(rollouts(), [0])], ScorerConfig(), GuardsConfig(), "primary").aggregated)
    torch.testing.assert_close(paid, (lowest - lowest.mean()) / lowest.std(correction=0), atol=1e-4, rtol=1e-4)
    alone = export_people(features, PeopleConfig(mixture={"user-001": 2.0}), tmp_path / "cache")
    scorer.load(0, alone)  # another's reward in the same place: nobody of before is left
    torch.testing.assert_close(
        torch.tensor(vote([scorer.score(rollouts(), [0])], ScorerConfig(), GuardsConfig(), "primary").aggregated),
        z[:, 1],
        atol=1e-4,
        rtol=1e-3,
    )


def test_the_reward_trainer_hands_people_on(features: Path, tmp_path: Path) -> None:
    place = export_people(features, PeopleConfig(group="mean"), tmp_path / "cache")
    setup = ProcessSetup("reward-0", tmp_path / "log", torch.get_num_threads(), "cpu", "float32", 0, 1, False)
    pairs = [Pair("1", (1, 5), (6, 2), (7, 2))]
    config = checked({"name": "paid"}, "test")
    trainer = RewardTrainer.__ray_metadata__.modified_class(
        setup, pairs, {"original": pairs}, config.reward, MetaConfig(enabled=False), place, GuardsConfig(), True
    )
    assert trainer.fit(tmp_path / "reward", 0, None, None).steps == ()
    assert torch.equal(People.load(tmp_path / "reward").heads, People.load(place).heads)


def test_a_config_names_a_model_and_somebody_or_neither(features: Path, tmp_path: Path) -> None:
    paid = {**PAID, "name": "paid", "scorer": {**PAID["scorer"], "reward_model": f"features:{features}"}}
    with pytest.raises(UserError, match=r"people\.profile, people\.mixture and people\.group are not"):
        checked(paid, "test")
    with pytest.raises(UserError, match=r"scorer\.reward_model is None"):
        checked({"name": "paid", "people": {"group": "mean"}}, "test")
    config = checked({**paid, "people": {"group": "mean"}}, "test")
    base = with_domain_reward(config, tmp_path).reward.base
    assert base is not None and Path(base).parent == tmp_path / "cache" and People.load(Path(base)).group == "mean"
    assert theme_for(config, theme_of(config)) is ForPeople
    each = with_domain_reward(checked({**paid, "people": {"group": "own"}}, "test"), tmp_path)
    with pytest.raises(UserError, match="which names none of the 4 members"):
        check_domains(each, open_source(each.model_copy(update={"reward": config.reward}), tmp_path))
    one = {"rounds": {"baseline": "best_of_n", "best_of": 4, "num_rounds": 1, "softness": 0.5}}
    picked = checked({**paid, "people": {"group": "mean"}, **one}, "test")
    assert theme_for(picked, theme_of(picked)) is BestOfNForPeople and issubclass(BestOfNForPeople, BestOfN)
    plain = checked({"name": "plain"}, "test")
    assert theme_for(plain, theme_of(plain)) is Theme
    with pytest.raises(UserError, match=r"softness is 0\.5 and baseline none"):
        checked({"name": "plain", "rounds": {"softness": 0.5}}, "test")


def test_users_are_asked_for_their_own_gold_where_they_are_the_raters(features: Path, tmp_path: Path) -> None:
    config = checked({"name": "plain"}, "test")
    world = World(config.world)
    prompt = world.prompts("train")[0]
    said = Rollout(Prompt("p", prompt.text, (1,), prompt.domain), 0, (2,), "thanks , it is great .", (-1.0,), 0, True)
    assert users_of(features) is None, "a model from elsewhere"
    home = tmp_path / "run"
    shutil.copytree(features, home / "model")
    (home / "config.yaml").write_text(config_text(config))
    names = ("user-001", "user-017", "me")
    people = People(names, torch.ones(3, 2), (0,), "mean", None, users_of(home / "model"), num_raters=1)
    golds = golds_of(config, people, names, [said])
    assert golds is not None and golds[0][0] == world.gold(prompt.text, said.text, user="user-001")
    assert all(math.isnan(gold) for gold in golds[0][1:]), "a profile may be called user-017"
    other = config.model_copy(update={"world": config.world.model_copy(update={"user_agreement": 0.9})})
    assert golds_of(other, people, names, [said]) is None, "its users have the same names and other tastes"
    assert (
        golds_of(config.model_copy(update={"data": config.data.model_copy(update={"preferences": "x"})}), people, (), []) is None
    )
    more = config.model_copy(update={"world": config.world.model_copy(update={"num_users": 80, "num_pairs": 100})})
    same = golds_of(more, people, names, [said])
    assert same is not None and same[0][0] == golds[0][0]


@pytest.fixture(scope="module")
def paid(command: Command, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Keys that pay by the less pleased of two of four random raters on the tiny world's SFT model."""
    folder = tmp_path_factory.mktemp("paid")
    tiny = load_config(TINY, [])
    recipe = WorldRecipe(tiny.world, tiny.sft, command.storage / "cache")
    model = feature_model(recipe.build(lambda phase, done, total: None).sft_dir, folder / "model", tiny.reward.pooling)
    (folder / "config.yaml").write_text(config_text(tiny))
    return [
        "--scorer.reward_model", f"features:{model}", "--people.group", "min", "--people.members", '["user-000", "user-002"]',
        "--meta.enabled", "false", "--scorer.num_members", "1", "--scorer.aggregate", "primary", "--rounds.num_rounds", "1",
    ]  # fmt: skip


def test_ppo_is_paid_by_a_group_and_says_for_whom(command: Command, paid: list[str]) -> None:
    made = command("run", str(TINY), "--name", "for-whom", *paid)
    assert made.returncode == 0, made.stdout + made.stderr
    rows = read_rows(command.storage / "runs" / "for-whom" / "rounds" / "round_000" / PEOPLE, PersonRow)
    assert [row.name for row in rows] == list(RATERS) and all(row.num_prompts == 24 for row in rows)
    assert all(row.gold_gain is not None and row.gain != row.gold_gain for row in rows)
    assert "of 4 people, by the true reward of each: better than SFT for" in made.stdout
    ledger = json.loads((command.storage / "runs" / "for-whom" / "ledger.json").read_text())
    assert ledger["rounds"][0]["reward"]["loss"] is None, "no reward model was trained"


def test_soft_best_of_n_picks_by_a_group_from_the_pool_and_says_for_whom(command: Command, paid: list[str]) -> None:
    picks = ("--rounds.baseline", "best_of_n", "--rounds.best_of", "4", "--rounds.softness", "0.1")
    made = command("run", str(TINY), "--name", "picked", *paid, *picks)
    assert made.returncode == 0, made.stdout + made.stderr
    run = command.storage / "runs" / "picked"
    rows = {row.name: row for row in read_rows(run / "rounds" / "round_000" / PEOPLE, PersonRow)}
    assert all(rows[name].gain > 0 for name in ("user-000", "user-002")), "who is listened to is better off"
    assert "of 4 people, by the true reward of each: better than SFT for" in made.stdout
    page = (run / "report.html").read_text()
    assert "For whom the policy is better" in page and "of 4 people, by the true reward of each" in page
