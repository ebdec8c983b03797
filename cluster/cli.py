"""The command line. Exit code 0 = done, 1 = a role failed, 2 = the input is wrong, 3 = too many numbers went wrong, 130 and 143 =
stopped: docs/jobs.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.config import RunConfig
from cluster.endpoint_options import EndpointOptions
from cluster.load_config import all_keys, load_config
from cluster.signals import EXIT_INTERRUPTED, Stopped, exit_code, listen, stop_asked
from tokens.errors import UserError
from tokens.paths import check_path, printable

EXIT_FAILED, EXIT_INPUT, EXIT_NUMBERS = 1, 2, 3
CUT_SHORT = "what was committed is intact; the same command continues after it"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    parser = _parser()
    chosen, rest = parser.parse_known_args(arguments)
    listen()
    try:
        for given in vars(chosen).values():
            for path in given if isinstance(given, list) else [given]:
                if isinstance(path, Path):
                    check_path(str(path))
        if chosen.command == "keys":
            return _keys()
        if chosen.command in WITHOUT_CONFIG:
            if rest:
                raise UserError(f"{chosen.command} takes no config keys, got {' '.join(rest)}")
            return WITHOUT_CONFIG[chosen.command](chosen)
        if chosen.config.suffix not in (".yaml", ".yml") and any(word.endswith((".yaml", ".yml")) for word in rest):
            raise UserError(f"give CONFIG right after {chosen.command}, and overrides after it; got {chosen.config} as CONFIG")
        return _with_config(chosen, load_config(chosen.config, rest))
    except Stopped as error:
        print(f"stopped: {error.words}", file=sys.stderr)
        return exit_code()
    except SystemExit:
        if not stop_asked():
            raise
        print(f"stopped: {CUT_SHORT}", file=sys.stderr)
        return exit_code()  # whatever code Ray gave it on the way
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return EXIT_INPUT
    except KeyboardInterrupt:
        print(f"interrupted: {CUT_SHORT}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except RuntimeError as error:
        from cluster.failures import BadNumbers, RoleFailed

        if not isinstance(error, RoleFailed):
            raise
        words = f"{error.shown()}failed: {error}\n{CUT_SHORT.capitalize()}."
        print("\n".join(printable(line) for line in words.split("\n")), file=sys.stderr)
        return EXIT_NUMBERS if isinstance(error, BadNumbers) else EXIT_FAILED


def _with_config(chosen: argparse.Namespace, config: RunConfig) -> int:
    """The commands that take a recipe."""
    if chosen.command == "plan":
        from cluster.show_plan import show_plan

        return show_plan(config, chosen)
    from cluster.console import Console

    console = Console()
    if chosen.command == "run":
        from cluster.run import run

        run(config, console)
        return 0
    from cluster.storage import refuse_store

    refuse_store(config, chosen.command)
    if chosen.command == "sft":
        from cluster.sft import sft

        sft(config, console)
        return 0
    from evaluation.preference_report import write_preference_report

    if chosen.command == "strength":
        from cluster.strength import strength

        directory = strength(config, console)
    elif chosen.command == "reward":
        from cluster.reward import reward

        directory = reward(config, console)
    elif chosen.command == "features":
        from cluster.features import features
        from evaluation.feature_report import write_feature_report

        console.say(f"Report: {write_feature_report(features(config, console))}")
        return 0
    elif chosen.command == "customize":
        from cluster.customize import customize

        console.say(f"Report: {_report_of_domains(customize(config, console))}")
        return 0
    elif chosen.command == "generalize":
        from cluster.generalize import generalize
        from evaluation.generalize_report import write_generalize_report

        console.say(f"Report: {write_generalize_report(generalize(config, console))}")
        return 0
    else:
        from cluster.study import study

        directory = study(config, chosen.studies, chosen.seeds, console)
    console.say(f"Report: {write_preference_report(directory)}")
    return 0


def _report(chosen: argparse.Namespace) -> int:
    from cluster.reporting import report

    print(report(chosen.directories, chosen.out))
    return 0


def _report_of_domains(directory: Path) -> Path:
    from evaluation.domain_report import write_domain_report

    return write_domain_report(directory)


def _relabel(chosen: argparse.Namespace) -> int:
    from cluster.console import Console
    from cluster.relabel import relabel

    relabel(
        chosen.pairs,
        chosen.judge,
        chosen.out,
        Console(),
        split=chosen.split,
        limit=chosen.limit,
        allow_hub=chosen.allow_hub,
        options=_endpoint_options(chosen),
    )
    return 0


def _adapt(chosen: argparse.Namespace) -> int:
    from cluster.adapt import adapt
    from cluster.console import Console

    adapt(chosen.model, chosen.answers, Console(), chosen.name, chosen.towards, chosen.l2, chosen.out)
    return 0


def _ask(chosen: argparse.Namespace) -> int:
    from cluster.ask import Asking, ask
    from cluster.console import Console

    asking = Asking(
        chosen.model, chosen.name, chosen.by, chosen.pairs, chosen.answers, chosen.towards, chosen.l2, chosen.seed, chosen.out
    )
    ask(asking, chosen.terminal, chosen.port, Console())
    return 0


def _evaluate(chosen: argparse.Namespace) -> int:
    from cluster.console import Console
    from cluster.evaluate import Evaluating, evaluate

    asked = Evaluating(
        chosen.a,
        chosen.b,
        tuple(chosen.judge),
        chosen.prompts,
        chosen.split,
        chosen.num_prompts,
        chosen.out,
        chosen.seed,
        chosen.temperature,
        chosen.max_new_tokens,
        chosen.tie,
        chosen.allow_hub,
        _endpoint_options(chosen),
    )
    evaluate(asked, Console())
    return 0


WITHOUT_CONFIG: dict[str, Callable[[argparse.Namespace], int]] = {
    "report": _report,
    "relabel": _relabel,
    "evaluate": _evaluate,
    "adapt": _adapt,
    "ask": _ask,
}
"""Commands that take no recipe."""


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

    def recipe(name: str, meaning: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=meaning, description=meaning, epilog=parser.epilog, allow_abbrev=False)
        command.add_argument("config", type=Path, metavar="CONFIG", help="a YAML recipe, e.g. configs/quickstart.yaml")
        return command

    recipe("run", "run the rounds of a config; the same command again continues")
    recipe("sft", "fine-tune a language model on texts: the first stage, where no SFT model is at hand")
    recipe("strength", "train an ensemble on the preference pairs and measure each pair's preference strength")
    recipe("reward", "train one reward model, without any RL")
    recipe("features", "learn reward features from many raters' labels, on which one person needs a few answers")
    recipe("customize", "fine-tune a reward model on general data, then one for each domain, and say what each cost")
    recipe("generalize", "meta-learn one reward model over labelled domains, and use it on domains that nobody labelled")
    study = recipe("study", "train reward models on parts of the pairs chosen by strength, for the report's figures")
    study.add_argument(
        "--studies", nargs="+", metavar="NAME", default=None, help="which (default: all); an unknown one lists them"
    )
    study.add_argument("--seeds", type=int, default=3, help="fits of each arm (default 3)")
    _add_plan_options(recipe("plan", "say what would run where, in how much memory and how fast, and start nothing"))
    relabel = commands.add_parser("relabel", help="ask a second labeller about preference pairs, in both orders")
    relabel.add_argument("pairs", metavar="PAIRS", help="a preference data set (docs/data.md), or sandbox:CONFIG.yaml")
    relabel.add_argument("--judge", required=True, help="gold, gold:CONFIG.yaml, reward:DIR or openai:BASE_URL#MODEL")
    relabel.add_argument("--out", type=Path, default=None, help="Parquet file to write (default: beside PAIRS)")
    relabel.add_argument("--split", default=None, help="split of PAIRS to read")
    relabel.add_argument("--limit", type=int, default=None, help="only the first so many pairs")
    relabel.add_argument("--allow-hub", action="store_true", help="PAIRS may be fetched from the Hugging Face hub")
    _add_endpoint_options(relabel)
    _add_evaluate(
        commands.add_parser("evaluate", help="compare two model directories on the same prompts, by one or more judges")
    )
    _add_adapt(commands.add_parser("adapt", help="fit one person's weights on reward features to their answers"))
    _add_ask(commands.add_parser("ask", help="ask a person which of two responses is better, and keep their profile"))
    report = commands.add_parser(
        "report",
        help="write report.html again from the directory of a run, strength, reward, domains, generalize, features or evaluate; "
        "of several runs, one page that compares them",
    )
    report.add_argument(
        "directories",
        type=Path,
        nargs="+",
        metavar="DIRECTORY",
        help="e.g. ~/rondo/runs/quickstart; with several, the others are compared with the first",
    )
    report.add_argument(
        "--out", type=Path, default=None, metavar="FILE", help="the comparison (default: comparison.html in the first DIRECTORY)"
    )
    commands.add_parser("keys", help="list every config key with its default and meaning")
    return parser


def _add_endpoint_options(command: argparse.ArgumentParser) -> None:
    usual = EndpointOptions()
    for flag, kind, default, help_text in (
        ("--concurrency", int, usual.concurrency, "requests in flight (openai; default %(default)s)"),
        ("--timeout", float, usual.timeout_s, "seconds for one request (openai; default %(default)g)"),
        ("--retries", int, usual.retries, "of one request (openai; default %(default)s)"),
        (
            "--max-tokens",
            int,
            usual.max_tokens,
            "of one reply (openai; default %(default)s; a model that reasons first needs more)",
        ),
    ):
        command.add_argument(flag, type=kind, default=default, help=help_text)


def _endpoint_options(chosen: argparse.Namespace) -> EndpointOptions:
    return EndpointOptions(chosen.concurrency, chosen.timeout, chosen.retries, chosen.max_tokens)


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    from evaluation.config import EvaluationConfig

    tie = EvaluationConfig().tie
    evaluate.add_argument("a", type=Path, metavar="A", help="a model directory, e.g. RUN/rounds/round_001/policy")
    evaluate.add_argument("b", type=Path, metavar="B", help="another, e.g. the SFT model")
    evaluate.add_argument(
        "--judge",
        action="append",
        required=True,
        help="gold, gold:CONFIG.yaml, reward:DIR, ensemble:DIR, openai:BASE_URL#MODEL or human:FILE.jsonl; may be given again",
    )
    evaluate.add_argument(
        "--prompts", required=True, help="a data set with a column prompt (docs/data.md), or sandbox:CONFIG.yaml"
    )
    evaluate.add_argument("--split", default=None, help="split of the prompts (default: train; test for the sandbox)")
    evaluate.add_argument("--num-prompts", type=int, default=None, help="only the first so many")
    evaluate.add_argument("--out", type=Path, default=None, help="directory to write (default: STORAGE/evaluations/COMPARISON)")
    evaluate.add_argument("--seed", type=int, default=0, help="of sampling, for both models (default 0)")
    evaluate.add_argument(
        "--temperature", type=float, default=None, help="0 = the likeliest token (default 1; of the config for the sandbox)"
    )
    evaluate.add_argument(
        "--max-new-tokens", type=int, default=None, help="of a response (default 256; of the config for the sandbox)"
    )
    evaluate.add_argument(
        "--tie", type=float, default=tie, help=f"scores up to this far apart are ties (gold, reward, ensemble; default {tie:g})"
    )
    evaluate.add_argument("--allow-hub", action="store_true", help="the prompts may be fetched from the Hugging Face hub")
    _add_endpoint_options(evaluate)


def _add_adapt(adapt: argparse.ArgumentParser) -> None:
    adapt.add_argument("model", type=Path, metavar="MODEL", help="the directory that `features` wrote")
    adapt.add_argument("--answers", type=Path, required=True, metavar="FILE", help="a .jsonl file of prompt, chosen, rejected")
    adapt.add_argument("--name", default=None, help="the person's (default: the answers file's)")
    adapt.add_argument(
        "--towards", choices=("mean", "zero"), default=None, help="what weights are drawn to (default: that of features.towards)"
    )
    adapt.add_argument("--l2", type=float, default=None, help="how strongly (default: that of features.l2)")
    adapt.add_argument(
        "--out", type=Path, default=None, metavar="FILE", help="profile to write (default: MODEL/profiles/NAME.json)"
    )


def _add_ask(ask: argparse.ArgumentParser) -> None:
    from rm.features_config import WAYS

    ask.add_argument("model", type=Path, metavar="MODEL", help="the directory that `features` wrote")
    ask.add_argument("--name", default="me", help="the person's (default me)")
    ask.add_argument("--by", choices=WAYS, default=WAYS[0], help="how the next pair is chosen (default information: D-optimal)")
    ask.add_argument("--terminal", action="store_true", help="ask in the terminal, not on a page in the browser")
    ask.add_argument("--port", type=int, default=0, help="of the page on 127.0.0.1 (default: any free one)")
    ask.add_argument(
        "--answers", type=Path, default=None, metavar="FILE", help=".jsonl to keep the answers in (default: not kept)"
    )
    ask.add_argument(
        "--pairs", type=Path, default=None, metavar="FILE", help=".jsonl of prompt, a, b (default: MODEL's own pool)"
    )
    ask.add_argument("--towards", choices=("mean", "zero"), default=None, help="what weights are drawn to (default mean)")
    ask.add_argument("--l2", type=float, default=None, help="how strongly (default 1)")
    ask.add_argument("--seed", type=int, default=0, help="of the choice and of which response is shown first (default 0)")
    ask.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="FILE",
        help="profile to write and go on from (default: MODEL/profiles/NAME.json)",
    )


def _add_plan_options(plan: argparse.ArgumentParser) -> None:
    plan.add_argument(
        "--cluster",
        type=Path,
        default=None,
        metavar="FILE",
        help="plan on the node types of a cluster file, e.g. ray_config.yaml",
    )
    plan.add_argument("--nodes", type=int, default=1, help="machines of the cluster (default 1)")
    plan.add_argument("--node-cpus", type=float, default=None, help="CPUs of each (default: this machine's)")
    plan.add_argument("--node-gpus", type=float, default=None, help="GPUs of each (default: this machine's)")
    plan.add_argument("--node-memory-gib", type=float, default=None, help="memory of each (default: this machine's)")
    plan.add_argument("--gpu-memory-gib", type=float, default=80.0, help="memory of one GPU (default 80)")
    plan.add_argument(
        "--gpu-tflops", type=float, default=None, help="dense bfloat16 peak of one GPU, TFLOP/s (default: an H100's or H200's)"
    )
    plan.add_argument("--gpu-bandwidth-tbs", type=float, default=None, help="memory bandwidth of a GPU, TB/s (default: likewise)")
    plan.add_argument("--link-gbs", type=float, default=None, help="between nodes, for each GPU, GB/s (default 50)")
    plan.add_argument(
        "--nvlink-gbs", type=float, default=None, help="between GPUs of one node, one direction, GB/s (default 450)"
    )
    plan.add_argument("--mfu", type=float, default=None, help="share of the peak that training reaches (default 0.25, measured)")
    plan.add_argument("--scoring-mfu", type=float, default=None, help="share that forward passes reach (default 0.31, measured)")
    plan.add_argument("--mean-prompt", type=float, default=None, help="tokens of a prompt (default: data.max_prompt_tokens)")
    plan.add_argument("--mean-response", type=float, default=None, help="tokens of a response (default: rollout.max_new_tokens)")
    plan.add_argument(
        "--num-pairs", type=int, default=None, help="preference pairs (default: world.num_pairs, data.max_pairs, or 10000)"
    )
