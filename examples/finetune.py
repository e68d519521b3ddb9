"""Train or fine-tune a network on an ImageFolder, with optional distillation: the training behind our tables.

    python examples/finetune.py resnet20 --data-dir ~/data/cifar10 --out runs/resnet20
    python examples/finetune.py tf_efficientnet_lite0 --data-dir ~/data/cifar10 --out runs/lite0 \
        --weights efficientnet_lite0.pth --size 64 --images 10000 --epochs 5 --batch-size 32 --lr 0.02
    python examples/finetune.py resnet20 --data-dir ~/data/cifar10 --out runs/fitted --weights fitted.safetensors \
        --teacher runs/resnet20/model.safetensors --epochs 2 --lr 0.01
    python examples/finetune.py resnet20 --data-dir ~/data/cifar10 --out runs/mixed --mixup 0.2 --cutmix 1 --epochs 100

A run that was killed, at any moment, goes on where its last checkpoint left it when the same command is given again,
and ends with the very same weights: a step depends on the state before it and on (seed, step), on nothing else.
Other scripts call `build`, `load_data`, `train` and `evaluate` with a model already in hand.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from timm.data import Mixup
from timm.models import load_state_dict
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

import nmconv

CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}


@dataclass(frozen=True)
class Split:
    """Pictures, uint8 of shape (n, size, size, 3), and their class numbers."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Data:
    """Every class is equally frequent in any first n pictures of a split."""

    train: Split
    test: Split
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """All that decides what a model becomes, besides its weights, its teacher and the pictures."""

    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    warmup: float = 0.5  # epochs, of the above
    seed: int = 0  # of the order of the pictures and their augmentation
    distill: float = 0.0  # weight of the teacher's answers in the loss; the labels have the rest
    temperature: float = 4.0
    mixup: float = 0.0  # alpha of timm's mixup, of half of the batches where CutMix is on too
    cutmix: float = 0.0  # alpha of timm's CutMix
    bf16: bool = False  # forward passes of training in bfloat16 where autocast allows


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its place at `path` once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# The pictures


def load_data(root: Path, size: int = 32, images: int = 0, cache: Path | None = None) -> Data:
    """The ImageFolder's train/ and test/ (or val/) at `size` pixels; `images` of the train pictures, 0 for all.

    The choice of pictures is always the same, a smaller one lies within a larger one. Everything is decoded once, into
    two .npy files in the folder `cache`: without, beside the pictures.
    """
    held_out = next((name for name in ("test", "val") if (root / name).is_dir()), "test")
    folders = [ImageFolder(str(root / name)) for name in ("train", held_out)]
    if folders[0].classes != folders[1].classes:
        raise ValueError(f"{root}: train/ and {held_out}/ do not have the same classes")
    splits = []
    for folder, limit in zip(folders, (images, 0), strict=True):
        rows = balanced(np.array(folder.targets))[: limit or None]
        pixels = decoded(folder, size, cache or root)[rows]
        splits.append(Split(torch.from_numpy(pixels), torch.tensor(folder.targets)[rows]))
    return Data(train=splits[0], test=splits[1], classes=tuple(folders[0].classes))


def balanced(labels: np.ndarray) -> np.ndarray:
    """A fixed order in which the classes take turns."""
    shuffled = np.random.default_rng(0).permutation(len(labels))
    turn = np.empty(len(labels), dtype=int)
    for label in np.unique(labels):
        own = shuffled[labels[shuffled] == label]
        turn[own] = np.arange(len(own))
    return np.lexsort((labels, turn))


def decoded(folder: ImageFolder, size: int, cache: Path) -> np.ndarray:
    """All pictures of the folder, short side to `size`, then the middle."""
    root = Path(folder.root)
    files = [Path(path) for path, _ in folder.samples]
    known = "\n".join(f"{file.relative_to(root)} {file.stat().st_size}" for file in files)
    path = cache / f"{root.name}-{size}px-{zlib.crc32(known.encode()):08x}.npy"
    if not path.exists():
        pixels = np.empty((len(files), size, size, 3), dtype=np.uint8)
        for row, name in zip(pixels, files, strict=True):
            with Image.open(name) as opened:
                picture = opened.convert("RGB")
            scale = size / min(picture.size)
            width, height = (max(size, round(side * scale)) for side in picture.size)
            left, top = (width - size) // 2, (height - size) // 2
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
            row[:] = np.asarray(picture.crop((left, top, left + size, top + size)))
        with replacing(path) as file:
            np.save(file, pixels)
    return np.load(path, mmap_mode="r")


def inputs(model: nn.Module, images: Tensor) -> Tensor:
    """What the model takes: floats, channels last in memory, with its own mean and deviation (timm's configuration)."""
    config = getattr(model, "pretrained_cfg", CIFAR)
    mean, std = (torch.tensor(config[key], dtype=torch.float32) * 255 for key in ("mean", "std"))
    pixels = ((images.float() - mean) / std).permute(0, 3, 1, 2)
    return pixels.to(next(model.parameters()).device)


