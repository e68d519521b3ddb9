"""The one place that knows timm and torchvision: the kinds of their modules, and their models' metadata.

Neither is ever imported here: a model of theirs can only exist if the program has imported it.
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
    "PASS_THROUGH",
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

PASS_THROUGH = "_nmconv_through"  # attribute of a module that only passes its input on, whatever its class

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
# What depends on the number of classes in torchvision's models.
_TORCHVISION_HEADS = (
    *("fc", "classifier", "aux_classifier", "head.classification_head.cls_logits"),
    *("head.classification_head.module_list", "roi_heads.mask_predictor.mask_fcn_logits"),
    "roi_heads.keypoint_predictor",
)
# For each zoo, the function that builds a model by its name, and the dict of builders that it looks up.
_BUILDERS = {
    "timm": (("timm.models._factory", "create_model"), ("timm.models._registry", "_model_entrypoints")),
    "torchvision": (("torchvision.models._api", "get_model"), ("torchvision.models._api", "BUILTIN_MODELS")),
}
ZOOS = tuple(_BUILDERS)

_names: WeakKeyDictionary[type[nn.Module], str] = WeakKeyDictionary()


def _name_of(cls: type[nn.Module]) -> str:
    """Return the class's qualified name; timm's layers by package, since they move between its files."""
    name = _names.get(cls)
    if name is None:
        package = "timm.layers" if cls.__module__.startswith("timm.layers.") else cls.__module__
        name = _names[cls] = f"{package}.{cls.__qualname__}"
    return name


# -- modules ----------------------------------------------------------------------------------------------------------


def module_op(cls: type[nn.Module]) -> Op | None:
    """Return the kind of a timm or torchvision class that is a leaf, or None."""
    return _TABLE.get(_name_of(cls))


def is_opaque(cls: type[nn.Module]) -> bool:
    """Return whether a class outside timm and torchvision was given to timm's ``register_notrace_module``.

    timm registers its own classes because torch.fx cannot trace them; a recording can look into them.
    """
    if cls.__module__.partition(".")[0] in ("timm", "torchvision"):
        return False
    is_notrace_module = getattr(sys.modules.get("timm.layers"), "is_notrace_module", None)
    return is_notrace_module is not None and bool(is_notrace_module(cls))


def act_kind(cls: type[nn.Module]) -> str | None:
    """Return the kind of activation that a timm class is, or None."""
    return _ACTS.get(_name_of(cls))


def is_norm_act(module: nn.Module) -> bool:
    """Return whether the module is one of timm's that apply a norm, then ``drop``, then ``act``."""
    if PASS_THROUGH in module.__dict__:
        return False
    return _name_of(type(module)) in _NORM_ACTS and isinstance(getattr(module, "act", None), nn.Module)


def pads_same(module: nn.Module) -> bool:
    """Return whether a convolution of timm's pads like TensorFlow's "same", depending on its input's size."""
    name = _name_of(type(module))
    return name.startswith("timm.layers.") and (name.endswith(".Conv2dSame") or getattr(module, "same_pad", False))


def has_plain_weight(cls: type[nn.Module]) -> bool:
    """Return whether a convolution of timm's with its own forward uses ``weight`` unchanged."""
    return _name_of(cls) == "timm.layers.Conv2dSame"


def is_frozen_norm(module: nn.Module) -> bool:
    """Return whether the module is a batch norm that always uses its stored statistics."""
    return _name_of(type(module)) in ("torchvision.ops.misc.FrozenBatchNorm2d", "timm.layers.FrozenBatchNormAct2d")


# -- models ------------------------------------------------------------------------------------------------------------


def stage_names(model: nn.Module) -> tuple[str, ...]:
    """Return the module names in timm's ``feature_info``, in order; empty if the model has none."""
    info = getattr(model, "feature_info", None)
    info = getattr(info, "info", info)
    if not isinstance(info, (list, tuple)) or not all(isinstance(part, dict) and "module" in part for part in info):
        return ()
    return tuple(part["module"] for part in info)


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Return the qualified names of the modules whose size depends on the number of classes.

    By timm's ``pretrained_cfg``, or torchvision's conventions.
    """
    if _name_of(type(model)).startswith("torchvision.models."):
        return _TORCHVISION_HEADS
    config = getattr(model, "pretrained_cfg", None)
    names = config.get("classifier") if isinstance(config, dict) else None
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


def default_input_size(model: nn.Module) -> tuple[int, ...] | None:
    """Return the channels and spatial extents of the input that the model was designed for, or None."""
    config: Any = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("input_size"):
        return tuple(config["input_size"])
    name = _name_of(type(model))
    if name.startswith("torchvision.models.inception"):
        return (3, 299, 299)
    if name.startswith("torchvision.models.video") and "torchvision" in sys.modules:
        return (3, 16, 224, 224) if name.startswith("torchvision.models.video.s3d") else (3, 16, 112, 112)
    return None


def takes_list_of_images(model: nn.Module) -> bool:
    """Return whether the model is a torchvision detector, whose input is a list of images without a batch axis."""
    name = _name_of(type(model))
    return name.startswith("torchvision.models.detection.") and hasattr(model, "transform")


def builders(zoo: str) -> tuple[Callable[..., Any], dict[str, Callable[..., Any]]]:
    """Return an imported zoo's function that builds a model by name, and its registry of builders.

    Raises:
        OptionError: If the installed version of the zoo keeps them elsewhere.
    """
    try:
        by_name, registry = (getattr(sys.modules[module], name) for module, name in _BUILDERS[zoo])
    except (KeyError, AttributeError) as error:
        version = getattr(sys.modules[zoo], "__version__", "")
        raise OptionError(f"{zoo} {version} has no {error}: install a version that nmconv supports") from error
    return by_name, registry
