"""What a page says of a baseline: whose numbers these are, and what is not theirs."""

from collections.abc import Mapping

JUDGES: Mapping[str, str] = {
    "vanilla_ppo": "which also trained the policy",
    "ensemble_ppo": "which also trained the policy",
    "best_of_n": "which also picked the samples",
    "dpo": "trained on the pairs that the policy was trained on",
}
"""By ``rounds.baseline``: why the reward ensemble is no independent judge."""
SUBJECTS: Mapping[str, str] = {
    "vanilla_ppo": "After {rounds} of vanilla PPO the policy",
    "ensemble_ppo": "After {rounds} of PPO against an ensemble the policy",
    "best_of_n": "The best of {best_of} samples of SFT",
    "dpo": "After DPO the policy",
}
"""By ``rounds.baseline``: who wins and loses."""
WORDS: Mapping[str, str] = {
    "vanilla_ppo": "A baseline, vanilla PPO: one reward model, trained once without MetaRM, in all rounds.",
    "ensemble_ppo": "A baseline, PPO against an ensemble of reward models that are trained once without MetaRM, in all rounds.",
    "best_of_n": "A baseline, best of {best_of}: no policy was trained. KL is log n - (n - 1) / n, an upper bound; perplexity is "
    "that of the picked samples.",
    "dpo": "A baseline, DPO by TRL: the policy was trained on the pairs, and the reward models only judged it.",
}
"""By ``rounds.baseline``: what it is."""


def subject(choices: Mapping[str, str], num_rounds: int) -> str:
    """The subject of the headline.

    Source: the ledger's choices.

    Args:
        choices: of the last round.
        num_rounds: committed.

    Returns:
        Words before "wins".

    Padding contract: there is none.
    """
    rounds = f"{num_rounds} round{'s' if num_rounds > 1 else ''}"
    if "rounds.baseline" not in choices:
        return f"After {rounds} the policy"
    return _filled(SUBJECTS[choices["rounds.baseline"]], choices, rounds)


def description(choices: Mapping[str, str]) -> str | None:
    """What the baseline is.

    Source: the ledger's choices.

    Args:
        choices: of the last round.

    Returns:
        A sentence; None for a run of rounds.

    Padding contract: there is none.
    """
    return _filled(WORDS[choices["rounds.baseline"]], choices, "") if "rounds.baseline" in choices else None


def judges_too(choices: Mapping[str, str]) -> str:
    """Why the reward ensemble is no independent judge.

    Source: the ledger's choices.

    Args:
        choices: of the last round.

    Returns:
        Words after "the reward ensemble".

    Padding contract: there is none.
    """
    return JUDGES[choices["rounds.baseline"]] if "rounds.baseline" in choices else "which also trained the policy"


def _filled(words: str, choices: Mapping[str, str], rounds: str) -> str:
    return words.format(rounds=rounds, best_of=choices["rounds.best_of"] if "rounds.best_of" in choices else "n")
