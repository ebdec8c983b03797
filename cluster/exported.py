"""Every metric that a run exports, by name: the registry makes them, docs/dashboard.md lists them, Grafana's panels show them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PREFIX = "rondo_"


@dataclass(frozen=True)
class Exported:
    """One metric.

    Args:
        name: as Ray is given it; Prometheus sees ``ray_`` before it, and ``_total`` behind a counter.
        description: one line; Prometheus's HELP, and the row in docs/dashboard.md.
        tags: its labels besides ``run``.
        kind: Prometheus's type. Ray exports no counter before its first increment: what may stay 0 is a gauge.
        boundaries: upper edges of a histogram's buckets.
    """

    name: str
    description: str
    tags: tuple[str, ...] = ()
    kind: Literal["gauge", "counter", "histogram"] = "gauge"
    boundaries: tuple[float, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """The names that Prometheus knows it by."""
        if self.kind == "histogram":
            return tuple(f"ray_{self.name}{part}" for part in ("_bucket", "_sum", "_count"))
        return (f"ray_{self.name}_total",) if self.kind == "counter" else (f"ray_{self.name}",)


def _of_rows(phase: str, descriptions: Mapping[str, str], tags: tuple[str, ...] = ()) -> tuple[Exported, ...]:
    return tuple(Exported(f"{PREFIX}{phase}_{name}".lower(), text, tags) for name, text in descriptions.items())


POLICY = _of_rows(
    "policy",
    {
        "score": "mean score of the rollouts, the scorer's units",
        "score_std": "standard deviation of those scores",
        "score_clipped": "share of normalised scores at the clip",
        "reward": "mean summed token reward: shaped score minus coefficient times KL",
        "kl": "mean summed log pi - log ref of a response, nats",
        "kl_coef": "coefficient of the KL in this update",
        "loss": "clipped surrogate, mean over minibatches",
        "value_loss": "the critic's error, mean over minibatches",
        "explained_variance": "of the returns by the critic, before the update",
        "clip_fraction": "share of tokens whose gradient a ratio clip removed",
        "value_clip_fraction": "share of tokens at which the clipped value gave the larger error",
        "approx_kl": "KL of the old to the new policy per token, nats",
        "ratio_max": "largest probability ratio new / old of a token",
        "entropy": "mean -log pi of the sampled tokens, nats",
        "exact_entropy": "entropy over the whole vocabulary, nats; with policy.entropy_coef",
        "ptx_loss": "language-modelling loss on the supervised texts, nats per token; with policy.ptx_coef",
        "update_kl": "KL of the policy before the update to that after it, per token, nats; on some of the rollouts",
        "scores_dropped": "scores of single members that were not finite and did not count",
        "length": "mean response tokens",
        "finished": "share of responses that ended by themselves",
        "sampler_gap": "largest difference of sampler's and learner's log-prob of a token, nats",
        "sampler_kl": "KL of the sampler to the learner per token, nats",
        "importance_mean": "mean importance weight of the tokens",
        "importance_capped": "share of tokens at policy.importance_cap",
        "steps_taken": "share of the update's optimizer steps that were taken",
        "grad_norm": "gradient norm of the policy before clipping",
        "critic_grad_norm": "gradient norm of the critic before clipping",
        "proxy": "mean score of r_k, the round's own reward model",
        "ensemble_mean": "mean score of all members of the reward ensemble",
        "ensemble_std": "disagreement: spread of the members' scores",
        "gold": "mean gold reward; in the sandbox",
        "lag": "staleness: mean age of the tokens, in updates",
        "swapped": "share of rollouts that got new weights while they were sampled",
        "tokens": "response tokens of the update's batch",
    },
)
"""One PPO update."""

SAMPLING = _of_rows(
    "sample",
    {
        "seconds": "from the first engine's start on a batch to the last one's end",
        "tokens_per_second": "response tokens of a batch by those seconds, all engines together",
    },
) + _of_rows(
    "sync",
    {
        "seconds": "to bring an update's weights to all engines",
        "bytes": "of the weights as they travelled to each engine",
        "bytes_per_second": "those bytes by those seconds",
    },
)
"""Engines, and the weights that they are given."""

POOL = _of_rows(
    "pool",
    {
        "engines": "rollout engines that serve",
        "wanted": "engines that an elastic pool wants to have now",
        "took_part": "engines that had a part in an elastic pool's last batch",
        "redone": "pieces of that batch that were done again, since their engine was lost",
    },
)
"""The rollout pool; all but the first with rollout.max_engines."""

FAULTS = _of_rows(
    "faults",
    {
        "losses": "processes that were lost since the driver started",
        "detection_seconds": "from the last sign of life of the process that was lost last to when its loss was noticed",
        "recovery_seconds": "from then until another one in its place held all that it must",
        "start_seconds": "of these, until its process was up",
        "stale_replies": "answers that came too late, of calls that were given up, and were refused",
    },
)
"""What is lost and made good."""

REWARD = (
    _of_rows(
        "reward",
        {
            "loss": "loss that is descended, nats per pair; last step of the fit",
            "accuracy": "share of the step's pairs ranked as labelled",
            "lr": "learning rate",
            "gradient_norm": "gradient norm before clipping",
            "skipped": "steps of the fit that were left out: their loss or gradient was not finite",
            "J": "MetaRM's difference loss at theta",
            "J_ascended": "the same at theta'",
            "J_heldout": "the same at theta, on prompts that no ascent sees",
            "J_heldout_ascended": "the same at theta', on prompts that no ascent sees",
            "spread_heldout": "spread of scores within a prompt over their spread overall, at theta",
            "spread_heldout_ascended": "the same at theta'",
            "J_gradient_norm": "norm of the gradient of J",
            "displacement": "norm of theta' - theta",
            "relative_displacement": "the same over the norm of theta",
            "alignment_cos": "cosine of the loss's descent and J's ascent",
            "duplicates": "responses of the step that repeat another of their prompt",
            "preference_loss": "the preference term, with reward.contrastive",
            "contrastive": "the contrastive term",
            "view_cos": "mean cosine of the two dropout views",
            "prototypes_effective": "SwAV: prototypes that tell the batch's rows apart",
            "prototypes_used": "SwAV: share of prototypes that are nearest to a row",
        },
    )
    + _of_rows(
        "validation",
        {
            "accuracy": "share of a validation set's pairs ranked as labelled",
            "loss": "Bradley-Terry loss on a validation set, nats per pair",
            "ece": "expected calibration error on a validation set",
        },
        ("set",),
    )
    + _of_rows(
        "scores",
        {
            "chosen_mean": "mean score of the chosen responses of the validation set",
            "rejected_mean": "mean score of the rejected ones",
            "std": "standard deviation of both",
        },
    )
)
"""The fit of a round's reward model: known when it is over."""

