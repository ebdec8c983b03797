"""Fresh labels: somebody compares samples of each round, and the round's reward model learns from what was said."""

from __future__ import annotations

import json
import math
import re
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from cluster.asking import open_answers
from cluster.console import Console
from cluster.draft import Draft
from cluster.endpoint_options import EndpointOptions
from cluster.fresh import (
    ANSWERS,
    FEWEST_TOLD,
    FRESH,
    AnnotatorJudge,
    Labelling,
    in_words,
    label,
    learnt_from,
    open_labeller,
    share_right,
    told,
    told_accuracy,
)
from cluster.inputs import open_source
from cluster.judges import FIRST, NONE, Answer, NotAsked
from cluster.load_config import load_config
from cluster.own_judge import _reward_models
from cluster.run_directory import RunDirectory, config_sha256
from cluster.stages import Stages
from cluster.waiting import Waiter
from evaluation.records import FreshRow, read_rows
from evaluation.timeline import Span
from preferences.config import DataConfig, FreshConfig
from preferences.load import load_preferences
from sandbox.world import World
from tests.cluster.command import TINY, Command
from tests.cluster.endpoint import serve
from tests.cluster.test_reward import encoder
from tests.preferences.test_fresh import group
from tokens.errors import UserError
from tokens.records import Pair, Rollout

ASKED = ("--fresh.num_pairs", "12", "--fresh.judge", "annotators")


