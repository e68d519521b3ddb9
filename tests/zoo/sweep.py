"""Every name of both zoos held against the oracle: converted, skipped and why, failed. Resumable.

    python -m zoo.sweep [--workers 2] [--largest 400] [--out out/zoo.jsonl] [--table docs/zoo.md] [name ...]

A row a model goes into ``--out`` as it is done; what stands there is not done again. The table is written at the end
(and by ``--table-only``). Models without sites are planned on the meta device only; all others are built with random
weights, run in eval and in train mode, converted, and run again, all to the bit. A conversion at another ratio is
tried on the meta device.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import time
import traceback
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

import nmconv
from zoo import models as zoo


def row_of(job: tuple[str, int]) -> dict[str, Any]:
    """What became of one model; models of more than the given millions of parameters are only planned."""
    name, largest = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.time()
    row: dict[str, Any] = {"name": name}
    try:
        with warnings.catch_warnings():
            model, given = zoo.to_plan(name)
            row["millions"] = round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1)
            try:
                plan = nmconv.make_plan(model, **given)
            except nmconv.NoSitesError as error:
                return {**row, "result": "no sites", "why": str(error)}
            counts = plan.counts
            row |= {
                "counts": [counts.convs, counts.activations_before, counts.activations_after],
                "untraced": [[part.name, part.reason] for part in plan.untraced],
                "locked": [[site.id, site.locked] for site in plan.sites if site.locked],
            }
            ratio = zoo.RATIOS[1 + zlib.crc32(name.encode()) % 3]  # one of the others, by name
            row["other"] = ratio
            nmconv.convert(model, ratio, witness=False, **given)
            if row["millions"] > largest:
                return {**row, "result": "planned", "why": f"over {largest} million parameters: not run"}
            del model
            zoo.check(name)
            row["result"] = "equal" if plan.changes else "equal, no effect"
    except Exception as error:
        row |= {"result": "failed", "why": f"{type(error).__name__}: {error}"[:300], "trace": traceback.format_exc()}
    row["seconds"] = round(time.time() - start, 1)
    return row


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """The rows as a page."""
    totals = Counter(row["result"] for row in rows)
    every = len(zoo.all_names())
    left_out = "" if len(rows) == every else ": the others were not run on it, and are left out"
    commit = subprocess.run(["git", "log", "-1", "--format=%h", "--", "nmconv"], capture_output=True, text=True)
    lines = [
        "# Both zoos, every name",
        "",
        f"Written by `python -m zoo.sweep` on commit {commit.stdout.strip()} of `nmconv/`, {len(rows)} of "
        f"{every} names{left_out}. The versions it ran with: "
        f"torch {torch.__version__.partition('+')[0]}, timm {zoo.timm.__version__}, "
        f"torchvision {zoo.torchvision.__version__.partition('+')[0]}.",
        "",
        "*equal*: converted at 2:1, outputs and buffers equal to the oracle's to the bit, in eval and in train mode, "
        "and the result's recording is as the plan says; converted at another ratio too (3:2, 3:1 or 4:1; not run "
        "there). *equal, no effect*: the same, and at 2:1 every unit has few enough activations. *no sites*: no "
        "activation belongs to a convolution. *planned*: converted at that other ratio, too large to run.",
        "",
        "| result | models |",
        "| --- | --- |",
        *(f"| {result} | {count} |" for result, count in sorted(totals.items())),
        "",
        "| model | result | convolutions | activations | after 2:1 | remarks |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: row["name"]):
        convs, before, after = row.get("counts", ["", "", ""])
        remarks = [row.get("why", "")] if row["result"] != "no sites" else []
        remarks += [f"untraced: {name or 'the model itself'} ({why})" for name, why in row.get("untraced", [])[:2]]
        remarks += [f"{len(row['locked'])} locked"] if row.get("locked") else []
        text = "; ".join(remark for remark in remarks if remark).replace("|", "/").replace("\n", " ")
        lines.append(f"| {row['name']} | {row['result']} | {convs} | {before} | {after} | {text} |")
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="these only")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--largest", type=int, default=400, help="millions of parameters up to which models are run")
    parser.add_argument("--out", type=Path, default=Path("out/zoo.jsonl"))
    parser.add_argument("--table", type=Path, default=Path("docs/zoo.md"))
    parser.add_argument("--table-only", action="store_true")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {row["name"] for row in rows}
    jobs = [(name, options.largest) for name in options.names or zoo.all_names() if name not in done]
    if jobs and not options.table_only:
        with (
            multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=20) as pool,
            options.out.open("a") as out,
        ):
            for row in track(pool.imap_unordered(row_of, jobs), "models", total=len(jobs)):
                rows.append(row)
                out.write(json.dumps(row) + "\n")
                out.flush()
    if not options.names:
        write_table(rows, options.table)
    for row in rows:
        if row["result"] == "failed":
            print(row["name"], row["why"])


if __name__ == "__main__":
    main()
