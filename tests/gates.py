"""What the latency gate promises, over the zoo: no merged network slower than the network it was made from.

    python tests/gates.py --backend eager --limit 10        the first ten of tests/zoo_quick.txt's timm models
    python tests/gates.py --backend onnxruntime             one model of every timm file (hours)

One line a model and ratio, appended to ``--out`` and not measured again: original over merged, norms folded in both,
batch 1, the model's own input size, one thread, interleaved.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import torch
import zoo

from nmconv import NmconvError, bench


def measure(name: str, ratio: str, backend: str, rounds: int) -> dict[str, object]:
    """One line: quartiles of original over merged, and how many convolutions are left."""
    model = zoo.build(f"timm/{name}")
    size = model.pretrained_cfg["input_size"][-1]
    try:
        result = bench.run(name, ratio=ratio, gate="latency", backends=[backend], batches=[1], size=size, rounds=rounds)
    except NmconvError as error:
        return {"why": f"{type(error).__name__}: {str(error)[:120]}"}
    cell = result.cells[0]
    if cell.measured is None:
        return {"why": cell.why[:160]}
    gain = cell.measured.original_over_merged
    convs = [result.original.convs, cell.measured.network.convs]
    return {"convs": convs, "median": gain.median, "lower": gain.lower, "upper": gain.upper}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--limit", type=int, default=0, help="most models, 0 for all")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path("out/gates.jsonl"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {(row["name"], row["ratio"], row["backend"]) for row in rows}
    names = [name.removeprefix("timm/") for name in zoo.quick_names() if name.startswith("timm/")]
    for name in names[: options.limit or None]:
        for ratio in ("2:1", "3:1"):
            if (name, ratio, options.backend) in done:
                continue
            row = {"name": name, "ratio": ratio, "backend": options.backend}
            row |= measure(name, ratio, options.backend, options.rounds)
            rows.append(row)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
    measured = sorted((row["median"], row["name"], row["ratio"]) for row in rows if "median" in row)
    below = [row for row in measured if row[0] < 0.98]
    print(f"{len(measured)} measured, lowest {measured[:3]}, {len(below)} below 0.98")


if __name__ == "__main__":
    main()
