"""What the sandbox world may be told."""

from pydantic import Field

from tokens.section import Section


class WorldConfig(Section):
    """A small world with a known truth. Everything in it follows from these numbers."""

    seed: int = Field(0, ge=0)
    num_texts: int = Field(20_000, ge=100)
    """Texts of the corpus that the SFT policy is trained on."""
    num_prompts: int = Field(2_000, ge=32)
    """Training prompts; validation and test prompts come on top and share no text with them."""
    num_eval_prompts: int = Field(256, ge=8)
    """Validation prompts, and as many test prompts."""
    num_pairs: int = Field(3_000, ge=8)
    """Preference pairs, drawn from the SFT policy."""
    num_validation_pairs: int = Field(500, ge=8)
    """Pairs with the gold label, on validation prompts."""
    flip_rate: float = Field(0.25, ge=0, lt=0.5)
    """Share of the labels that are turned round after the annotator has answered."""
    annotator_beta: float = Field(3.0, gt=0)
    """The annotator prefers a to b with probability sigmoid(beta * (gold(a) - gold(b)))."""
    near_tie_share: float = Field(0.1, ge=0, le=1)
    """Share of pairs whose two responses have almost the same gold reward."""
    near_tie_gap: float = Field(0.2, gt=0)
    """Largest gold difference of a near-tie, in standard deviations."""
    candidate_temperature: float = Field(1.0, gt=0)
    """Temperature at which the SFT policy writes the responses of the pairs."""
    max_response_tokens: int = Field(32, ge=4)
    """Longest response of a pair, in tokens; a response that has not ended by then is cut."""
    held_out_domains: int = Field(2, ge=0, le=6)
    """Domains (of ten) that have prompts but no preference pairs to train on."""
    num_users: int = Field(64, ge=1)
    """Users, each with a taste of their own."""
    user_agreement: float = Field(0.6, ge=0, le=1)
    """Probability that a user likes what the gold reward likes in one matter of taste; 0.5 is most disagreement."""

    @property
    def truth(self) -> str:
        """What users' gold rewards follow from: worlds that share it have the same users, however many."""
        return f"seed {self.seed}, {self.num_prompts} + 2 x {self.num_eval_prompts} prompts, agreement {self.user_agreement:g}"
