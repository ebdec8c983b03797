"""Asking one person, and the server of the page, without a model: answers, undo, order, and who may send one."""

import http.client
import json
import threading
from collections.abc import Iterator, Sequence

import pytest
import torch

from cluster.ask_page import LONGEST_BODY, AskServer
from cluster.interview import Given, Interview, Pool, signed
from preferences.pool import PoolPair
from rm.features_config import By
from rm.person import Person, fit_person
from tokens.errors import UserError

N, D = 30, 3
JSON = "application/json"


class Kept:
    """What an interview handed over to be written."""

    def __init__(self) -> None:
        self.people: list[Person] = []
        self.answers: tuple[Given, ...] = ()
        self.full = False

    def __call__(self, person: Person, given: Sequence[Given]) -> None:
        if self.full:
            raise UserError("ann.json cannot be written (No space left on device)")
        self.people.append(person)
        self.answers = tuple(given)


def begin(by: By = "information", number: int = N, seed: int = 0, asked: torch.Tensor | None = None) -> tuple[Interview, Kept]:
    pairs = tuple(PoolPair(f"prompt {i}", f"first {i}", f"second {i}") for i in range(number))
    pool = Pool(pairs, torch.randn(number, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    before, kept = torch.zeros(number, dtype=torch.bool) if asked is None else asked, Kept()
    return Interview(pool, before, lambda rows: fit_person(rows, 1.0), by, seed, 0, kept), kept


def answer(interview: Interview, better: str | None) -> None:
    question = interview.question()
    assert question is not None
    interview.answer(question, None if better is None else "a" if better == "a" else "b")


@pytest.mark.parametrize("by", ["information", "thompson", "random"])
def test_every_pair_comes_once_and_what_was_better_is_what_counts(by: By) -> None:
    interview, kept = begin(by)
    seen, first_shown_first = set(), 0
    while (question := interview.question()) is not None:
        assert interview.left == N - len(seen)
        seen.add(question.pair)
        first_shown_first += question.a == f"first {question.pair}"
        assert {question.a, question.b} == {f"first {question.pair}", f"second {question.pair}"}
        interview.answer(question, "a" if question.a.startswith("first") else "b")  # the pool's first is always the better one
    assert seen == set(range(N)) and interview.num_answers == N and interview.left == 0
    assert 5 < first_shown_first < N - 5  # the order is random, and says nothing
    assert {given.preferred for given in kept.answers} == {"a"}
    places = [given.pair for given in kept.answers]
    torch.testing.assert_close(interview.person.weights, fit_person(interview.pool.differences[places], 1.0).weights)


def test_signs_follow_the_answers() -> None:
    interview, _ = begin()
    rows = signed(interview.pool, [Given(3, "a"), Given(4, None), Given(5, "b")])
    torch.testing.assert_close(rows, torch.stack([interview.pool.differences[3], -interview.pool.differences[5]]))


@pytest.mark.parametrize("by", ["information", "thompson", "random"])
def test_undo_brings_the_same_question_and_the_same_person_back(by: By) -> None:
    interview, kept = begin(by)
    for better in ("a", "b", None, "b"):
        answer(interview, better)
    question, person, accuracies = interview.question(), interview.person, list(interview.accuracies)
    answer(interview, "b")
    answer(interview, None)
    interview.undo()
    interview.undo()
    assert interview.question() == question and interview.accuracies == accuracies
    assert torch.equal(interview.person.weights, person.weights) and torch.equal(kept.people[-1].weights, person.weights)
    assert interview.num_answers == 3 and len(kept.answers) == 4


def test_a_skip_says_nothing_and_does_not_come_again() -> None:
    interview, kept = begin(number=3)
    before = interview.person
    for _ in range(3):
        answer(interview, None)
    assert interview.question() is None and interview.person is before and not kept.people and interview.num_answers == 0


def test_what_was_asked_before_does_not_come_again() -> None:
    asked = torch.ones(N, dtype=torch.bool)
    asked[[4, 9]] = False
    interview, _ = begin(asked=asked)
    answer(interview, "a")
    answer(interview, "b")
    assert {given.pair for given in interview.given} == {4, 9} and interview.question() is None


def test_an_answer_that_cannot_be_written_did_not_happen() -> None:
    interview, kept = begin()
    answer(interview, "a")
    question, person = interview.question(), interview.person
    kept.full = True
    with pytest.raises(UserError, match="No space"):
        answer(interview, "b")
    assert interview.question() == question and interview.person is person and len(interview.accuracies) == 2


def test_a_pool_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a pool needs pairs and a difference for each, got 0 and 0"):
        Pool((), torch.zeros(0, D))


class Client:
    """Talks to a server as a browser does, or as somebody else would."""

    def __init__(self, server: AskServer) -> None:
        self.server = server

    def send(self, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, str, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=30)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        return reply.status, text, dict(reply.getheaders())

    def state(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.send("GET", f"/{self.server.token}/state")[1])
        return found

    def answer(self, number: int, choice: str) -> dict[str, object]:
        body = json.dumps({"number": number, "choice": choice})
        status, text, _ = self.send("POST", f"/{self.server.token}/answer", body, Content_Type=JSON)
        assert status == 200, text
        found: dict[str, object] = json.loads(text)
        return found


@pytest.fixture
def served() -> Iterator[tuple[Client, Interview, Kept, threading.Thread]]:
    interview, kept = begin()
    with AskServer(interview, "Ann", "ann.json", "Nothing is kept.", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Client(server), interview, kept, thread
        server.shutdown()
        thread.join(30)


def test_the_page_answers_skips_undoes_and_ends(served: tuple[Client, Interview, Kept, threading.Thread]) -> None:
    client, interview, kept, thread = served
    first = client.state()
    assert (first["number"], first["answers"], first["undo"], first["finished"], first["left"]) == (1, 0, False, False, N)
    second = client.answer(1, "a")
    assert (second["number"], second["answers"], second["undo"]) == (2, 1, True) and len(kept.people) == 1
    again = client.answer(1, "a")  # a second click
    assert again["trouble"] == "That question was answered already; this is the open one." and again["answers"] == 1
    assert client.answer(2, "skip")["number"] == 3 and client.answer(3, "undo")["number"] == 2
    back = client.answer(2, "undo")
    assert back == first | {"trouble": ""} and interview.num_answers == 0
    assert client.answer(1, "undo")["trouble"] == "There is no answer to undo."
    kept.full = True
    broken = client.answer(1, "b")
    assert broken[
        "answers"
    ] == 0 and "does not count, the earlier ones do: ann.json cannot be written (No space left on device)" in str(
        broken["trouble"]
    )
    kept.full = False
    client.answer(1, "b")
    assert client.answer(2, "done")["finished"] is True
    thread.join(30)
    assert not thread.is_alive() and interview.num_answers == 1


def test_nobody_else_is_answered(served: tuple[Client, Interview, Kept, threading.Thread]) -> None:
    client, interview, _, _ = served
    here, token, port = f"/{client.server.token}/", client.server.token, client.server.server_port
    good = json.dumps({"number": 1, "choice": "a"})
    assert client.server.server_address[0] == "127.0.0.1" and len(token) >= 32
    assert client.send("GET", here)[0] == 200 and client.send("GET", here, Host=f"localhost:{port}")[0] == 200
    assert client.send("GET", here, Host=f"evil.example:{port}")[0] == 403
    assert client.send("GET", here, Host="127.0.0.1")[0] == 403
    for path in (
        "/",
        "/state",
        f"/{token[:-1]}/",
        f"/{token}x/state",
        f"/{token}",
        f"{here}answer",
        f"{here}../etc/passwd",
        "/%C3%A4/",
    ):
        assert client.send("GET", path)[:2] == (404, "Not Found"), path
    assert client.send("GET", "/favicon.ico")[0] == 204
    assert client.send("POST", "/answer", good, Content_Type=JSON)[0] == 404
    assert client.send("POST", f"{here}state", good, Content_Type=JSON)[0] == 404
    assert client.send("POST", f"{here}answer", good, Content_Type=JSON, Origin="http://evil.example")[0] == 403
    assert client.send("POST", f"{here}answer", good, Content_Type=JSON, Origin="null")[0] == 403
    assert client.send("POST", f"{here}answer", good, Content_Type="text/plain")[0] == 415
    assert client.send("POST", f"{here}answer", "x" * (LONGEST_BODY + 1), Content_Type=JSON)[0] == 413
    assert client.send("POST", f"{here}answer", None, Content_Type=JSON, Content_Length="-1")[0] == 413
    odd = ("", "[", "[]", "{}", '{"number": true, "choice": "a"}', '{"number": 1, "choice": "c"}', '{"number": 1, "choice": []}',
           '{"number": "1", "choice": "a"}', '{"number": 1, "choice": "a", "more": 1}', "[" * 990)  # fmt: skip
    for body in odd:
        assert client.send("POST", f"{here}answer", body, Content_Type=JSON)[0] == 400, body
    assert client.send("PUT", here)[0] == 501
    assert interview.num_answers == 0
    origin = f"http://127.0.0.1:{port}"
    assert client.send("POST", f"{here}answer", good, Content_Type=JSON, Origin=origin)[0] == 200 and interview.num_answers == 1


def test_the_page_may_do_little_and_its_nonce_is_new_each_time(served: tuple[Client, Interview, Kept, threading.Thread]) -> None:
    client = served[0]
    (_, one, headers), (_, other, _) = (client.send("GET", f"/{client.server.token}/") for _ in range(2))
    policy = one.split('http-equiv="Content-Security-Policy" content="')[1].split('"')[0]
    nonce = policy.split("'nonce-")[1].split("'")[0]
    assert one.count(f'<script nonce="{nonce}">') == 1 == one.count("<script") and nonce not in other
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'nonce-")
    assert policy.endswith("connect-src 'self'; base-uri 'none'; form-action 'none'")
    assert headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert headers["Cache-Control"] == "no-store" and headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"


def test_a_port_that_is_taken_is_said(served: tuple[Client, Interview, Kept, threading.Thread]) -> None:
    taken = served[0].server.server_port
    for port, words in ((taken, "Address already in use"), (70_000, "0-65535")):
        with pytest.raises(UserError, match=f"cannot listen on port {port} .*{words}.*--port 0 takes any"):
            AskServer(begin()[0], "Ann", "ann.json", "", port)
