"""A run in an object store: moto's S3, a small made-up run directory, and what can go wrong between the two."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cluster.claims import ENDED, FOLDER, LIVE, Pace
from cluster.cli import main
from cluster.load_config import load_config
from cluster.run_directory import RunDirectory
from cluster.storage import Store
from cluster.store_mirror import StoreMirror
from tests.cluster.command import ROOT, TINY, Command
from tests.cluster.judged import JUDGED
from tests.cluster.object_store import ObjectStore, served
from tokens.errors import UserError

QUICK = Pace(beat_s=0.1, lease_s=1.5)


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with served() as store:
        yield store


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "unsaid",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("RONDO_STORAGE", "RAY_ADDRESS", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RONDO_SCRATCH", str(tmp_path / "scratch"))


class Place:
    """A prefix of its own in the store, and working directories in front of it."""

    def __init__(self, server: ObjectStore, tmp_path: Path) -> None:
        self.uri, self.tmp_path, self.said = server.uri(f"people/{uuid.uuid4().hex}"), tmp_path, list[str]()

    def run(self, scratch: str, *overrides: str, pauses_s: tuple[float, ...] = (0.01, 0.01)) -> RunDirectory:
        """The run as a driver sees it that works in a scratch directory of that name."""
        root = self.tmp_path / scratch
        run = RunDirectory(load_config(TINY, ["--storage", self.uri, "--scratch", str(root), *overrides]))
        run.mirror = StoreMirror(Store(self.uri, pauses_s), "runs/tiny", run.path, self.said.append, QUICK)
        return run

    def there(self) -> Store:
        return Store(self.uri, ())


@pytest.fixture
def place(server: ObjectStore, tmp_path: Path) -> Place:
    return Place(server, tmp_path)


def start(run: RunDirectory, by: str = "first") -> None:
    with run.draft(run.start_path) as draft:
        (draft / "members").mkdir()
        (draft / "members" / "model.safetensors").write_bytes(by.encode() * 1000)
        run.commit_start(draft, {**JUDGED, "committed": True, "by": by})


def play(run: RunDirectory, index: int, by: str = "first") -> None:
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"round": index, "phase": "policy", "reward": 0.5}) + "\n")
    with run.draft(run.round_path(index)) as draft:
        (draft / "policy").mkdir()
        (draft / "policy" / "model.safetensors").write_bytes(f"{by} {index}".encode() * 1000)
        (draft / "policy" / "empty").touch()
        run.commit_round(draft, {**JUDGED, "round": index, "by": by})


def rounds(store: Store) -> list[int]:
    """What a reader of the store sees."""
    text = store.read("runs/tiny/ledger.json")
    return [] if text is None else [entry["round"] for entry in json.loads(text)["rounds"]]


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_empty_directory_goes_on_with_what_the_store_has(place: Place) -> None:
    with place.run("a").open() as run:
        start(run)
        play(run, 0)
        (run.path / "report.html").write_text("of two rounds")
        (run.path / "logs").mkdir()
        (run.path / "logs" / "learner-0.log").write_text("all is well")
    first = place.tmp_path / "a" / "runs" / "tiny"
    with place.run("b").open() as run:
        assert run.num_committed == 1 and run.ledger == json.loads((first / "ledger.json").read_text())
        play(run, 1)
    second = place.tmp_path / "b" / "runs" / "tiny"
    assert tree(second / "rounds" / "round_000") == tree(first / "rounds" / "round_000")
    assert tree(second / "start") == tree(first / "start")
    assert (second / "report.html").read_text() == "of two rounds"
    assert (second / "logs" / "learner-0.log").read_text() == "all is well"
    assert [json.loads(line)["round"] for line in (second / "metrics.jsonl").read_text().splitlines()] == [0, 1]
    assert rounds(place.there()) == [0, 1]
    assert any("fetch rounds/round_000 from s3://models/people" in line for line in place.said)
    with place.run("a").open() as run:  # the first machine is back, and one round behind
        assert run.num_committed == 2
    assert tree(first / "rounds") == tree(second / "rounds")
    assert place.there().names(f"runs/tiny/{FOLDER}") == [], "claims are taken back"


def test_what_only_the_directory_has_is_sent_when_the_run_is_opened(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    local = RunDirectory(load_config(TINY, ["--storage", str(place.tmp_path / "a")]))
    with local.open() as run:
        start(run)
        play(run, 0)
    with place.run("a").open():
        assert rounds(place.there()) == [0], "a run that began without a store goes on in one"
    with place.run("b").open() as run:
        assert run.num_committed == 1


@pytest.mark.parametrize("until", ["rounds/round_001/policy/model.safetensors", "manifests/rounds-round_001", "ledger.json"])
def test_a_commit_that_is_cut_short_is_not_seen(until: str, place: Place, server: ObjectStore) -> None:
    with place.run("a").open() as run:
        start(run)
        play(run, 0)
        refusing = server.refusing(lambda method, path: 403 if method in ("PUT", "POST") and until in path else None)
        with refusing, pytest.raises(UserError, match=r"does not let .* what was committed is intact in the working directory"):
            play(run, 1)
        assert run.num_committed == 2 and rounds(place.there()) == [0], "committed here, not there"
    with place.run("b").open() as run:  # another machine sees whole rounds only
        assert run.num_committed == 1 and not run.round_path(1).exists()
        assert [json.loads(line)["round"] for line in (run.path / "metrics.jsonl").read_text().splitlines()] == [0]
    with place.run("a").open() as run:  # the same machine sends what it had
        assert run.num_committed == 2 and rounds(place.there()) == [0, 1]
    assert (
        tree(place.tmp_path / "a" / "runs" / "tiny" / "rounds").keys()
        > tree(place.tmp_path / "b" / "runs" / "tiny" / "rounds").keys()
    )


DRIVER = """
import sys
from pathlib import Path
from cluster.load_config import load_config
from cluster.run_directory import RunDirectory
from tests.cluster.judged import JUDGED

