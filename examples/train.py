"""Train a network, original or converted, on an ImageFolder or a data set of torchvision.

    python examples/train.py cifar_resnet20 --data-dir ~/data/cifar10 --ratio 2:1 --out runs/2to1
    python examples/train.py resnet50 --data-dir ~/data/imagenet --size 224 --augment timm --workers 8 --out runs/r50
    torchrun --nproc-per-node 4 -- examples/train.py resnet50 --data-dir ~/data/imagenet ... --log
    python examples/train.py tf_efficientnet_lite0 --data-dir ~/data/cifar10 --size 64 --weights lite0.pth \
        --ratio 2:1 --gradual --epochs 5 --batch-size 32 --lr 0.02 --out runs/lite0
    python examples/train.py cifar_resnet20 --data-dir ~/data/cifar10 --weights runs/1/model.safetensors \
        --plan plan.json --teacher runs/1/model.safetensors --epochs 2 --lr 0.01 --out runs/tuned

The same command resumes a killed run from its last checkpoint, and ends with bitwise equal weights: an update depends
only on the state before it and on (seed, step).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from accelerate import PartialState
from recipes.checkpoint import replacing
from recipes.networks import build
from recipes.pictures import load_data
from recipes.recipe import Recipe
from recipes.training import evaluate, train
from timm.utils import ParseKwargs
from torch import nn

import nmconv


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", help="cifar_resnet20 and the like, a name of timm's or torchvision's, package:function"
    )
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")
    parser.add_argument("--data-dir", type=Path, required=True, help="an ImageFolder with train/ and test/ or val/")
    parser.add_argument("--dataset", default="", help="a data set of torchvision in --data-dir, such as CIFAR10")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, model.safetensors, result.json")
    parser.add_argument("--cache", type=Path, help="folder for the decoded pictures [beside the pictures]")
    parser.add_argument("--images", type=int, default=0, help="pictures to train on, 0 for all [0]")
    parser.add_argument(
        "--held-back", type=int, default=0, help="train pictures to hold back for choices, instead of the test ones [0]"
    )
    parser.add_argument("--size", type=int, help="side of the pictures [32; with --augment timm the model's own]")
    parser.add_argument("--weights", type=Path, help="to start with: a state dict, or what nmconv.save wrote [random]")

    nm = parser.add_argument_group("N:M")
    nm.add_argument("--ratio", default="1:1", help="convolutions to activations [1:1]")
    nm.add_argument(
        "--keep", default="first", help="which activations of a unit stay: first, boundary or spread [first]"
    )
    nm.add_argument("--relocate", action="store_true", help="move kept activations to the ends of their units")
    nm.add_argument("--hoist-padding", action="store_true", help="move padding to each linear run's first convolution")
    nm.add_argument("--plan", type=Path, help="a file of Plan.to_json, instead of a ratio")
    nm.add_argument("--gradual", action="store_true", help="drop activations gradually")
    nm.add_argument(
        "--end", type=float, default=0.6, help="with --gradual: fraction of the training at which they are gone [0.6]"
    )

    parser.add_argument("--teacher", type=Path, help="weights of the network to distil from, as for --weights [none]")
    parser.add_argument("--device", default="", help="cpu, or the best there is")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that decode pictures, with --augment timm [0]"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="to compute with [%(default)s]")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between checkpoints [60]")
    parser.add_argument("--log", action="store_true", help="write for TensorBoard, into --out")

    recipe = parser.add_argument_group("recipe")
    gpu_defaults = {"precision": "bf16"} if torch.cuda.is_available() else {}
    for field in fields(Recipe):
        default = gpu_defaults.get(field.name, field.default)
        recipe.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(default), default=default, help="[%(default)s]"
        )
    return parser.parse_args(argv)


def converted(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """Convert the model by the plan or the ratio of the arguments."""
    if args.plan is not None:
        plan = nmconv.Plan.from_json(args.plan.read_text())
        return nmconv.apply_plan(model, plan, gradual=args.gradual, inplace=True)
    if args.ratio == "1:1":
        return model
    options = {name: getattr(args, name) for name in ("keep", "relocate", "hoist_padding", "gradual")}
    return nmconv.convert(model, args.ratio, **options, inplace=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    result = args.out / "result.json"
    if result.exists():
        print(f"{result} exists: nothing to do")
        return
    torch.set_num_threads(args.threads)
    main_process = PartialState(cpu=args.device == "cpu").is_main_process
    try:
        decode = args.augment != "timm"
        size = args.size or (32 if decode else 0)
        data_options = {"dataset": args.dataset, "held_back": args.held_back, "cache": args.cache, "decode": decode}
        data = load_data(args.data_dir.expanduser(), size, args.images, **data_options)
        classes = len(data.classes)
        model = converted(build(args.model, classes, args.weights, args.seed, **args.model_kwargs), args)
        teacher = args.teacher and build(args.model, classes, args.teacher, **args.model_kwargs)
        args.distill = args.distill or (0.5 if args.teacher else 0.0)
        recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
        options = {"device": args.device, "compiled": args.compile, "workers": args.workers, "every": args.every}
        gradual = {"end": args.end} if args.gradual else None
        log_dir = args.out if args.log else None
        log = train(model, data, recipe, out=args.out, teacher=teacher, gradual=gradual, log_dir=log_dir, **options)
    except (nmconv.NmconvError, ValueError, OSError, ImportError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not main_process:
        return
    nmconv.save(model, args.out / "model.safetensors")
    summary = {"model": args.model, "images": len(data.train), "size": size, "ratio": args.ratio, **asdict(recipe)}
    scores = {"accuracy": evaluate(model, data.test)}
    if data.valid is not None:
        scores["held_back"] = evaluate(model, data.valid)
    with replacing(result) as file:
        file.write(json.dumps({**summary, **scores, **log}, indent=2).encode())
    print(f"accuracy {scores['accuracy']:.2f} % on {len(data.test)} test pictures")


if __name__ == "__main__":
    main()