GUARD = _of_rows(
    "guard",
    {
        "left_out": "PPO steps of the round that were left out: a number was wrong before anything had changed",
        "undone": "PPO steps of the round that were undone: a number was wrong after weights had moved",
        "refitted": "PPO steps of the round before which engines that disagreed with the learner got the weights again",
    },
)
"""Numbers that went wrong; known when one has."""

DPO = _of_rows(
    "dpo",
    {
        "loss": "DPO's loss",
        "accuracy": "share of pairs whose chosen response gained more",
        "margin": "mean difference of their gains",
    },
)
"""The baseline ``dpo``: known when it is over."""

MONITOR = _of_rows(
    "monitor",
    {
        "repetition": "share of a response's word trigrams that stand in it before, mean",
        "self_bleu": "BLEU of responses with all others as references, mean; 1 = all say the same",
        "truncated": "share of responses that were cut by the token limit",
        "length_correlation": "correlation of length and r_k's score",
        "repetition_correlation": "correlation of repetition and r_k's score",
        "reward_accuracy": "share of fresh pairs that r_k ranks as the truth does, of one prompt; in the sandbox",
        "held_out": "mean score of the held-out members",
        "held_out_std": "the held-out members' disagreement",
        "perplexity": "of the responses under the KL's reference",
        "distance": "square root of the KL from the reference",
    },
)
"""Signs of over-optimisation in a step's rollouts, every evaluation.every_steps steps."""