with RunDirectory(load_config(Path(sys.argv[1]), ["--storage", sys.argv[2], "--scratch", sys.argv[3]])).open() as run:
    with run.draft(run.start_path) as draft:
        run.commit_start(draft, {**JUDGED, "committed": True})
    for index in range(2):
        with run.draft(run.round_path(index)) as draft:
            (draft / "model.safetensors").touch()
            run.commit_round(draft, {**JUDGED, "round": index})
"""


def test_a_driver_that_is_killed_while_it_sends_leaves_what_was_whole(place: Place, server: ObjectStore) -> None:
    reached, killed = threading.Event(), threading.Event()

    def hold(method: str, path: str) -> int | None:
        if method != "PUT" or "round_001/model" not in path:
            return None
        reached.set()
        killed.wait(60)
        return 500

    with server.refusing(hold):
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(TINY), place.uri, str(place.tmp_path / "a")], cwd=ROOT)
        try:
            assert reached.wait(60)
        finally:
            driver.kill()
            driver.wait()
            killed.set()
    assert rounds(place.there()) == [0]
    with place.run("b").open() as run:
        assert run.num_committed == 1
    with place.run("a").open() as run:  # it holds the lock of the killed driver's directory: it need not wait
        assert run.num_committed == 2 and rounds(place.there()) == [0, 1]
    assert len([line for line in place.said if "waiting" in line]) == 1, "the other machine had to"


def test_a_store_that_fails_now_and_then_is_asked_again(place: Place, server: ObjectStore) -> None:
    failures = iter(range(8))
    with place.run("a").open() as run:
        with server.refusing(lambda method, path: 500 if method == "PUT" and next(failures, None) is not None else None):
            start(run)
        play(run, 0)
    assert next(failures, None) is None, "it did fail"
    assert rounds(place.there()) == [0]


def lay_down_round(run: RunDirectory, index: int, steps: int) -> None:
    """As a stop leaves a round."""
    with run.draft(run.round_path(index)) as draft:
        mark = (run.path / "metrics.jsonl").stat().st_size
        draft.begin(6, mark)
        if draft.done("reward") is None:
            (partial := draft.partial("reward")).mkdir()
            (partial / "model.safetensors").write_bytes(b"r")
            draft.record("reward", ["reward"], {"J": 1.0}, mark, {"policy": 2.0})
        draft.checkpoint(steps, 7, lambda place: (place / "learner.safetensors").touch(), 1, mark, {"policy": 2.0})
        run.keep_draft()


def lay_down_in_vain(run: RunDirectory, server: ObjectStore) -> None:
    """The store does not take the learner's state."""
    with (
        server.refusing(lambda method, path: 403 if method in ("PUT", "POST") and "learner.safetensors" in path else None),
        pytest.raises(UserError, match="does not let"),
    ):
        lay_down_round(run, 1, steps=3)


