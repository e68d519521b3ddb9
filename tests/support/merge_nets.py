"""What the tests of merging share: nets whose statistics matter, counts of what really ran, and drawn runs of convs.

The oracle is always the net as it was, run in float64. What ran is counted by a dispatch mode, whatever modules a
merged model is made of: a convolution counts where its input has the batch of the picture, so that a correction that is
computed once for the whole batch does not. ``BATCH`` is a number that nothing else in these nets is.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from nets import net
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

import nmconv

BATCH = 5
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DROP = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
PADS = {
    "zeros": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "constant": (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


# Nets ----------------------------------------------------------------------------------------------------------------


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 and eval mode, with weights, biases, norms and statistics under which everything matters."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(value: Tensor, low: float, high: float) -> None:
        value.copy_(torch.empty(value.shape, dtype=torch.float64).uniform_(low, high, generator=generator))

    model = model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _ConvNd) and isinstance(module.weight, nn.Parameter):
                reach = (3.0 / max(1, module.weight[0].numel())) ** 0.5
                uniform(module.weight, -reach, reach)
                if module.bias is not None:
                    uniform(module.bias, -1.0, 1.0)
            elif getattr(module, "running_var", None) is not None and getattr(module, "running_mean", None) is not None:
                uniform(module.running_mean, -1.0, 1.0)
                uniform(module.running_var, 0.3, 3.0)
                if getattr(module, "weight", None) is not None:
                    uniform(module.weight, 0.5, 1.5)
                    module.weight[::2] *= -1
                    uniform(module.bias, -1.0, 1.0)
    return model


C = 4
SHAPES = [(C, size, 12 - size) for size in range(1, 12)]


def conv(kernel: int = 3, inputs: int = C, outputs: int = C, **options: Any) -> nn.Module:
    """A convolution that keeps the size where it has no stride."""
    options.setdefault("padding", kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, **options)


def made(forward: Any, **parts: nn.Module) -> nn.Module:
    """A settled net with this forward and these parts."""
    return settle(net(forward, **parts))


def statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """A whole network of a zoo in float64 and eval mode: norms that do something, everything else as it was made."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_var", None) is None:
                continue
            for name, low, high in (("running_mean", -0.2, 0.2), ("running_var", 0.7, 1.4)):
                getattr(module, name).uniform_(low, high, generator=generator)
            for name, low, high in (("weight", 0.7, 1.4), ("bias", -0.3, 0.3)):
                if getattr(module, name, None) is not None:
                    getattr(module, name).uniform_(low, high, generator=generator)
        for module in model.modules():
            if isinstance(module, _ConvNd) and isinstance(module.bias, nn.Parameter):
                module.bias.uniform_(-0.2, 0.2, generator=generator)
    return model


def picture(*shape: int, batch: int = BATCH, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)


def snapshot(model: nn.Module) -> list[Any]:
    """Everything of a model that must not change, bit for bit: modules, their classes and modes, tensors and hooks."""
    found: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        found.append((name, id(module), type(module), module.training, sorted(vars(module))))
        found.append((name, [id(hook) for hook in module._forward_hooks.values()]))
    for kind in (model.named_parameters, model.named_buffers):
        for name, value in kind(remove_duplicate=False):
            found.append((name, id(value), value._version, value.requires_grad, value.dtype, value.tolist()))
    return [*found, torch.is_grad_enabled(), torch.get_rng_state().tolist()]


