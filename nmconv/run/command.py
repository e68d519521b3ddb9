"""The command line of ``python -m nmconv.run``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from nmconv.errors import NmconvError, OptionError, RemovedParametersWarning
from nmconv.planning import Options, Plan, current_keep
from nmconv.run.models import Models, say
from nmconv.run.script import run_module, run_script
from nmconv.run.zoo_builders import watch_builders
from nmconv.surgery import apply_plan, convert, get_plan

__all__ = ["main"]

# Options that a saved plan has already decided.
_PLAN_OPTIONS = ("ratio", "keep", "relocate", "include", "exclude", "linear", "hoist_padding")


def main(argv: list[str] | None = None) -> None:
    """Run a script and convert the model it creates; exit with 1 if it succeeds without one.

    Exceptions of the script pass through, ``SystemExit`` included.

    Args:
        argv: Arguments; None means those of the process.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    is_module = args.module is not None or command[:1] == ["-m"]
    command = args.module or command[is_module:]
    if not command:
        parser.error("name the script to run: python -m nmconv.run --ratio 2:1 -- train.py --model resnet50")
    if not is_module and not Path(command[0]).is_file():
        parser.error(f"{command[0]}: no such file")
    try:
        models = Models(_converter(args), tuple(args.match))
    except (NmconvError, OSError) as error:
        parser.error(str(error))
    watch_builders(models.on_built)
    try:
        (run_module if is_module else run_script)(command[0], command[1:])
    except SystemExit as end:
        if end.code not in (None, 0) or models.problem is None:
            raise
    if models.problem is not None:
        sys.exit(f"nmconv.run: error: {models.problem}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nmconv.run",
        description="Run a training script as it is, with the model that it creates by timm's or torchvision's "
        "builders converted to N:M proportional units.",
        allow_abbrev=False,
    )
    add = partial(parser.add_argument, default=None)
    add("--ratio", metavar="N:M", help="default: 2:1")
    add("--keep", metavar="WHICH", help="first (the default), boundary or spread")
    add("--relocate", action="store_true", help="move kept activations to their unit's end")
    add("--include", action="append", metavar="PATTERN", help="modules to convert; repeatable; default: all")
    add("--exclude", action="append", metavar="PATTERN", help="modules to leave alone; repeatable")
    add("--linear", action="store_true", help="count nn.Linear as a convolution")
    add("--hoist-padding", action="store_true", help="move padding to each linear run's first convolution")
    add("--plan", metavar="FILE", help="do what a plan saved as JSON says, instead of all of the above")
    add("--no-witness", action="store_true", help="do not check the converted model against the original")
    parser.add_argument(
        "--match",
        action="append",
        default=[],
        metavar="NAME",
        help="convert each model of such a name (a glob), instead of the first one; repeatable",
    )
    add("-m", dest="module", nargs=argparse.REMAINDER, help="run a module instead of a file, as python -m does")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- script.py ...", help="what to run")
    return parser


def _converter(args: argparse.Namespace) -> Callable[[nn.Module], Plan]:
    """Return the function that converts a model in place and returns its plan; check the options beforehand.

    Raises:
        OptionError, RatioError, PatternError, PlanError: If an option is invalid.
        OSError: If the plan's file cannot be read.
    """
    options = {name: getattr(args, name) for name in _PLAN_OPTIONS if getattr(args, name) is not None}
    witness = not args.no_witness
    if args.plan is not None:
        if options:
            raise OptionError(
                f"--plan and --{next(iter(options)).replace('_', '-')} exclude each other: give one of them"
            )
        plan = Plan.from_json(Path(args.plan).read_text(encoding="utf-8"))
        return partial(_convert_and_get_plan, partial(apply_plan, plan=plan, witness=witness, inplace=True))
    if "keep" in options:
        with warnings.catch_warnings(record=True) as deprecated:
            warnings.simplefilter("always")
            options["keep"] = current_keep(options["keep"])
        for warning in deprecated:
            say(str(warning.message))
    Options(**{name: options[name] for name in ("ratio", "keep") if name in options}).check()
    return partial(_convert_and_get_plan, partial(convert, **options, witness=witness, inplace=True))


def _convert_and_get_plan(convert_model: Callable[[nn.Module], nn.Module], model: nn.Module) -> Plan:
    """Convert a model and return its plan."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RemovedParametersWarning)  # no optimizer can hold parameters of a new model
        plan = get_plan(convert_model(model))
    assert plan is not None
    return plan
