"""The one place that knows timm and torchvision: what their modules are, and what their models say of themselves.

Neither is imported unless the program has done so already: a model of theirs cannot exist without.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from nmconv.errors import OptionError
from nmconv.flow.ops import Op

__all__ = [
    "THROUGH",
    "ZOOS",
    "act_kind",
    "builders",
    "classifier_names",
    "default_input_size",
    "has_plain_weight",
    "is_frozen_norm",
    "is_norm_act",
    "is_opaque",
    "module_op",
    "pads_same",
    "stage_names",
    "takes_list_of_images",
]

THROUGH = "_nmconv_through"  # on a module that only hands on what it gets, whatever its class

_TIMM_ACTS = {
    "Swish": "SiLU",
    "SwishMe": "SiLU",
    "Mish": "Mish",
    "MishMe": "Mish",
    "HardSwish": "Hardswish",
    "HardSwishMe": "Hardswish",
    "HardMish": "HardMish",
    "HardMishMe": "HardMish",
    "PReLU": "PReLU",
    "GELU": "GELU",
    "GELUTanh": "GELUTanh",
    "QuickGELU": "QuickGELU",
}
_TIMM_NORM_ACTS = (
    "BatchNormAct2d SyncBatchNormAct FrozenBatchNormAct2d GroupNormAct GroupNorm1Act LayerNormAct LayerNormActFp32 "
    "LayerNormAct2d LayerNormAct2dFp32 RmsNormAct RmsNormActFp32 RmsNormAct2d RmsNormAct2dFp32"
)
_TIMM: dict[Op, str] = {
    Op.ACT: " ".join(_TIMM_ACTS),
    Op.BOUNDED: "Sigmoid Tanh HardSigmoid HardSigmoidMe",
    Op.CONV: "MixedConv2d CondConv2d Conv2dSame StdConv2d StdConv2dSame ScaledStdConv2d ScaledStdConv2dSame",
    Op.NORM: "GroupNorm GroupNorm1 LayerNorm LayerNormFp32 LayerNorm2d LayerNorm2dFp32 LayerNormExp2d RmsNorm "
    "RmsNormFp32 RmsNorm2d RmsNorm2dFp32 SimpleNorm SimpleNormFp32 SimpleNorm2d SimpleNorm2dFp32 SplitBatchNorm2d "
    "GlobalResponseNorm",
    Op.DROP: "DropPath DropBlock2d PatchDropout",
    Op.POOL: "BlurPool2d AvgPool2dSame MaxPool2dSame",
    Op.OTHER: "EvoNorm2dB0 EvoNorm2dB1 EvoNorm2dB2 EvoNorm2dS0 EvoNorm2dS0a EvoNorm2dS1 EvoNorm2dS1a EvoNorm2dS2 "
    "EvoNorm2dS2a FilterResponseNormTlu2d FilterResponseNormAct2d InplaceAbn",
}
_TORCHVISION: dict[Op, str] = {
    Op.NORM: "torchvision.ops.misc.FrozenBatchNorm2d torchvision.models.convnext.LayerNorm2d",
    Op.DROP: "torchvision.ops.stochastic_depth.StochasticDepth torchvision.ops.drop_block.DropBlock2d",
    Op.OTHER: "torchvision.ops.deform_conv.DeformConv2d",
}
_TABLE = {f"timm.layers.{name}": op for op, names in _TIMM.items() for name in names.split()} | {
    path: op for op, paths in _TORCHVISION.items() for path in paths.split()
}
_NORM_ACTS = frozenset(f"timm.layers.{name}" for name in _TIMM_NORM_ACTS.split())
_ACTS = {f"timm.layers.{name}": kind for name, kind in _TIMM_ACTS.items()}


_paths: WeakKeyDictionary[type[nn.Module], str] = WeakKeyDictionary()


def _path(cls: type[nn.Module]) -> str:
    """The class's full name; timm's layers by package, since their files move."""
    found = _paths.get(cls)
    if found is None:
        home = "timm.layers" if cls.__module__.startswith("timm.layers.") else cls.__module__
        found = _paths[cls] = f"{home}.{cls.__qualname__}"
    return found


def module_op(cls: type[nn.Module]) -> Op | None:
    """What a timm or torchvision class is, or None if it is to be looked into like any other."""
    return _TABLE.get(_path(cls))


def is_opaque(cls: type[nn.Module]) -> bool:
    """Whether a class was given to timm's ``register_notrace_module``, by others than timm.

    timm's own are there because fx cannot trace them; a recording can look into them.
    """
    if cls.__module__.partition(".")[0] in ("timm", "torchvision"):
        return False
    ask = getattr(sys.modules.get("timm.layers"), "is_notrace_module", None)
    return ask is not None and bool(ask(cls))


def act_kind(cls: type[nn.Module]) -> str | None:
    """The activation that a timm class is, or None."""
    return _ACTS.get(_path(cls))


def is_norm_act(module: nn.Module) -> bool:
    """Whether the module is timm's norm, then ``drop``, then ``act``, which can be divided."""
    if THROUGH in module.__dict__:
        return False
    return _path(type(module)) in _NORM_ACTS and isinstance(getattr(module, "act", None), nn.Module)


