"""Two models are compared by judges of every kind; a chat model behind vLLM's own server is one of them."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import evaluate_models
from cluster.cli import main
from cluster.console import Console
from cluster.endpoint_options import EndpointOptions
from cluster.evaluate import evaluate
from cluster.evaluate_inputs import Evaluating
from cluster.evaluate_models import Response
from cluster.judges import FIRST, NONE, SECOND, TIE, JudgeFailed, digest_of, read_verdict
from cluster.load_config import load_config
from cluster.open_judge import find_members
from cluster.sandbox_source import WorldRecipe
from evaluation.compare import win_tie_lose
from evaluation.judgement_run import read_judgement_run
from sandbox.build import WorldFiles
from sandbox.world import World
from tests.cluster.command import TINY, Command
from tests.cluster.endpoint import Endpoint, serve
from tests.cluster.tiny_judge import greedy_reply, save_judge, vllm_server
from tokens.errors import UserError

SANDBOX = f"sandbox:{TINY}"
SEED_OF_JUDGE = 0
"""With these weights the tiny judge says each of its words in the test."""


@pytest.fixture(scope="module")
def world(command: Command) -> WorldFiles:
    """The tiny world, which the other tests of the storage root share."""
    config = load_config(TINY)
    return WorldRecipe(config.world, config.sft, command.storage / "cache").build(lambda phase, done, total: None)


@pytest.fixture(scope="module")
def noisy(world: WorldFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SFT model with a little noise on its weights."""
    from transformers import AutoModelForCausalLM

    place = tmp_path_factory.mktemp("models") / "noisy"
    shutil.copytree(world.sft_dir, place)
    model = AutoModelForCausalLM.from_pretrained(world.sft_dir, dtype=torch.float32, use_safetensors=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(torch.randn_like(weights) * 0.02)
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def reward_models(world: WorldFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two reward models with heads of their own, as an ensemble."""
    from transformers import AutoTokenizer

    from rm.model import RewardModel

    place = tmp_path_factory.mktemp("ensemble")
    for seed in range(2):
        model = RewardModel.from_language_model(world.sft_dir, pooling="last", seed=seed, dtype=torch.float32)
        model.save_pretrained(place / str(seed))
        AutoTokenizer.from_pretrained(world.sft_dir).save_pretrained(place / str(seed))
    return place


@pytest.fixture(scope="module")
def compared(world: WorldFiles, noisy: Path, reward_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SFT model against the noisy one, by gold and by reward models; a directory to look at, not to change."""
    out = tmp_path_factory.mktemp("compared") / "here"
    judges = ("gold", f"ensemble:{reward_models}", f"reward:{reward_models / '0'}")
    return evaluate(Evaluating(world.sft_dir, noisy, judges, SANDBOX, num_prompts=12, out=out), Console())


@pytest.fixture
def again(compared: Path, world: WorldFiles, noisy: Path, tmp_path: Path) -> Evaluating:
    """The same comparison in a copy of the directory, to go on in."""
    out = tmp_path / "copy"
    shutil.copytree(compared, out)
    return Evaluating(world.sft_dir, noisy, ("gold",), SANDBOX, num_prompts=12, out=out)


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, tuple[str, str]]], None]:
    """Has both models answer what a test wants them to, by the prompt's text."""

    def answer(texts: dict[str, tuple[str, str]]) -> None:
        def sample(one: Any, ids: Any, prompts: Any, sampling: Any, file: Path, console: Console) -> list[Response]:
            side = [pair["AB".index(one.letter)] for pair in texts.values()]
            return [Response(id_, text, len(text.split()) + 1, True) for id_, text in zip(ids, side, strict=True)]

        monkeypatch.setattr("cluster.evaluate.sample", sample)

    return answer


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr("cluster.endpoint_judge.LONGEST_PAUSE_S", 0.02)
    with serve() as server:
        yield server


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def card(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "card.json").read_text("utf-8"))
    return found


