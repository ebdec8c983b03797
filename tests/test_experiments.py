"""The harness of benchmarks/experiments, at a size at which nothing can be learned from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.experiments import metarm, over, people, people_data, people_personas, shifted
from benchmarks.experiments.common import (
    KnownPair,
    Lab,
    Results,
    clean_scores,
    fit,
    interval_text,
    of_width,
    open_lab,
    paired,
    relabelled,
    run_jobs,
)
from benchmarks.experiments.generalize import Referred, without
from benchmarks.experiments.generalize_settings import Place
from benchmarks.experiments.metarm_report import draw, holm, report
from benchmarks.experiments.people_arms import Material
from benchmarks.experiments.people_in_context import in_context, start_reader
from benchmarks.experiments.people_personas import LABELS, D, Persona, held_out
from benchmarks.experiments.people_report import report as report_on_people
from rm.bilevel_fit import ReferredQuery
from sandbox.world import World
from tokens.errors import UserError
from tokens.queries import Query
from tokens.records import Pair

TINY = (
    "--world.num_texts=600", "--world.num_prompts=64", "--world.num_eval_prompts=16", "--world.num_pairs=96",
    "--world.num_validation_pairs=24", "--sft.epochs=0.5", "--meta.num_prompts=20", "--meta.prompts_per_step=4",
    "--policy.steps_per_round=1",
)  # fmt: skip
SHIFT = "0.0001"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RONDO_STORAGE", str(tmp_path_factory.mktemp("storage")))
        patch.setattr(shifted, "LEVELS", (float(SHIFT),))
        patch.setattr(metarm, "SHIFTS", ("0", SHIFT))
        patch.setattr(shifted, "SHIFT_BATCH", 64)
        threads = torch.get_num_threads()
        yield open_lab(overrides=TINY)
        torch.set_num_threads(threads)


def _pair(name: str, gold: tuple[float, float], flipped: bool) -> KnownPair:
    return KnownPair(Pair(name, (1,), (2,), (3,)), *gold, flipped)


def test_stored_flips_are_undone_before_others_are_made() -> None:
    pairs = [_pair(str(i), (0.0, 1.0), True) if i % 2 else _pair(str(i), (1.0, 0.0), False) for i in range(40)]
    assert not any(pair.wrong or pair.flipped for pair in relabelled(pairs, 0.0, seed=1))
    once, again, other = (relabelled(pairs, 0.25, seed) for seed in (1, 1, 2))
    assert sum(pair.wrong for pair in once) == sum(pair.flipped for pair in once) == 10
    assert once == again and once != other


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.jsonl", ("arm", "seed"))
    for arm, seed, value in (("a", 1, 1.0), ("a", 2, 2.0), ("b", 2, 5.0), ("b", 3, 9.0), ("b", 1, 2.0), ("b", 1, 3.0)):
        results.append({"arm": arm, "seed": seed, "value": value})
    assert paired(results.rows(), "value", {"arm": "b"}, {"arm": "a"}) == [2.0, 3.0]
    assert results.missing([("a", 1), ("a", 3)], lambda job: job) == [("a", 3)]
    assert interval_text([2.0, 3.0]).startswith("+2.500")


def test_a_row_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.jsonl", ("arm",))
    results.append({"arm": "a"})
    with results.path.open("a") as file:
        file.write('{"arm": "b", "val')
    assert [row["arm"] for row in results.rows()] == ["a"] and results.missing(["a", "b"], lambda job: (job,)) == ["b"]
    results.append({"arm": "b"})
    assert [row["arm"] for row in results.rows()] == ["a", "b"], "what was left of the first try is gone"


def test_an_interval_in_words() -> None:
    assert interval_text([2.0, 2.1, 1.9]).startswith("**")


def test_a_fit_depends_on_its_seed_alone_and_gold_judges_it(lab: Lab) -> None:
    pairs, validation = lab.pairs("train"), lab.pairs("validation")
    first, second = (fit(lab, [p.pair for p in pairs[:32]], seed=3)[0] for _ in range(2))
    found = clean_scores(lab, first, validation)
    assert found == clean_scores(lab, second, validation)
    assert 0 <= found.accuracy <= 1 and found.scale > 0
    swapped = [pair.swapped() for pair in validation]
    assert clean_scores(lab, first, swapped).accuracy == pytest.approx(found.accuracy)


def test_another_width_is_trained_once_on_the_same_texts(lab: Lab) -> None:
    wide = of_width(lab, 128)
    assert of_width(lab, 64) == lab.files.sft_dir and of_width(lab, 128) == wide
    model, _ = fit(lab, [p.pair for p in lab.pairs("train")[:32]], seed=3, base=wide)
    assert model.model.config.hidden_size == 128 and model.model.config.intermediate_size == 384


def test_the_metarm_experiment_runs_resumes_and_reports(lab: Lab, tmp_path: Path) -> None:
    base = metarm.Job("reward", "vanilla", 0.0, "", 1, overrides=TINY)
    jobs = [replace(base, seed=seed) for seed in (1, 2)]
    jobs += [replace(job, arm="algorithm1", strength=eta, shift=SHIFT) for job in jobs[:2] for eta in (0.5, 2.0)]
    jobs += [replace(base, part="ppo", shift=SHIFT), replace(base, part="ppo", arm="joint", strength=1.0, shift=SHIFT)]
    results = Results(tmp_path / "metarm.jsonl", metarm.KEY)
    for rows in run_jobs(metarm.run, results.missing(jobs, metarm.Job.key), workers=1):
        for row in rows:
            results.append(row)
    assert results.missing(jobs, metarm.Job.key) == []
    rows = results.rows()
    assert {(row["arm"], row["deploy"], row["shift"]) for row in rows if row["part"] == "reward"} == {
        ("vanilla", "theta", "0"), ("vanilla", "theta_prime", "0"), ("vanilla", "theta", SHIFT),
        ("algorithm1", "theta", SHIFT), ("algorithm1", "theta_prime", SHIFT),
    }  # fmt: skip
    text = report(rows)
    assert "Algorithm 1, eta 0.5, theta' deployed" in text and f"PPO from KL {SHIFT}" in text
    assert all(0 <= p <= 1 for p, *_ in holm(rows, "J"))
    draw(rows, tmp_path / "metarm.svg", SHIFT)
    assert (tmp_path / "metarm.svg").stat().st_size > 5000


def test_theta_prime_is_what_the_config_deploys(lab: Lab) -> None:
    groups = [group[:3] for group in shifted.shifted_samples(lab, 1, "0").groups]
    pairs = [p.pair for p in lab.pairs("train")[:32]]
    config = lab.config.meta.model_copy(update={"eta": 0.5})
    ours = metarm.ascended(lab, fit(lab, pairs, 4, meta=config, groups=groups)[0], groups, 0.5, seed=4)
    theirs, _ = fit(lab, pairs, 4, meta=config.model_copy(update={"deploy": "theta_prime"}), groups=groups)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.fixture
def small_people(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few prompts, few people."""
    for name, value in {"TRAIN_PROMPTS": 24, "TEST_PROMPTS": 6, "TEST_RESPONSES": 4, "CHOICE_PROMPTS": 6, "MANY": 40}.items():
        monkeypatch.setattr(people_data, name, value)
    monkeypatch.setattr(people, "HELD_OUT", 3)


