"""One trial of a sweep: train and measure a configuration, and keep the result as a row on disk."""

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
    """All settings that determine a trial's row, besides the machine."""

    model: str = "cifar_resnet20"
    options: dict[str, Any] = field(default_factory=dict)  # arguments of the model's builder, such as {"width": 0.5}
    ratio: str = "1:1"
    keep: str = "boundary"  # the names of committed rows depend on this default
    relocate: bool = False
    hoist_padding: bool = False
    gradual: bool = False
    drop: tuple[str, ...] = ()  # instead of a ratio: patterns of the activations to drop
    route: str = ""  # from `weights` to that ratio: one of `routes.ROUTES`; "" trains from scratch
    weights: str = ""  # a file of docs/weights; "" initializes from the recipe's seed
    slope: float = 0.0  # slope of the Leaky ReLUs that replace all ReLUs; 0 keeps the ReLUs
    recipe: Recipe = field(default_factory=Recipe)  # its seed also initializes the weights
    dataset: str = "cifar10"  # a folder within the data folder
    size: int = 32
    images: int = 0  # 0 for all that are not held back
    held_back: int = 5000

    @property
    def name(self) -> str:
        """A prefix of the SHA-256 of all non-default values, so that new fields do not change existing names."""
        non_default = json.dumps(changes(asdict(self), asdict(Trial())), sort_keys=True)
        return hashlib.sha256(non_default.encode()).hexdigest()[:12]

    def data(self, root: Path) -> Data:
        return load_data(root / self.dataset, self.size, self.images, held_back=self.held_back)

    def network(self, classes: int) -> nn.Module:
        """Build the network before anything is dropped."""
        weights = WEIGHTS / self.weights if self.weights else None
        model = build(self.model, classes, weights, self.recipe.seed, **self.options)
        if self.slope:
            for path, module in list(model.named_modules()):
                if isinstance(module, nn.ReLU):
                    model.set_submodule(path, nn.LeakyReLU(self.slope, module.inplace))
        return model

    def converted(self, classes: int) -> nn.Module:
        """Build the network in its final structure, but not trained."""
        model = self.network(classes)
        plan = self.plan(model)
        return nmconv.apply_plan(model, plan, inplace=True) if plan.changes else model

    def plan(self, model: nn.Module) -> nmconv.Plan:
        """Return the plan of the activations to drop."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nmconv.NoEffectWarning)
            options = {name: getattr(self, name) for name in ("keep", "relocate", "hoist_padding")}
            plan = nmconv.make_plan(model, self.ratio, **options)
        dropped = [site.id for site in plan.sites if any(fnmatch(site.id, pattern) for pattern in self.drop)]
        return plan.edit(dict.fromkeys(dropped, "drop"))


def changes(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration that differ from the defaults."""
    nested = {"recipe": changes(values["recipe"], defaults["recipe"])} if "recipe" in values else {}
    return {key: value for key, value in (values | nested).items() if value != defaults[key] and value != {}}


def trial_from(values: dict[str, Any]) -> Trial:
    """Return the trial of which `asdict(trial)` is given."""
    return Trial(**{**values, "drop": tuple(values["drop"]), "recipe": Recipe(**values["recipe"])})


def run(trial: Trial, root: Path, rows: Path, work: Path, device: str = "cpu") -> dict[str, Any]:
    """Return the trial's row: read it from the folder `rows`, or train, measure and write it there.

    Checkpoints and the network after each epoch go to `work / trial.name`. An interrupted trial is resumed.
    """
    return load_or_make(rows / f"{trial.name}.json", lambda: trained(trial, root, work, device))


def load_or_make(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the row in a file; if the file does not exist, make and write it."""
    if path.exists():
        return json.loads(path.read_text())
    row = make()
    with replacing(path) as file:
        file.write((json.dumps(row, indent=1) + "\n").encode())
    return row


def trained(trial: Trial, root: Path, work: Path, device: str) -> dict[str, Any]:
    """Train a trial and return its row."""
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
    return {"name": trial.name, "trial": asdict(trial), **measured(model, data, plan), **log, **provenance()}


def measured(model: nn.Module, data: Data, plan: nmconv.Plan) -> dict[str, Any]:
    """Measure the accuracies in percent on the whole held-back and test splits, and the cost of the network."""
    image = inputs(model, data.test.first(1).images)
    stats = nmconv.activation_stats(model, image.repeat(2, 1, 1, 1))
    return {
        "held_back": None if data.valid is None else evaluate(model, data.valid),
        "test": evaluate(model, data.test),
        "convolutions": plan.counts.convs,
        "activations": plan.counts.activations_after,
        "activation_values": sum(site.values for site in stats.sites) // 2,  # per picture
        "multiply_adds": multiply_adds(model, image),
        "parameters": sum(each.numel() for each in model.parameters()),
    }


def provenance() -> dict[str, Any]:
    """Describe the code and the machine."""
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
