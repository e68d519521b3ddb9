"""One trial of a sweep: a configuration, trained and measured, and its row on disk."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import nmconv

from .batches import inputs
from .checkpoint import replacing
from .cost import multiply_adds
from .networks import build
from .pictures import Data, load_data
from .recipe import Recipe
from .routes import ROUTES, Start
from .training import evaluate, train

WEIGHTS = Path(__file__).resolve().parents[2] / "docs" / "weights"


@dataclass(frozen=True)
class Trial:
    """All that decides a trial's row, but for the machine."""

    model: str = "cifar_resnet20"
    options: dict[str, Any] = field(default_factory=dict)  # of what builds the model, such as {"width": 0.5}
    ratio: str = "1:1"
    keep: str = "boundary"
    relocate: bool = False
    gradual: bool = False
    drop: tuple[str, ...] = ()  # instead of a ratio: patterns of the activations that go
    route: str = ""  # from `weights` to that: one of `routes.ROUTES`; "" trains from the start
    weights: str = ""  # a file of docs/weights; "" draws new ones from the recipe's seed
    slope: float = 0.0  # of Leaky ReLUs in place of all ReLUs
    recipe: Recipe = field(default_factory=Recipe)  # its seed draws the weights, too
    dataset: str = "cifar10"  # a folder below the folder of the data
    size: int = 32
    images: int = 0  # 0 for all that are not held back
    held_back: int = 5000

    @property
    def name(self) -> str:
        """The start of the SHA-256 of what is not as by default, so that new fields change no name."""
        told = json.dumps(changes(asdict(self), asdict(Trial())), sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    def data(self, root: Path) -> Data:
        return load_data(root / self.dataset, self.size, self.images, held_back=self.held_back)

    def network(self, classes: int) -> nn.Module:
        """As it is before anything is dropped."""
        weights = WEIGHTS / self.weights if self.weights else None
        model = build(self.model, classes, weights, self.recipe.seed, **self.options)
        if self.slope:
            for path, module in list(model.named_modules()):
                if isinstance(module, nn.ReLU):
                    model.set_submodule(path, nn.LeakyReLU(self.slope, module.inplace))
        return model

    def converted(self, classes: int) -> nn.Module:
        """As it is when its training has ended, but for its weights."""
        model = self.network(classes)
        plan = self.plan(model)
        return nmconv.apply_plan(model, plan, inplace=True) if plan.changes else model

    def plan(self, model: nn.Module) -> nmconv.Plan:
        """What is dropped."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nmconv.NoEffectWarning)
            plan = nmconv.make_plan(model, self.ratio, keep=self.keep, relocate=self.relocate)
        gone = [site.id for site in plan.sites if any(fnmatch(site.id, pattern) for pattern in self.drop)]
        return plan.edit(dict.fromkeys(gone, "drop"))


def changes(told: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration differs from another one."""
    nested = {"recipe": changes(told["recipe"], usual["recipe"])} if "recipe" in told else {}
    return {key: value for key, value in (told | nested).items() if value != usual[key] and value != {}}


def trial_from(told: dict[str, Any]) -> Trial:
    """What `asdict(trial)` was made of."""
    return Trial(**{**told, "drop": tuple(told["drop"]), "recipe": Recipe(**told["recipe"])})


def run(trial: Trial, root: Path, rows: Path, work: Path, device: str = "cpu") -> dict[str, Any]:
    """The trial's row: from the folder `rows`, or else trained, measured, and written there.

    Checkpoints and the network after each epoch go to `work / trial.name`; a trial that was stopped goes on.
    """
    return kept(rows / f"{trial.name}.json", lambda: trained(trial, root, work, device))


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row in a file; made and written there if there is none."""
    if path.exists():
        return json.loads(path.read_text())
    row = make()
    with replacing(path) as file:
        file.write((json.dumps(row, indent=1) + "\n").encode())
    return row


def trained(trial: Trial, root: Path, work: Path, device: str) -> dict[str, Any]:
    """Train a trial, and measure what comes of it."""
    out = work / trial.name
    data = trial.data(root)
    model = trial.network(len(data.classes))
    plan = trial.plan(model)
    updates = len(data.train) // trial.recipe.batch_size

    def snapshot(step: int, model: nn.Module) -> None:
        if step % updates == 0:
            with replacing(out / f"epoch-{step // updates}.pt") as file:
                torch.save(model.state_dict(), file)

    if trial.route:
        model, log = ROUTES[trial.route](Start(model, plan, data, trial.recipe, out, device))
    else:
        if plan.changes:
            model = nmconv.apply_plan(model, plan, gradual=trial.gradual, inplace=True)
        gradual = {} if trial.gradual else None
        log = train(model, data, trial.recipe, out=out, gradual=gradual, after_step=snapshot, device=device)
    return {"name": trial.name, "trial": asdict(trial), **measured(model, data, plan), **log, **made_on()}


def measured(model: nn.Module, data: Data, plan: nmconv.Plan) -> dict[str, Any]:
    """Accuracies in percent on all pictures held back and all of the test set, and what the network costs."""
    image = inputs(model, data.test.first(1).images)
    stats = nmconv.activation_stats(model, image.repeat(2, 1, 1, 1))
    return {
        "held_back": None if data.valid is None else evaluate(model, data.valid),
        "test": evaluate(model, data.test),
        "convolutions": plan.counts.convs,
        "activations": plan.counts.activations_after,
        "activation_values": sum(site.values for site in stats.sites) // 2,  # of one picture
        "multiply_adds": multiply_adds(model, image),
        "parameters": sum(each.numel() for each in model.parameters()),
    }


def made_on() -> dict[str, Any]:
    """The code and the machine."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return {
        "commit": commit,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "when": time.strftime("%Y-%m-%d"),
    }
