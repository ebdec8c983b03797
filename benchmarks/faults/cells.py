"""The matrix of faults, F1 to F56, as declared rows: what is done to whom, what must come of it, and where it is played."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One fault.

    Args:
        who: the component that it is done to.
        fault: what is done.
        promise: what must come of it.
        scenario: that plays it; "" where none does.
        why_not: why none does; "" where one does.
    """

    who: str
    fault: str
    promise: str
    scenario: str
    why_not: str = ""


ENGINE, SCORER, REWARD, LEARNER = "rollout engine", "scorer", "reward trainer", "policy learner"
DRIVER, NODE = "driver", "node"
EQUAL = "bits of the undisturbed run"
ENGINES_EQUAL = "each sample once; the rollouts that were recorded are learned from bit for bit"

CELLS: Mapping[str, Cell] = {
    "F1": Cell(ENGINE, "SIGKILL while idle", f"a successor, refitted; {EQUAL}", "roles"),
    "F2": Cell(SCORER, "SIGKILL while idle", f"a successor with its members; {EQUAL}", "roles"),
    "F3": Cell(REWARD, "SIGKILL while idle", f"a successor; {EQUAL}", "roles"),
    "F4": Cell(LEARNER, "SIGKILL while idle", f"back to the last checkpoint, steps replayed; {EQUAL}", "roles"),
    "F5": Cell(DRIVER, "SIGKILL between stages", f"the same command goes on, at most one stage redone; {EQUAL}", "drivers"),
    "F6": Cell(NODE, "a node with an engine is lost, engine idle", "another engine on another node", "nodes"),
    "F7": Cell(ENGINE, "SIGKILL while it samples", f"its part alone is redone; {ENGINES_EQUAL}", "roles"),
    "F8": Cell(SCORER, "SIGKILL while it scores", f"scored again; {EQUAL}", "roles"),
    "F9": Cell(REWARD, "SIGKILL while it fits", f"the fit goes on or begins again; {EQUAL}", "roles"),
    "F10": Cell(LEARNER, "SIGKILL in an update", f"the update is done once; {EQUAL}", "roles"),
    "F11": Cell(DRIVER, "SIGKILL after each line of the journal", f"goes on at the next stage; {EQUAL}", "drivers"),
    "F12": Cell(NODE, "the node with learner, trainer and scorer is lost", f"all three elsewhere; {EQUAL}", "nodes"),
    "F13": Cell(REWARD, "SIGKILL while it writes a reward model", f"never half a model; {EQUAL}", "roles"),
    "F14": Cell(LEARNER, "SIGKILL while it writes a checkpoint", f"the one before is whole; {EQUAL}", "roles"),
    "F15": Cell(DRIVER, "SIGKILL between the last stage and the commit", f"committed once; {EQUAL}", "drivers"),
    "F16": Cell(NODE, "the run's directory becomes read-only", "a clear end; goes on when it is writable again", "disks"),
    "F17": Cell(ENGINE, "SIGSTOP while it samples", f"past its deadline it is ended, a successor; {EQUAL}", "hangs"),
    "F18": Cell(SCORER, "SIGSTOP while it scores", f"past its deadline a successor; {EQUAL}", "hangs"),
    "F19": Cell(REWARD, "SIGSTOP while it fits", f"past its deadline a successor; {EQUAL}", "hangs"),
    "F20": Cell(LEARNER, "SIGSTOP in an update", f"past its deadline a successor; {EQUAL}", "hangs"),
    "F21": Cell(DRIVER, "SIGSTOP for 10 s", f"a second driver is refused meanwhile; it goes on; {EQUAL}", "hangs"),
    "F22": Cell(NODE, "SIGSTOP of a node's raylet", "lost after the health checks, as F6", "nodes"),
    "F23": Cell(ENGINE, "a tenth of its speed", f"the round ends; {ENGINES_EQUAL}", "hangs"),
    "F24": Cell(SCORER, "a tenth of its speed", f"the round ends; {EQUAL}", "hangs"),
    "F25": Cell(ENGINE, "SIGKILL while weights arrive", f"no sample of old or mixed weights; {EQUAL}", "roles"),
    "F26": Cell(SCORER, "another round's reward model in its place", f"refused by its digest, made again; {EQUAL}", "drivers"),
    "F27": Cell(LEARNER, "the rollouts of another step in place of its own", f"refused by their digest; {EQUAL}", "drivers"),
    "F28": Cell(ENGINE, "NaN among its log-probs", "named; nothing is learned from it", "numbers"),
    "F29": Cell(SCORER, "NaN from one of its members", "named; nothing is learned from it", "numbers"),
    "F30": Cell(LEARNER, "a loss that is NaN", "the step is undone and its batch skipped, by name", "numbers"),
    "F31": Cell(LEARNER, "a gradient that is infinite", "the step is undone and its batch skipped, by name", "numbers"),
    "F32": Cell(LEARNER, "KL that blows up", "the step is undone, by name; a limit of them ends the run", "numbers"),
    "F33": Cell(ENGINE, "no memory left to it", "a clear end or a successor, by name", "memory"),
    "F34": Cell(SCORER, "no memory left to it", "a clear end or a successor, by name", "memory"),
    "F35": Cell(REWARD, "no memory left to it", "a clear end or a successor, by name", "memory"),
    "F36": Cell(LEARNER, "no memory left to it", "a clear end or a successor, by name", "memory"),
    "F37": Cell(DRIVER, "no memory left to it", "a clear end; the same command goes on", "memory"),
    "F38": Cell(NODE, "the object store is full", f"Ray spills; {EQUAL}", "memory"),
    "F39": Cell(REWARD, "the disk fills while it fits", "one sentence, code 2; goes on when there is room", "disks"),
    "F40": Cell(LEARNER, "the disk fills while it writes a checkpoint", "the one before is whole; one sentence, code 2", "disks"),
    "F41": Cell(DRIVER, "the disk fills before a journal line", "one sentence, code 2; goes on when there is room", "disks"),
    "F42": Cell(ENGINE, "a bit flipped in recorded rollouts", f"said aloud, made again; {EQUAL}", "drivers"),
    "F43": Cell(SCORER, "a bit flipped in a member's weights", "refused by name", "drivers"),
    "F44": Cell(LEARNER, "the latest checkpoint cut short", f"said aloud, the one before is used; {EQUAL}", "drivers"),
    "F45": Cell(LEARNER, "a bit flipped in the last round's learner", "refused by name", "drivers"),
    "F46": Cell(DRIVER, "the journal's tail torn, and its middle", f"tail left out, {EQUAL}; middle refused", "drivers"),
    "F47": Cell(DRIVER, "ledger.json deleted", "refused by name", "drivers"),
    "F48": Cell(ENGINE, "a tenth of Ray's calls and answers lost", f"each applied once; {EQUAL}", "calls"),
    "F49": Cell(SCORER, "the same", f"each applied once; {EQUAL}", "calls"),
    "F50": Cell(DRIVER, "the same, of its calls to the cluster's head", f"each applied once; {EQUAL}", "calls"),
    "F51": Cell(NODE, "a node joins in the middle of a round", "an engine on it takes part", "nodes"),
    "F52": Cell(NODE, "a node is drained", "its engine gets no new work; nothing is lost", "nodes"),
    "F53": Cell(NODE, "no room left for a successor", "a clear end at faults.restart_s", "nodes"),
    "F54": Cell(DRIVER, "a second driver on the same directory", "refused; after a SIGKILL the lock is free", "drivers"),
    "F55": Cell(DRIVER, "SIGTERM", f"ends by itself with code 143; goes on; {EQUAL}", "drivers"),
    "F56": Cell(NODE, "soak: seeded faults, round after round", "I1 to I6; memory and open files do not grow", "monkey"),
}  # fmt: skip


def listed(words: str) -> list[str]:
    """The cells that the command line names, in order.

    Args:
        words: such as ``F1,F7``; all where it is empty.

    Raises:
        ValueError: if one is not in the matrix.
    """
    names = [word.strip() for word in words.split(",") if word.strip()] or list(CELLS)
    unknown = [name for name in names if name not in CELLS]
    if unknown:
        raise ValueError(f"there is no cell {unknown[0]!r}: they are F1 to F{len(CELLS)}")
    return names
