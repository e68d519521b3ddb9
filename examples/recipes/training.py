"""The training loop of all examples: on one or many devices, resumable at any moment."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import nmconv

from . import checkpoint
from .batches import Share, batches, in_order, mixed, seeded
from .pictures import Data, Pictures
from .recipe import Recipe

Log = dict[str, Any]
ALONE = Share()


class Wrapped(nn.Module):
    """Wraps the model, since accelerate replaces the forward of the module that it prepares."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        return getattr(output, "logits", output)  # torchvision's GoogLeNet and Inception also return auxiliary logits


def accelerator_for(recipe: Recipe, device: str = "", compiled: bool = False, log: Path | None = None) -> Accelerator:
    """Create an Accelerator for this process. `torchrun` sets the number of processes.

    `device` is "cpu", or "" for the best device.
    """
    AcceleratorState._reset_state()  # it stores one precision per process, and models trained in turn may differ
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision=recipe.precision,
        gradient_accumulation_steps=recipe.accumulate,
        step_scheduler_with_optimizer=False,
        dynamo_backend="inductor" if compiled else "no",
        log_with="tensorboard" if log else None,
        project_dir=log,
    )


def evaluate(
    model: nn.Module, pictures: Pictures, limit: int | None = None, batch_size: int = 250, share: Share = ALONE
) -> float:
    """Return the top-1 accuracy in percent on all pictures or the first `limit`, and leave the model in eval mode.

    With several processes, all must call it, and the accuracy is that on all their pictures.
    """
    model.eval()
    pictures = pictures.first(limit)
    correct = torch.zeros((), device=next(model.parameters()).device)
    with torch.inference_mode():
        for images, labels in in_order(model, pictures, batch_size, share):
            correct += (model(images).argmax(1) == labels).sum()
    if share.processes > 1:
        correct = correct.clone()
        torch.distributed.all_reduce(correct)
    return 100 * float(correct) / len(pictures)


def loss_of(logits: Tensor, labels: Tensor, targets: Tensor | None, recipe: Recipe) -> Tensor:
    """Return the cross entropy with class indices or probabilities; with the teacher's logits as `targets`, mixed with
    the divergence from its softened probabilities (Hinton et al., arXiv 1503.02531)."""
    smoothing = 0.0 if labels.is_floating_point() else recipe.smoothing  # timm's mixup has already smoothed them
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    if targets is None:
        return loss
    student, teacher = (F.log_softmax(x / recipe.temperature, 1) for x in (logits, targets))
    divergence = F.kl_div(student, teacher, log_target=True, reduction="batchmean") * recipe.temperature**2
    return torch.lerp(loss, divergence, recipe.distill)


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    out: Path | None = None,
    teacher: nn.Module | None = None,
    gradual: dict[str, Any] | None = None,
    after_step: Callable[[int, nn.Module], None] | None = None,
    device: str = "cpu",
    compiled: bool = False,
    workers: int = 0,
    probe: int | None = 2000,
    every: float = 60.0,
    log_dir: Path | None = None,
    quiet: bool = False,
) -> Log:
    """Train a model, in place.

    Args:
        model: The model; it is left in eval mode, on the training device. With `recipe.ema`, it is left with the
            average of its weights.
        data: Its train split is used for training; the held-back split, or else the test split, is classified after
            each epoch.
        recipe: The settings.
        out: A folder for checkpoints, written after each epoch and every `every` seconds; a run found there is resumed.
        teacher: The teacher for `recipe.distill`; it is put in eval mode.
        gradual: For a gradual model, options of `nmconv.Gradual`. The model is finished at the end.
        after_step: Called after each update with the number of updates so far and the model.
        device: "cpu", or "" for the best device.
        compiled: Whether to use `torch.compile`.
        workers: Number of processes that decode pictures.
        probe: Number of pictures to classify after each epoch; None for all.
        every: Seconds between checkpoints.
        log_dir: A folder for TensorBoard's files.
        quiet: Print no lines; a terminal still shows the progress bar.

    Returns:
        The `losses` and the `curve` of accuracies (percent, on the `probe` pictures) by epoch, and the `seconds`.

    Raises:
        ValueError: If the recipe is invalid, or the checkpoint is damaged or belongs to another run.
    """
    accelerator = accelerator_for(recipe, device, compiled, log_dir)
    share = Share(accelerator.process_index, accelerator.num_processes, workers)
    recipe.check(len(data.train), share.processes, teacher is not None, accelerator.device)
    data = data.to(accelerator.device)
    run = _Run(model, data, recipe, teacher, gradual, accelerator, out)
    shown = data.valid or data.test
    if log_dir:
        accelerator.init_trackers("tensorboard")
    clock = time.perf_counter()

    def report(message: str) -> None:
        if not quiet:
            accelerator.print(message, flush=True)

    def save_checkpoint() -> None:
        nonlocal clock
        run.log["seconds"] += time.perf_counter() - clock
        clock = time.perf_counter()
        if accelerator.is_main_process:
            run.write()

    steps = recipe.epochs * run.updates
    with torch.random.fork_rng(), progress(accelerator, steps, run.step) as advance:
        while run.step < steps:
            epoch = run.step // run.updates
            epoch_batches = batches(model, data.train, recipe, epoch, run.step % run.updates, share)
            for _ in range(run.step % run.updates, run.updates):
                run.update(epoch_batches, share)
                if after_step is not None:
                    after_step(run.step, model)
                advance(run.accuracy)
                if run.step % run.updates and time.perf_counter() - clock > every:
                    save_checkpoint()
                    report(f"step {run.step} of {steps}, {run.log['seconds']:.0f} s")
            run.log["losses"].append(run.total / run.updates)
            run.log["curve"].append(evaluate(run.shown, shown, probe, share=share))
            run.total = 0.0
            save_checkpoint()
            metrics = {"loss": run.log["losses"][-1], "accuracy": run.log["curve"][-1]}
            if log_dir:
                accelerator.log(metrics, step=run.step)
            summary = f"loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.2f} %, {run.log['seconds']:.0f} s"
            report(f"epoch {epoch + 1} of {recipe.epochs}: {summary}")
    for tracker in accelerator.trackers:
        tracker.finish()
    run.finish()
    model.eval()
    return run.log


