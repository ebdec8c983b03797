"""Making good what is lost: another process in a dead one's place, with all that it must hold, and the work done again.

An engine, the scorer and the reward trainer are replaced in the middle of whatever goes on, and what they had is asked for again.
The learner holds what is in no other place, so its loss ends the attempt: the round is played again from its last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError

from cluster.failures import BadNumbers, GivenUp, RoleFailed, RoleLost
from cluster.health import Budget, FaultsConfig, Kind, State
from cluster.moving import Moving
from cluster.parts import Fence
from cluster.patience import is_away, until_there
from cluster.pulse import Pulse
from cluster.replacing import Fault, Replacing, id_of
from cluster.rota import Process
from cluster.signals import obey_termination
from cluster.telemetry import role_of

T = TypeVar("T")
PING_S = 1.0
"""How often a process that is out of reach is asked whether it is there."""


class Recovery:
    """Makes good what is lost, as far as the budgets go.

    Args:
        faults: the limits.
        processes: of the run.
        storage: directory of the run.
    """

    def __init__(self, faults: FaultsConfig, processes: Replacing, storage: Path) -> None:
        self.faults, self.all, self.storage = faults, processes, storage
        self.wait, self.say = processes.wait, processes.say
        self.budget = Budget(faults, time.monotonic)
        self.moving = Moving(processes)
        self.pulse = Pulse(processes.processes)
        self.num_losses, self.num_stale = 0, 0
        self.wait.make_good, self.wait.fence = self.make_good, Fence(self._refused)

    def __call__(self, play: Callable[[], T]) -> T:
        """Play something that goes on where it was left, until it is done.

        Args:
            play: it.

        Raises:
            RoleFailed: if something failed more often than it is made good, or is not made good at all.
        """
        while True:
            try:
                played = play()
                self.budget.committed()
                return played
            except (GivenUp, BadNumbers):  # numbers that went wrong have a budget of their own: cluster.guarding
                raise
            except RoleLost as lost:
                if lost.who not in self.all.processes:
                    raise
                self.say(f"  goes on from the last checkpoint: {lost.who} {lost.how}")
            except RoleFailed as failure:
                self._do_once_more(failure)
            except OSError as error:
                if not is_away(error, self.storage):
                    raise
                self._wait_for_storage(error)
                self.all.replace_the_unfitted()  # what they were to hold lies there

    def look(self) -> None:
        """Look after those that are away, and whether the others live; called again and again while the driver waits.

        Raises:
            RoleLost: if a process is not there again in time, or another one takes over from it.
        """
        self.pulse.look(self.wait.starting)
        self.all.refit_the_unfit()
        self.moving.look()
        for name in sorted(self.wait.starting):
            absence = self.all.away[name]
            absence.room.look(waiting=True)
            if self._too_long(name):
                what = f"it was not there again within faults.restart_s = {self.faults.restart_s:g} s: {absence.room.short()}"
                raise self.all.lost(name, "unreachable", what)
        for name in self.all.unfitted_for(self.wait.deadline_s):
            what = f"it was up, and did not hold what it must after {self.wait.deadline_s:g} s (resources.deadline_s)"
            raise self.all.lost(name, "hung", what)

    def _too_long(self, name: str) -> bool:
        return name in self.wait.starting and time.monotonic() - self.all.away[name].began > self.faults.restart_s

    def make_good(self, lost: RoleLost) -> None:
        """Put another process in the place of a lost one. Its calls are then asked for again by whoever waits for them.

        Raises:
            RoleLost: if what it held cannot be given to another: the round must go on from its last checkpoint.
            GivenUp: if that is one too many, or there is no room for another.
        """
        name = lost.who
        if name not in self.all.processes:
            raise lost
        process = self.all.processes[name]
        if lost.actor != id_of(process):
            return  # another one has its place already
        if self._too_long(name):
            self._give_up(process, lost)
            return
        if lost.how == "unreachable" and self._answers_again(process, lost):
            return
        if lost.how == "moved":
            self.all.note("moved", process, lost.why, {})
            self.say(f"  {name} moves: {lost.why}")
        else:
            self._count(process, lost)
        group = self.all.group(name)
        self.all.replace(group)
        if any(role_of(member) == "learner" for member in group):
            raise lost

    def _count(self, process: Process, lost: RoleLost) -> None:
        """Tell of a loss.

        Raises:
            GivenUp: if it is one too many.
        """
        name = process.identity.name
        silent = self.pulse.silent_s(name)
        self.num_losses += 1
        values = {"faults/losses": float(self.num_losses), "faults/detection_seconds": silent}
        self.all.note("lost", process, f"{lost.how}: {lost.why}", values)
        self.say(f"[yellow]lost[/] {name}: {lost.how}, {silent:.1f} s after its last sign of life ({lost.why})")
        self._spend(name, "infrastructure", lost)

    def _wait_for_storage(self, error: OSError) -> None:
        """Nothing can be saved or read meanwhile; what was being written when it went is written again.

        Raises:
            OSError: if it stays away.
            GivenUp: if it is away too often.
        """
        limit_s = self.faults.storage_s
        self.say(f"[yellow]storage[/] {self.storage} does not answer ({error}); waiting up to {limit_s:g} s for it")
        took = until_there(self.storage, limit_s, obey_termination)
        why = f"{error.strerror}: away for {took:.1f} s"
        self.all.write_down(Fault("storage away", "storage", "", why, {"faults/recovery_seconds": took}))
        self.say(f"  storage is there again after {took:.1f} s; the round goes on from what is recorded")
        if not self.budget.spend("storage", "infrastructure"):
            raise GivenUp(f"the storage was away more than {self.faults.infrastructure} times within {self.faults.window_s:g} s")

    def _do_once_more(self, failure: RoleFailed) -> None:
        """A role raised an error: another process does its work once more."""
        if failure.who not in self.all.processes:
            raise failure
        process = self.all.processes[failure.who]
        self.all.note("raised", process, str(failure), {})
        self._spend(failure.who, "data", failure)
        self.say(f"[yellow]failed[/] {failure}; another process does it once more, from the last checkpoint")
        self.all.replace(self.all.group(failure.who))

    def _spend(self, name: str, kind: Kind, failure: RoleFailed) -> None:
        role = role_of(name)
        if not self.budget.spend(role, kind):
            limit = self.budget.limit(kind)
            if not limit:
                raise GivenUp(str(failure), failure.who, failure.trace) from failure
            within = f"within {self.faults.window_s:g} s" if kind == "infrastructure" else "before the round was done"
            raise GivenUp(
                f"{failure}. Role {role} failed more than {limit} times {within} (faults.{kind})",
                failure.who,
                failure.trace,
            ) from failure

    def _answers_again(self, process: Process, lost: RoleLost) -> bool:
        """Whether a process that could not be reached is there after all, and its call may be made again."""
        name = process.identity.name
        health, until = self.all.health[name], time.monotonic() + self.faults.suspect_s
        if health.state is State.RESTARTING:
            return False
        health.move(State.SUSPECT)
        before = State.STALE if name in self.all.away else State.HEALTHY
        while time.monotonic() < until:
            obey_termination()
            try:
                ray.get(process.actor.identity.remote(), timeout=PING_S)
            except ActorUnavailableError:
                time.sleep(PING_S)
            except GetTimeoutError:
                continue
            except RayActorError:
                return False
            else:
                health.move(before)
                self.all.keep_vigil(process)  # the one before is given up with all that was asked of it
                self.all.note("cleared", process, lost.why, {})
                self.say(f"  {name} could not be reached for a while, and answers again")
                return True
        return False

    def _give_up(self, process: Process, lost: RoleLost) -> None:
        """There is no room for another one: an engine's place stays empty if others serve, and the run ends for any other.

        Raises:
            GivenUp: if nobody else does its work.
        """
        name = process.identity.name
        serving = [] if self.all.engines is None else self.all.engines.serving()
        others = [engine for engine in serving if engine.identity.name not in self.wait.starting]
        if role_of(name) != "rollout" or not others or not self.all.separate:  # the learner sends to all places, or to none
            raise GivenUp(str(lost), name) from lost
        self.all.health[name].move(State.DEAD)
        self.wait.starting.discard(name)
        ray.kill(process.actor)
        self.all.note("given up", process, lost.why, {})
        self.say(f"[yellow]given up[/] {name}: {lost.why}; {len(others)} engines go on")

    def _refused(self, name: str) -> None:
        """An answer came that nobody may take."""
        self.num_stale += 1
        process = self.all.processes[name]
        self.all.note("stale reply", process, "of a call that was given up", {"faults/stale_replies": float(self.num_stale)})
