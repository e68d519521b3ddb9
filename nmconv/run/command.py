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
from nmconv.planning import BOUNDARY, Options, Plan, current_name
from nmconv.run.models import Models, say
from nmconv.run.script import run_module, run_script
from nmconv.run.zoo_builders import watch_builders
from nmconv.surgery import apply_plan, convert, get_plan

__all__ = ["main"]

_CHOICES = ("ratio", "keep", "relocate", "include", "exclude", "linear", "hoist_padding")  # what a plan has decided


def main(argv: list[str] | None = None) -> None:
    """Run a script with its first model converted; exit with 1 if it ends well without one.

    What the script raises passes through, its ``SystemExit`` included.
    """
    parser = _parser()
    asked = parser.parse_args(argv)
    command = asked.command[1:] if asked.command[:1] == ["--"] else asked.command
    is_module = asked.module is not None or command[:1] == ["-m"]
    command = asked.module or command[is_module:]
    if not command:
        parser.error("name the script to run: python -m nmconv.run --ratio 2:1 -- train.py --model resnet50")
    if not is_module and not Path(command[0]).is_file():
        parser.error(f"{command[0]}: no such file")
    try:
        models = Models(_conversion(asked), tuple(asked.match))
    except (NmconvError, OSError) as error:
        parser.error(str(error))
    watch_builders(models.built)
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
    add("--keep", metavar="WHICH", help="boundary (the default), first or spread")
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


def _conversion(asked: argparse.Namespace) -> Callable[[nn.Module], Plan]:
    """What to do with a model, checked as far as it can be before there is one.

    Raises:
        OptionError, RatioError, PatternError, PlanError: For an option that is none.
        OSError: If the plan's file cannot be read.
    """
    given = {name: getattr(asked, name) for name in _CHOICES if getattr(asked, name) is not None}
    witness = not asked.no_witness
    if asked.plan is not None:
        if given:
            raise OptionError(f"--plan has decided what --{next(iter(given)).replace('_', '-')} asks for: give one")
        plan = Plan.from_json(Path(asked.plan).read_text(encoding="utf-8"))
        return partial(_converted, partial(apply_plan, plan=plan, witness=witness, inplace=True))
    if "keep" in given:
        with warnings.catch_warnings(record=True) as deprecated:
            warnings.simplefilter("always")
            given["keep"] = current_name(given["keep"], stacklevel=1)
        for warning in deprecated:
            say(str(warning.message))
    Options(ratio=given.get("ratio", "2:1"), keep=given.get("keep", BOUNDARY)).check()
    return partial(_converted, partial(convert, **given, witness=witness, inplace=True))


def _converted(change: Callable[[nn.Module], nn.Module], model: nn.Module) -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RemovedParametersWarning)  # nobody has seen the model yet
        plan = get_plan(change(model))
    assert plan is not None
    return plan
