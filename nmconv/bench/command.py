"""The command ``python -m nmconv bench``: the only file that knows typer and rich."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nmconv.atomic_files import check_folder
from nmconv.bench.benchmark import run
from nmconv.bench.results import Cell, NetworkSize, Result, Settings
from nmconv.errors import NmconvError
from nmconv.timing import BACKENDS, Spread, Timing

__all__ = ["app"]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """N:M proportional units: measure how much faster merged networks are."""


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="A timm name, or torchvision:NAME.")],
    ratio: Annotated[str, typer.Option(help="N:M to convert to; none merges the network as it is.")] = "2:1",
    relocate: Annotated[bool, typer.Option("--relocate", help="Move kept activations to their unit's end.")] = False,
    hoist: Annotated[
        bool, typer.Option("--hoist-padding", "--hoist", help="Move padding to each linear run's first conv.")
    ] = False,
    gate: Annotated[
        str, typer.Option(help="What a merge must save: multiply_adds, latency, or nothing (always).")
    ] = "multiply_adds",
    min_gain: Annotated[float, typer.Option(help="Least gain of a merge: before over after.")] = 1.05,
    backend: Annotated[list[str] | None, typer.Option(help=f"{', '.join(BACKENDS)}; default: all.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch size; default: 1 and 8.")] = None,
    size: Annotated[int, typer.Option(help="Height and width of the images, in pixels.")] = 224,
    threads: Annotated[int, typer.Option(help="Number of threads.")] = 1,
    rounds: Annotated[int, typer.Option(help="Number of samples of each timing.")] = 11,
    seconds: Annotated[float, typer.Option(help="Minimum duration of a sample, in seconds.")] = 0.2,
    device: Annotated[str, typer.Option(help="torch's name of the device.")] = "cpu",
    weights: Annotated[str, typer.Option(help="State dict to load; default: random weights.")] = "",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Use torch.channels_last memory.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
) -> None:
    """Time the original, converted and merged network side by side, all three with norms folded."""
    screen, errors = Console(width=None if sys.stdout.isatty() else 120), Console(stderr=True)
    try:
        if json is not None:
            check_folder(json)
        with errors.status("") as status:
            settings = Settings(
                ratio=ratio,
                relocate=relocate,
                hoist_padding=hoist,
                gate=gate,
                min_gain=min_gain,
                backends=tuple(backend or ()),
                batches=tuple(batch or (1, 8)),
                size=size,
                threads=threads,
                rounds=rounds,
                seconds=seconds,
                device=device,
                weights=weights,
                channels_last=channels_last,
            )
            result = run(model, settings, lambda message: status.update(message))
    except NmconvError as error:
        _fail(errors, str(error))
    screen.print(_table(result))
    for line in _remark_lines(result):
        screen.print(line, markup=False, highlight=False)
    if json is not None:
        try:
            result.save(json)
        except (NmconvError, OSError) as error:
            _fail(errors, f"{json}: not written: {error}")
    if not any(cell.measured for cell in result.cells):
        raise typer.Exit(1)


def _fail(errors: Console, message: str) -> Any:
    errors.print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)


def _table(result: Result) -> Table:
    settings = result.settings
    conversion = "not converted" if settings.ratio == "none" else f"converted to {settings.ratio}"
    options = [
        ("relocate", settings.relocate),
        ("padding hoisted", settings.hoist_padding),
        ("channels last", settings.channels_last),
    ]
    title = ", ".join([f"{result.model} {conversion}", *(name for name, enabled in options if enabled)])
    versions = dict(result.environment.versions)
    table = Table(
        title=f"{title}; merged by {settings.gate}, gain ≥ {settings.min_gain}",
        caption=(
            "Norms are folded into convolutions in all three, so that ratios show merging alone. Medians of "
            f"{settings.rounds} interleaved rounds; ratios are original / this one, round by round, with quartiles: "
            "above 1 is faster than the original. Multiply-adds of one image; difference: largest, relative to the "
            f"largest output of the converted network. {settings.size}x{settings.size}, {settings.threads} thread(s), "
            f"{result.environment.device}, torch {versions['torch']}."
        ),
        caption_justify="left",
    )
    for name in ("backend", "batch", "network"):
        table.add_column(name)
    for name in ("activations", "convs", "multiply-adds", "ms", "ratio (quartiles)", "difference"):
        table.add_column(name, justify="right")
    for cell in result.cells:
        for row in _rows(cell, result):
            table.add_row(*row)
        table.add_section()
    return table


def _rows(cell: Cell, result: Result) -> list[tuple[str, ...]]:
    head, times = (cell.backend, str(cell.batch)), cell.measured
    if times is None:
        return [(*head, "not measured")]
    difference = f"{times.difference:.1e}"
    return [
        (*head, "original", *_size(result.original), _ms(times.original), "1"),
        ("", "", "converted", *_size(result.converted), _ms(times.converted), _ratio(times.original_over_converted)),
        ("", "", "merged", *_size(times.network), _ms(times.merged), _ratio(times.original_over_merged), difference),
    ]


def _size(network: NetworkSize) -> tuple[str, str, str]:
    return str(network.activations), str(network.convs), f"{network.multiply_adds / 1e6:,.1f} M"


def _ms(timing: Timing) -> str:
    return f"{timing.median * 1e3:.2f}"


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.3f} ({spread.lower:.3f}–{spread.upper:.3f})"


def _remark_lines(result: Result) -> list[str]:
    cells = [f"{cell.backend}, batch {cell.batch}: {cell.why}" for cell in result.cells if cell.why]
    return cells + [f"note: {note}" for note in result.notes]
