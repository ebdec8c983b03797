"""One seed makes many: each purpose has a generator of its own."""

import hashlib


def derive(seed: int, *names: object) -> int:
    """A seed for one purpose.

    Args:
        seed: of the run.
        names: what it is for.

    Returns:
        31 bits.
    """
    text = "/".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
