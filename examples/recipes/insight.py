"""Measurements inside the study's networks: activation statistics during training, and ensemble members."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import nmconv

from .batches import inputs
from .networks import build
from .pictures import Data
from .trial import Trial, load_or_make

SEEN = 1000  # held-back pictures to measure on
CALIBRATED = 1000  # train pictures to recalibrate the members' norms with
MEMBERS = 24


def insights(trial: Trial, root: Path, rows: Path, work: Path) -> list[dict[str, Any]]:
    """Return the rows of a trained trial's snapshots, read from the folder `rows` or measured and written there."""
    data = trial.data(root)
    result = []
    for epoch in (1, 2, 4, trial.recipe.epochs):
        weights = torch.load(work / trial.name / f"epoch-{epoch}.pt", weights_only=True)
        model = trial.converted(len(data.classes)).eval()
        model.load_state_dict(weights)
        result.append(row(trial, "activations", epoch, rows, lambda model=model: activations(model, data)))
    if trial.ratio == "1:1" and not trial.drop:  # `weights` are now those of the last epoch
        plain = build(trial.model, len(data.classes), **trial.options)
        plain.load_state_dict(weights)
        for slope in (0.1, 0.3):
            measure: Callable[[], Any] = lambda slope=slope: members(plain, data, slope)  # noqa: E731
            result.append(row(trial, f"members {slope}", trial.recipe.epochs, rows, measure))
    return result


def keep_weights(trials: Iterable[Trial], work: Path, out: Path) -> None:
    """Write the state dicts of the networks that have been trained as `MODEL-SEED.safetensors`."""
    out.mkdir(parents=True, exist_ok=True)
    for trial in trials:
        last = work / trial.name / f"epoch-{trial.recipe.epochs}.pt"
        if last.exists():
            weights = {key: value.contiguous() for key, value in torch.load(last, weights_only=True).items()}
            save_file(weights, out / f"{trial.model}-{trial.recipe.seed}.safetensors")


def row(trial: Trial, kind: str, epoch: int, rows: Path, measure: Callable[[], Any]) -> dict[str, Any]:
    """Return a measurement's row, read from the folder `rows` or measured and written there."""
    path = rows / f"{trial.name}-{kind.replace(' ', '-')}-{epoch}.json"
    return load_or_make(
        path, lambda: {"name": trial.name, "trial": asdict(trial), "kind": kind, "epoch": epoch, **measure()}
    )


def activations(model: nn.Module, data: Data) -> dict[str, Any]:
    """Measure the activations by site on held-back pictures, with the gradient of the cross entropy."""
    pictures = data.valid.first(SEEN)
    batches = [
        (inputs(model, images), labels)
        for images, labels in zip(pictures.images.split(250), pictures.labels.split(250), strict=True)
    ]
    stats = nmconv.activation_stats(model, batches, loss=F.cross_entropy)
    columns = ("positive", "sparsity", "rank", "gradient")
    sites = {site.site: {name: round(getattr(site, name), 6) for name in columns} for site in stats.sites}
    share = statistics.fmean(site.rank / site.channels for site in stats.sites)
    dead = sum(len(site.dead) for site in stats.sites)
    return {"sites": sites, "rank_share": share, "dead": dead, "channels": sum(site.channels for site in stats.sites)}


def members(model: nn.Module, data: Data, slope: float) -> dict[str, Any]:
    """Measure the members of the network read as an ensemble at this slope, each with recalibrated norms."""
    pictures = data.valid.first(SEEN)
    calibrated = inputs(model, data.train.first(CALIBRATED).images)
    batch = [(inputs(model, pictures.images), pictures.labels)]
    ensemble = nmconv.ensemble.members(model, batch, slope, n=MEMBERS, recalibrate=calibrated)
    return {
        "slope": slope,
        "kept": ensemble.kept,
        "member_accuracy": [round(100 * each, 3) for each in ensemble.accuracy],
        "disagreement": 100 * ensemble.disagreement,
        "probabilities_accuracy": 100 * ensemble.probabilities_accuracy,
        "logits_accuracy": 100 * ensemble.logits_accuracy,
        "soft_accuracy": 100 * ensemble.soft_accuracy,
        "gap": ensemble.gap,
    }
