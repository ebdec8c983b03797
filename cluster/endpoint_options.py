"""How an OpenAI-compatible endpoint is asked."""

from __future__ import annotations

from dataclasses import dataclass

from tokens.errors import UserError


@dataclass(frozen=True)
class EndpointOptions:
    """Of a judge behind an endpoint (``cluster.endpoint_judge``), and the defaults of the options of that name.

    Args:
        concurrency: requests in flight.
        timeout_s: of one request.
        retries: how often one request is tried again after a refused connection, a timeout, status 408, 409, 429 or 5xx. A 429
            that says how long to wait (Retry-After) does not count.
        max_tokens: of one reply.

    Raises:
        UserError: if a number is out of its range.
    """

    concurrency: int = 8
    timeout_s: float = 60.0
    retries: int = 5
    max_tokens: int = 16

    def __post_init__(self) -> None:
        for name, number, least in (
            ("concurrency", self.concurrency, 1),
            ("retries", self.retries, 0),
            ("max-tokens", self.max_tokens, 1),
        ):
            if number < least:
                raise UserError(f"--{name} must be at least {least}, got {number}")
        if not self.timeout_s > 0:
            raise UserError(f"--timeout must be above 0, got {self.timeout_s:g}")
