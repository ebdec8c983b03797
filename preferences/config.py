"""Where the preference pairs come from."""

from pydantic import Field

from tokens.section import Section


class DataConfig(Section):
    """The preference data D, in one of TRL's formats or as HH-RLHF transcripts."""

    preferences: str = "sandbox"
    """``sandbox``, a .jsonl or .parquet file, a directory of them or of ``save_to_disk``, or a Hugging Face data set name."""
    split: str = "train"
    """Split to read where the source has several."""
    validation_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the prompts (never of the pairs) held out to measure the reward model and the policy."""
    max_pairs: int | None = Field(None, ge=2)
    """Read at most this many pairs."""
    max_prompt_tokens: int = Field(64, ge=1)
    """A longer prompt is an error, or is left out and listed: see ``drop_bad``."""
    max_response_tokens: int = Field(64, ge=1)
    """A longer chosen or rejected response is treated likewise."""
    drop_bad: bool = False
    """Leave out rows that cannot be used (too long, empty, chosen equal to rejected ...) and list them, instead of stopping."""
    allow_hub: bool = False
    """Let names that are not local paths be fetched from the Hugging Face hub."""
