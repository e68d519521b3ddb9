"""The trials behind docs/study.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from .recipe import Recipe
from .routes import ROUTES
from .trial import Trial

RECIPE = Recipe(epochs=8, lr=0.4, precision="bf16")
BLOCKS = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]

# A unit ends at an addition, so that a block of two convolutions is either 2:1 or 1:1. For other ratios, the
# activations to drop are listed here: those after additions first.
THREE_TO_TWO = tuple(f"{block}.act2#1" for block in BLOCKS[::2])
FOUR_TO_ONE = ("layer*.act2#1", *(f"{block}.act1#1" for block in BLOCKS[::2]))

RATIOS = {
    "1:1": Trial(recipe=RECIPE),
    "2:1 first": Trial(ratio="2:1", keep="first", recipe=RECIPE),
    "2:1 boundary": Trial(ratio="2:1", keep="boundary", recipe=RECIPE),
    "2:1 boundary, hoisted": Trial(ratio="2:1", keep="boundary", hoist_padding=True, recipe=RECIPE),
    "Leaky ReLU 0.1": Trial(slope=0.1, recipe=RECIPE),
    "3:2 first": Trial(drop=THREE_TO_TWO, recipe=RECIPE),
    "4:1 first": Trial(drop=FOUR_TO_ONE, recipe=RECIPE),
}


def changed(trial: Trial, **recipe: object) -> Trial:
    """Return the trial with some fields of its recipe changed."""
    return replace(trial, recipe=replace(trial.recipe, **recipe))


def learning_rates() -> list[Trial]:
    """Return the trials that choose the learning rate: by the mean held-back accuracy of three networks."""
    trials = [replace(RATIOS[name], images=20_000) for name in ("1:1", "2:1 first", "2:1 boundary")]
    return [changed(trial, epochs=3, lr=lr, seed=100) for lr in (0.1, 0.05, 0.2, 0.4) for trial in trials]


def ratios(seeds: int = 3) -> list[Trial]:
    """Return ResNet-20 at six ratios of convolutions to activations."""
    return [changed(trial, seed=seed) for seed in range(seeds) for trial in RATIOS.values()]


def headline() -> list[Trial]:
    """Return three more seeds of 1:1 and of the best N:M, chosen on the pictures held back."""
    return [changed(RATIOS[name], seed=seed) for seed in (3, 4, 5) for name in ("1:1", "3:2 first")]


ROUTE_RECIPE = Recipe(epochs=3, lr=0.05, warmup=0.1, distill=0.5, precision="bf16")


def routes(keep: str, seeds: Sequence[int] = (0, 1, 2)) -> list[Trial]:
    """Return a trained ResNet-20 converted to 2:1 by each route, and the original trained as long."""
    trials = []
    for seed in seeds:
        common = Trial(weights=f"cifar_resnet20-{seed}.safetensors", recipe=replace(ROUTE_RECIPE, seed=seed))
        for route in ROUTES:
            half = {} if route == "longer" else {"ratio": "2:1", "keep": keep}
            trials.append(replace(common, route=route, **half))
    return trials


def long() -> list[Trial]:
    """Return the original ResNet-20 trained longer, from which the routes start."""
    return [changed(RATIOS["1:1"], epochs=30, lr=0.2, seed=seed) for seed in range(3)]


SIZES = {
    "ResNet-8": {"model": "cifar_resnet8"},
    "ResNet-32": {"model": "cifar_resnet32"},
    "ResNet-20, half as wide": {"options": {"width": 0.5}},
}


def sizes(seeds: int = 2) -> list[Trial]:
    """Return ResNets of other depths and widths at 1:1 and 2:1."""
    return [
        changed(replace(RATIOS[ratio], **size), seed=seed)
        for seed in range(seeds)
        for size in SIZES.values()
        for ratio in ("1:1", "2:1 first")
    ]


# One short run for each family of the paper. AlexNet has no norms, and diverges at a higher learning rate.
SHORT = Recipe(epochs=3, lr=0.1, precision="bf16")
FAMILIES = {
    "AlexNet": {"model": "cifar_alexnet", "recipe": replace(SHORT, lr=0.02)},
    "VGG-11-BN": {"model": "cifar_vgg11_bn", "recipe": SHORT},
    "MobileNetV2": {"model": "cifar_mobilenetv2", "recipe": SHORT, "images": 20_000},
    "DenseNet-BC-100": {"model": "cifar_densenet", "recipe": SHORT, "images": 20_000},
    "Inception": {"model": "cifar_inception", "recipe": SHORT, "images": 20_000},
}


def families() -> list[Trial]:
    """Return the other families at 1:1, and at 2:1 with either `keep`; of DenseNet, the slowest, with the default only.

    Inception's branches hold one activation each: a plan by hand drops those of the 1x1 convolutions.
    """
    trials = []
    for name, family in FAMILIES.items():
        ends = [{"ratio": "2:1", "keep": keep} for keep in ("first", "boundary")]
        if name == "DenseNet-BC-100":
            ends = ends[:1]
        halves = [{"drop": ("*.one:relu#1",)}] if name == "Inception" else ends
        trials += [Trial(**family), *(Trial(**family, **half) for half in halves)]
    return trials


def with_insights() -> list[Trial]:
    """Return the trials whose activations and members are measured."""
    return [trial for trial in ratios() if not trial.drop and not trial.hoist_padding]


STUDIES = {
    "learning-rates": learning_rates,
    "ratios": ratios,
    "headline": headline,
    "long": long,
    "sizes": sizes,
    "families": families,
    "routes-boundary": partial(routes, "boundary"),
    "routes-first": partial(routes, "first"),
}
