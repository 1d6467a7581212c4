"""The command ``lightning-cl``."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

__all__ = ["main"]

_LIGHTNING = {"fit", "validate", "test", "predict"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors a user can mend are one line on standard error and exit status 2.

    With the environment variable ``LIGHTNING_CL_TRACEBACK`` they come with their traceback.

    Args:
        arguments: What follows the program's name; ``sys.argv`` if ``None``.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given and given[0] in _LIGHTNING:
            from lightning_cl.cli.lightning import run

            run(given)
        else:
            options = _parser().parse_args(given)
            options.run(options)
    except (ValueError, FileNotFoundError, ImportError, MisconfigurationException, argparse.ArgumentError) as error:
        if "LIGHTNING_CL_TRACEBACK" in os.environ:
            raise
        print(f"lightning-cl: error: {_in_one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def _in_one_line(error: Exception) -> str:
    """Return the message without what a config's parser says of types that were not meant."""
    noise = re.compile(r"Does not validate against|Subtypes:|Errors:|Given value|Expected a <class '[\w.]+'>$|$")
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    return " ".join(line for line in lines if not noise.match(line))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-cl", description="Continual learning and unlearning on PyTorch Lightning."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in ("fit", "validate", "test", "predict"):
        commands.add_parser(name, help=f"{name} with a LightningCLI config: lightning-cl {name} --config run.yaml")

    methods = commands.add_parser("methods", help="list the methods")
    methods.set_defaults(run=_methods)

    compare = commands.add_parser("compare", help="run several methods on one stream and report them")
    compare.add_argument("stream", help="a config for `lightning-cl fit`, with settings of methods under `methods:`")
    compare.add_argument("--methods", default="finetune,joint", help="names, joined by commas")
    compare.add_argument("--seeds", type=int, default=1, help="seeds 0 to N-1 for every method")
    compare.add_argument("--output", default="lightning_cl_comparison", help="folder for the runs and the report")
    compare.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    compare.add_argument(
        "--sweep",
        metavar="SETTING=VALUE,...",
        help="run every method that has the setting with each value, such as capacity=50,100,200",
    )
    compare.set_defaults(run=_compare)

    plan = commands.add_parser("plan", help="say what a run takes in memory on each rank, and whether it fits")
    plan.add_argument("configs", nargs="+", help="configs for `lightning-cl fit`, the later ones on top of the earlier")
    plan.add_argument("--devices", type=int, help="ranks on each node, those of the config by default")
    plan.add_argument("--nodes", type=int, help="nodes, those of the config by default")
    plan.add_argument("--card", help="memory of a card, such as 80GiB")
    plan.add_argument("--json", action="store_true", help="print bytes by part as JSON")
    plan.set_defaults(run=_plan)

    unlearn = commands.add_parser("unlearn", help="serve requests to forget on the model of a finished run")
    unlearn.add_argument("config", help="the config of the run, with a callback that serves requests")
    unlearn.add_argument(
        "--request", required=True, metavar="FILE", help="YAML or JSON: one request, or a list of them"
    )
    unlearn.add_argument("--checkpoint", help="where to go on from; by default the model in the output folder")
    unlearn.add_argument(
        "--epochs", type=int, help="passes over what a request forgets, those of the config by default"
    )
    unlearn.add_argument("--output", default="lightning_cl_unlearning", help="folder of the model, ledger and report")
    unlearn.set_defaults(run=_unlearn)

    report = commands.add_parser("report", help="write the HTML report of finished runs")
    report.add_argument("runs", nargs="*", help="folders with a record.json, searched in depth")
    report.add_argument("--ledger", metavar="FILE", help="the requests.jsonl of requests to forget, in place of runs")
    report.add_argument("--retrained", metavar="FILE", help="JSON: measurements of retrained models by request's name")
    report.add_argument("--output", default="lightning_cl_report", help="folder for the report")
    report.set_defaults(run=_report)
    return parser


def _methods(options: argparse.Namespace) -> None:
    from lightning_cl.cli.methods import print_methods

    print_methods()


def _compare(options: argparse.Namespace) -> None:
    from lightning_cl.cli.compare import compare

    compare(
        options.stream,
        methods=[name.strip() for name in options.methods.split(",") if name.strip()],
        seeds=options.seeds,
        output=options.output,
        jobs=options.jobs,
        sweep=None if options.sweep is None else _values(options.sweep),
    )


def _values(sweep: str) -> tuple[str, list[Any]]:
    """Read ``setting=value,...``."""
    setting, _, text = sweep.partition("=")
    values = [value.strip() for value in text.split(",")]
    numbers = [_number(value) for value in values]
    if not setting.isidentifier() or not all(values) or len(set(map(_size, numbers))) < len(values) or "/" in text:
        raise ValueError(f"`--sweep` must be a setting and distinct values, such as capacity=50,100, got {sweep!r}.")
    return setting, numbers


def _number(value: str) -> int | float | str:
    for kind in (int, float):
        try:
            number = kind(value)
        except ValueError:
            continue
        # 1e2 is a number of samples too
        return int(number) if number == number // 1 else number
    return value


def _size(value: int | float | str) -> int | float | str:
    """Return the number of bytes that a value means, if it means any: 1MB and 1000KB are one point of a plot."""
    from lightning_cl.memory.capacity import parse_bytes

    try:
        return value if isinstance(value, float) else parse_bytes("--sweep", value)
    except ValueError:
        return value


def _plan(options: argparse.Namespace) -> None:
    from lightning_cl.cli.plan import plan, print_plan

    result = plan(*options.configs, devices=options.devices, nodes=options.nodes, card=options.card)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_plan(result)


def _unlearn(options: argparse.Namespace) -> None:
    from lightning_cl.cli.unlearn import unlearn

    page = unlearn(
        options.config,
        options.request,
        checkpoint=options.checkpoint,
        output=options.output,
        epochs=options.epochs,
    )
    print(f"report: {page}")


def _report(options: argparse.Namespace) -> None:
    from lightning_cl.metrics.record import read_records
    from lightning_cl.report import write_report
    from lightning_cl.report.requests import write_request_report

    if bool(options.runs) == bool(options.ledger):
        raise ValueError("`report` takes folders of runs, or the ledger of requests by `--ledger`: give one of them.")
    if options.ledger:
        retrained = None if options.retrained is None else json.loads(Path(options.retrained).read_text())
        print(f"report: {write_request_report(options.ledger, options.output, retrained=retrained)}")
        return
    print(f"report: {write_report(read_records(options.runs), options.output)}")


if __name__ == "__main__":
    main()