class ByRule:
    """A judge that answers a comparison by its prompt and texts, and counts the questions."""

    name, batch_size, template = "by rule", 8, None

    def __init__(self, answer: Callable[[str, str, str], Answer]) -> None:
        self.answer, self.questions = answer, 0

    def compare(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[Answer]:
        self.questions += len(prompts)
        return [self.answer(*texts) for texts in zip(prompts, firsts, seconds, strict=True)]


def longer(prompt: str, first: str, second: str) -> Answer:
    return int(len(first) > len(second))


def rollouts(*prompts: str) -> list[Rollout]:
    return [one for prompt in prompts for one in group(prompt, "a", "aa")]


def test_the_sandbox_s_annotators_err_as_often_as_those_of_its_pairs_and_know_no_order() -> None:
    world = World(load_config(TINY, []).world)
    texts = world.corpus()[:1200]
    prompts = [prompt for prompt, _ in texts]
    firsts, seconds = [text for _, text in texts], [text for _, text in texts[1:] + texts[:1]]
    judge = AnnotatorJudge(world, 0)
    said = judge.compare(prompts, firsts, seconds)
    assert judge.compare(prompts, seconds, firsts) == [1 - int(answer) for answer in said if isinstance(answer, int)]
    assert AnnotatorJudge(world, 0).compare(prompts, firsts, seconds) == said
    assert AnnotatorJudge(world, 1).compare(prompts, firsts, seconds) != said
    gaps = [world.gold(p, a) - world.gold(p, b) for p, a, b in zip(prompts, firsts, seconds, strict=True)]
    rate, beta = world.config.flip_rate, world.config.annotator_beta
    right = [1 / (1 + math.exp(-beta * abs(gap))) for gap in gaps]
    expected = fmean(p * (1 - rate) + (1 - p) * rate for p in right)
    found = fmean((gap > 0) == (answer == FIRST) for gap, answer in zip(gaps, said, strict=True))
    assert found == pytest.approx(expected, abs=4 * math.sqrt(0.25 / len(gaps))) and expected < 0.75


def test_what_the_judge_says_in_both_orders_becomes_pairs_and_is_kept(tmp_path: Path) -> None:
    config = load_config(TINY, ["--fresh.num_pairs", "9", "--fresh.judge", "annotators"])
    rules: dict[str, Callable[[str, str], Answer]] = {
        "clear": lambda first, second: longer("", first, second),
        "order": lambda first, second: FIRST,
        "silent": lambda first, second: NONE,
        "too": lambda first, second: NotAsked("too long"),
    }
    judge = ByRule(lambda prompt, first, second: rules[prompt.split()[0]](first, second))
    shifted = rollouts(*(f"clear {index}" for index in range(5)), "order 0", "silent 0", "too 0")
    found = label(config, judge, tmp_path, 3, shifted, Console())
    assert found.counts == {"wanted": 9, "compared": 8, "labelled": 5, "undecided": 2, "not_asked": 1}
    assert {row.prompt_id for row in found.rows} == {f"clear {index}" for index in range(5)}
    assert {(row.chosen, row.rejected, row.chosen_ids, row.rejected_ids, row.judge) for row in found.rows} == {
        ("aa", "a", (3,), (2,), "by rule")
    }
    assert {row.id[:10] for row in found.rows} == {"round_003-"} and len({row.id for row in found.rows}) == 5
    asked = judge.questions
    assert label(config, judge, tmp_path, 3, shifted, Console()) == found
    assert judge.questions == asked + 2, "only those that it could not be asked are asked again"
    with open_answers(tmp_path / ANSWERS) as kept:
        assert len(kept.known) == 14
    right = [0.0 if rollout.text == "a" else 1.0 for rollout in shifted]
    assert share_right(found.rows, shifted, right) == 1.0 and share_right(found.rows, shifted, [-s for s in right]) == 0.0
    assert share_right(found.rows, shifted, [0.0] * len(shifted)) == 0.5
    words = in_words({**found.counts, "accuracy": 0.6}, 105)
    assert words.startswith(
        "fresh labels: 5 of 8 pairs (2 undecided, 1 not asked about); the last round's reward model ranks 60%"
    )
    assert words.endswith("learns from 105 pairs")
    given = (Pair("d", (1,), (2,), (3,)),)
    learnt = learnt_from(config, given, [found.rows, found.rows[:2]])
    assert [pair.id for pair in learnt] == ["d", *(row.id for row in (*found.rows, *found.rows[:2]))]
    assert (learnt[1].prompt_ids, learnt[1].chosen_ids, learnt[1].rejected_ids) == ((1,), (3,), (2,))


@pytest.mark.parametrize(
    ("shifted", "answer", "undecided", "not_asked"),
    [
        (group("p", "same", "same"), longer, 0, 0),
        (rollouts("p", "q"), lambda *texts: FIRST, 2, 0),
        (rollouts("p", "q"), lambda prompt, *texts: NotAsked("filtered") if prompt == "p" else FIRST, 1, 1),
    ],
)
def test_a_judge_that_cannot_decide_ends_no_run(
    tmp_path: Path, shifted: list[Rollout], answer: Callable[[str, str, str], Answer], undecided: int, not_asked: int
) -> None:
    found = label(load_config(TINY, [*ASKED]), ByRule(answer), tmp_path, 0, shifted, Console())
    assert found.rows == []
    assert (found.counts["labelled"], found.counts["undecided"], found.counts["not_asked"]) == (0, undecided, not_asked)


@pytest.mark.parametrize("answer", [NONE, NotAsked("max_tokens 16 is too few")])
def test_a_judge_that_answers_nothing_at_all_is_no_judge(tmp_path: Path, answer: Answer) -> None:
    with pytest.raises(UserError, match=r"the judge answered none of 4 questions about 2 pairs"):
        label(load_config(TINY, [*ASKED]), ByRule(lambda *texts: answer), tmp_path, 0, rollouts("p", "q"), Console())


def stage_of(storage: Path, judge: ByRule, *keys: str) -> tuple[Labelling, Stages, list[Span]]:
    config = load_config(TINY, ["--storage", str(storage), *ASKED, *keys])
    spans: list[Span] = []
    wait, directory = Waiter(Console(), storage, 10, spans.append), RunDirectory(config)
    metrics = SimpleNamespace(mark=lambda: 0)
    draft = Draft(storage / "draft")
    draft.path.mkdir(exist_ok=True)
    work = Stages(draft, wait, metrics, config, 0)  # type: ignore[arg-type]
    return Labelling(config, judge, directory, wait, Console()), work, spans


def test_a_round_is_labelled_once_and_prompts_that_are_kept_back_are_not_asked_about(tmp_path: Path) -> None:
    judge, shifted, given = ByRule(longer), rollouts("p", "q", "r"), [Pair("d", (1,), (2,), (3,))]
    labelling, work, spans = stage_of(tmp_path, judge)
    labelling.directory.path.mkdir(parents=True)
    labelling.label(0, work, shifted, {1}, lambda: pytest.fail("nothing was trained before round 0"))
    assert told(work)["labelled"] == 2 and told(work)["accuracy"] is None and told(work)["judge"] == "by rule"
    assert {row.prompt_id for row in read_rows(work.draft / FRESH, FreshRow)} == {"p", "r"}
    assert [span.what for span in spans] == ["label"] and labelling.wait.seconds["label"] > 0
    asked = judge.questions
    labelling.label(0, work, shifted, {1}, list)
    assert judge.questions == asked, "what is recorded is not done again"
    assert [pair.id for pair in labelling.learnt(0, work, given)] == ["d", "round_000-00000", "round_000-00001"]
    assert told_accuracy(work) is None, "too few to say anything"


def test_the_last_reward_model_is_looked_at_before_another_one_learns(tmp_path: Path) -> None:
    shifted = rollouts(*(f"p{index}" for index in range(FEWEST_TOLD)))
    labelling, work, _ = stage_of(tmp_path, ByRule(longer), "--meta.num_prompts", "64", "--fresh.num_pairs", str(FEWEST_TOLD))
    labelling.directory.path.mkdir(parents=True)
    scores = [float(place % 4 == 1) for place in range(len(shifted))]  # every other prompt's second sample is the better one
    labelling.label(1, work, shifted, (), lambda: scores)
    assert told(work)["labelled"] == FEWEST_TOLD
    assert told(work)["accuracy"] == told_accuracy(work) == 0.75, "half of them right, half a tie"
    elsewhere, again, _ = stage_of(tmp_path / "left out", ByRule(longer))
    elsewhere.directory.path.mkdir(parents=True)
    elsewhere.label(1, again, rollouts("p", "q"), (), lambda: None)
    assert told(again)["labelled"] == 2 and told(again)["accuracy"] is None, "that reward model's scores were not finite"


def test_rounds_without_labels_learn_from_what_there_is_and_from_nothing_not_at_all(tmp_path: Path) -> None:
    given = [Pair("d", (1,), (2,), (3,))]
    for carry, learnt in (("all", 1), ("sample", 1), ("latest", 0)):
        labelling, work, _ = stage_of(tmp_path / carry, ByRule(lambda *texts: FIRST), "--fresh.carry", carry)
        labelling.directory.path.mkdir(parents=True)
        labelling.label(0, work, rollouts("p", "q"), (), list)
        assert read_rows(work.draft / FRESH, FreshRow) == ()
        if learnt:
            assert len(labelling.learnt(0, work, given)) == learnt
        else:
            with pytest.raises(UserError, match=r"carry is latest, and none of round 0's 2 pairs got a label.*fresh\.carry all"):
                labelling.learnt(0, work, given)


def test_how_an_endpoint_is_asked_and_where_it_stands_may_change(tmp_path: Path) -> None:
    def digest(*keys: str) -> str:
        return config_sha256(load_config(TINY, ["--fresh.num_pairs", "8", *keys]))

    plain = digest("--fresh.judge", "openai:http://one:8000/v1#model")
    for key, value in (("concurrency", "2"), ("timeout_s", "7"), ("retries", "1"), ("max_tokens", "4")):
        assert digest("--fresh.judge", "openai:http://one:8000/v1#model", f"--fresh.{key}", value) == plain
    assert digest("--fresh.judge", "openai:http://two:9000/v1#model") == plain
    assert digest("--fresh.judge", "openai:http://one:8000/v1#other") != plain
    assert digest("--fresh.judge", "annotators") != digest("--fresh.judge", "gold") != plain
    assert digest("--fresh.judge", "annotators", "--fresh.carry", "latest") != digest("--fresh.judge", "annotators")
    options, fresh = EndpointOptions(), FreshConfig()
    assert vars(options) == {name: getattr(fresh, name) for name in vars(options)}, "the defaults of every other command"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("--fresh.num_pairs", "12"), r"num_pairs is 12 and judge None: .*set both"),
        (("--fresh.judge", "annotators"), r"num_pairs is 0 and judge annotators: .*set both"),
        (("--fresh.carry", "latest"), r"carry is latest and num_pairs 0"),
        ((*ASKED, "--fresh.judge", "somebody"), r"fresh\.judge"),
        ((*ASKED, "--fresh.judge", "openai:http://me:secret@host/v1#m"), r"fresh\.judge.*password"),
        ((*ASKED, "--fresh.num_pairs", "33"), r"S_k makes 29 pairs at most: .* is 32, .* 3 back, meta\.samples_per_prompt 3"),
        ((*ASKED, "--rounds.baseline", "vanilla_ppo"), r"fresh\.num_pairs is 12 and rounds\.baseline vanilla_ppo"),
        ((*ASKED, "--data.preferences", "d.jsonl"), r"fresh\.judge is annotators and data\.preferences d\.jsonl"),
        (
            (*ASKED, "--scorer.reward_model", "domain:law", "--meta.enabled", "false", "--scorer.num_members", "1",
             "--scorer.aggregate", "primary"),
            r"fresh\.num_pairs is 12 and scorer\.reward_model domain:law",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(keys: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(TINY, list(keys))
    assert re.search(message, str(refused.value)) and "secret@" not in str(refused.value)


def test_a_reward_model_that_reads_another_chat_template_is_refused(tmp_path: Path) -> None:
    judge = encoder(tmp_path / "judge", ["say", "word"])
    config = load_config(TINY, ["--fresh.num_pairs", "8", "--fresh.judge", f"reward:{judge}"])

    def opened(rendered: bool, template: str) -> Any:
        source = SimpleNamespace(rendered=rendered, tokenizer=SimpleNamespace(chat_template=template))
        with ExitStack() as stack:
            return open_labeller(config, source, stack)  # type: ignore[arg-type]

    with pytest.raises(UserError, match=r"rendered by the policy's chat template, and .*judge has another one or none"):
        opened(True, "{{ messages }}")
    assert not opened(False, "").on_gpu, "GPUs belong to the roles"
    tokenizer = AutoTokenizer.from_pretrained(judge)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(judge)
    assert opened(True, "{{ messages }}").templated


def test_a_labeller_that_is_not_there_is_refused_before_anything_starts(command: Command, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    done = command("run", str(TINY), "--name", "nobody", "--fresh.num_pairs", "8", "--fresh.judge", f"openai:{url}#m")
    assert done.returncode == 2, done.stdout + done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert "the judge 'm' at" in said and "cannot be asked" in said and "start the five roles" not in said
    config = load_config(TINY, ["--storage", str(tmp_path), "--fresh.num_pairs", "8", "--fresh.judge", f"reward:{tmp_path}"])
    with ExitStack() as stack, pytest.raises(UserError, match=re.escape(str(tmp_path))):
        open_labeller(config, open_source(config, tmp_path), stack)


def test_a_run_is_labelled_by_an_endpoint_in_every_round_and_goes_on_where_that_failed(command: Command) -> None:
    with serve() as endpoint:
        endpoint.by_length, endpoint.down_after = True, 15
        keys = ("--fresh.num_pairs", "20", "--fresh.judge", f"openai:{endpoint.url}#m", "--fresh.carry", "sample")
        asking = ("run", str(TINY), "--name", "labelled", *keys, "--fresh.retries", "0", "--fresh.concurrency", "2")
        asking += ("--evaluation.disqualify", "[reward_model_blind, truncation]")
        failed = command(*asking)
        said = " ".join((failed.stdout + failed.stderr).split())
        assert failed.returncode == 1 and "500" in said and "answers (40 are needed) are kept in" in said, said
        before = endpoint.asked.total()
        endpoint.down, endpoint.down_after = False, None
        done = command(*asking)
        asked = endpoint.asked.total()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 of" in " ".join(done.stdout.split()) and "answers are there from an earlier call" in done.stdout
    run = command.storage / "runs" / "labelled"
    entries = json.loads((run / "ledger.json").read_text())["rounds"]
    labelled = 0
    for index, entry in enumerate(entries):
        rows = read_rows(run / "rounds" / f"round_{index:03d}" / FRESH, FreshRow)
        facts = entry["fresh"]
        labelled += facts["compared"]
        assert facts["wanted"] == 20 and len(rows) == facts["labelled"] > 0
        assert facts["labelled"] + facts["undecided"] + facts["not_asked"] == facts["compared"]
        assert all(len(row.chosen) > len(row.rejected) for row in rows)
        assert (facts["accuracy"] is None) == (index == 0) and entry["evaluation"]["fresh_accuracy"] is None, "too few"
        assert entry["choices"]["fresh.carry"] == "sample"
        named = [alarm["name"] for alarm in entry["alarms"] if alarm["name"] in ("reward_model_blind", "truncation")]
        assert entry["disqualified"] == named and (not named or entry["best"]["round"] != index)
        pairs = load_preferences(DataConfig(preferences=str(run / "rounds" / f"round_{index:03d}" / FRESH)))
        assert list(pairs.rows["chosen"]) == [row.chosen for row in rows], "every command reads it as preference data"
    assert asked == 2 * labelled + before - 15, "nobody was asked twice, but for what was not answered"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["round"] for row in metrics if row["phase"] == "reward"]
    assert steps.count(0) == steps.count(1) == 128 // 16, "a sample has as many pairs as D"
    assert f"fresh labels: {entries[1]['fresh']['labelled']} of" in " ".join(done.stdout.split())
    page = (run / "report.html").read_text()
    assert f"{entries[1]['fresh']['labelled']}, RM {entries[1]['fresh']['accuracy']:.0%}" in page


def test_answers_of_an_endpoint_are_kept_wherever_it_stands(tmp_path: Path) -> None:
    names = set()
    with serve() as one, serve() as two:
        for url in (one.url, two.url):
            config = load_config(TINY, ["--fresh.num_pairs", "8", "--fresh.judge", f"openai:{url}#m"])
            with ExitStack() as stack:
                judge = open_labeller(config, SimpleNamespace(rendered=False), stack)  # type: ignore[arg-type]
                assert judge is not None
                names.add(judge.name)
    (name,) = names
    assert name.startswith("openai:#m:")


def test_who_labelled_is_no_judge_of_the_policy(tmp_path: Path) -> None:
    for name in ("model", "member_0", "member_1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    run = tmp_path / "run"
    (run / "rounds").mkdir(parents=True)
    for judge, found in (
        (f"reward:{tmp_path / 'model'}", ["model"]),
        (f"ensemble:{tmp_path / 'member_0'},{tmp_path / 'member_1'}", ["member_0", "member_1"]),
        ("openai:http://localhost/v1#m", []),
        (None, []),
    ):
        (run / "config.yaml").write_text(yaml.safe_dump({"reward": {"base": None}, "fresh": {"judge": judge}}))
        assert [path.name for path in _reward_models(run)] == found
