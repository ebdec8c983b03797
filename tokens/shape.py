"""The sizes of a Llama-shaped model: what one is made with, and what is counted while its directory is not there."""

from pydantic import Field, model_validator

from tokens.section import Section


class ModelShape(Section):
    """A Llama-shaped model, described by its sizes."""

    vocab_size: int = Field(512, ge=16)
    """Entries of the tokenizer; where the tokenizer is given, its own size is used."""
    hidden_size: int = Field(128, ge=16)
    intermediate_size: int = Field(384, ge=16)
    num_layers: int = Field(5, ge=1)
    num_heads: int = Field(4, ge=1)
    num_kv_heads: int | None = Field(None, ge=1)
    """Heads of keys and values, each shared by equally many heads (grouped-query attention); null = one for each head."""
    context_length: int = Field(128, ge=8)
    """Longest prompt + response, in tokens."""

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelShape":
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 16:
            raise ValueError(
                f"hidden_size / num_heads must be a multiple of 16 (vLLM's attention), got {self.hidden_size} / {self.num_heads}"
            )
        if self.num_heads % self.key_value_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.key_value_heads}: every head of "
                "keys and values serves equally many"
            )
        return self
