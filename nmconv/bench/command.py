"""``python -m nmconv bench``: the only file that knows typer and rich."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nmconv.bench.benchmark import run
from nmconv.bench.results import Cell, Latencies, NetworkSize, Result
from nmconv.errors import NmconvError
from nmconv.timing import BACKENDS, Spread, Timing

__all__ = ["app"]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """N:M proportional units: measure what merging is worth."""


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="A timm name, or torchvision:NAME.")],
    ratio: Annotated[str, typer.Option(help="N:M to convert to; none merges the network as it is.")] = "2:1",
    relocate: Annotated[bool, typer.Option("--relocate", help="Move kept activations to their unit's end.")] = False,
    hoist: Annotated[bool, typer.Option("--hoist", help="Move padding to each linear run's first conv.")] = False,
    gate: Annotated[str, typer.Option(help="What a merge must save: flops, latency, or nothing (always).")] = "flops",
    min_gain: Annotated[float, typer.Option(help="How many times, before over after.")] = 1.05,
    backend: Annotated[list[str] | None, typer.Option(help=f"{', '.join(BACKENDS)}; default: all.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images in a batch; default: 1 and 8.")] = None,
    size: Annotated[int, typer.Option(help="Height and width of the images, in pixels.")] = 224,
    threads: Annotated[int, typer.Option(help="To compute with.")] = 1,
    rounds: Annotated[int, typer.Option(help="Samples of each timing.")] = 11,
    seconds: Annotated[float, typer.Option(help="Least duration of a sample.")] = 0.2,
    device: Annotated[str, typer.Option(help="As torch names it.")] = "cpu",
    weights: Annotated[str, typer.Option(help="State dict to load; without, weights are random.")] = "",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Networks and images, in memory.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write all that was measured to this file.")] = None,
) -> None:
    """Time a network as it is, converted, and merged: side by side, norms folded in all three."""
    screen, errors = Console(width=None if sys.stdout.isatty() else 120), Console(stderr=True)
    if json is not None and not json.parent.is_dir():
        _fail(errors, f"{json}: there is no folder {json.parent}: make it first")
    try:
        with errors.status("") as status:
            result = run(
                model,
                ratio=ratio,
                relocate=relocate,
                hoist_padding=hoist,
                gate=gate,
                min_gain=min_gain,
                backends=backend,
                batches=batch or (1, 8),
                size=size,
                threads=threads,
                rounds=rounds,
                seconds=seconds,
                device=device,
                weights=weights,
                channels_last=channels_last,
                progress=lambda doing: status.update(doing),
            )
    except NmconvError as error:
        _fail(errors, str(error))
    screen.print(_table(result))
    for line in _remarks(result):
        screen.print(line, markup=False, highlight=False)
    if json is not None:
        try:
            result.save(json)
        except OSError as error:
            _fail(errors, f"{json}: not written: {error}")
    if not any(cell.measured for cell in result.cells):
        raise typer.Exit(1)


def _fail(errors: Console, message: str) -> Any:
    errors.print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)


def _table(result: Result) -> Table:
    asked = result.settings
    conversion = "not converted" if asked.ratio == "none" else f"converted to {asked.ratio}"
    options = [
        ("relocate", asked.relocate),
        ("padding hoisted", asked.hoist_padding),
        ("channels last", asked.channels_last),
    ]
    title = ", ".join([f"{result.model} {conversion}", *(name for name, given in options if given)])
    versions = dict(result.environment.versions)
    table = Table(
        title=f"{title}; merged by {asked.gate}, gain ≥ {asked.min_gain}",
        caption=(
            "Norms are folded into convolutions in all three, so that ratios show merging alone. Medians of "
            f"{asked.rounds} interleaved rounds; ratios are original / this one, round by round, with quartiles: above "
            "1 is faster than the original. Multiply-adds of one image; difference: largest, relative to the largest "
            f"output of the converted network. {asked.size}x{asked.size}, {asked.threads} thread(s), "
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
    head, found = (cell.backend, str(cell.batch)), cell.measured
    if found is None:
        return [(*head, "not measured")]
    return [
        (*head, "original", *_size(result.original), _ms(found.original), "1"),
        ("", "", "converted", *_size(result.converted), _ms(found.converted), _ratio(found.original_over_converted)),
        ("", "", "merged", *_size(found.network), _ms(found.merged), _ratio(found.original_over_merged), _apart(found)),
    ]


def _size(network: NetworkSize) -> tuple[str, str, str]:
    return str(network.activations), str(network.convs), f"{network.multiply_adds / 1e6:,.1f} M"


def _ms(timing: Timing) -> str:
    return f"{timing.median * 1e3:.2f}"


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.3f} ({spread.lower:.3f}–{spread.upper:.3f})"


def _apart(found: Latencies) -> str:
    return f"{found.difference:.1e}"


def _remarks(result: Result) -> list[str]:
    cells = [f"{cell.backend}, batch {cell.batch}: {cell.why}" for cell in result.cells if cell.why]
    return cells + [f"note: {note}" for note in result.notes]
