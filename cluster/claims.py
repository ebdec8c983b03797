"""One driver at a time on a run in an object store, which has no locks.

A driver puts an object of its own, its claim, *before* it lists those of others. Of two that come at once the later one to put
sees the other's, on every store that lists what was put (S3, GCS, Azure and MinIO do): no conditional write is needed. A claim is
put again every few seconds with a higher number. Who finds a claim of another watches that number on its own clock: if it
moves, the other is alive and the newcomer leaves; if it does not for ``Pace.lease_s``, the newcomer writes beside it that it has
ended. That mark is never taken back, and a driver looks for its own before each commit.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Event, Thread

from cluster.storage import StoppedError, Store
from tokens.errors import UserError

FOLDER = ".claims"
LIVE, ENDED = ".live", ".ended"


@dataclass(frozen=True)
class Pace:
    """How often a driver says that it lives, and how long it is believed.

    Args:
        beat_s: seconds between two signs of life.
        lease_s: seconds without one after which a driver is taken for dead.
    """

    beat_s: float = 15.0
    lease_s: float = 90.0


PACE = Pace()


class Claim:
    """A driver's claim to a run.

    Args:
        store: where the run is.
        folder: of the run in it, such as runs/NAME.
        working_directory: identity of the directory where this driver works, whose lock it holds: whoever claimed the run from
            there before has ended.
        say: shows a line to the user.
        pace: of the signs of life.
    """

    def __init__(self, store: Store, folder: str, working_directory: str, say: Callable[[str], None], pace: Pace = PACE) -> None:
        self.store, self.folder, self.say, self.pace = store, f"{folder}/{FOLDER}", say, pace
        self.run = f"{store.name}/{folder}"
        self.incarnation = uuid.uuid4().hex
        self.mine = {"host": socket.gethostname(), "pid": os.getpid(), "working_directory": working_directory}
        self.beats, self.over = 0, Event()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Claim the run, and give it back at the end.

        Raises:
            UserError: if another driver has it.
        """
        self._beat()
        beating = Thread(target=self._keep_beating, daemon=True, name="claim")
        beating.start()
        try:
            self._end_the_dead()
            yield
        finally:
            self.over.set()
            self.store.stopped.set()
            beating.join()
            try:
                self.store.remove(self._key(self.incarnation, LIVE))
            except (UserError, StoppedError):
                self.say(
                    f"the claim to {self.run} could not be taken back: the next driver waits {self.pace.lease_s:.0f} s for it"
                )

    def check(self) -> None:
        """Look whether the run is still this driver's.

        Raises:
            UserError: if another driver took it for dead.
        """
        if self.incarnation + ENDED in self.store.names(self.folder):
            raise UserError(
                f"another driver took over {self.run}: this one gave no sign of life for {self.pace.lease_s:.0f} s. Nothing of "
                "it was written there since; let the other one finish"
            )

    def _beat(self) -> None:
        self.beats += 1
        self.store.write(self._key(self.incarnation, LIVE), json.dumps(self.mine | {"beat": self.beats}))

    def _keep_beating(self) -> None:
        while not self.over.wait(self.pace.beat_s):
            with contextlib.suppress(UserError, StoppedError):  # the store is away: the next beat is as good
                self._beat()

    def _others(self) -> dict[str, str]:
        """Claims of drivers that have not ended, by incarnation, as text."""
        names = self.store.names(self.folder)
        ended = {name.removesuffix(ENDED) for name in names if name.endswith(ENDED)}
        live = {name.removesuffix(LIVE) for name in names if name.endswith(LIVE)} - ended - {self.incarnation}
        read = {name: self.store.read(self._key(name, LIVE)) for name in sorted(live)}
        return {name: text for name, text in read.items() if text is not None}

    def _end_the_dead(self) -> None:
        found = self._others()
        here = {name for name, text in found.items() if json.loads(text)["working_directory"] == self.mine["working_directory"]}
        strange = {name: text for name, text in found.items() if name not in here}
        if strange:
            self._watch(strange)
        for name in found:
            self.store.write(self._key(name, ENDED), json.dumps(self.mine | {"taken_over_by": self.incarnation}))
            self.store.remove(self._key(name, LIVE))
        if late := self._others():
            self._refuse(next(iter(late.values())))
        self.check()

    def _watch(self, first: dict[str, str]) -> None:
        text = next(iter(first.values()))
        self.say(
            f"{self.run} is claimed by {_who(text)}: waiting up to {self.pace.lease_s:.0f} s for a sign of life, then taking over"
        )
        until = time.monotonic() + self.pace.lease_s
        while time.monotonic() < until:
            time.sleep(min(self.pace.beat_s, max(0.0, until - time.monotonic())))
            now = self._others()
            for name, text in now.items():
                if name not in first or first[name] != text:
                    self._refuse(text)
            if not now:
                return

    def _refuse(self, text: str) -> None:
        raise UserError(
            f"another driver is running {self.run}: {_who(text)}. Wait for it, stop it, or choose another name; once it is dead, "
            f"the same command takes over after {self.pace.lease_s:.0f} s"
        )

    def _key(self, incarnation: str, what: str) -> str:
        return f"{self.folder}/{incarnation}{what}"


def _who(text: str) -> str:
    claim = json.loads(text)
    return f"process {claim['pid']} on {claim['host']}"
