"""A Ray cluster on this machine that ends with the command."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import ray

from tokens.errors import UserError

ATTEMPTS = 3
"""Ray gives its own processes half a minute each time."""
LATE = "timed out during startup"
"""What Ray says, as a plain ``Exception``, of processes that were not there in that time."""


def start_local_ray(say: Callable[[str], None]) -> None:
    """Start Ray's processes; on a machine that is too busy to start them in time, try again.

    Args:
        say: prints a line.

    Raises:
        UserError: if they are not there after ``ATTEMPTS`` attempts.
    """
    # Idle workers that nobody would take: every role has an environment of its own.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            return
        except Exception as error:
            if LATE not in str(error):
                raise
            ray.shutdown()
            busy = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
            if attempt == ATTEMPTS:
                raise UserError(
                    f"Ray's processes did not start within half a minute, {ATTEMPTS} times ({busy}): wait until the machine is "
                    "less busy and give the same command again, or start Ray before (`ray start --head`) and set RAY_ADDRESS=auto"
                ) from error
            say(f"[yellow]note[/] Ray's processes did not start within half a minute ({busy}): trying again")
