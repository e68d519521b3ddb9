"""Train many networks at many ratios with several seeds, on this machine or a Ray cluster, and report the results.

    python examples/sweep.py run --data-dir ~/data --models cifar_resnet20 --ratios 1:1 2:1 --keep first boundary \
        --seeds 3 --epochs 8 --lr 0.1 --rows out/rows
    python examples/sweep.py run --data-dir ~/data --study ratios --rows docs/study
    python examples/sweep.py report --rows out/rows --plot out/sweep.svg
    python examples/sweep.py insights --data-dir ~/data --rows docs/study/insights
    python examples/sweep.py weights --out docs/weights
    python examples/sweep.py study --rows docs/study --doc docs/study.md

Each result is a row: a file named by the hash of its configuration. Ray only schedules the trials. The same command
resumes an interrupted sweep and the interrupted trial. Failed trials are listed at the end, with their tracebacks in
files beside the rows, and are run again by the next call. On a cluster, all paths must be on a shared file system.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from recipes.recipe import Recipe
from recipes.trial import Trial, run, trial_from

HERE = Path(__file__).resolve().parent


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("run", help="train what has no row yet")
    train.add_argument("--data-dir", type=Path, required=True, help="the folder that holds --dataset")
    train.add_argument("--dataset", default="cifar10", help="an ImageFolder in there [cifar10]")
    train.add_argument("--rows", type=Path, required=True, help="folder for the rows")
    train.add_argument("--work", type=Path, default=Path("out/work"), help="folder for checkpoints [out/work]")
    train.add_argument("--study", help="a list of trials of examples/recipes/study.py, instead of what follows")
    train.add_argument("--models", nargs="+", default=["cifar_resnet20"])
    train.add_argument("--widths", nargs="+", type=float, default=[1.0], help="of models that take one")
    train.add_argument("--ratios", nargs="+", default=["1:1", "2:1"])
    train.add_argument("--keep", nargs="+", default=["first"])
    train.add_argument("--relocate", action="store_true")
    train.add_argument("--hoist-padding", action="store_true")
    train.add_argument("--gradual", action="store_true")
    train.add_argument("--seeds", type=int, default=3, help="how many [3]")
    train.add_argument("--size", type=int, default=32)
    train.add_argument("--images", type=int, default=0, help="pictures to train on, 0 for all but those held back [0]")
    train.add_argument("--held-back", type=int, default=5000, help="train pictures to hold back for choices [5000]")
    train.add_argument("--cores", type=int, default=1, help="of a trial [1]")
    train.add_argument("--gpus", type=float, default=0, help="of a trial [0]")
    train.add_argument("--address", help="of a Ray cluster [this machine]")
    for field in fields(Recipe):
        if field.name != "seed":
            flag = f"--{field.name.replace('_', '-')}"
            train.add_argument(flag, type=type(field.default), default=field.default, help="[%(default)s]")
    report = commands.add_parser("report", help="print the rows' table, and plot it")
    report.add_argument("--rows", type=Path, required=True)
    report.add_argument("--column", choices=("test", "held_back"), default="held_back", help="[held_back]")
    report.add_argument("--latency", action="store_true", help="time the merged networks, too: now, on this machine")
    report.add_argument("--plot", type=Path, help="a file, .svg or .png")
    inside = commands.add_parser("insights", help="measure the activations and members of the study's networks")
    inside.add_argument("--data-dir", type=Path, required=True)
    inside.add_argument("--rows", type=Path, required=True, help="folder for these rows")
    inside.add_argument("--work", type=Path, default=Path("out/work"), help="where `run` left the networks [out/work]")
    weights = commands.add_parser("weights", help="write the weights of the study's longer trainings")
    weights.add_argument("--work", type=Path, default=Path("out/work"), help="where `run` left them [out/work]")
    weights.add_argument("--out", type=Path, required=True)
    tables = commands.add_parser("study", help="update the tables of docs/study.md")
    tables.add_argument("--rows", type=Path, required=True)
    tables.add_argument("--doc", type=Path, required=True)
    return parser.parse_args(argv)


def trials(args: argparse.Namespace) -> list[Trial]:
    """Return all requested trials, each once: at 1:1, options of the conversion make no difference."""
    if args.study:
        from recipes.study import STUDIES

        if args.study not in STUDIES:
            raise SystemExit(f"--study {args.study}: give one of {', '.join(STUDIES)}")
        return STUDIES[args.study]()
    recipe = {field.name: getattr(args, field.name) for field in fields(Recipe) if field.name != "seed"}
    common = {name: getattr(args, name) for name in ("dataset", "size", "images", "held_back")}
    by_name = {}
    for seed, model, width, ratio, keep in itertools.product(
        range(args.seeds), args.models, args.widths, args.ratios, args.keep
    ):
        options = {} if width == 1 else {"width": width}
        flags = {name: getattr(args, name) for name in ("relocate", "hoist_padding", "gradual")}
        conversion = {} if ratio == "1:1" else {"keep": keep, **flags}
        trial = Trial(
            model=model, options=options, ratio=ratio, **conversion, recipe=Recipe(**recipe, seed=seed), **common
        )
        by_name[trial.name] = trial
    return list(by_name.values())


def train_one(config: dict[str, Any]) -> None:
    """Run one trial in a Ray worker."""
    import torch
    from ray import tune

    torch.set_num_threads(config["cores"])
    root, rows, work = (Path(config[name]) for name in ("data_dir", "rows", "work"))
    row = run(trial_from(config["trial"]), root, rows, work, config["device"])
    tune.report({"held_back": row["held_back"]})


def schedule(args: argparse.Namespace) -> int:
    """Run the trials that have no row with Ray, and return the number of failed trials."""
    import ray
    from ray import tune

    requested = trials(args)
    missing = [trial for trial in requested if not (args.rows / f"{trial.name}.json").exists()]
    print(f"{len(requested)} trials, {len(requested) - len(missing)} of which have their row", flush=True)
    if not missing:
        return 0
    paths = {name: str(getattr(args, name).expanduser().resolve()) for name in ("data_dir", "rows", "work")}
    python_path = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {"PYTHONPATH": python_path, "OMP_NUM_THREADS": str(args.cores)}
    ray.init(args.address, runtime_env={"env_vars": env}, include_dashboard=False, log_to_driver=True)
    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            tune.with_resources(train_one, {"cpu": args.cores, "gpu": args.gpus}),
            param_space={
                "trial": tune.grid_search([asdict(trial) for trial in missing]),
                "cores": args.cores,
                "device": "" if args.gpus else "cpu",
                **paths,
            },
            run_config=tune.RunConfig(storage_path=folder, name="sweep", verbose=1),
        )
        results = tuner.fit()
    ray.shutdown()
    failed = 0
    for result in results:
        trial = trial_from(result.config["trial"])
        note = args.rows / f"{trial.name}.failed.txt"
        note.unlink(missing_ok=True)
        if result.error is not None:
            failed += 1
            note.write_text(f"{json.dumps(asdict(trial))}\n\n{result.error}\n")
            print(f"failed: {note}: {str(result.error).strip().splitlines()[-1]}", file=sys.stderr)
    return failed


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.command == "run":
        args.rows.mkdir(parents=True, exist_ok=True)
        raise SystemExit(1 if schedule(args) else 0)
    if args.command == "insights":
        from recipes.insight import insights
        from recipes.study import with_insights

        for trial in with_insights():
            if (args.work / trial.name / f"epoch-{trial.recipe.epochs}.pt").exists():
                insights(trial, args.data_dir.expanduser(), args.rows, args.work)
        return
    if args.command == "weights":
        from recipes.insight import keep_weights
        from recipes.study import long

        keep_weights(long(), args.work, args.out)
        return
    if args.command == "study":
        from recipes.study_tables import with_tables

        args.doc.write_text(with_tables(args.doc.read_text(), args.rows))
        return
    from recipes.report import as_markdown, plot, read_rows, table

    rows = read_rows(args.rows)
    if not rows:
        raise SystemExit(f"{args.rows} holds no rows: give the --rows of a run")
    lines = table(rows, args.column, args.latency)
    print(as_markdown(lines))
    if args.plot:
        plot(lines, args.plot)


if __name__ == "__main__":
    main()