class _Run:
    """The state of a training run, which a checkpoint holds."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        recipe: Recipe,
        teacher: nn.Module | None,
        gradual: dict[str, Any] | None,
        accelerator: Accelerator,
        out: Path | None,
    ) -> None:
        model.to(accelerator.device, memory_format=torch.channels_last)  # at least a third faster on a CPU, too
        self.model, self.recipe, self.accelerator = model, recipe, accelerator
        self.teacher = None if teacher is None else teacher.eval().to(accelerator.device)
        self.classes = len(data.classes)
        self.updates = len(data.train) // recipe.batch_size
        steps = recipe.epochs * self.updates
        optimizer = create_optimizer_v2(
            model, opt=recipe.opt, lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay
        )
        self.scheduler, _ = create_scheduler_v2(
            optimizer,
            recipe.schedule,
            num_epochs=recipe.epochs,
            warmup_epochs=recipe.warmup,
            step_on_epochs=False,
            updates_per_epoch=self.updates,
        )
        self.ema = ModelEmaV3(model, decay=recipe.ema) if recipe.ema else None
        followers = [self.ema.module] if self.ema else []
        self.slopes = None if gradual is None else nmconv.Gradual(model, steps, followers=followers, **gradual)
        self.prepared, self.optimizer = accelerator.prepare(Wrapped(model), optimizer)
        self.step, self.total = 0, 0.0  # number of updates, and sum of this epoch's losses
        self.accuracy = 0.0  # on the last batch, in percent
        self.log: Log = {"losses": [], "curve": [], "seconds": 0.0}
        plan = nmconv.get_plan(model)
        self._task = {
            "recipe": asdict(recipe),
            "pictures": len(data.train),
            "gradual": gradual,
            "plan": None if plan is None else hashlib.sha256(plan.to_json().encode()).hexdigest(),
            "weights": checkpoint.digest(model.state_dict()),
            "teacher": None if teacher is None else checkpoint.digest(teacher.state_dict()),
        }
        self._path = None if out is None else out / "checkpoint.pt"
        self._read()

    @property
    def shown(self) -> nn.Module:
        """The model to evaluate."""
        return self.ema.module if self.ema else self.model

    def update(self, parts: Iterator[tuple[Tensor, Tensor]], share: Share) -> None:
        """Update the weights once."""
        recipe, accelerator = self.recipe, self.accelerator
        self.prepared.train()
        for part in range(recipe.accumulate):
            images, labels = next(parts)
            numbers = (self.step, part, share.rank)
            images, mixed_labels = mixed(images, labels, recipe, self.classes, *numbers)
            with seeded(recipe.seed, 1, *numbers), accelerator.accumulate(self.prepared):  # seeds dropout and the like
                with torch.no_grad(), accelerator.autocast():
                    targets = None if self.teacher is None else self.teacher(images).float()
                logits = self.prepared(images)
                loss = loss_of(logits, mixed_labels, targets, recipe)
                accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.total += float(accelerator.reduce(loss.detach(), "mean")) / recipe.accumulate
            self.accuracy = 100 * float((logits.argmax(1) == labels).float().mean())
        self.step += 1
        self.scheduler.step_update(self.step)
        if self.slopes is not None:
            self.slopes.step_update(self.step)
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)

    def write(self) -> None:
        """Write the checkpoint if there is a folder for it."""
        if self._path is not None:
            state = {name: part.state_dict() for name, part in self._parts().items()}
            checkpoint.write(
                self._path, {"task": self._task, "step": self.step, "total": self.total, "log": self.log, **state}
            )

    def finish(self) -> None:
        """Bring the model into its final state."""
        if self.slopes is not None:
            self.slopes.finish()
        if self.ema is not None:
            self.model.load_state_dict(self.ema.module.state_dict())

    def _read(self) -> None:
        saved = None if self._path is None else checkpoint.read(self._path, self.accelerator.device)
        if saved is None:
            return
        if saved["task"] != self._task:
            changed = sorted(key for key, value in self._task.items() if saved["task"].get(key) != value)
            raise ValueError(f"{self._path} is of another run (other {', '.join(changed)}): give another folder")
        for name, part in self._parts().items():
            part.load_state_dict(saved[name])
        self.step, self.total, self.log = saved["step"], saved["total"], saved["log"]

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        optional = {"ema": self.ema and self.ema.module, "slopes": self.slopes, "scaler": self.accelerator.scaler}
        return parts | {name: part for name, part in optional.items() if part is not None}


@contextmanager
def progress(accelerator: Accelerator, steps: int, step: int) -> Iterator[Callable[[float], None]]:
    """Show a progress bar with the batch accuracy and the remaining time, if stdout is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    hidden = not (accelerator.is_main_process and sys.stdout.isatty())
    with Progress(*columns, *times, disable=hidden) as bar:
        task = bar.add_task("train", total=steps, completed=step)
        yield lambda accuracy: bar.update(task, advance=1, description=f"train: {accuracy:4.1f} %")