def test_gold_compares_two_models(compared: Path, world: WorldFiles) -> None:
    rows = lines(compared / "judgements.jsonl")
    config = load_config(TINY)
    truth = World(config.world)
    prompts = truth.prompts("test")[:12]
    assert [(row["prompt_id"], row["prompt"]) for row in rows] == [(p.id, p.text) for p in prompts]
    golds = [(truth.gold(row["prompt"], row["a"]), truth.gold(row["prompt"], row["b"])) for row in rows]
    expected = ["a" if a - b > 0.1 else "b" if b - a > 0.1 else "tie" for a, b in golds]
    assert [row["verdicts"]["gold"]["verdict"] for row in rows] == expected
    assert all(row["verdicts"]["gold"]["a_first"] == row["verdicts"]["gold"]["b_first"] for row in rows)
    found = win_tie_lose([a for a, _ in golds], [b for _, b in golds], 0.1)
    judged = card(compared)["judges"]["gold"]
    assert judged["outcome"] == vars(found)
    assert judged["order"]["consistent"] == 1 and judged["order"]["bias"]["value"] == 0  # scores know no order
    assert any(row["a"] != row["b"] for row in rows)
    assert max(row["a_tokens"] for row in rows) <= config.rollout.max_new_tokens


def test_what_the_card_says(compared: Path, world: WorldFiles, noisy: Path, reward_models: Path) -> None:
    said = card(compared)
    assert said["models"]["A"]["path"] == str(world.sft_dir) and said["models"]["B"]["path"] == str(noisy)
    assert said["models"]["A"]["sha256"] != said["models"]["B"]["sha256"]
    assert said["sampling"] == {"seed": 0, "temperature": 1.0, "max_new_tokens": 32}
    names = list(said["judges"])
    assert names == ["gold", f"ensemble:{reward_models}", f"reward:{reward_models / '0'}"]
    assert [pair["judges"] for pair in said["agreement"]] == [[names[0], names[1]], [names[0], names[2]], [names[1], names[2]]]
    read = read_judgement_run(compared)
    assert [judge.outcome is not None and vars(judge.outcome) for judge in read.judges] == [
        judge["outcome"] for judge in said["judges"].values()
    ]
    page = (compared / "report.html").read_text("utf-8")
    assert "A wins" in page and "Cohen" in page and "<script" not in page
    assert len(said["notes"]) == 2 and all("A and B cannot be seen from where it lies" in note for note in said["notes"])
    assert read.notes == tuple(said["notes"]) and page.count("is taken on trust") == 2


def test_the_mean_of_the_ensemble_judges(compared: Path, world: WorldFiles, reward_models: Path) -> None:
    from transformers import AutoTokenizer

    from preferences.encode import encode_prompt, encode_response
    from rm.batches import score_sequences
    from rm.model import RewardModel

    tokenizer = AutoTokenizer.from_pretrained(world.sft_dir)
    rows = lines(compared / "judgements.jsonl")
    gaps = torch.zeros(len(rows))
    for seed in range(2):
        model = RewardModel.from_pretrained(reward_models / str(seed), dtype=torch.float32)
        sides = [
            [(encode_prompt(tokenizer, row["prompt"]), encode_response(tokenizer, row[side])) for row in rows] for side in "ab"
        ]
        first, second = (score_sequences(model, side, 4, tokenizer.pad_token_id) for side in sides)
        gaps += (first - second) / 2
    expected = ["a" if gap > 0.1 else "b" if gap < -0.1 else "tie" for gap in gaps.tolist()]
    assert [row["verdicts"][f"ensemble:{reward_models}"]["verdict"] for row in rows] == expected
    assert len(set(expected)) > 1