@pytest.mark.usefixtures("small_people")
def test_the_people_of_a_seed_judge_as_the_world_says(lab: Lab) -> None:
    texts = people_data.draw_texts(lab)
    assert people_data.draw_texts(lab).responses == texts.responses, "sampled once"
    known = people_data.draw_people(lab, texts, 0.5, 4, 3, seed=1)
    more = people_data.draw_people(lab, texts, 0.5, 6, 3, seed=1)
    assert known.names[4:] == more.names[6:] and set(known.names[:4]) < set(more.names[:6]), "the same are held out"
    world = World(lab.config.world.model_copy(update={"user_agreement": 0.5, "num_users": people_data.POOL}))
    for user in (0, 5):
        for text in (0, 30, len(texts.prompts) - 1):
            truth = world.gold(texts.prompts[text], texts.responses[text], user=known.names[user])
            assert known.gold[user, text] == pytest.approx(truth)
    first, last, _ = texts.start["test"]
    judged = known.judged(5, 50)
    assert (known.gold[5, judged[:, 0]] > known.gold[5, judged[:, 1]]).all() and judged.min() >= first and judged.max() < last
    assert (known.answers(5) < texts.start["validation"][0]).all(), "asked about training prompts only"
    assert not known.disagreement > 0.5


@pytest.mark.usefixtures("small_people")
def test_every_way_to_know_a_person_is_measured_and_reported(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = people_data.draw_texts(lab)
    results = Results(tmp_path / "people.jsonl", people.KEY)
    jobs = [people.Job(*job, seed, 1) for seed in (1, 2) for job in [("shared", 0.5, 1, 6, 8), ("features", 0.5, 32, 6, 8)]]
    others = [("conditioned", 0.5, 16, 6, 8), ("attributes", 0.5, 12, 6, 8), ("in context", 0.5, 0, 6, 16)]
    for job in [*jobs, *(people.Job(*other, 1, 1) for other in others)]:
        for row in people.fitted(job, lab, texts):
            results.append(row)
    rows = results.rows()
    assert results.missing(jobs, people.key_of) == []
    arms = {row["arm"] for row in rows if row["what"] == "accuracy"}
    assert arms == {
        "shared", "own linear head", "LoRe-like", "own MLP (Park et al.)", "latent user (VPL-like)", "features", "conditioned",
        "attributes", "in context",
    }  # fmt: skip
    for row in rows:
        if row["what"] == "accuracy":
            assert all(0 <= row[f"accuracy_{n}"] <= 1 for n in people_data.ANSWERS) and len(row["gold_30"]) == 3
            assert all(best >= own for best, own in zip(row["gold_best"], row["gold_30"], strict=True))
    of = {row["arm"]: row for row in rows if row["seed"] == 1}
    assert of["shared"]["accuracy_0"] == of["shared"]["accuracy_50"], "one reward for all hears nobody"
    assert of["attributes"]["accuracy_oracle"] > 0.7, "the sandbox's own attributes explain its users"
    for row in rows:  # the report's sizes
        row |= {"raters": 60, "labels": 50}
    report_on_people(rows, [], tmp_path)
    out = capsys.readouterr().out
    assert "| features, d = 32 |" in out and "| quantile 0.25 |" in out
    assert (tmp_path / "people-answers.png").is_file() and (tmp_path / "people-for-whom.png").is_file()


@pytest.mark.usefixtures("small_people")
def test_answers_before_a_question_are_one_text_with_it(lab: Lab) -> None:
    """The scores of a batch, padded and on top of what was read before, are those of whole texts, each by itself."""
    texts = people_data.draw_texts(lab)
    material = Material(lab, people_data.draw_people(lab, texts, 0.5, 2, 2, seed=1), 3, 1)
    reader = start_reader(material)
    answers, asked = material.people.answers(2)[:5], [0, 7, 30]
    told = [
        token
        for one, other in answers.tolist()
        for token in (*texts.encoded[one][0], reader.better, *texts.encoded[one][1], reader.worse, *texts.encoded[other][1])
    ]
    with torch.no_grad():
        for before, read in ((told, reader.told(answers)), ([], reader.told(answers[:0]))):
            whole = [[*before, *texts.encoded[i][0], *texts.encoded[i][1], reader.which] for i in asked]
            last = torch.stack([reader.model(torch.tensor([ids])).logits[0, -1] for ids in whole])
            expected = last.log_softmax(-1)[:, reader.better] - last.log_softmax(-1)[:, reader.worse]
            torch.testing.assert_close(reader.scores(read, asked), expected, rtol=1e-4, atol=1e-4)
    assert len(told) > lab.config.sft.shape.context_length, "the context is longer than that of the model that it was made of"
    scores = in_context(material)(answers)
    assert np.isfinite(scores[texts.split("test")]).all() and np.isnan(scores[texts.split("train")]).all()


def test_personas_need_no_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    monkeypatch.setattr(people_personas, "PATH", tmp_path / "personas.jsonl")
    monkeypatch.setattr(people_personas, "JUDGED", 20)
    data.mkdir()
    with pytest.raises(UserError, match=r"holds 0 files \*\.jsonl, expected at least three personas"):
        people_personas.personas(data, None, cache, [1])
    for name, loves in {"baker": "bread", "sailor": "storms", "clerk": "ledgers"}.items():
        rows = [
            {"statement": f"{word} {loves} for {i} years", "answer_matching_behavior": answer}
            for i in range(20)
            for word, answer in (("I have loved", " Yes"), ("Nobody should like", " No"))
        ]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for backbone, kept in ((None, None), (tmp_path, cache)):
        with pytest.raises(UserError, match="either --backbone, a sentence encoder's directory, or --cache"):
            people_personas.personas(data, backbone, kept, [1])
    people_personas.personas(data, None, cache, [1])
    rows = Results(people_personas.PATH, people_personas.KEY).rows()
    assert {row["persona"] for row in rows} == {"baker", "sailor", "clerk"} and len(rows) == 9
    assert {row["backbone"] for row in rows} == {people_personas.MADE_HERE}
    before = people_personas.PATH.read_bytes()
    monkeypatch.setattr(people_personas, "embed", lambda *_: pytest.fail("everything is there"))
    people_personas.personas(data, None, cache, [1])
    assert people_personas.PATH.read_bytes() == before


def test_a_persona_that_was_held_out_is_learnt_from_its_answers() -> None:
    """Three personas whose statements lie along directions of their own, the last between the first two."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(8, dtype=torch.float64)[:2]
    directions = torch.stack([directions[0], directions[1], (directions[0] + directions[1]) / 2**0.5])
    known, vectors = [], []
    for place, direction in enumerate(directions):
        start, side = 80 * place, torch.tensor([1.0] * 40 + [-1.0] * 40, dtype=torch.float64)
        vectors.append(1.5 * side[:, None] * direction + torch.randn(80, 8, generator=generator, dtype=torch.float64))
        ids = torch.arange(start, start + 80).numpy()
        known.append(Persona(f"p{place}", ids[:40], ids[40:]))
    rows = {row["arm"]: row for row in held_out(torch.cat(vectors), known, 2, seed=1)}
    assert {row["d"] for row in rows.values()} == {D} and rows["features"]["labels"] == LABELS
    assert rows["features"]["accuracy_50"] > 0.85 and rows["features"]["accuracy_oracle"] > 0.85
    train, test = known[0].parts(1)
    assert not {*train.yes, *train.no} & {*test.yes, *test.no} and len(test.yes) == 8


def test_what_a_left_out_domain_wrote_is_in_no_query_to_train_on() -> None:
    theirs = Query("a-train-0", (1,), ((2,), (3,), (4,)), (1.0, 0.0, 0.0), "a")
    alone = Query("b-0", (1,), ((2,), (3,)), (1.0, 0.0), "b")
    referred = tuple(ReferredQuery(query, tuple(-float(i) for i in range(len(query.responses)))) for query in (theirs, alone))
    place = Place("a", (theirs,), (), (), (), lambda prompt, response: 0.0)
    each = Referred(place, referred, (), (), {}, Path("a"))
    trimmed, untouched = without(each, ["b"], {"a-train-0": ("a", "b", "c")}).train
    assert trimmed.query.responses == ((2,), (4,)) and trimmed.query.scores == (1.0, 0.0) and trimmed.reference == (0.0, -2.0)
    assert untouched == referred[1]
    assert without(each, ["b"], {}) == each


def test_the_share_of_the_best_rounds_gain() -> None:
    assert over.share_of_best([0.0, 1.0, 0.5], -1.0, 2) == 0.75
    assert over.share_of_best([0.0, 1.0, 0.5], -1.0, None) == 0.0
    assert over.share_of_best([-2.0, -1.0], -1.0, 1) is None


def test_a_line_of_a_run_that_is_driven_too_far() -> None:
    row = {"seed": 3, "judge": "gold", "rounds": 2, "asked": 30, "sft": -1.0, "chosen": 0, "golds": [0.5, 1.0], "share": 0.75}
    fine = {"answers": 8, "share_fine": 0.8}
    said = over.line(row | fine)
    assert "best/ round 0 (+0.50), best round 1 (+1.00), last +1.00" in said
    assert said.endswith("75% of the best round's gain, 80% by 8 answers a prompt")
    assert over.line(row | fine | {"share": None}).endswith("no round is better than SFT")
    assert "best/ SFT," in over.line(row | fine | {"chosen": None})


@pytest.mark.slow  # a whole run, and its judgement: four minutes
def test_a_run_that_is_driven_too_far_stops_by_itself_and_keeps_a_good_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RONDO_STORAGE", str(tmp_path / "storage"))
    over.main(["--seeds", "2"], results=tmp_path)
    row = json.loads((tmp_path / "over.jsonl").read_text())
    assert row["rounds"] < row["asked"] and "rounds.stop.patience" in row["ended"]
    gold, chosen = row["golds_fine"], row["chosen"]
    assert chosen is not None and chosen < row["rounds"] - 1
    assert gold[-1] < gold[chosen] and gold[chosen] > row["sft_fine"]
    assert row["share_fine"] > 0.95, "1.00 in docs/log.md"