def test_a_round_that_was_laid_down_goes_on_elsewhere(place: Place) -> None:
    with place.run("a").open() as run:
        start(run)
        play(run, 0)
        lay_down_round(run, 1, steps=3)
        first = tree(run.path / "rounds")
    with place.run("b").open() as run:
        assert run.num_committed == 1 and run.point is not None and run.point.steps == 3 and tree(run.path / "rounds") == first
        lay_down_round(run, 1, steps=5)
    with place.run("c").open() as run:
        assert run.point is not None and run.point.steps == 5
        play(run, 1)
        assert run.point is None
    with place.run("d").open() as run:
        assert run.point is None and run.num_committed == 2
    assert not [name for name in place.there().tree("runs/tiny") if "partial" in name], "nothing of the draft is left there"


def test_a_pause_that_is_cut_short_is_not_seen(place: Place, server: ObjectStore) -> None:
    with place.run("a").open() as run:
        start(run)
        play(run, 0)
        lay_down_in_vain(run, server)
        assert run.point is not None, "it is laid down here all the same"
    with place.run("b").open() as run:
        assert run.point is None and run.num_committed == 1


def test_a_checkpoint_that_follows_sends_what_is_new_and_one_that_is_cut_short_leaves_the_one_before(
    place: Place, server: ObjectStore
) -> None:
    with place.run("a").open() as run:
        start(run)
        play(run, 0)
        lay_down_round(run, 1, steps=2)
        sent: list[str] = []
        with server.refusing(lambda method, path: sent.append(path) if method in ("PUT", "POST") else None):  # type: ignore[func-returns-value]
            lay_down_round(run, 1, steps=3)
        assert not [path for path in sent if "reward" in path] and [path for path in sent if "after_0003_steps" in path]
        first = tree(run.path / "rounds")
        with (
            server.refusing(lambda method, path: 403 if method in ("PUT", "POST") and "manifests" in path else None),
            pytest.raises(UserError, match="does not let"),
        ):
            lay_down_round(run, 1, steps=4)
    with place.run("b").open() as run:
        assert run.point is not None and run.point.steps == 3
        assert tree(run.path / "rounds") == first, "the journal is as it was then"


def test_the_further_of_two_pauses_goes_on(place: Place) -> None:
    with place.run("a").open() as run:
        start(run)
        play(run, 0)
        lay_down_round(run, 1, steps=2)
    with place.run("b").open() as run:
        lay_down_round(run, 1, steps=5)
    with place.run("a").open() as run:
        assert run.point is not None and run.point.steps == 5, "the first machine's own pause is older"


def test_a_pause_that_was_not_sent_is_sent_when_the_run_is_opened(place: Place, server: ObjectStore) -> None:
    with place.run("a").open() as run:
        start(run)
        play(run, 0)
        lay_down_in_vain(run, server)
    with place.run("a").open():
        pass
    with place.run("b").open() as run:
        assert run.point is not None and run.point.steps == 3


def test_a_fetch_that_is_cut_short_is_begun_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.run("a").open() as run:
        start(run)
        play(run, 0)
        lay_down_round(run, 1, steps=3)
        first = tree(run.path / "rounds")
    fetch = StoreMirror.fetch
    for cut in ("start", "rounds/round_000", "rounds/.round_001.partial"):

        def cut_short(self: StoreMirror, name: str, into: Path, cut: str = cut) -> None:
            if name == cut:
                raise SystemExit(143)
            fetch(self, name, into)

        with monkeypatch.context() as patch:
            patch.setattr(StoreMirror, "fetch", cut_short)
            with pytest.raises(SystemExit), place.run("b").open():
                pass
    with place.run("b").open() as run:
        assert run.num_committed == 1 and run.point is not None and run.point.steps == 3
        assert tree(run.path / "rounds") == first
        assert (run.path / "metrics.jsonl").stat().st_size == run.point.metrics_bytes


