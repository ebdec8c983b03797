"""What every entry of a ledger holds of its judgement."""

from typing import Any

JUDGED: dict[str, Any] = {"evaluation": {"judge": "gold", "gold": 0.0}}
"""No better than SFT."""