def merge(model: nn.Module, *, gate: str = "always", **options: Any) -> nn.Module:
    """What ``nmconv.merge`` makes; that nothing merges is no error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nmconv.NoEffectWarning)
        return nmconv.merge(model, gate=gate, **options)


# What ran ------------------------------------------------------------------------------------------------------------


class Counts(TorchDispatchMode):
    """Counts what runs on tensors of the given batch: convolutions, their multiply-adds, norms, and sums of two."""

    def __init__(self, batch: int = BATCH) -> None:
        super().__init__()
        self.batch, self.convs, self.multiply_adds, self.norms, self.sums = batch, 0, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        ours = [each for each in args if isinstance(each, Tensor) and each.ndim >= 3 and each.shape[0] == self.batch]
        if name in ("convolution", "_convolution") and ours and ours[0] is args[0]:
            self.convs += 1
            self.multiply_adds += result.numel() * args[1][0].numel()
        elif "batch_norm" in name and ours:
            self.norms += 1
        elif name in ("add", "add_") and len(ours) == 2:
            self.sums += 1
        return result


def counts(model: nn.Module, *args: Tensor) -> Counts:
    with torch.no_grad(), Counts(args[0].shape[0]) as found:
        model(*args)
    return found


def convs_of(model: nn.Module, *shape: int) -> int:
    """How many convolutions run on a picture of this shape."""
    return counts(model, picture(*shape)).convs


def assert_near(found: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    """Equal shapes and dtypes, and values that differ by no more than the tolerance times the largest wanted one."""
    if isinstance(wanted, (tuple, list)):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_near(one, other, tolerance)
        return
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_near(found[key], wanted[key], tolerance)
        return
    if not isinstance(wanted, Tensor):
        assert found == wanted
        return
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert torch.isfinite(wanted).all(), "the net of this test is no good"
    if wanted.numel():
        largest, apart = wanted.abs().max().item(), (found - wanted).abs().max().item()
        assert apart <= tolerance * largest, f"{apart / max(largest, 1e-300):.1e} of the largest output apart"


def assert_agree(
    merged: nn.Module, model: nn.Module, *shapes: tuple[int, ...], tolerance: float = 1e-10, batch: int = BATCH
) -> int:
    """Both do the same on every shape: the same outputs, or both raise. Returns at how many shapes they ran."""
    ran = 0
    with torch.no_grad():
        for at, shape in enumerate(shapes):
            x = picture(*shape, batch=batch, seed=at)
            try:
                wanted = model(x.clone())
            except (RuntimeError, ValueError):
                with pytest.raises((RuntimeError, ValueError)):
                    merged(x.clone())
                    pytest.fail(f"merged runs on {shape}, where the original raises")
                continue
            assert_near(merged(x.clone()), wanted, tolerance)
            ran += 1
    return ran


# Drawn runs ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
    """One convolution of a run as the issue's rules see it; padding before it, by modules too, counts as its own."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padded: tuple[bool, ...]
    modes: frozenset[str]
    sources: int = 1
    between: bool = False  # whether a norm stands between its paddings: its shift ends at the later ones

    @property
    def point(self) -> bool:
        return set(self.kernel) == {1}


def steps(net: nn.Module) -> list[Step]:
    """The convolutions of a sequential net."""
    found: list[Step] = []
    waiting: list[tuple[str, tuple[bool, ...]]] = []
    shifted = between = False
    for module in net:
        shifted |= bool(waiting) and isinstance(module, NORM)
        kind = next((kind for kind, classes in PADS.items() if isinstance(module, classes)), None)
        if kind == "constant" and isinstance(module, PADS["zeros"]):
            kind = "zeros"
        if kind is not None:
            pairs = list(zip(module.padding[::2], module.padding[1::2], strict=True))[::-1]
            waiting.append((kind, tuple(any(pair) for pair in pairs)))
            between |= shifted and any(waiting[-1][1])
        elif isinstance(module, CONV):
            rank = len(module.kernel_size)
            if module.padding == "same":
                own = tuple(size > 1 for size in module.kernel_size)
            elif module.padding == "valid":
                own = (False,) * rank
            else:
                own = tuple(size > 0 for size in module.padding)
            every = [(kind, axes) for kind, axes in [*waiting, (module.padding_mode, own)] if any(axes)]
            padded = tuple(any(axes[axis] for _, axes in every) for axis in range(rank))
            modes = frozenset(kind for kind, _ in every)
            between |= shifted and any(own)
            found.append(Step(module.kernel_size, module.stride, padded, modes, len(every), between))
            waiting, shifted, between = [], False, False
    return found


def verdict(before: list[Step], step: Step) -> str:
    """What the issue says of merging a conv into those before it: ``merge``, ``refuse``, or it leaves it ``open``."""
    if not before or not any(step.padded):
        return "merge"
    if step.between:
        return "open"
    rest = step.modes - {"zeros"}
    if all(each.point and not any(each.padded) for each in before):
        mirrored = step.sources == 1 and rest <= {"reflect", "replicate", "circular"}
        if not rest or (mirrored and all(set(each.stride) == {1} for each in before)):
            return "merge"
    for axis, padded in enumerate(step.padded):
        if padded and "circular" not in rest and any(each.kernel[axis] > 1 for each in before):
            return "refuse"  # circular after circular could be exact
        if padded and rest & {"reflect", "replicate", "circular"} and any(each.stride[axis] > 1 for each in before):
            return "refuse"
    return "open"


def verdict_of_run(found: list[Step]) -> str:
    """``merge`` if the issue says that the whole run becomes one conv, ``refuse`` if it says that it must not."""
    every = {verdict(found[:at], step) for at, step in enumerate(found)}
    return "refuse" if "refuse" in every else "merge" if every == {"merge"} else "open"


def fewest(found: list[Step]) -> tuple[int, int]:
    """Between which numbers of convolutions a run must come out where every exact merge is made."""
    least, most = [0], [0]
    for end in range(1, len(found) + 1):
        judged = [verdict_of_run(found[start:end]) for start in range(end)]
        least.append(1 + min(least[start] for start in range(end) if judged[start] != "refuse"))
        most.append(1 + min(most[start] for start in range(end) if judged[start] == "merge"))
    return least[-1], most[-1]


