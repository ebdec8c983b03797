"""Where the preference pairs come from, what is done to those that look wrong, and who labels new ones."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from tokens.paths import PathText, check_path
from tokens.section import Section

DenoiseMethod = Literal["none", "flip", "soft", "margin", "flip+margin", "soft+margin", "drop"]
Carry = Literal["all", "sample", "latest"]


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


class FreshConfig(Section):
    """Fresh labels: in every round, pairs of the current policy's own samples that somebody compares. docs/fresh.md."""

    num_pairs: int = Field(0, ge=0)
    """Pairs of S_k's samples that are labelled each round, for r_k to learn from; 0 = none."""
    judge: str | None = Field(None, pattern=r"^(gold|annotators|(reward|ensemble|openai):.+)$")
    """Who labels them: reward:DIR, ensemble:DIR or openai:BASE_URL#MODEL; in the sandbox also annotators, who err as those of D
    do, and gold, which does not."""
    carry: Carry = "all"
    """What r_k learns from. all: D and the fresh pairs of every round so far. sample: as many pairs of these as D has, drawn anew
    each round. latest: the round's own fresh pairs alone."""
    concurrency: int = Field(8, ge=1)
    """Requests to an endpoint in flight."""
    timeout_s: float = Field(60.0, gt=0)
    """How long one request may take."""
    retries: int = Field(5, ge=0)
    """How often one request is tried again after a refused connection, a timeout, status 408, 409, 429 or 5xx."""
    max_tokens: int = Field(16, ge=1)
    """Longest reply of an endpoint."""

    @field_validator("judge")
    @classmethod
    def _named_by_paths_and_urls(cls, judge: str | None) -> str | None:
        kind, _, place = (judge or "").partition(":")
        for part in place.split(",") if kind in ("reward", "ensemble", "openai") else ():
            check_path(part)
        return judge

    @model_validator(mode="after")
    def _somebody_labels(self) -> "FreshConfig":
        if (self.num_pairs > 0) != (self.judge is not None):
            raise ValueError(
                f"num_pairs is {self.num_pairs} and judge {self.judge}: fresh pairs need somebody who labels them; set both, or "
                "num_pairs to 0 and judge to null"
            )
        if not self.num_pairs and self.carry != "all":
            raise ValueError(
                f"carry is {self.carry} and num_pairs 0: there are no fresh pairs to carry; set num_pairs, or carry to all"
            )
        return self
