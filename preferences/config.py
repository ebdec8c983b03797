"""Where the preference pairs come from, and what is done to those that look wrong."""

from typing import Literal

from pydantic import Field, model_validator

from tokens.paths import PathText
from tokens.section import Section

DenoiseMethod = Literal["none", "flip", "soft", "margin", "flip+margin", "soft+margin", "drop"]


class DenoiseConfig(Section):
    """What to do with pairs whose preference strength says that their label is wrong (Secrets of RLHF II, section 2.4)."""

    method: DenoiseMethod = "none"
    """flip swaps chosen and rejected; soft smooths the label; margin trains on -log sigma(difference - strength); drop leaves the
    pair out."""
    strength: PathText | None = None
    """Strengths that `strength` wrote (a directory or Parquet files), or a data set with the public columns; null = those of
    STORAGE/strengths/NAME, made first where they are missing."""
    noisy: Literal["auto", "lowest", "negative"] = "auto"
    """Which pairs count as noisy: the ``fraction`` of lowest strength, or strength below 0; auto = lowest for flip and drop,
    negative for soft, as in the paper."""
    fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the pairs that ``lowest`` means."""
    smoothing: float = Field(0.1, gt=0, lt=1)
    """alpha of label smoothing."""
    margin_scale: Literal["none", "std"] = "none"
    """std divides margins by the standard deviation over the data set of the strengths, so that they do not depend on the
    ensemble's unit."""
    margin_clip: float | None = Field(None, gt=0)
    """Margins beyond this (either sign) are cut to it; null = none."""


class DataConfig(Section):
    """The preference data D, in one of TRL's formats or as HH-RLHF transcripts."""

    preferences: PathText = "sandbox"
    """``sandbox``, a .jsonl or .parquet file, a directory of them or of ``save_to_disk``, or a Hugging Face data set name."""
    split: str = "train"
    """Split to read where the source has several."""
    validation_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the prompts (never of the pairs) held out to measure the reward model and the policy. With ``validation`` the
    share of ``policy.prompts`` only."""
    validation: PathText | None = None
    """A preference data set of its own to hold out (as ``preferences``; not with the sandbox), e.g. a clean one; null = the
    ``validation_fraction``."""
    validation_split: str = "test"
    """Split of ``validation`` to read where it has several."""
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
    denoise: DenoiseConfig = DenoiseConfig()

    @model_validator(mode="after")
    def _validation_is_another_set(self) -> "DataConfig":
        if self.validation is None:
            return self
        if self.preferences == "sandbox":
            raise ValueError(
                f"validation is {self.validation!r} and preferences sandbox, which has validation pairs of its own: set "
                "validation to null"
            )
        if (self.validation, self.validation_split) == (self.preferences, self.split):
            raise ValueError(
                f"validation and preferences are both {self.preferences!r}, split {self.split!r}: nothing would be held out. "
                "Name another data set or another validation_split, or set validation to null"
            )
        return self
