"""What is run for the paper's tables: arms, each a set of keys on configs/reproduce.yaml, and the items that compare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Prompts = Literal["train", "held_out"]
SEEDS, ABLATION_SEEDS, ENSEMBLE_SEEDS = (1, 2, 3, 4, 5), (1, 2, 3), (6, 7, 8, 9, 10)
"""No setting was chosen on them: that of the ensembles was, on seeds 1 to 3 and on those of benchmarks.experiments.over."""
VANILLA = ("--rounds.baseline", "vanilla_ppo")
SHORT = ("--rounds.num_rounds", "3")
NO_KL = (*VANILLA, *SHORT, "--policy.kl.coef", "0")
TOO_FAR = (
    "--rounds.num_rounds", "6", "--policy.steps_per_round", "3", "--policy.kl.coef", "0",
    "--policy.lr", "1e-3", "--policy.missing_eos_penalty", "0",
)  # fmt: skip
"""As configs/over.yaml: a single reward model is over-optimised within a few steps, and rounds are short enough to see when."""
NEW = ("--policy.prompts", "sandbox:held_out", "--evaluation.num_prompts", "48")
ONE_ROUND = ("--rounds.num_rounds", "1")
OTHER_COEFS = ("0.03", "0.3")
"""KL coefficients beside the recipe's 0.1, that a tuned arm chooses among."""


@dataclass(frozen=True)
class Arm:
    """One way to train a policy.

    Args:
        keys: on the command line, after the config.
        seeds: whole runs.
        prompts: domains of the test prompts that it is judged on.
        elsewhere: judged on the other domains' test prompts too.
    """

    keys: tuple[str, ...]
    seeds: tuple[int, ...] = SEEDS
    prompts: Prompts = "train"
    elsewhere: bool = False


def _ablation(*keys: str) -> Arm:
    return Arm(keys, ABLATION_SEEDS)


def _ensemble(aggregate: str, flips: str) -> Arm:
    kind = "vanilla_ppo" if aggregate == "primary" else "ensemble_ppo"
    members = "1" if aggregate == "primary" else "4"
    ensemble = ("--rounds.baseline", kind, "--scorer.aggregate", aggregate, "--scorer.num_members", members)
    return Arm((*ensemble, *TOO_FAR, "--world.flip_rate", flips), ENSEMBLE_SEEDS)


AGAIN = "the same again"
"""The recipe a second time, by the code that the other ablations were run by: what differs from the first is luck, or code."""
RESTARTED = "policy starts from SFT, 60 steps a round"
"""With as many steps in its last round as the policy that goes on has in five."""
AGGREGATES: Mapping[str, str] = {"single": "primary", "mean": "mean", "worst case": "worst", "mean - std": "mean_minus_std"}
ARMS: Mapping[str, Arm] = {
    "iterated": Arm((), elsewhere=True),
    "M = 1": Arm(("--scorer.num_members", "1", "--scorer.aggregate", "primary"), elsewhere=True),
    "vanilla PPO": Arm(VANILLA, elsewhere=True),
    **{
        f"{name}, KL {coef}": Arm((*keys, "--policy.kl.coef", coef), elsewhere=True)
        for coef in OTHER_COEFS
        for name, keys in (("iterated", ()), ("vanilla PPO", VANILLA))
    },
    **{
        f"DPO, lr {rate}": Arm(("--rounds.baseline", "dpo", "--dpo.lr", rate, *ONE_ROUND), elsewhere=True)
        for rate in ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2")
    },
    "best of 16": Arm(("--rounds.baseline", "best_of_n", "--rounds.best_of", "16", *ONE_ROUND), elsewhere=True),
    "new domain, S_k from it": Arm((*NEW, *SHORT, "--meta.prompts", "sandbox:held_out"), prompts="held_out"),
    "new domain, S_k from the old ones": Arm((*NEW, *SHORT), prompts="held_out"),
    "new domain, vanilla PPO": Arm((*NEW, *SHORT, *VANILLA), prompts="held_out"),
    "no KL": Arm(NO_KL),
    "no KL, margin": Arm((*NO_KL, "--data.denoise.method", "margin")),
    "no KL, flip": Arm((*NO_KL, "--data.denoise.method", "flip")),
    "no KL, soft+margin": Arm((*NO_KL, "--data.denoise.method", "soft+margin")),
    "no KL, SimCSE": Arm((*NO_KL, "--reward.contrastive.method", "simcse")),
    "no KL, SwAV": Arm((*NO_KL, "--reward.contrastive.method", "swav")),
    **{
        f"{name}, {float(flips):.0%} flips": _ensemble(aggregate, flips)
        for flips in ("0.0", "0.25")
        for name, aggregate in AGGREGATES.items()
    },
    AGAIN: _ablation(),
    "eta 0 (MetaRM off)": _ablation("--meta.enabled", "false"),
    "eta 0.02": _ablation("--meta.eta", "0.02"),
    "eta 0.5": _ablation("--meta.eta", "0.5"),
    "k = 2": _ablation("--meta.samples_per_prompt", "2"),
    "k = 8": _ablation("--meta.samples_per_prompt", "8"),
    "RM goes on from the last": _ablation("--reward.start", "previous"),
    "policy starts from SFT": _ablation("--policy.start", "sft"),
    RESTARTED: _ablation("--policy.start", "sft", "--policy.steps_per_round", "60"),
    "reference is the last policy": _ablation("--policy.reference", "previous"),
    "all members retrained": _ablation("--scorer.refresh", "each_round"),
    "M = 6": _ablation("--scorer.num_members", "6"),
    **{
        f"fresh labels, {carry}": _ablation("--fresh.num_pairs", "192", "--fresh.judge", "annotators", "--fresh.carry", carry)
        for carry in ("all", "sample", "latest")
    },
    "6 PPO steps a round": _ablation("--policy.steps_per_round", "6"),
    "24 PPO steps a round": _ablation("--policy.steps_per_round", "24"),
}