def test_what_is_there_is_not_made_again(
    again: Evaluating, compared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert again.out is not None
    there, draw, drawn = again.out / "responses_b.jsonl", evaluate_models._draw, []
    original = there.read_bytes()

    def draws(*given: Any) -> Any:
        drawn.append(given[-1])
        return draw(*given)

    monkeypatch.setattr("cluster.evaluate_models.CHUNK", 5)
    monkeypatch.setattr("cluster.evaluate_models._draw", draws)
    there.unlink()
    evaluate(again, Console())
    whole = there.read_bytes()
    there.write_bytes(b"".join(whole.splitlines(keepends=True)[:8])[:-9])  # cut in the second chunk of three
    evaluate(again, Console())
    assert there.read_bytes() == whole and drawn == [0, 5, 10, 5, 10]
    there.write_bytes(original)

    def load(one: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("cluster.evaluate_models._load", load)
    evaluate(again, Console())
    assert card(again.out)["judges"]["gold"] == card(compared)["judges"]["gold"]
    asked = [str(again.a), str(again.b), "--prompts", SANDBOX, "--num-prompts", "12", "--judge", "gold", "--out", str(again.out)]
    capsys.readouterr()
    assert main(["evaluate", *asked]) == 0
    said = capsys.readouterr().out
    assert "answers are there from an earlier call" in said and "wins - losses [95%]" in said and "Report: " in said
    assert main(["evaluate", *asked, "--num-prompts", "0"]) == 2
    assert "error: --num-prompts must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"belongs to another config \(seed: 0 there, 1 here\)"):
        evaluate(replace(again, seed=1), Console())
    (again.out / "report.html").unlink()
    assert main(["report", str(again.out)]) == 0 and (again.out / "report.html").exists()


def test_a_model_against_itself_ties_and_nobody_is_asked(
    world: WorldFiles, tmp_path: Path, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    judges = ("gold", f"openai:{endpoint.url}#m")
    asked = Evaluating(world.sft_dir, world.sft_dir, judges, SANDBOX, num_prompts=3, out=tmp_path / "x", max_new_tokens=4)
    out = evaluate(asked, Console())
    for judge in card(out)["judges"].values():
        assert (judge["outcome"]["num"], judge["outcome"]["tie"], judge["order"]) == (3, 1.0, None)
    assert sum(endpoint.asked.values()) == 0
    assert "A and B are the same model" in capsys.readouterr().out


RULES = {
    "good bread": ("good", "bad"),
    "bad bread": ("good", "bad"),
    "first bread": ("good long answer", "bad"),
    "wordy bread": ("bad", "good"),
    "equal bread": ("good", "bad"),
    "garbage bread": ("good", "bad"),
    "refused bread": ("good", "bad"),
}
"""The endpoint's rule with what both models say."""


def rules(world: WorldFiles, noisy: Path, tmp_path: Path, endpoint: Endpoint, *judges: str) -> Evaluating:
    prompts = tmp_path / "prompts.jsonl"
    texts = [*RULES, "bread"]  # of the last, its tokenizer knows every word
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    asked = (f"openai:{endpoint.url}#m", *judges)
    return Evaluating(world.sft_dir, noisy, asked, str(prompts), out=tmp_path / "out", max_new_tokens=8)


def test_an_endpoint_is_asked_in_both_orders(
    world: WorldFiles, noisy: Path, tmp_path: Path, endpoint: Endpoint, answered: Callable[[dict[str, Any]], None]
) -> None:
    answered({**RULES, "bread": ("same", "same")})
    asked = rules(world, noisy, tmp_path, endpoint)
    out = evaluate(asked, Console())
    (judge,) = asked.judges
    found = {row["prompt"]: row["verdicts"][judge] for row in lines(out / "judgements.jsonl")}
    assert {prompt: (v["a_first"], v["b_first"], v["verdict"]) for prompt, v in found.items()} == {
        "good bread": ("a", "a", "a"),
        "bad bread": ("b", "b", "b"),
        "first bread": ("a", "b", "tie"),
        "wordy bread": ("b", "b", "b"),
        "equal bread": ("tie", "tie", "tie"),
        "garbage bread": (None, None, None),
        "refused bread": (None, None, None),
        "bread": ("tie", "tie", "tie"),
    }
    judged = card(out)["judges"][judge]
    assert (judged["outcome"]["num"], judged["no_verdict"]) == (6, 2)
    assert judged["outcome"]["win"] == pytest.approx(1 / 6) and judged["outcome"]["lose"] == pytest.approx(2 / 6)
    assert judged["order"]["num"] == 5 and judged["order"]["consistent"] == 0.8
    assert judged["order"]["bias"]["value"] == pytest.approx(1 / 5)
    reasons = list(judged["reasons"])
    assert "a reply is not clearly one of the two, or a tie" in reasons
    assert any("the endpoint refuses it: status 400" in reason for reason in reasons)
    assert sum(endpoint.asked.values()) == 14 + 0 and max(endpoint.asked.values()) == 1
    questions = [question for question in endpoint.asked if "A, B, or tie if neither is better" in question]
    assert len(questions) == 14
    evaluate(asked, Console())
    assert sum(endpoint.asked.values()) == 14 + 2  # nothing is asked twice but what was refused


def test_an_endpoint_that_fails_loses_no_answer(
    world: WorldFiles, noisy: Path, tmp_path: Path, endpoint: Endpoint, answered: Callable[[dict[str, Any]], None]
) -> None:
    answered({**RULES, "bread": ("good", "bad")})
    asked = rules(world, noisy, tmp_path, endpoint)
    asked = replace(asked, options=EndpointOptions(concurrency=1, retries=0))
    endpoint.down_after = 9  # of 16; the judge is asked four at a time
    with pytest.raises(JudgeFailed, match="status 500"):
        evaluate(asked, Console())
    assert asked.out is not None and not (asked.out / "card.json").exists()
    endpoint.down, endpoint.down_after = False, None
    before = endpoint.asked.total()
    evaluate(asked, Console())
    assert endpoint.asked.total() == before + 16 - 9, "what was answered is not asked again"
    assert card(asked.out)["judges"][asked.judges[0]]["outcome"]["num"] == 6


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("tie", TIE), ("Tie.", TIE), ("It is a tie", TIE), ("Answer: tie", TIE), ("[[C]]", TIE), ("[[tie]]", TIE), ("A", FIRST),
        ("b.", SECOND), ("[[b]]", SECOND), ("My verdict is a tie.", TIE), ("Answer: A, though nearly a tie", FIRST),
        ("Answer: A. Answer: tie", NONE), ("perhaps", NONE), ("tied up", NONE), (None, NONE),
    ],
)  # fmt: skip
def test_what_a_reply_says_where_ties_are_allowed(reply: str | None, verdict: int) -> None:
    assert read_verdict(reply, ties=True) == verdict
    if verdict == TIE:
        assert read_verdict(reply) == NONE


def test_a_person_judges_blindly(
    world: WorldFiles, noisy: Path, tmp_path: Path, answered: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {f"bread {i}": (f"good {i}", f"bad {i}") for i in range(40)} | {"bread": ("same", "same")}
    answered(texts)
    prompts, sheet = tmp_path / "prompts.jsonl", tmp_path / "ann.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    asked = Evaluating(world.sft_dir, noisy, (f"human:{sheet}",), str(prompts), out=tmp_path / "out", max_new_tokens=4)
    out = evaluate(asked, Console())
    assert "has 40 of 40 answers to give" in capsys.readouterr().out
    assert card(out)["judges"][asked.judges[0]]["outcome"] is None
    assert "Not judged yet" in (out / "report.html").read_text("utf-8")
    rows = lines(sheet)
    assert len(rows) == 40 and {row["better"] for row in rows} == {""}  # of one text there is nothing to ask
    firsts = sum(row["response_1"].startswith("good") for row in rows)
    assert 10 <= firsts <= 30 and set(rows[0]) == {"comparison", "id", "prompt", "response_1", "response_2", "better"}
    for number, row in enumerate(rows):
        good = "1" if row["response_1"].startswith("good") else "2"
        row["better"] = "tie" if number < 4 else int(good) if number < 30 else {"1": "2", "2": "1"}[good] if number < 38 else ""
    sheet.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(asked, Console())
    judged = card(out)["judges"][asked.judges[0]]
    assert (judged["outcome"]["num"], judged["no_verdict"]) == (38, 3)
    assert judged["outcome"]["win"] == pytest.approx(26 / 38) and judged["outcome"]["lose"] == pytest.approx(8 / 38)
    assert judged["order"]["consistent"] is None and "has 2 of 40 answers to give" in capsys.readouterr().out
    for change, words in (
        ({"better": "3"}, r"line 1: 'better' must be 1, 2 or tie, or \"\" for not answered, got '3'"),
        ({"better": True}, "'better' must be 1, 2 or tie"),
        ({"comparison": "other"}, "line 1: these are answers about another comparison"),
        ({"id": rows[1]["id"]}, "is there twice"),
        ({"id": "nobody's"}, "is none of this comparison"),
        ({"response_1": "mended"}, "line 1: the responses are not those of this comparison"),
    ):
        sheet.write_text("".join(json.dumps(row) + "\n" for row in [rows[0] | change, *rows[1:]]))
        with pytest.raises(UserError, match=words):
            evaluate(asked, Console())
    sheet.write_text("")
    with pytest.raises(UserError, match="there is no line in it"):
        evaluate(asked, Console())


def test_who_trained_a_policy_is_no_judge_of_it(world: WorldFiles, noisy: Path, reward_models: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    shutil.copytree(noisy, run / "rounds" / "round_000" / "policy")
    shutil.copytree(reward_models / "1", run / "rounds" / "round_000" / "reward")
    (run / "ledger.json").write_text("{}")
    policy = run / "rounds" / "round_000" / "policy"
    asked = Evaluating(world.sft_dir, policy, (), SANDBOX, out=tmp_path / "x", max_new_tokens=4)
    for judge in (
        f"reward:{run / 'rounds' / 'round_000' / 'reward'}",
        f"reward:{reward_models / '1'}",
        f"ensemble:{reward_models}",
    ):
        with pytest.raises(UserError, match=r"which made B, learned from .*cannot say whether it is better"):
            evaluate(replace(asked, judges=(judge,)), Console())
    (run / "config.yaml").write_text(f"reward: {{base: {reward_models / '0'}}}\n")
    with pytest.raises(UserError, match="learned from"):
        evaluate(replace(asked, judges=(f"reward:{reward_models / '0'}",)), Console())
    with pytest.raises(UserError, match=r"B: .*mine is a whole run.*rounds/round_000/policy"):
        evaluate(replace(asked, b=run, judges=("gold",)), Console())
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model", "vocab.txt", "chat_template.jinja"])
def test_a_model_is_another_if_a_file_is_that_its_scores_depend_on(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("one")
    (tmp_path / "notes.md").write_text("one")
    before = digest_of(tmp_path)
    (tmp_path / "notes.md").write_text("two")
    assert digest_of(tmp_path) == before
    (tmp_path / name).write_text("two")
    assert digest_of(tmp_path) != before


def test_an_ensemble_is_what_strength_left_or_a_list(reward_models: Path, tmp_path: Path) -> None:
    strength = tmp_path / "strength"
    for fold in ("0", "1"):
        shutil.copytree(reward_models, strength / "members" / fold)
    (strength / "members" / "0" / "0" / "model").mkdir()
    members = [strength / "members" / fold / member for fold in "01" for member in "01"]
    assert find_members(str(strength)) == members
    assert find_members(str(reward_models)) == [reward_models / "0", reward_models / "1"]
    assert find_members(f"{members[0]},{members[3]}") == [members[0], members[3]]
    (members[2] / "config.json").rename(members[2] / "adapter_config.json")
    with pytest.raises(UserError, match="is an adapter or a trunk with heads, and a judge needs whole reward models"):
        find_members(str(strength))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such judge": ({"judges": ("gpt",)}, "no such judge: 'gpt'; expected gold, gold:CONFIG.yaml, reward:DIR, ensemble:DIR"),
    "a judge twice": ({"judges": ("gold", "gold")}, "--judge gold is given twice"),
    "nobody": ({"judges": ()}, "nobody is asked"),
    "no model": ({"a": Path("nowhere")}, "A: nowhere: no such model directory"),
    "a reward model": ({"b": Path("REWARD/0")}, "B: .*holds a reward model, expected a causal language model"),
    "a judge that gives no scores": ({"judges": ("reward:SFT",)}, "holds a language model, which gives no scores"),
    "an ensemble of one": ({"judges": ("ensemble:REWARD/0,REWARD/0",)}, "two different reward models or more, got 2 of which 1"),
    "an ensemble that is not there": ({"judges": ("ensemble:nowhere",)}, "no such directory nowhere"),
    "an ensemble of nothing": ({"judges": ("ensemble:EMPTY",)}, "there is no reward model in .* \\(it is empty\\)"),
    "another world": (
        {"judges": ("gold",), "prompts": "FILE", "max_new_tokens": 8},
        "--judge gold knows the sandbox's prompts only",
    ),
    "prompts of another world": (
        {"judges": (f"gold:{TINY}",), "prompts": "FILE", "max_new_tokens": 8},
        "not a prompt of the sandbox: got .bread.",
    ),
    "no prompts": ({"prompts": "EMPTY.jsonl"}, "is empty"),
    "no such split": ({"split": "held"}, "the sandbox's prompts have the splits test, validation, train, not 'held'"),
    "too few": ({"num_prompts": 0}, "--num-prompts must be at least 1, got 0"),
    "too long": ({"max_new_tokens": 500}, "A: .* reads 72 tokens, and the prompt .* may take .* lower --max-new-tokens"),
    "no room": ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1, got 0"),
    "cold": ({"temperature": -1.0}, "--temperature must be 0"),
    "no temperature": ({"temperature": float("nan")}, "--temperature must be 0"),
    "a tie below 0": ({"tie": -1.0}, "--tie must be 0 or more"),
    "nobody listens": ({"judges": ("openai:http://127.0.0.1:9/v1#m",)}, "cannot be asked: no connection"),
    "no URL": ({"judges": ("openai:localhost#m",)}, "must be a URL such as"),
    "a sheet of another kind": ({"judges": ("human:x.csv",)}, "expected a name that ends in .jsonl"),
    "a sheet nowhere": ({"judges": ("human:nowhere/x.jsonl",)}, "there is no directory"),
    "words of another language": ({"prompts": "OTHER", "max_new_tokens": 8}, "has no token for a part of every prompt"),
    "a prompt that is empty": ({"prompts": "BLANK"}, "prompt is empty.*Correct the rows, or leave them out"),
    "messages": ({"prompts": "MESSAGES"}, "the prompts are conversational, and the tokenizer of .* has no chat template"),
    "a directory of something else": ({"out": Path("REWARD")}, "is there, and no directory of `evaluate`"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    name: str, world: WorldFiles, noisy: Path, reward_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(one: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("cluster.evaluate_models._load", load)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "EMPTY.jsonl").write_text("")
    (tmp_path / "FILE.jsonl").write_text(json.dumps({"prompt": "bread"}) + "\n")
    (tmp_path / "BLANK.jsonl").write_text(json.dumps({"prompt": "bread"}) + "\n" + json.dumps({"prompt": " "}) + "\n")
    (tmp_path / "OTHER.jsonl").write_text(json.dumps({"prompt": "Wie geht es?"}) + "\n")
    (tmp_path / "MESSAGES.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "bread"}]}) + "\n")
    places = {"REWARD": str(reward_models), "SFT": str(world.sft_dir), "EMPTY.jsonl": str(tmp_path / "EMPTY.jsonl")}
    places |= {name: str(tmp_path / f"{name}.jsonl") for name in ("FILE", "BLANK", "OTHER", "MESSAGES")}
    changes, words = BAD[name]

    def placed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(placed(each) for each in value)
        if isinstance(value, str | Path) and not str(value).startswith("sandbox"):
            text = str(value)
            for key, place in places.items():
                text = text.replace(key, place)
            text = text.replace("ensemble:EMPTY", f"ensemble:{tmp_path / 'EMPTY'}")
            return type(value)(text) if isinstance(value, str) else Path(text)
        return value

    default = {"judges": ("reward:REWARD/0",)} if "prompts" in changes and "judges" not in changes else {}
    asked = Evaluating(world.sft_dir, noisy, ("gold",), SANDBOX, num_prompts=4, out=tmp_path / "out")
    asked = replace(asked, **{key: placed(value) for key, value in (default | changes).items()})
    with pytest.raises(UserError, match=words):
        evaluate(asked, Console())
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def vllm_judge(world: WorldFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """vLLM's own server with a tiny chat model: its URL and the model's directory."""
    from cluster.endpoint_judge import QUESTION_WITH_TIES

    place = tmp_path_factory.mktemp("vllm")
    words = World(load_config(TINY).world).vocabulary
    save_judge(place / "tiny-judge", [QUESTION_WITH_TIES, " ".join(words)], seed=SEED_OF_JUDGE)
    with vllm_server(place / "tiny-judge", place / "server.log") as url:
        yield url, place / "tiny-judge"


def num_requests(url: str) -> int:
    """Requests that vLLM has answered, by its own count."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=30) as reply:
        said = reply.read().decode()
    counts = [line.rsplit(" ", 1)[1] for line in said.splitlines() if line.startswith("vllm:request_success_total{")]
    return int(sum(map(float, counts)))


def test_a_judge_behind_vllm_s_own_server(
    world: WorldFiles,
    noisy: Path,
    vllm_judge: tuple[str, Path],
    tmp_path: Path,
    answered: Callable[[dict[str, Any]], None],
) -> None:
    from cluster.endpoint_judge import QUESTION_WITH_TIES

    url, model = vllm_judge
    truth = World(load_config(TINY).world)
    written = [response for _, response in truth.corpus()[:24]]
    prompts = [prompt.text for prompt in truth.prompts("test")[:12]]
    texts = dict(zip(prompts, zip(written[::2], written[1::2], strict=True), strict=True))
    answered(texts)
    judge = f"openai:{url}#tiny-judge"
    asked = Evaluating(world.sft_dir, noisy, ("gold", judge), SANDBOX, num_prompts=12, out=tmp_path / "x")
    asked = replace(asked, options=EndpointOptions(max_tokens=4))
    before = num_requests(url)
    out = evaluate(asked, Console())
    assert num_requests(url) - before == 1 + 24  # whether anybody is there, then both orders of every prompt, each once

    def expected(prompt: str, sides: str) -> str | None:
        responses = dict(zip("ab", texts[prompt], strict=True))
        question = QUESTION_WITH_TIES.format(prompt=prompt, first=responses[sides[0]], second=responses[sides[1]])
        said = read_verdict(greedy_reply(model, question, 4), ties=True)
        return {FIRST: sides[0], SECOND: sides[1], TIE: "tie", NONE: None}[said]

    rows = [row["verdicts"][judge] for row in lines(out / "judgements.jsonl")]
    found = [(row["a_first"], row["b_first"]) for row in rows]
    assert found == [(expected(prompt, "ab"), expected(prompt, "ba")) for prompt in prompts]
    assert {verdict for pair in found for verdict in pair} == {"a", "b", "tie", None}
    judged, missing = card(out)["judges"][judge], sum(None in pair for pair in found)
    assert (judged["outcome"]["num"], judged["no_verdict"]) == (12 - missing, missing)  # what is no verdict is no data
    assert judged["reasons"] == {"a reply is not clearly one of the two, or a tie": missing}
    assert judged["order"]["consistent"] == sum(a == b for a, b in found if a and b) / (12 - missing)
    assert card(out)["agreement"][0]["num"] == 12 - missing
    after = num_requests(url)
    evaluate(replace(asked, judges=(judge, "gold")), Console())
    assert num_requests(url) == after + 1  # the samples are a stand-in and on no disk, so it looks for the server again
    for wrong in (f"openai:{url}#another", f"openai:{url.removesuffix('/v1')}#tiny-judge"):
        with pytest.raises(UserError, match="cannot be asked: status 404"):
            evaluate(replace(asked, out=tmp_path / "new", judges=(wrong,)), Console())