def test_two_histories_are_not_mixed(place: Place) -> None:
    with place.run("a").open() as run:
        start(run)
        play(run, 0)
    shutil.copytree(place.tmp_path / "a", place.tmp_path / "b")
    with place.run("a").open() as run:
        play(run, 1, by="first")
    other = RunDirectory(load_config(TINY, ["--storage", str(place.tmp_path / "b")]))  # went on without the store
    with other.open() as run:
        play(run, 1, by="second")
        play(run, 2, by="second")
    with pytest.raises(
        UserError, match=r"b/runs/tiny \(3 rounds\) and s3://models/people/\w+/runs/tiny \(2 rounds\).*round 1 is"
    ):
        place.run("b").inspect()
    assert rounds(place.there()) == [0, 1] and other.round_path(2).is_dir()


def test_the_store_of_another_config_is_refused(place: Place) -> None:
    with place.run("a").open() as run:
        start(run)
    with pytest.raises(
        UserError, match=r"s3://models/.*/runs/tiny belongs to another config .*policy.kl.coef: 0.05 there, 0.5 here"
    ):
        place.run("b", "--policy.kl.coef", "0.5").inspect()
    assert not (place.tmp_path / "b" / "runs").exists()


def test_a_damaged_file_is_not_taken(place: Place) -> None:
    with place.run("a").open() as run:
        start(run)
        play(run, 0)
    place.there().write("runs/tiny/rounds/round_000/policy/model.safetensors", "not that one")
    with pytest.raises(UserError, match=r"round_000/policy/model.safetensors is damaged: 12 bytes"), place.run("b").open():
        pytest.fail("it was opened")
    assert not list((place.tmp_path / "b" / "runs" / "tiny" / "rounds").iterdir())


def test_a_manifest_that_points_out_of_the_run_is_refused(place: Place) -> None:
    with place.run("a").open() as run:
        start(run)
    digest = {"size": 1, "sha256": "0"}
    place.there().write("runs/tiny/manifests/start.json", json.dumps({"../../../escaped": digest}))
    with pytest.raises(UserError, match=r"'\.\./\.\./\.\./escaped', which would lie outside"), place.run("b").open():
        pytest.fail("it was opened")


def test_a_second_driver_is_refused_while_the_first_lives(place: Place) -> None:
    with place.run("a").open() as run:
        start(run)
        with pytest.raises(UserError, match=r"another driver is running s3://models/.*process \d+ on "), place.run("b").open():
            pytest.fail("it was opened")
        play(run, 0)
    with place.run("b").open() as run:
        assert run.num_committed == 1


def test_of_many_that_come_at_once_at_most_one_gets_in(place: Place) -> None:
    inside, most, outcomes, door = [0], [0], list[str](), threading.Lock()

    def drive(name: str) -> None:
        try:
            with place.run(name).open():
                with door:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                time.sleep(0.3)
                with door:
                    inside[0] -= 1
            outcomes.append("ran")
        except UserError as error:
            outcomes.append(str(error))

    drivers = [threading.Thread(target=drive, args=(name,)) for name in "abcd"]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert most[0] <= 1 and len(outcomes) == 4
    assert all(outcome == "ran" or "another driver" in outcome for outcome in outcomes), outcomes


def left_by_a_dead_driver(place: Place, working_directory: str) -> str:
    incarnation = uuid.uuid4().hex
    claim = {"host": "gone", "pid": 7, "working_directory": working_directory, "beat": 3}
    place.there().write(f"runs/tiny/{FOLDER}/{incarnation}{LIVE}", json.dumps(claim))
    return incarnation