CHOSEN: Mapping[str, tuple[str, ...]] = {
    "DPO": tuple(name for name in ARMS if name.startswith("DPO")),
    **{f"{name}, tuned": (name, *(f"{name}, KL {coef}" for coef in OTHER_COEFS)) for name in ("iterated", "vanilla PPO")},
}
"""Arms of which validation prompts choose one for each seed: by the KL coefficient; of DPO, which has one round, by the learning
rate."""


@dataclass(frozen=True)
class Item:
    """A table of the paper.

    Args:
        number: of the item.
        title: of the table.
        source: where it stands.
        base: arm that the others are compared with; None = rounds against SFT.
        arms: of the table, the base among them; a name of ``CHOSEN`` stands for all of its arms.
        elsewhere: told of the other domains' test prompts.
    """

    number: int
    title: str
    source: str
    base: str | None
    arms: tuple[str, ...]
    elsewhere: bool = False


def run_for(item: Item) -> list[str]:
    """The arms that are run for an item."""
    return [arm for name in item.arms for arm in (CHOSEN[name] if name in CHOSEN else (name,))]


_ABLATIONS = tuple(list(ARMS)[list(ARMS).index(AGAIN) :])
_WAYS = ("iterated", "M = 1", "vanilla PPO", "iterated, tuned", "vanilla PPO, tuned", "DPO", "best of 16")
ITEMS: Sequence[Item] = (
    Item(1, "Rounds against SFT", "Secrets of RLHF II, Table 2", None, ("iterated",)),
    Item(2, "The best round against other ways", "Secrets of RLHF II, Table 3; DPO: MetaRM; best of 16: ours",
         "vanilla PPO", _WAYS),
    Item(3, "In domains without preferences", "Secrets of RLHF II, Fig. 15; DPO and best of 16: ours",
         "vanilla PPO", _WAYS, True),
    Item(3, "Trained for such a domain", "Secrets of RLHF II, Fig. 15", "new domain, vanilla PPO",
         tuple(name for name in ARMS if name.startswith("new domain"))),
    Item(4, "PPO without a KL penalty", "Secrets of RLHF II, Fig. 9 and 10", "no KL",
         ("no KL", "no KL, margin", "no KL, flip", "no KL, soft+margin")),
    Item(5, "Contrastive reward models in PPO", "Secrets of RLHF II, Fig. 12 and 13", "no KL",
         ("no KL", "no KL, SimCSE", "no KL, SwAV")),
    Item(6, "Ensembles, clean labels", "Coste et al. 2023", "single, 0% flips",
         tuple(f"{name}, 0% flips" for name in AGGREGATES)),
    Item(6, "Ensembles, 25% flips", "Coste et al. 2023", "single, 25% flips",
         tuple(f"{name}, 25% flips" for name in AGGREGATES)),
    Item(7, "One factor at a time", "ablations; Wolf et al. 2025 on restarting", AGAIN, ("iterated", "M = 1", *_ABLATIONS)),
)  # fmt: skip