EVALUATION = _of_rows(
    "evaluation",
    {
        "proxy": "mean score of r_k on the held-out prompts' responses",
        "ensemble_mean": "mean score of all members there",
        "ensemble_std": "the members' disagreement there",
        "sft_ensemble_std": "the same members' disagreement on SFT's responses",
        "gold": "mean gold reward there; in the sandbox",
        "held_out": "mean score of the held-out members there; they judge and pay nobody",
        "held_out_std": "the held-out members' disagreement there",
        "kl": "mean log pi - log SFT of a response there, nats",
        "perplexity": "of the responses under SFT",
        "length": "mean response tokens there",
        "finished": "share of responses that ended by themselves there",
        "repetition": "share of a response's word trigrams that stand in it before, mean there",
        "self_bleu": "BLEU of responses with all others as references, mean there; 1 = all say the same",
        "truncated": "share of responses that were cut by the token limit there",
        "length_correlation": "correlation of length and r_k's score there",
        "repetition_correlation": "correlation of repetition and r_k's score there",
        "reward_accuracy": "share of fresh pairs that r_k ranks as the truth does, of its response and SFT's; in the sandbox",
        "fresh_accuracy": "share of freshly labelled pairs that the last round's reward model ranks so; with fresh.num_pairs",
        "fresh_labelled": "how many of them there are",
        "win": "share of held-out prompts on which the policy beats SFT",
        "tie": "share on which neither does",
        "lose": "share on which SFT beats it",
        "margin": "win - lose",
        "margin_low": "lower end of the margin's 95% interval",
        "margin_high": "upper end of it",
        "alarms": "alarms of over-optimisation at the round's end",
        "best_round": "the best round by then; -1 = SFT, which none beats",
        "best_gain": "the best round's mean judgement less SFT's, units of the judge",
    },
    ("round",),
)
"""A round's judgement."""

RUN = (
    Exported("rondo_round", "round under way, counted from 0"),
    Exported("rondo_step", "PPO step under way, counted from 0"),
    Exported("rondo_rounds", "rounds that the config asks for"),
    Exported("rondo_rounds_committed", "rounds that are committed"),
    Exported("rondo_steps_per_round", "PPO steps of a round"),
    Exported("rondo_pairs", "preference pairs that reward models learn from"),
    Exported("rondo_role_failures", "failures of a role's processes since the driver started", ("role",)),
    Exported("rondo_room_wait_seconds", "that the run waited for room on the cluster"),
    Exported("rondo_gpus", "GPUs that the run holds"),
    Exported("rondo_held_gpu_seconds", "GPUs that the run holds, times how long it has held them"),
    Exported("rondo_phase_seconds", "that the driver waited in a phase of a round", ("round", "phase")),
    Exported("rondo_role_seconds", "that a role's processes worked in a phase of a round, added up", ("round", "phase", "role")),
    Exported("rondo_gpu_seconds", "the same times the GPUs of a process", ("round", "phase", "role")),
    Exported("rondo_updates", "PPO updates of the policy", (), "counter"),
    Exported("rondo_rollouts", "rollouts that the policy learned from", (), "counter"),
    Exported("rondo_rollout_tokens", "response tokens that the policy learned from", (), "counter"),
    Exported(
        "rondo_step_seconds", "from one PPO update to the next", (), "histogram", (1, 3, 10, 30, 60, 120, 300, 600, 1200, 3600)
    ),
)
"""The run itself."""

EXPORTED = POLICY + SAMPLING + POOL + FAULTS + REWARD + GUARD + DPO + MONITOR + EVALUATION + RUN


def exported_as(key: str) -> tuple[str, dict[str, str]]:
    """How a key of metrics.jsonl is exported: name and tags.

    Args:
        key: e.g. ``policy/kl``, or ``validation/original/loss``, whose middle is a tag.
    """
    first, *middle, last = key.split("/")
    return f"{PREFIX}{first}_{last}".lower(), {"set": "/".join(middle)} if middle else {}
