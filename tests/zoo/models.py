"""timm's and torchvision's models for the tests: how to build one, what to feed it, and the check that judges it.

A name is ``timm/resnet18`` or ``torchvision/resnet18``.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from oracle import assert_same, dropped
from torch import nn

import nmconv

RATIOS = ("2:1", "3:2", "3:1", "4:1")
# torchvision reads numbers from tensors while it builds these.
NOT_ON_META = frozenset(
    f"torchvision/regnet_{kind}_{size}gf"
    for kind, sizes in (("x", "16 1_6 32 3_2 400 800 8"), ("y", "128 16 1_6 32 3_2 400 800 8"))
    for size in sizes.split()
) | {f"torchvision/regnet_{kind}_{size}mf" for kind in "xy" for size in (400, 800)}
HERE = Path(__file__).parent
# A few of every kind, for the quick tests.
FEW = (
    "timm/hrnet_w18_small",
    "timm/mobilenetv3_small_050",
    "timm/resnet18",
    "timm/resnetv2_18",
    "torchvision/efficientnet_b0",
    "torchvision/googlenet",
)
_SIZES = (64, 96, 128, None)  # tried in turn; None is the model's own


def all_names() -> list[str]:
    """Every model of both zoos, torchvision's quantized ones aside (their convolutions are no floating-point ones)."""
    vision = [name for name in torchvision.models.list_models() if not name.startswith("quantized")]
    return [f"torchvision/{name}" for name in vision] + [f"timm/{name}" for name in timm.list_models()]


def one_of_each_file() -> list[str]:
    """One model of every timm file that has sites, the smallest, and one of every family of torchvision's."""
    return (HERE / "one_of_each_file.txt").read_text().split()


def files_without_sites() -> list[str]:
    """The timm files none of whose models has an activation that belongs to a convolution."""
    return (HERE / "files_without_sites.txt").read_text().split()


def file_of(name: str) -> str:
    """The timm file a model is defined in."""
    from timm.models._registry import _model_to_module

    return _model_to_module[name.removeprefix("timm/")]


def build(name: str, device: str = "cpu") -> nn.Module:
    """The model with random weights."""
    library, _, model = name.partition("/")
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")
        if library == "timm":
            return timm.create_model(model)
        builder = torchvision.models.get_model_builder(model)
        takes = inspect.signature(builder).parameters
        options: dict[str, Any] = {"weights_backbone": None} if "weights_backbone" in takes else {}
        if "detection" in builder.__module__ and "ssd" not in model:
            options |= {"min_size": 96, "max_size": 128}
        if model in ("googlenet", "inception_v3"):
            options["init_weights"] = False  # scipy's truncated normal takes a minute
        return builder(weights=None, **options)


def to_plan(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model for planning, on the meta device where that will do, and what it is called with if not a batch."""
    model = build(name, "cpu" if name in NOT_ON_META else "meta")
    if is_detector(model):  # data decide what it does
        model = build(name)
    asked = is_detector(model) or "optical_flow" in type(model).__module__
    return model, {"example_inputs": next(inputs(model))} if asked else {}


def is_detector(model: nn.Module) -> bool:
    """Whether the model takes a list of images, and targets in train mode."""
    return type(model).__module__.startswith("torchvision.models.detection")


def inputs(model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Arguments to try in turn, smallest first."""
    kind = type(model).__module__
    if is_detector(model):
        yield ([torch.rand(3, 96, 96), torch.rand(3, 80, 96)],)
    elif "optical_flow" in kind:
        yield (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    elif "torchvision.models.video" in kind:
        yield (torch.rand(2, 3, 16, 64, 64),)
        yield (torch.rand(1, 3, 16, 224, 224),)
    else:
        config = getattr(model, "pretrained_cfg", None) or {}
        channels, *own = config.get("input_size", (3, 224, 224))
        sizes = (None,) if config.get("fixed_input_size") else _SIZES
        for size in sizes:
            yield (torch.rand(2, channels, *((size, size) if size else own)),)
        if "inception" in kind:
            yield (torch.rand(2, 3, 299, 299),)


def targets() -> list[dict[str, torch.Tensor]]:
    """What detectors are trained on: one box each, with label, mask and keypoints."""
    masks = torch.zeros(1, 96, 96, dtype=torch.uint8)
    masks[:, 20:60, 20:60] = 1
    return [
        {
            "boxes": torch.tensor([[20.0, 20.0, 60.0, 60.0]]),
            "labels": torch.tensor([1]),
            "masks": masks[:, :height],
            "keypoints": torch.tensor([[[30.0, 30.0, 1.0]] * 17]),
        }
        for height in (96, 80)
    ]


def run(model: nn.Module, args: tuple[Any, ...], *, training: bool) -> tuple[Any, dict[str, torch.Tensor]]:
    """What the model returns in one mode, seeded, and its buffers after that; the buffers are put back."""
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.train(training)
    torch.manual_seed(1)
    with torch.no_grad():
        if training and is_detector(model):
            args = (*args, targets())
        output = model(*args)
        after = {name: value.clone() for name, value in model.named_buffers()}
        for name, value in model.named_buffers():
            value.copy_(before[name])
    return output, after


def usable_inputs(model: nn.Module) -> tuple[Any, ...]:
    """The first arguments the untouched model can be called with in both modes."""
    problems = []
    for args in inputs(model):
        try:
            for training in (False, True):
                run(model, args, training=training)
            return args
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
    raise RuntimeError("no input fits: " + "; ".join(problems))


def check(name: str, ratio: str = "2:1", **options: Any) -> nmconv.Plan:
    """Convert the model and hold it against the oracle: the original, its dropped calls skipped at run time.

    Both outputs and all buffers must be equal to the bit, in eval and in train mode with the same seed, and the keys
    of the state_dict and the class must be the same. The library's own witness must agree, too.
    """
    torch.manual_seed(0)
    model = build(name)
    randomize(model)
    args = usable_inputs(model)
    plan = nmconv.make_plan(model, ratio, example_inputs=args, **options)
    gone = [site for site in plan.sites if site.action == "drop"]
    expected = []
    for training in (False, True):
        with dropped(model, gone) as log:
            expected.append(run(model, args, training=training))
        log.assert_all_hit(training=training)
    log.assert_inplace_agrees()
    keys, kind, methods = list(model.state_dict()), type(model), dir(type(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nmconv.NoEffectWarning)
        converted = nmconv.apply_plan(model, plan, example_inputs=args, inplace=True)
    assert converted is model
    assert list(converted.state_dict()) == keys
    assert isinstance(converted, kind)
    assert set(methods) <= set(dir(converted))
    for training, wanted in zip((False, True), expected, strict=True):
        output, buffers = run(converted, args, training=training)
        assert_same(output, wanted[0])
        assert_same(buffers, wanted[1])
    return plan


def randomize(model: nn.Module) -> None:
    """Weights under which every activation matters: some initialisations make whole branches zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1 and not torch.any(parameter != 0):
                parameter.uniform_(-0.1, 0.1, generator=generator)
            elif parameter.ndim <= 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.1, 0.1, generator=generator))
