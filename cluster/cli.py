"""The command line: run, plan, report. Exit code 0 = done, 1 = a role failed, 2 = the input is wrong."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.load_config import all_keys, load_config
from cluster.signals import terminate
from tokens.errors import UserError

EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    parser = _parser()
    chosen, rest = parser.parse_known_args(arguments)
    signal.signal(signal.SIGTERM, terminate)
    try:
        if chosen.command == "keys":
            return _keys()
        if chosen.command == "report":
            if rest:
                raise UserError(f"report takes a run directory and nothing else, got {' '.join(rest)}")
            return _report(chosen.run_dir)
        if chosen.config.suffix not in (".yaml", ".yml") and any(word.endswith((".yaml", ".yml")) for word in rest):
            raise UserError(f"give CONFIG right after {chosen.command}, and overrides after it; got {chosen.config} as CONFIG")
        config = load_config(chosen.config, rest)
        if chosen.command == "plan":
            from cluster.show_plan import show_plan

            return show_plan(config, chosen)
        from cluster.console import Console
        from cluster.run import run

        run(config, Console())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_INPUT
    except KeyboardInterrupt:
        print("interrupted: committed rounds are intact; the same command continues after the last one", file=sys.stderr)
        return EXIT_INTERRUPTED
    except RuntimeError as error:
        from cluster.waiting import RoleFailed

        if not isinstance(error, RoleFailed):
            raise
        print(f"failed: {error}\nCommitted rounds are intact; the same command continues after the last one.", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _report(run_dir: Path) -> int:
    from evaluation.report import write_report

    print(write_report(run_dir))
    return 0


def _keys() -> int:
    for key, (default, meaning) in all_keys().items():
        print(f"--{key} (default {default})\n    {meaning}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cluster",
        description="Iterated RLHF on Ray: sample, MetaRM, PPO, evaluate, commit, and again.",
        epilog="Any key of a config can be set on the command line: python -m cluster run configs/quickstart.yaml "
        "--policy.kl.coef 0.1 --rounds.num_rounds 5. `python -m cluster keys` lists them all.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run the rounds of a config; the same command again continues", epilog=parser.epilog)
    run.add_argument("config", type=Path, metavar="CONFIG", help="a YAML recipe, e.g. configs/quickstart.yaml")
    plan = commands.add_parser("plan", help="say what would run where, and start nothing", epilog=parser.epilog)
    plan.add_argument("config", type=Path, metavar="CONFIG", help="a YAML recipe, e.g. configs/hh_7b.yaml")
    plan.add_argument("--nodes", type=int, default=1, help="machines of the cluster (default 1)")
    plan.add_argument("--node-cpus", type=float, default=None, help="CPUs of each (default: this machine's)")
    plan.add_argument("--node-gpus", type=float, default=None, help="GPUs of each (default: this machine's)")
    plan.add_argument("--node-memory-gib", type=float, default=None, help="memory of each (default: this machine's)")
    plan.add_argument("--gpu-memory-gib", type=float, default=80.0, help="memory of one GPU (default 80)")
    report = commands.add_parser("report", help="write report.html again from a run directory")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="e.g. ~/rondo/runs/quickstart")
    commands.add_parser("keys", help="list every config key with its default and meaning")
    return parser