def test_a_dead_drivers_claim_is_taken_over(place: Place) -> None:
    incarnation = left_by_a_dead_driver(place, "of another machine")
    began = time.monotonic()
    with place.run("a").open() as run:
        assert time.monotonic() - began >= QUICK.lease_s
        start(run)
    assert place.there().names(f"runs/tiny/{FOLDER}") == [incarnation + ENDED]
    assert any("process 7 on gone: waiting" in line for line in place.said)


def test_who_holds_the_directorys_lock_does_not_wait_for_its_last_driver(place: Place) -> None:
    with place.run("a").open() as run:
        start(run)
    incarnation = left_by_a_dead_driver(place, (run.path / ".working_directory").read_text())
    with place.run("a").open():
        assert place.there().names(f"runs/tiny/{FOLDER}")[-1].endswith((LIVE, ENDED))
    assert place.there().names(f"runs/tiny/{FOLDER}") == [incarnation + ENDED] and not any(
        "waiting" in line for line in place.said
    )


def test_a_driver_that_was_taken_for_dead_writes_nothing_more(place: Place) -> None:
    with place.run("a").open() as run:
        start(run)
        (own,) = [name.removesuffix(LIVE) for name in place.there().names(f"runs/tiny/{FOLDER}")]
        place.there().write(f"runs/tiny/{FOLDER}/{own}{ENDED}", "{}")
        with pytest.raises(UserError, match="another driver took over s3://"):
            play(run, 0)
        assert rounds(place.there()) == [] and run.num_committed == 1


def test_a_ledger_that_somebody_else_wrote_is_not_overwritten(place: Place) -> None:
    with place.run("a").open() as run:
        start(run)
        place.there().write("runs/tiny/ledger.json", "{}")
        with pytest.raises(UserError, match=r"ledger.json was written by another driver"):
            play(run, 0)
    assert place.there().read("runs/tiny/ledger.json") == "{}"
    with pytest.raises(UserError, match=r"s3://models/.*/runs/tiny/ledger.json has format None"):
        place.run("b").inspect()


WRONG = {
    "a secret": ("s3://somebody:hushhush@models/x", ["s3://...@models/x has credentials in it", "AWS_SECRET_ACCESS_KEY"]),
    "a key without its secret": ("s3://hushhush@models/x", ["has credentials in it"]),
    "an unknown scheme": ("ftp://models/x", ["ftp://", "s3://, gs://"]),
    "no bucket": ("s3:///x", ["no bucket"]),
    "an option that is a secret": ("abfs://models/x?sas_token=hushhush", ["the option sas_token", "endpoint_override"]),
}


@pytest.mark.parametrize("by", ["config", "environment"])
@pytest.mark.parametrize("case", WRONG)
def test_a_storage_name_that_is_wrong(
    case: str, by: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri, words = WRONG[case]
    if by == "environment":
        monkeypatch.setenv("RONDO_STORAGE", uri)
    assert main(["run", str(TINY), *(["--storage", uri] if by == "config" else [])]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and "hushhush" not in message
    assert all(word in message for word in words), message
    assert not (tmp_path / "scratch").exists()


def test_a_bucket_that_is_missing_or_may_not_be_seen(server: ObjectStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(TINY), "--storage", server.uri("x", bucket="nowhere")]) == 2
    message = capsys.readouterr().err
    assert "there is no bucket 'nowhere'" in message and message.count("\n") == 1
    with server.refusing(lambda method, path: 403):
        assert main(["run", str(TINY), "--storage", server.uri("x")]) == 2
    message = capsys.readouterr().err
    assert "does not let the bucket be looked up" in message and "ACCESS_DENIED" in message and message.count("\n") == 1
    assert "unsaid" not in message


def test_a_bucket_that_may_not_be_written(place: Place, server: ObjectStore) -> None:
    began = time.monotonic()
    run, refusing = (
        place.run("a", pauses_s=(30.0,)),
        server.refusing(lambda method, path: 403 if method in ("PUT", "POST") else None),
    )
    with refusing, pytest.raises(UserError, match="ACCESS_DENIED"), run.open():
        pytest.fail("it was opened")
    assert time.monotonic() - began < 15, "another attempt would say the same"


def test_a_file_system_of_fsspec(place: Place, tmp_path: Path) -> None:
    place.uri = f"fsspec+memory://models/{uuid.uuid4().hex}"
    with place.run("a").open() as run:
        start(run)
        play(run, 0)
    with place.run("b").open() as run:
        assert run.num_committed == 1


def test_scratch_belongs_to_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(TINY), "--storage", str(tmp_path), "--scratch", str(tmp_path / "scratch")]) == 2
    assert "scratch is" in capsys.readouterr().err
    assert main(["run", str(TINY), "--storage", "s3://models/x", "--scratch", "here"]) == 2
    assert "absolute" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["strength", "reward", "study", "sft"])
