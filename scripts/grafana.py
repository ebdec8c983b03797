"""Write the Grafana dashboard from the list of panels below, with Grafana's own builders.

    .venv/bin/python -m scripts.grafana

The file is cluster/deploy/grafana/rondo.json. A test holds that this writes it, and asks every query of a real Prometheus.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.common import VizOrientation

OUT = Path(__file__).resolve().parents[1] / "cluster" / "deploy" / "grafana" / "rondo.json"
RUN = '{run=~"$run"}'
OURS = "ray_rondo_"
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
HEIGHT = 7


@dataclass(frozen=True)
class Shown:
    """A panel: what it shows.

    Args:
        title: above it.
        queries: legend and PromQL; ``NAME`` alone stands for the run's series of that name.
        unit: Grafana's name of the unit.
        about: what to look for, shown at the panel's corner.
        kind: lines over time, the last number, or the last value of each series as a bar.
        width: of Grafana's 24 columns; a row's panels fill them.
    """

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    about: str = ""
    kind: str = "lines"
    width: int = 8


def one(title: str, name: str, about: str = "") -> Shown:
    """The last value of one metric, which is named without ``ray_rondo_``."""
    return Shown(title, (("", OURS + name),), "short", about, "number", 3)


def lines(title: str, *names: str, unit: str = "short", about: str = "") -> Shown:
    """Metrics over time, each named without ``ray_rondo_``."""
    return Shown(title, tuple((name, OURS + name) for name in names), unit, about)


def bars(title: str, label: str, expr: str, unit: str, about: str) -> Shown:
    """The last value of each series."""
    return Shown(title, ((label, expr),), unit, about, "bars")


ROWS: dict[str, tuple[Shown, ...]] = {
    "Run": (
        one("Rounds committed", "rounds_committed"),
        one("Rounds asked for", "rounds"),
        one("Round under way", "round", "Counted from 0, as in the run directory."),
        one("Step under way", "step", "Counted from 0."),
        one("Steps per round", "steps_per_round"),
        one("Engines", "pool_engines"),
        one("GPUs held", "gpus"),
        Shown("Failures", (("", f"sum(ray_rondo_role_failures{RUN})"),), kind="number", width=3),
    ),
    "Learning": (
        lines("Score", "policy_score", "policy_gold", about="Gold falls while the score rises: over-optimisation."),
        lines("KL from the reference", "policy_kl", about="Nats per response. A jump is a collapse under way."),
        Shown(
            "Against SFT, by round",
            tuple((f"{name}, round {{{{round}}}}", f"ray_rondo_evaluation_{name}") for name in ("win", "tie", "lose")),
            "percentunit",
            "Held-out prompts, judged at the end of each round; start is the SFT policy itself.",
            "bars",
        ),
        lines("Reward", "policy_reward", about="Stays near 0 by construction: scores are normalised by their history."),
        lines("Entropy", "policy_entropy", about="Nats per token. Near 0 the policy says one thing only."),
        lines("Response length", "policy_length", about="Tokens. A slide to the shortest or longest is a reward hack."),
        lines("Step size", "policy_approx_kl", "policy_clip_fraction", about="A clip fraction above 0.3 is too large."),
        lines("Critic", "policy_explained_variance", "policy_value_loss"),
        lines("Shares", "policy_finished", "policy_steps_taken", "policy_score_clipped", unit="percentunit"),
    ),
    "Reward model": (
        lines("Fit", "reward_loss", "reward_accuracy", about="The fit's last step, known when it is over."),
        lines("MetaRM", "reward_j", "reward_alignment_cos", about="The difference loss; the cosine of the two gradients."),
        Shown(
            "Validation",
            (("{{set}}: accuracy", "ray_rondo_validation_accuracy"), ("{{set}}: calibration error", "ray_rondo_validation_ece")),
            "percentunit",
            "With reward.evaluate_every; known when a round's fit is over.",
        ),
    ),
    "Ensemble": (
        lines("Scores", "policy_proxy", "policy_ensemble_mean", about="Of r_k alone, and of all members."),
        lines("Disagreement", "policy_ensemble_std", about="Grows: the policy has left what the members agree on."),
        lines("Spread of the scores", "policy_score_std", about="Near 0 the reward no longer tells responses apart."),
    ),
    "Sampling and sync": (
        lines("Sampling", "sample_tokens_per_second", about="Response tokens per second, all engines together."),
        lines("Seconds per step", "sample_seconds", "sync_seconds", unit="s"),
        lines("Sync", "sync_bytes_per_second", unit="Bps"),
        lines("Staleness", "policy_lag", "policy_swapped", about="At policy.max_lag all the time: more engines."),
        lines(
            "Sampler against learner", "policy_sampler_kl", "policy_sampler_gap", about="Nats. Growth is a sync that was lost."
        ),
        lines("Importance weights", "policy_importance_mean", about="1.00 within a percent."),
    ),
    "Time and GPUs": (
        bars("Seconds by phase", "{{phase}}", f"sum by (phase) (ray_rondo_phase_seconds{RUN})", "s", "The driver's waits."),
        bars(
            "GPU-seconds by phase and round",
            "{{phase}}, round {{round}}",
            f"sum by (phase, round) (ray_rondo_gpu_seconds{RUN})",
            "s",
            "Of the roles that worked, times the GPUs that they hold; 0 on a cluster without GPUs.",
        ),
        bars("Work by role", "{{role}}", f"sum by (role) (ray_rondo_role_seconds{RUN})", "s", "All its processes."),
        lines("GPU-seconds held", "held_gpu_seconds", unit="s", about="What the run costs, whether its GPUs work or wait."),
        Shown(
            "Seconds per PPO step",
            (
                ("mean", f"ray_rondo_step_seconds_sum{RUN} / ray_rondo_step_seconds_count{RUN}"),
                ("95%", f"histogram_quantile(0.95, sum by (le) (ray_rondo_step_seconds_bucket{RUN}))"),
            ),
            "s",
        ),
        lines("Waited for room", "room_wait_seconds", unit="s", about="Until the cluster had what the run asks for."),
    ),
    "Cluster": (
        Shown("CPUs in use", (("{{instance}}", "ray_node_cpu_utilization"),), "percent", "Ray's own: all runs of the cluster."),
        Shown("Memory of nodes", (("{{instance}}", "ray_node_mem_used / ray_node_mem_total"),), "percentunit"),
        Shown("Object store", (("{{instance}}", "ray_object_store_used_memory"),), "bytes", "Where weights and batches pass."),
    ),
}
"""The dashboard: its rows, and in each the panels from left to right."""


def query(legend: str, expr: str, ref: str) -> prometheus.Dataquery:
    """A query of Prometheus."""
    full = f"{expr}{RUN}" if expr.startswith("ray_rondo_") and expr.replace("_", "").isalnum() else expr
    return prometheus.Dataquery().expr(full).legend_format(legend).ref_id(ref).datasource(SOURCE)


def panel(shown: Shown) -> timeseries.Panel | stat.Panel | bargauge.Panel:
    """A panel."""
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    made: timeseries.Panel | stat.Panel | bargauge.Panel
    if shown.kind == "lines":
        made = timeseries.Panel().span_nulls(True).line_width(2)
    elif shown.kind == "number":
        made = stat.Panel().reduce_options(last)
    else:
        made = bargauge.Panel().reduce_options(last).orientation(VizOrientation.HORIZONTAL)
    made = made.title(shown.title).description(shown.about).unit(shown.unit).datasource(SOURCE)
    made = made.span(shown.width).height(4 if shown.kind == "number" else HEIGHT)
    for number, (legend, expr) in enumerate(shown.queries):
        made = made.with_target(query(legend, expr, chr(ord("A") + number)))
    return made


def built() -> dashboard.Dashboard:
    """The dashboard; which Prometheus and which run are chosen above it."""
    source = dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    run = dashboard.QueryVariable("run").label("Run").datasource(SOURCE).query("label_values(ray_rondo_rounds, run)")
    run = run.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).include_all(False).multi(False)
    board = dashboard.Dashboard("Rondo").uid("rondo").tags(["ray", "rlhf"]).editable().refresh("10s").time("now-3h", "now")
    board = (
        board.description("A run of Rondo; docs/dashboard.md says what each metric is.").with_variable(source).with_variable(run)
    )
    for title, row in ROWS.items():
        board = board.with_row(dashboard.Row(title))
        for shown in row:
            board = board.with_panel(panel(shown))
    return board


def as_json() -> str:
    """The dashboard as Grafana reads it; panels are numbered, as its own exports are."""
    board = built().build()
    for number, each in enumerate(board.panels or [], start=1):
        each.id_val = number
    return json.dumps(board, cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(as_json())
    print(OUT)