def batches(split: Split, recipe: Recipe, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The epoch's batches from number `start` on, each picture shifted by up to an eighth of its side, or mirrored."""
    count, size = split.images.shape[:2]
    rng = np.random.default_rng((recipe.seed, epoch))
    order = torch.from_numpy(rng.permutation(count))
    shift = torch.from_numpy(rng.integers(-(size // 8), size // 8, (2, count, 1), endpoint=True))
    mirror = torch.from_numpy(rng.random((count, 1)) < 0.5)
    side = torch.arange(size)
    for i in range(start, count // recipe.batch_size):
        rows = order[i * recipe.batch_size : (i + 1) * recipe.batch_size]
        y, x = (side + shift[:, rows]).clamp(0, size - 1)
        x = torch.where(mirror[rows], x.flip(1), x)
        yield split.images[rows[:, None, None], y[:, :, None], x[:, None, :]], split.labels[rows]


def mixed(images: Tensor, labels: Tensor, recipe: Recipe, classes: int, step: int) -> tuple[Tensor, Tensor]:
    """The batch as timm's mixup and CutMix leave it, with the classes' shares for labels; as it is where both are off.

    timm draws from numpy's global state: here it depends on (seed, step) alone, and the caller's is put back.
    """
    if not recipe.mixup and not recipe.cutmix:
        return images, labels
    mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=classes)
    images, state = images.float(), np.random.get_state()
    try:
        np.random.seed((recipe.seed * 1_000_003 + step) % 2**32)
        _, shares = mix(images.permute(0, 3, 1, 2), labels)  # in place
    finally:
        np.random.set_state(state)
    return images, shares


# The network


def resnet20(classes: int) -> ResNet:
    """The CIFAR network of *Deep Residual Learning*, with 1x1 projections: timm's ResNet behind a 3x3 convolution."""
    net = ResNet(BasicBlock, (3, 3, 3), classes, channels=(16, 32, 64), stem_type="deep", stem_width=8)
    net.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    net.maxpool = net.layer4 = nn.Identity()
    net.init_weights()
    net.pretrained_cfg = CIFAR
    return net


def build(name: str, classes: int, weights: Path | None = None, seed: int = 0) -> nn.Module:
    """`resnet20` or a timm model: with weights drawn from the seed, or with those of a file.

    The file may be what `nmconv.save` wrote: the network is then converted, merged and fitted as it says. Or it is a
    state dict of the network as built, .pth or .safetensors, perhaps under other names in the same order, and perhaps
    for other classes: then the classifier is a new one, and starts at zero.
    """
    torch.manual_seed(seed)
    model = resnet20(classes) if name == "resnet20" else timm.create_model(name, num_classes=classes)
    if weights is None:
        return model
    if weights.suffix == ".safetensors":
        with safe_open(weights, "pt") as file:
            ours = "nmconv" in (file.metadata() or {})
        if ours:
            return nmconv.load(model, weights, inplace=True)
    own, state = model.state_dict(), load_state_dict(str(weights))
    if state.keys() != own.keys():
        state = dict(zip(own, state.values(), strict=True))
    head = next(path for path, module in model.named_modules() if module is model.get_classifier())
    new = [key for key in own if key.startswith(f"{head}.") and own[key].shape != state[key].shape]
    model.load_state_dict(state | {key: torch.zeros_like(own[key]) for key in new})
    return model


def evaluate(model: nn.Module, split: Split, limit: int | None = None, batch_size: int = 250) -> float:
    """Top-1 accuracy in percent, of all pictures or the first `limit`; leaves the model in eval mode."""
    model.eval()
    images, labels = split.images[:limit], split.labels[:limit]
    right = 0
    with torch.inference_mode():
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            right += int((model(inputs(model, x)).argmax(1).cpu() == y).sum())
    return 100 * right / len(labels)


def loss_of(logits: Tensor, labels: Tensor, targets: Tensor | None, recipe: Recipe) -> Tensor:
    """Cross entropy with class numbers or shares; with the teacher's logits as `targets`, partly the divergence from
    its softened answers."""
    loss = F.cross_entropy(logits, labels)
    if targets is None:
        return loss
    student, teacher = (F.log_softmax(x / recipe.temperature, 1) for x in (logits, targets))
    apart = F.kl_div(student, teacher, log_target=True, reduction="batchmean") * recipe.temperature**2
    return torch.lerp(loss, apart, recipe.distill)


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    out: Path | None = None,
    teacher: nn.Module | None = None,
    probe: int | None = 2000,
    every: float = 60.0,
) -> dict[str, Any]:
    """Train the model, in place, with Nesterov's SGD under a cosine.

    Args:
        model: Any; it is left in eval mode.
        data: Its train split is learnt from.
        recipe: How.
        out: A folder for checkpoints, one after each epoch and each `every` seconds; a run found there goes on.
        teacher: What `recipe.distill` refers to; it is put into eval mode.
        probe: How many of the test pictures are classified after each epoch; None for all.
        every: See `out`.

    Returns:
        The `losses` and the `curve` of accuracies (percent, of the `probe` pictures), by epoch; and the `seconds`.
    """
    if (teacher is None) != (recipe.distill == 0):
        raise ValueError("distillation needs both: a teacher, and a weight above 0 in the recipe")
    updates = len(data.train.labels) // recipe.batch_size
    if updates == 0:
        raise ValueError(f"{len(data.train.labels)} pictures do not fill a batch of {recipe.batch_size}")
    if recipe.batch_size % 2 and (recipe.mixup or recipe.cutmix):
        raise ValueError(f"timm mixes pairs of pictures: an even batch size, not {recipe.batch_size}")
    model.to(memory_format=torch.channels_last)  # on a CPU a third to three quarters more pictures a second
    device = next(model.parameters()).device
    optimizer = create_optimizer_v2(model, opt="sgd", lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    times = {"num_epochs": recipe.epochs, "warmup_epochs": recipe.warmup, "updates_per_epoch": updates}
    scheduler, _ = create_scheduler_v2(optimizer, "cosine", step_on_epochs=False, **times)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    task = {"recipe": asdict(recipe), "pictures": list(data.train.images.shape)}
    log: dict[str, Any] = {"losses": [], "curve": [], "seconds": 0.0}
    step, total = 0, 0.0  # updates made, and the sum of this epoch's losses
    checkpoint = None if out is None else out / "checkpoint.pt"
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        if saved["task"] != task:
            raise ValueError(f"{checkpoint} is of another run: {saved['task']} instead of {task}")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        step, total, log = saved["step"], saved["total"], saved["log"]
    clock = time.perf_counter()

    def keep() -> None:
        nonlocal clock
        now = time.perf_counter()
        log["seconds"] += now - clock
        clock = now
        if checkpoint is not None:
            state = {name: part.state_dict() for name, part in parts.items()}
            with replacing(checkpoint) as file:
                torch.save({"task": task, "step": step, "total": total, "log": log, **state}, file)

    if teacher is not None:
        teacher.eval()
    with torch.random.fork_rng():
        while step < recipe.epochs * updates:
            model.train()
            for images, labels in batches(data.train, recipe, step // updates, step % updates):
                images, labels = mixed(images, labels, recipe, len(data.classes), step)
                torch.manual_seed(recipe.seed * 1_000_003 + step)  # for dropout and the like
                with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
                    with torch.no_grad():
                        targets = None if teacher is None else teacher(inputs(teacher, images)).float()
                    logits = model(inputs(model, images)).float()
                loss = loss_of(logits, labels.to(device), targets, recipe)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                scheduler.step_update(step)
                total += loss.item()
                if step % updates and time.perf_counter() - clock > every:
                    keep()
                    print(f"step {step} of {recipe.epochs * updates}, {log['seconds']:.0f} s", flush=True)
            log["losses"].append(total / updates)
            log["curve"].append(evaluate(model, data.test, probe))
            total = 0.0
            keep()
            numbers = f"loss {log['losses'][-1]:.4f}, accuracy {log['curve'][-1]:.2f} %, {log['seconds']:.0f} s"
            print(f"epoch {step // updates} of {recipe.epochs}: {numbers}", flush=True)
    model.eval()
    return log


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="resnet20, or a timm model")
    parser.add_argument("--data-dir", type=Path, required=True, help="an ImageFolder with train/ and test/ or val/")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, model.safetensors, result.json")
    parser.add_argument("--cache", type=Path, help="folder for the decoded pictures [beside the pictures]")
    parser.add_argument("--images", type=int, default=0, help="train pictures, 0 for all [0]")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures [32]")
    parser.add_argument("--weights", type=Path, help="to start with: a state dict, or what nmconv.save wrote [random]")
    parser.add_argument("--teacher", type=Path, help="weights of the network to distil from, as for --weights [none]")
    parser.add_argument("--distill", type=float, default=0.5, help="weight of the teacher in the loss [0.5]")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 where autocast allows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="to compute with [%(default)s]")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between checkpoints [60]")
    for field in fields(Recipe):
        if field.name not in ("distill", "bf16"):
            flag = f"--{field.name.replace('_', '-')}"
            parser.add_argument(flag, type=type(field.default), default=field.default, help="[%(default)s]")
    return parser.parse_args()


def main() -> None:
    args = parse()
    result = args.out / "result.json"
    if result.exists():
        raise SystemExit(f"{result} is there: nothing to do")
    torch.set_num_threads(args.threads)
    data = load_data(args.data_dir.expanduser(), args.size, args.images, args.cache)
    classes = len(data.classes)
    model = build(args.model, classes, args.weights, args.seed)
    teacher = args.teacher and build(args.model, classes, args.teacher)
    args.distill = args.distill if args.teacher else 0.0
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
    log = train(model, data, recipe, out=args.out, teacher=teacher, every=args.every)
    accuracy = evaluate(model, data.test)
    nmconv.save(model, args.out / "model.safetensors")
    summary = {"model": args.model, "images": len(data.train.labels), "size": args.size, **asdict(recipe)}
    with replacing(result) as file:
        file.write(json.dumps({**summary, "accuracy": accuracy, **log}, indent=2).encode())
    print(f"accuracy {accuracy:.2f} % on {len(data.test.labels)} test pictures")


if __name__ == "__main__":
    main()
