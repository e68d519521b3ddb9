"""What torch's modules, functions and tensor methods mean to the analysis: one table of each."""

from __future__ import annotations

import operator
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

__all__ = [
    "ACT_FUNCTIONS",
    "ACT_KINDS",
    "ACT_METHODS",
    "ACT_MODULES",
    "FUNCTIONS",
    "INPLACE_ARG",
    "METHODS",
    "MODULES",
    "NEW_MEMORY",
    "PLAIN_ACTS",
    "SHAPE_ATTRIBUTES",
    "SHAPE_FUNCTIONS",
    "SHAPE_METHODS",
    "SUMS",
    "Op",
    "is_inplace",
]

SUMS = ("add", "iadd", "add_", "radd")  # what additions are called in a forward


class Op(Enum):
    """The kinds of node of a flow graph."""

    INPUT = auto()
    OUTPUT = auto()
    PARAM = auto()  # parameters, buffers, constants, and what is computed from them alone
    CONV = auto()
    LINEAR = auto()
    NORM = auto()
    ACT = auto()
    DROP = auto()  # dropout and drop-path
    PASS = auto()  # identity, clone, casts
    PAD = auto()
    SCALE = auto()  # times or plus a constant or a per-channel parameter
    LAYOUT = auto()  # view, permute, flatten, ...
    ADD = auto()
    MUL = auto()
    GATED = auto()  # a product (or sum) of the main path and a gate
    BOUNDED = auto()  # sigmoid, softmax, ...: what gates are made of
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
_ACT_NAMES = {kind.lower(): kind for kind in ACT_MODULES.values()} | {"leaky_relu": "LeakyReLU"}
_ACT_NAMES.pop("leakyrelu")


def _functions(*names: str) -> list[Callable[..., Any]]:
    homes = (torch, F, torch._C._nn, operator)
    return [getattr(home, name) for name in names for home in homes if hasattr(home, name)]


# From function or method to the name of its kind in a site's id.
ACT_FUNCTIONS: dict[Callable[..., Any], str] = {
    function: name for name in _ACT_NAMES for function in _functions(name, f"{name}_")
}
ACT_METHODS: dict[str, str] = {
    method: name for name in _ACT_NAMES for method in (name, f"{name}_") if hasattr(torch.Tensor, method)
}
ACT_KINDS = _ACT_NAMES
# Functions without settings: a module of the same kind does the same.
PLAIN_ACTS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Hardswish, nn.Mish)
}
# Where ``inplace`` stands among the positional arguments.
INPLACE_ARG: dict[Callable[..., Any], int] = {
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
    Op.ADD: "add iadd sub isub subtract",
    Op.MUL: "mul imul multiply truediv itruediv div divide",
    Op.BOUNDED: "sigmoid sigmoid_ tanh tanh_ softmax hardsigmoid hardtanh hardtanh_ clamp clamp_ clip gumbel_softmax",
    Op.POOL: "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d interpolate upsample cat concat "
    "concatenate pixel_shuffle pixel_unshuffle",
}
_METHOD_NAMES: dict[Op, str] = {
    Op.PASS: "clone contiguous float half double bfloat16 to type type_as detach",
    Op.LAYOUT: "view reshape permute transpose flatten unflatten squeeze unsqueeze swapaxes swapdims movedim moveaxis "
    "view_as reshape_as expand expand_as broadcast_to t",
    Op.ADD: "add add_ sub sub_",
    Op.MUL: "mul mul_ multiply div div_",
    Op.BOUNDED: "sigmoid sigmoid_ tanh tanh_ softmax clamp clamp_ clip",
}
FUNCTIONS: dict[Callable[..., Any], Op] = {
    function: op for op, names in _FUNCTION_NAMES.items() for function in _functions(*names.split())
} | dict.fromkeys(ACT_FUNCTIONS, Op.ACT)
METHODS: dict[str, Op] = {name: op for op, names in _METHOD_NAMES.items() for name in names.split()} | dict.fromkeys(
    ACT_METHODS, Op.ACT
)
# What is of no kind above and certainly no view of its input.
NEW_MEMORY: frozenset[Any] = frozenset(
    (
        *_functions(
            "mean", "sum", "amax", "amin", "max", "min", "matmul", "bmm", "einsum", "exp", "log", "sqrt", "rsqrt"
        ),
        *_functions(
            "pow", "ipow", "stack", "where", "rsqrt", "norm", "var", "std", "roll", "topk", "cumsum", "neg", "abs"
        ),
        *_functions("adaptive_avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool1d", "normalize", "grid_sample"),
        *_functions("scaled_dot_product_attention", "addcmul", "fold", "linear", "eq", "gt", "lt", "ge", "le"),
        *("mean", "sum", "amax", "amin", "max", "min", "matmul", "bmm", "exp", "log", "sqrt", "rsqrt", "pow", "norm"),
        *("var", "std", "roll", "topk", "cumsum", "repeat", "neg", "abs", "new_tensor", "new_zeros", "new_ones"),
    )
)
# What reads only a tensor's shape or type: no flow of data.
SHAPE_METHODS = frozenset(
    (
        *("size", "dim", "numel", "nelement", "ndimension", "stride", "element_size", "is_contiguous"),
        *("is_floating_point", "get_device", "new_empty", "new_zeros", "new_ones", "new_full"),
    )
)
SHAPE_ATTRIBUTES = frozenset(
    (
        *("shape", "ndim", "dtype", "device", "layout", "requires_grad", "itemsize", "nbytes"),
        *("is_cuda", "is_meta", "is_sparse", "is_quantized"),
    )
)
SHAPE_FUNCTIONS = frozenset(
    _functions("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "numel", "is_tensor")
)


def is_inplace(node: Node, module: nn.Module | None) -> bool:
    """Whether the call overwrites its first input."""
    if node.op == "call_module":
        return getattr(module, "inplace", False) is True
    if node.kwargs.get("inplace") is True:
        return True
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.startswith("__")
    position = INPLACE_ARG.get(node.target)  # type: ignore[arg-type]
    if position is not None and len(node.args) > position and node.args[position] is True:
        return True
    name = getattr(node.target, "__name__", "")
    if getattr(node.target, "__module__", "") == "_operator":
        return name == "setitem" or (name.startswith("i") and hasattr(operator, f"__{name}__") and name in _IOPS)
    return name.endswith("_") and not name.startswith("_")


_IOPS = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"}
