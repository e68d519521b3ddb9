"""What the latency gate promises, over the zoo: no merged network slower than the network it was made from.

    python -m zoo.gates --backend eager                   one model of every timm file, smallest first (hours)
    python -m zoo.gates --backend onnxruntime --limit 10  the ten smallest of them
    python -m zoo.gates --backend compile vgg11 resnet18  these
    python -m zoo.gates --again 3 --rounds 31             once more, three times, what came out below 0.98

One line a model and ratio, appended to ``--out`` and not measured again: original over merged, norms folded in both,
batch 1, the model's own input size, one thread, interleaved. Where the gate lets nothing merge, nothing is timed: the
merged network is the converted one, module by module. Runs are not compared with their originals one by one here (the
tests of merging do that), but every merged network's outputs are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import unittest.mock
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import nmconv
from nmconv.bench.count import network_size
from nmconv.bench.models import randomize_norms
from nmconv.merging import merger
from nmconv.timing import make_runner, quotients, time_interleaved
from zoo import models as zoo

RATIOS = ("2:1", "3:1")


def measure(original: nn.Module, folded: nn.Module, image: Tensor, ratio: str, backend: str, rounds: int) -> dict:
    """Quartiles of original over merged, and how many convolutions each makes; or why there are none."""
    converted = nmconv.convert(original, ratio, keep="boundary")
    merged = nmconv.merge(converted, gate="latency", backend=backend, example_inputs=(image,))
    merges = [merge for merges in nmconv.get_merges(merged) for merge in merges]
    count = sum(len(merge.convs) > 1 or bool(merge.sums) for merge in merges)
    if not count:
        return {"merges": 0}
    convs = [network_size(module, image, 0).convs for module in (folded, merged)]
    runners = [make_runner(module, (image,), backend) for module in (folded, merged)]
    found = time_interleaved(runners, rounds=rounds, seconds=0.05)
    gain = quotients(*found)
    ms = round(found[0].median * 1e3, 2)
    return {"merges": count, "convs": convs, "ms": ms, "median": gain.median, "lower": gain.lower, "upper": gain.upper}


def rows_of(name: str, asked: Sequence[str], backend: str, rounds: int) -> list[dict]:
    """One row for each ratio asked for."""
    torch.manual_seed(0)
    original = zoo.build(f"timm/{name}").eval()
    size = original.pretrained_cfg["input_size"]
    randomize_norms(original, torch.randn(2, *size))
    image = torch.randn(1, *size)
    folded = nmconv.fold_norms(original)
    rows = []
    for ratio in asked:
        start = time.perf_counter()
        row = {"name": name, "ratio": ratio, "backend": backend}
        try:
            row |= measure(original, folded, image, ratio, backend, rounds)
        except Exception as error:
            row["why"] = f"{type(error).__name__}: {str(error)[:120]}"
        rows.append(row | {"seconds": round(time.perf_counter() - start, 1)})
    return rows


def weights(name: str) -> int:
    """How many parameters the model has."""
    return sum(value.numel() for value in zoo.build(f"timm/{name}", "meta").parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="timm's names; none for one model of every file")
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--limit", type=int, default=0, help="most models, 0 for all")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--again", type=int, default=0, help="times to measure anew what is below 0.98")
    parser.add_argument("--out", type=Path, default=Path("out/gates.jsonl"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # Random weights may make denormal numbers (efficientvit_m0, converted), which take longer than any merge saves.
    with torch.no_grad():
        make_runner(nn.Conv2d(1, 1, 1), (torch.zeros(1, 1, 1, 1),), options.backend)  # ONNX Runtime's first resets that
    torch.set_flush_denormal(True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    rows = [row for row in map(json.loads, lines) if row["backend"] == options.backend]

    def add(name: str, asked: Sequence[str], **more: object) -> None:
        for row in rows_of(name, asked, options.backend, options.rounds):
            rows.append(row | more)
            with options.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], flush=True)

    with unittest.mock.patch.object(merger, "check_segment", lambda *_, **__: None):
        if options.again:
            below = sorted({(row["name"], row["ratio"]) for row in rows if row.get("median", 1) < 0.98})
            for name, ratio in below * options.again:
                add(name, [ratio], again=options.rounds)
        else:
            done = {(row["name"], row["ratio"]) for row in rows}
            quick = [name.removeprefix("timm/") for name in zoo.one_of_each_file() if name.startswith("timm/")]
            names = options.names or quick
            for name in sorted(names, key=weights)[: options.limit or None]:
                asked = [ratio for ratio in RATIOS if (name, ratio) not in done]
                if asked:
                    add(name, asked)
    first = [row for row in rows if "again" not in row]
    measured = sorted((row["median"], row["name"], row["ratio"]) for row in first if "median" in row)
    below = [row for row in measured if row[0] < 0.98]
    nothing = sum(row.get("merges") == 0 for row in first)
    failed = [(row["name"], row["ratio"], row["why"]) for row in first if "why" in row]
    print(f"{len(measured)} measured, lowest {measured[:3]}, {len(below)} below 0.98: {below}")
    if measured:
        print(f"median {statistics.median(row[0] for row in measured):.3f}, highest {measured[-1]}")
    print(f"{nothing} where nothing passed the gate, not timed; {len(failed)} without a result: {failed}")


if __name__ == "__main__":
    sys.exit(main())
