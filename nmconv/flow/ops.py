"""The kinds of operation, and tables of torch's modules, functions and tensor methods by kind."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.fx import Node

__all__ = [
    "ACT_KINDS",
    "ACT_MODULES",
    "AFFINE",
    "CALLS",
    "MAKES_NEW",
    "MODULES",
    "NONLINEAR",
    "PLAIN_ACTS",
    "READS_SHAPE",
    "SUMS",
    "Op",
    "has_torch_forward",
    "is_inplace",
]

SUMS = ("add", "add_")  # labels of additions


class Op(Enum):
    """The kinds of operation in a flow graph."""

    INPUT = auto()
    OUTPUT = auto()
    PARAM = auto()  # parameters, buffers, constants, and what is computed from them alone
    CONV = auto()
    LINEAR = auto()
    NORM = auto()
    ACT = auto()
    DROP = auto()  # dropout and drop-path; fingerprints of plans hold these names
    PASS = auto()  # identity, clone, casts
    PAD = auto()
    SCALE = auto()  # product or sum with a constant or a per-channel parameter
    LAYOUT = auto()  # view, permute, flatten, ...
    ADD = auto()
    MUL = auto()
    GATED = auto()  # a product (or sum) of the main path and a gate
    BOUNDED = auto()  # sigmoid, softmax, ...: typical gates
    POOL = auto()  # keeps a map a map: pooling, resizing, concatenation
    OTHER = auto()
    DEAD = auto()  # folded into another node


# Activation kinds as users know them, by module class and by function name.
ACT_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "ReLU",
    nn.ReLU6: "ReLU6",
    nn.LeakyReLU: "LeakyReLU",
    nn.PReLU: "PReLU",
    nn.ELU: "ELU",
    nn.SELU: "SELU",
    nn.CELU: "CELU",
    nn.GELU: "GELU",
    nn.SiLU: "SiLU",
    nn.Hardswish: "Hardswish",
    nn.Mish: "Mish",
    nn.Softplus: "Softplus",
}
ACT_KINDS = {"leaky_relu" if kind == "LeakyReLU" else kind.lower(): kind for kind in ACT_MODULES.values()}
# Activations without settings, whose module does exactly what the function does.
PLAIN_ACTS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Hardswish, nn.Mish)
}
# The position of ``inplace`` among the arguments.
_INPLACE_POSITION: dict[Callable[..., Any], int] = {
    F.relu: 1,
    F.relu6: 1,
    F.leaky_relu: 2,
    F.elu: 2,
    F.selu: 1,
    F.celu: 2,
    F.silu: 1,
    F.hardswish: 1,
    F.mish: 1,
    F.dropout: 3,
    F.dropout1d: 3,
    F.dropout2d: 3,
    F.dropout3d: 3,
    F.alpha_dropout: 3,
    F.feature_alpha_dropout: 3,
    F.hardsigmoid: 1,
    F.hardtanh: 3,
}

MODULES: dict[type[nn.Module], Op] = {
    **dict.fromkeys(ACT_MODULES, Op.ACT),
    nn.modules.conv._ConvNd: Op.CONV,
    nn.Linear: Op.LINEAR,
    nn.modules.batchnorm._NormBase: Op.NORM,
    nn.GroupNorm: Op.NORM,
    nn.LayerNorm: Op.NORM,
    nn.RMSNorm: Op.NORM,
    nn.LocalResponseNorm: Op.NORM,
    nn.CrossMapLRN2d: Op.NORM,
    nn.modules.dropout._DropoutNd: Op.DROP,
    nn.Identity: Op.PASS,
    nn.modules.padding._ConstantPadNd: Op.PAD,
    nn.modules.padding._ReflectionPadNd: Op.PAD,
    nn.modules.padding._ReplicationPadNd: Op.PAD,
    nn.modules.padding._CircularPadNd: Op.PAD,
    nn.Flatten: Op.LAYOUT,
    nn.Unflatten: Op.LAYOUT,
    nn.Sigmoid: Op.BOUNDED,
    nn.Tanh: Op.BOUNDED,
    nn.Softmax: Op.BOUNDED,
    nn.Softmax2d: Op.BOUNDED,
    nn.Hardsigmoid: Op.BOUNDED,
    nn.Hardtanh: Op.BOUNDED,
    nn.modules.pooling._MaxPoolNd: Op.POOL,
    nn.modules.pooling._AvgPoolNd: Op.POOL,
    nn.Upsample: Op.POOL,
}

_FUNCTION_NAMES: dict[Op, str] = {
    Op.CONV: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution",
    Op.LINEAR: "linear",
    Op.NORM: "batch_norm instance_norm group_norm layer_norm rms_norm local_response_norm",
    Op.DROP: "dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout alpha_dropout_ feature_dropout "
    "feature_alpha_dropout",
    Op.PASS: "clone",
    Op.PAD: "pad constant_pad_nd",
    Op.LAYOUT: "flatten unflatten reshape permute transpose swapaxes swapdims movedim moveaxis squeeze unsqueeze "
    "broadcast_to",
    Op.ADD: "add sub subtract rsub",
    Op.MUL: "mul multiply div rdiv divide",
    Op.BOUNDED: "sigmoid sigmoid_ tanh tanh_ softmax hardsigmoid hardtanh hardtanh_ clamp clamp_ clip gumbel_softmax",
    Op.POOL: "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d interpolate upsample cat concat "
    "concatenate pixel_shuffle pixel_unshuffle",
}
_METHOD_NAMES: dict[Op, str] = {
    Op.PASS: "clone contiguous float half double bfloat16 to type type_as detach data",
    Op.LAYOUT: "view reshape permute transpose flatten unflatten squeeze unsqueeze swapaxes swapdims movedim moveaxis "
    "view_as reshape_as expand expand_as broadcast_to t T mT H mH",
    Op.ADD: "add add_ sub sub_",
    Op.MUL: "mul mul_ multiply div div_",
    Op.BOUNDED: "sigmoid sigmoid_ tanh tanh_ softmax clamp clamp_ clip",
}
# Kinds of call, by the name of the function or method; operators by the name of the method they call.
CALLS: dict[str, Op] = {
    name: op for table in (_FUNCTION_NAMES, _METHOD_NAMES) for op, names in table.items() for name in names.split()
} | {form: Op.ACT for name in ACT_KINDS for form in (name, f"{name}_")}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Differentiable elementwise calls: affine in each tensor operand, and nonlinear.
AFFINE = _names("add add_ sub sub_ rsub mul mul_ div div_ neg clone contiguous")
NONLINEAR = _names(
    "sigmoid sigmoid_ tanh tanh_ relu relu_ relu6 hardtanh hardtanh_ hardsigmoid leaky_relu leaky_relu_ elu elu_ selu "
    "selu_ celu celu_ gelu silu hardswish mish softplus softsign logsigmoid tanhshrink clamp clamp_ clamp_min "
    "clamp_max exp erf erfc log log1p expm1 sqrt rsqrt pow square abs atan sin cos reciprocal minimum maximum"
)
# Calls of other kinds whose result is never a view of an operand.
MAKES_NEW = _names(
    "mean sum amax amin max min matmul bmm einsum exp log sqrt rsqrt pow stack where norm var std roll topk cumsum neg "
    "abs adaptive_avg_pool2d adaptive_max_pool2d adaptive_avg_pool1d normalize grid_sample "
    "scaled_dot_product_attention addcmul fold linear eq gt lt ge le repeat new_tensor"
)
# Calls that read only a tensor's shape, dtype or device: no data flow.
READS_SHAPE = _names(
    "new_empty new_zeros new_ones new_full zeros_like ones_like empty_like full_like rand_like randn_like"
)


def is_inplace(node: Node, module: nn.Module | None, label: str) -> bool:
    """Return whether a call overwrites its first input; ``label`` is its name, as in :data:`CALLS`."""
    if module is not None:
        return getattr(module, "inplace", False) is True
    if node.kwargs.get("inplace") is True or label == "setitem":
        return True
    position = _INPLACE_POSITION.get(node.target)  # type: ignore[arg-type]
    if position is not None and len(node.args) > position and node.args[position] is True:
        return True
    return label.endswith("_") and not label.startswith("_")


def has_torch_forward(cls: type[nn.Module]) -> bool:
    """Return whether the class's forward, and a convolution's ``_conv_forward``, are torch's own."""
    methods = (getattr(cls, name, None) for name in ("forward", "_conv_forward"))
    return all((getattr(method, "__module__", None) or "").startswith("torch.") for method in methods if method)