def test_what_only_writes_to_directories_says_so(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(TINY), "--storage", "s3://models/x"]) == 2
    assert (
        f"only `run` keeps its results in an object store. Set storage to a directory for `{command}`" in capsys.readouterr().err
    )


def test_a_file_uri_is_its_directory(tmp_path: Path) -> None:
    assert RunDirectory(load_config(TINY, ["--storage", f"file://{tmp_path}/x"])).path == tmp_path / "x" / "runs" / "tiny"


def test_the_endpoint_may_come_from_the_environment(place: Place, server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    there = Store("s3://models/by-environment?region=us-east-1", ())
    there.write("x", "y")
    assert there.read("x") == "y" and ("PUT", "/models/by-environment/x") in server.requests


def test_a_killed_run_continues_after_the_last_committed_round_on_an_empty_machine(
    tiny_run: tuple[Path, subprocess.CompletedProcess[str]], command: Command, place: Place
) -> None:
    run, _ = tiny_run
    copy = place.tmp_path / "a" / "runs" / "tiny"
    shutil.copytree(run, copy)
    state = json.loads((run / "ledger.json").read_text())
    (copy / "ledger.json").write_text(json.dumps(state | {"rounds": state["rounds"][:1]}))  # round 1 lacks only this
    (copy / "rounds" / ".round_002.partial").mkdir()
    with (copy / "timeline.jsonl").open("a") as file:
        file.write('{"what": "sam')  # the kill cut a line
    with place.run("a").open():
        left = sorted(path.name for path in (copy / "rounds").iterdir())
        assert rounds(place.there()) == [0] and left == [".round_001.partial", "round_000"], "it is a draft again"
        assert policy_steps(copy)[:2] == [(0, 0), (0, 1)] and (copy / "timeline.jsonl").read_text().endswith("}\n")
    shutil.copytree(command.storage / "cache", place.tmp_path / "b" / "cache")  # can be made again; that takes a while
    done = command("run", str(TINY), "--storage", place.uri, "--scratch", str(place.tmp_path / "b"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Round 2 of 2" in done.stdout and "Round 1 of 2" not in done.stdout and "fetch rounds/round_000" in done.stdout
    assert f"rounds/round_001 is in {place.uri.split('?')[0]}/runs/tiny: " in done.stdout
    with place.run("c").open() as fetched:
        assert fetched.finished and fetched.ledger["rounds"][0] == state["rounds"][0]
    last = fetched.path
    sent = [name for name in place.there().tree("runs/tiny") if name.split("/")[0] == "best"]
    assert sent == ["best/best.json"], "its policy is there once, in its round"
    card = json.loads((place.tmp_path / "b" / "runs" / "tiny" / "best" / "best.json").read_text())
    assert json.loads(str(place.there().read("runs/tiny/best/best.json"))) == card
    assert (last / "best" / "model.safetensors").is_file() == (card["round"] is not None), "SFT's policy is not in the run"
    assert policy_steps(last) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert (last / "report.html").stat().st_size > 10_000
    for name in ("policy/model", "reward/model", "critic/model", "learner"):
        ours, theirs = (load_file(each / "rounds" / "round_001" / f"{name}.safetensors") for each in (last, run))
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours), name
    assert "unsaid" not in done.stdout + done.stderr
    for path in last.rglob("*"):
        assert not path.is_file() or b"unsaid" not in path.read_bytes(), path


def policy_steps(run: Path) -> list[tuple[int, int]]:
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sorted((row["round"], row["step"]) for row in read if row["phase"] == "policy")