MODES = ("zeros", "zeros", "zeros", "reflect", "replicate", "circular")


def drawn_conv(draw: Any, rank: int, inputs: int, *, modes: tuple[str, ...] = MODES, biggest: int = 4) -> nn.Module:
    """Any convolution, 1x1s and paddings of zero often enough for exact runs to be common."""
    kind = draw(st.sampled_from(["dense", "grouped", "depthwise"]))
    if kind == "depthwise":
        groups, outputs = inputs, inputs * draw(st.integers(1, 2))
    else:
        outputs = draw(st.sampled_from([2, 3, 4, 6, 12] if kind == "dense" else [4, 6, 12]))
        common = [n for n in (2, 3, 4, 6) if inputs % n == 0 == outputs % n]
        groups = draw(st.sampled_from(common)) if kind == "grouped" and common else 1

    def per_axis(low: int, high: int) -> Any:
        if draw(st.booleans()):
            return draw(st.integers(low, high))
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    kernel = 1 if draw(st.integers(0, 2)) == 0 else per_axis(1, biggest)
    stride = 1 if draw(st.booleans()) else per_axis(1, 3)
    dilation = 1 if draw(st.booleans()) else per_axis(1, 3)
    how = draw(st.sampled_from(["none", "number", "number", "axes", "same", "valid"]))
    padding: Any = {"none": 0, "valid": "valid", "same": "same"}.get(how)
    if how == "same" and stride not in (1, (1,) * rank):
        padding = 1
    if padding is None:
        padding = draw(st.integers(1, 3)) if how == "number" else tuple(draw(st.integers(0, 2)) for _ in range(rank))
    options = {"stride": stride, "dilation": dilation, "groups": groups, "padding": padding}
    options |= {"padding_mode": draw(st.sampled_from(modes)), "bias": draw(st.booleans())}
    return CONV[rank - 1](inputs, outputs, kernel, **options)


def drawn_pad(draw: Any, rank: int) -> nn.Module:
    kind = draw(st.sampled_from(["zeros", "zeros", "constant", "reflect", "replicate", "circular"]))
    amounts = tuple(draw(st.integers(0, 2)) for _ in range(2 * rank))
    return PADS[kind][rank - 1](amounts, *([0.7] if kind == "constant" else []))


def drawn_between(draw: Any, rank: int, channels: int, *, pads: bool = True) -> list[nn.Module]:
    """Up to two of what may stand between convolutions."""
    makes = [
        lambda: NORM[rank - 1](channels),
        lambda: NORM[rank - 1](channels),
        lambda: NORM[rank - 1](channels, affine=False),
        nn.Identity,
        lambda: nn.Dropout(0.3),
        lambda: DROP[rank - 1](0.3),
        *([lambda: drawn_pad(draw, rank)] if pads else []),
    ]
    return [make() for make in draw(st.lists(st.sampled_from(makes), max_size=2))]


@st.composite
def runs(draw: Any, rank: int, shortest: int = 2, longest: int = 2, **options: Any) -> nn.Sequential:
    """A run of convolutions with norms, identities, dropout and padding before, between and after them."""
    channels = draw(st.sampled_from([2, 3, 4, 6, 12]))
    layers = drawn_between(draw, rank, channels)
    count = draw(st.integers(shortest, longest))
    for at in range(1, count + 1):
        conv = drawn_conv(draw, rank, channels, **options)
        channels = conv.out_channels
        layers += [conv, *drawn_between(draw, rank, channels, pads=at < count)]  # the last belongs to what comes next
    return settle(nn.Sequential(*layers), draw(st.integers(0, 9)))


def inputs_of(net: nn.Module) -> int:
    """The channels that a sequential net takes."""
    return next(module.in_channels for module in net if isinstance(module, CONV))


def shapes_for(draw: Any, net: nn.Module, rank: int) -> list[tuple[int, ...]]:
    """Shapes of pictures: some of any size, too small ones too, and some just big enough and beyond, odd and even."""
    channels, biggest = inputs_of(net), (24, 12, 7)[rank - 1]
    small = [tuple(draw(st.integers(1, biggest)) for _ in range(rank)) for _ in range(3)]
    size = 1
    with torch.no_grad():
        while True:
            try:
                net(torch.zeros(1, channels, *(size,) * rank, dtype=torch.float64))
                break
            except (RuntimeError, ValueError):
                if size == 400:
                    raise
                size += 1
    more = [tuple(size + draw(st.integers(0, 3)) for _ in range(rank)) for _ in range(2)]
    return [(channels, *sizes) for sizes in [(size,) * rank, *more, *small]]