def stage_names(model: nn.Module) -> tuple[str, ...]:
    """Module names in timm's ``feature_info``, in order; empty where there is none."""
    info = getattr(model, "feature_info", None)
    info = getattr(info, "info", info)
    if not isinstance(info, (list, tuple)) or not all(isinstance(part, dict) and "module" in part for part in info):
        return ()
    return tuple(part["module"] for part in info)


_TORCHVISION_HEADS = (
    *(
        "fc",
        "classifier",
        "aux_classifier",
        "head.classification_head.cls_logits",
        "head.classification_head.module_list",
    ),
    *("roi_heads.mask_predictor.mask_fcn_logits", "roi_heads.keypoint_predictor"),
)


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Qualified names of what depends on the number of classes, by timm's ``pretrained_cfg`` or torchvision's habit."""
    if _path(type(model)).startswith("torchvision.models."):
        return _TORCHVISION_HEADS
    config = getattr(model, "pretrained_cfg", None)
    names = config.get("classifier") if isinstance(config, dict) else None
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


def default_input_size(model: nn.Module) -> tuple[int, ...] | None:
    """Channels and extents of the input the model was made for, as its family states it, or None."""
    config: Any = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("input_size"):
        return tuple(config["input_size"])
    if _path(type(model)).startswith("torchvision.models.inception"):
        return (3, 299, 299)
    if _path(type(model)).startswith("torchvision.models.video") and "torchvision" in sys.modules:
        return (3, 16, 224, 224) if _path(type(model)).startswith("torchvision.models.video.s3d") else (3, 16, 112, 112)
    return None


def takes_list_of_images(model: nn.Module) -> bool:
    """Whether the model is one of torchvision's detectors, which is given images in a list, without a batch."""
    path = _path(type(model))
    return path.startswith("torchvision.models.detection.") and hasattr(model, "transform")


def pads_same(module: nn.Module) -> bool:
    """Whether a convolution of timm's pads as TensorFlow's "same" does, by its input's size."""
    path = _path(type(module))
    return path.startswith("timm.layers.") and (path.endswith(".Conv2dSame") or getattr(module, "same_pad", False))


def has_plain_weight(cls: type[nn.Module]) -> bool:
    """Whether a convolution of timm's with a forward of its own convolves with ``weight`` as it is."""
    return _path(cls) == "timm.layers.Conv2dSame"


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether the module is a batch norm that always uses the statistics it holds."""
    return _path(type(module)) in ("torchvision.ops.misc.FrozenBatchNorm2d", "timm.layers.FrozenBatchNormAct2d")


_BUILDERS = {  # the function that builds by name, and where the builders are that it looks up
    "timm": (("timm.models._factory", "create_model"), ("timm.models._registry", "_model_entrypoints")),
    "torchvision": (("torchvision.models._api", "get_model"), ("torchvision.models._api", "BUILTIN_MODELS")),
}
ZOOS = tuple(_BUILDERS)


def builders(zoo: str) -> tuple[Callable[..., Any], dict[str, Callable[..., Any]]]:
    """The function of an imported zoo that builds a model by its name, and the zoo's own registry of builders.

    Raises:
        OptionError: If this version of the zoo has them elsewhere.
    """
    try:
        by_name, registry = (getattr(sys.modules[module], name) for module, name in _BUILDERS[zoo])
    except (KeyError, AttributeError) as error:
        version = getattr(sys.modules[zoo], "__version__", "")
        raise OptionError(f"{zoo} {version} has no {error}: nmconv knows newer versions of it") from error
    return by_name, registry
