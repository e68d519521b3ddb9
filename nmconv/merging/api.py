"""The public functions: merge a model, fold its norms, and find what could be merged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from nmconv.deprecation import current_value
from nmconv.errors import MergeError, NoEffectWarning, OptionError, warn_user
from nmconv.merging.example_outputs import batch_size
from nmconv.merging.latency_gate import is_slower
from nmconv.merging.merger import Merger
from nmconv.merging.partitioning import Price, Segment
from nmconv.merging.placing import bake
from nmconv.merging.report import Run, describe_run, get_merges
from nmconv.surgery import Witness, WorkingCopy, check_examples, check_finished, check_initialized, check_plain
from nmconv.timing import BACKENDS

__all__ = ["find_runs", "fold_norms", "merge"]

_GATES = ("multiply_adds", "latency", "always")
_OLD_GATES = {"flops": "multiply_adds"}


def merge(
    model: nn.Module,
    *,
    gate: str = "multiply_adds",
    min_gain: float = 1.05,
    backend: str = "eager",
    live: bool = False,
    example_inputs: Any = None,
    methods: Mapping[str, Any] | None = None,
    inplace: bool = False,
    witness: bool = True,
) -> nn.Module:
    """Turn linear runs into single convolutions where that pays; the outputs stay the same, borders included.

    A run is a sequence of convolutions with only norms, identities, dropout and padding between them, also across
    module boundaries. A residual identity or parallel branches around it are folded in (RepVGG, arXiv 2101.03697), and
    so is an average pool at its end: a pool after a 1x1 convolution is computed before it, where the 1x1 has less to
    do. Norms next to a convolution that is not merged are folded into it. Interval dynamic programming over all parts
    of a run chooses which of them become one convolution each. ``docs/merging.md`` has the algebra.

    Args:
        model: A model in eval mode, converted or not.
        gate: What a merge must achieve. ``"multiply_adds"``: a ratio of multiply-adds, before over after, of at least
            ``min_gain``. ``"latency"``: the same for time on ``backend``, for inputs of the shape of ``example_inputs``
            and the model's device and dtype; and all merges together must not make the model slower (not checked if
            ``live``, nor where ``backend`` cannot run the whole model). ``"always"``: nothing; as few convolutions as
            possible remain.
        min_gain: Least ratio of before over after; at 1.05 merging breaks even in measurements.
        backend: What the latency gate times: ``"eager"``, ``"compile"``, ``"frozen"`` or ``"onnxruntime"`` (see
            :func:`nmconv.timing.make_runner`).
        live: Whether the factors stay parameters under their old keys, with merged kernels computed from them in each
            call, for fine-tuning with frozen norms. The multiply-adds gate counts the composition of the kernels,
            shared by the batch, if ``example_inputs`` determine the batch size; the latency gate does not.
        example_inputs: What the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments. If
            given, the outputs of the whole model are compared before and after.
        methods: Further methods that the merged model will be called by, with example inputs for each, such as
            ``{"forward_intermediates": images}``: values that they read are preserved. If not listed,
            ``forward_intermediates`` raises where it would read a value inside a merged run.
        inplace: Whether to change ``model`` itself instead of a copy.
        witness: Whether to record the model before and after, as :func:`nmconv.convert` does: parts that are not a
            linear run in every recording are not merged, and the result is compared with the original.

    Returns:
        The merged model, of the same class. :func:`nmconv.get_merges` returns what was merged.

    Raises:
        OptionError: If the gate, gain, backend, methods or example inputs are invalid, if the latency gate has no
            ``example_inputs``, or if the model cannot be called with them (without them: with guessed inputs).
        ModelTypeError: If ``model`` is not an ``nn.Module``, is wrapped, compiled or scripted, or has lazy modules that
            never ran.
        MergeError: If the model or a merged part is in train mode, if it is gradual and not finished, or if a merged
            run differs from its original.
        WitnessError: If the merged model behaves differently in a recording; ``model`` is unchanged.

    Warns:
        NoEffectWarning: If no run pays; norms may have been folded all the same.

    Example:
        >>> import torch
        >>> import torch.nn as nn
        >>> import nmconv
        >>> model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3, padding=1)).eval()
        >>> merged = nmconv.merge(model)
        >>> sum(isinstance(module, nn.modules.conv._ConvNd) for module in merged.modules())
        1
        >>> x = torch.randn(1, 16, 8, 8)
        >>> torch.allclose(merged(x), model(x), atol=1e-5)
        True
    """
    gate = current_value("gate", gate, _OLD_GATES)
    _check_options(gate, min_gain, backend, example_inputs)
    _check_eval_mode(model, "merge")
    if methods is not None:
        _check_methods(model, methods)
    recorded = Witness(model, example_inputs, choices=True, methods=methods) if witness else None
    work = None
    live_heads = [merge.head for merges in get_merges(model) for merge in merges if merge.live]
    if live_heads:
        work = WorkingCopy(model, inplace=inplace)
        bake(work.model)
    merger = Merger(model, example_inputs, live, recorded, baked=None if work is None else (work.model, live_heads))
    if gate == "latency":
        price = merger.latency_price(min_gain, backend)
    elif gate == "multiply_adds":
        price = _multiply_adds_price(min_gain, batch_size(example_inputs) if live else None)
    else:
        price = _always_pays
    merger.choose(price, fold=not live, fewest=gate == "always")
    merger.check_eval_mode()
    gains = "is one exact convolution" if gate == "always" else f"gains {min_gain}"
    why = merger.why_not_live or merger.why_no_convs or f"no linear run of it {gains}"
    if gate == "latency" and not live and merger.merges_any():
        trial = merger.carry_out(merger.working_copy())
        if is_slower(_folded(model, recorded).model, trial.model, example_inputs, backend):
            why = f"together, the runs that gain {min_gain} each make it slower on {backend}"
            merger.choose(_never_pays, fold=True, fewest=False)
            merger.check_eval_mode()
        elif not inplace:
            return trial.finish()
    if not live_heads and not merger.merges_any():
        warn_user(
            f"nothing to merge in this {type(model).__name__}: {why} (nmconv.find_runs lists the runs)",
            NoEffectWarning,
        )
    return merger.carry_out(work or merger.working_copy(inplace=inplace)).finish()


def fold_norms(
    model: nn.Module, *, example_inputs: Any = None, inplace: bool = False, witness: bool = True
) -> nn.Module:
    """Fold norms into the convolutions next to them and merge nothing else: a fair baseline for merging.

    Args:
        model: A model in eval mode.
        example_inputs: What the model is called with; only structure and shapes are used.
        inplace: Whether to change ``model`` itself instead of a copy.
        witness: As for :func:`nmconv.merge`.

    Returns:
        The model with norms folded, of the same class.

    Raises:
        OptionError: If the model cannot be called with ``example_inputs`` (without them: with guessed inputs).
        ModelTypeError: As for :func:`nmconv.merge`.
        MergeError: As for :func:`nmconv.merge`.
        WitnessError: As for :func:`nmconv.merge`.

    Example:
        >>> import torch.nn as nn
        >>> import nmconv
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> nmconv.fold_norms(model)
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): FoldedNorm()
          (2): ReLU()
        )
    """
    _check_eval_mode(model, "fold norms")
    check_examples(example_inputs)
    recorded = Witness(model, example_inputs, choices=True) if witness else None
    return _folded(model, recorded, inplace, example_inputs).finish()


def find_runs(
    model: nn.Module, *, min_gain: float = 1.05, example_inputs: Any = None, witness: bool = True
) -> tuple[Run, ...]:
    """Return what could be merged: the linear runs of two convolutions or more.

    Args:
        model: A model in any mode, read as if in eval mode and left as it is.
        min_gain: The least gain of the multiply-adds gate, which determines ``Run.merges`` and
            ``Run.merged_multiply_adds``.
        example_inputs: What the model is called with; only structure and shapes are used.
        witness: Whether to also record the model in train mode, at other sizes and with other arguments, and to divide
            runs where it behaves differently than in eval mode.

    Returns:
        The runs in order of execution. A convolution followed by an average pool is a run, too.

    Raises:
        OptionError: If ``min_gain`` or ``example_inputs`` are invalid, or if the model cannot be called with them.
        ModelTypeError: If ``model`` is not an ``nn.Module``, or is wrapped, compiled or scripted, or has lazy modules
            that never ran.
        MergeError: If it is gradual and not finished.

    Warns:
        NoEffectWarning: If the model calls convolutions, but none of them in a linear run.

    Example:
        >>> import torch.nn as nn
        >>> import nmconv
        >>> model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 3, padding=1), nn.ReLU())
        >>> (run,) = nmconv.find_runs(model)
        >>> run.convs, run.exact, round(run.gain, 2)
        (('0', '1'), True, 1.21)
    """
    _check_model(model, "look at")
    _check_min_gain(min_gain)
    check_examples(example_inputs)
    recorded = Witness(model, example_inputs, choices=True) if witness else None
    merger = Merger(model, example_inputs, False, recorded)
    price = _multiply_adds_price(min_gain)
    merger.choose(price, fold=True, fewest=False)
    if merger.why_no_convs:
        warn_user(f"no run of this {type(model).__name__}: {merger.why_no_convs}", NoEffectWarning)
    runs = [nodes for nodes in merger.runs if sum(len(node.convs) for node in nodes) > 1 or nodes[-1].element.is_pool]
    return tuple(describe_run(model.get_submodule, nodes, price) for nodes in runs)


def _folded(
    model: nn.Module, witness: Witness | None, inplace: bool = False, example_inputs: Any = None
) -> WorkingCopy:
    merger = Merger(model, example_inputs, False, witness, compare_outputs=False)
    merger.choose(_never_pays, fold=True, fewest=False)
    merger.check_eval_mode()
    return merger.carry_out(merger.working_copy(inplace=inplace))


def _multiply_adds_price(min_gain: float, batch: int | None = None) -> Price:
    """Return the price by multiply-adds per image; those of composing a live kernel are shared by ``batch`` images."""

    def price(segment: Segment) -> float | None:
        merged = segment.merged_cost + (segment.composition_cost / batch if batch else 0)
        return merged if segment.cost >= min_gain * merged else None

    return price


def _always_pays(segment: Segment) -> float | None:
    return segment.merged_cost


def _never_pays(segment: Segment) -> float | None:
    return None


def _check_options(gate: str, min_gain: float, backend: str, example_inputs: Any) -> None:
    """Raise OptionError if an option is invalid."""
    if gate not in _GATES:
        raise OptionError(f"gate={gate!r}: give one of {', '.join(_GATES)}")
    if backend not in BACKENDS:
        raise OptionError(f"backend={backend!r}: give one of {', '.join(BACKENDS)}")
    _check_min_gain(min_gain)
    if gate == "latency" and example_inputs is None:
        raise OptionError('gate="latency" times on example_inputs: give what the model is called with')
    check_examples(example_inputs)


def _check_min_gain(min_gain: float) -> None:
    if isinstance(min_gain, bool) or not isinstance(min_gain, (int, float)) or not 0 < min_gain < math.inf:
        raise OptionError(f"min_gain={min_gain!r}: give a positive number, such as 1.05")


def _check_methods(model: nn.Module, methods: object) -> None:
    """Raise OptionError unless ``methods`` maps names of the model's methods to inputs."""
    if not isinstance(methods, Mapping):
        raise OptionError(f"methods={methods!r:.80}: map names of methods to example inputs for each")
    for name in methods:
        if not isinstance(name, str) or not callable(getattr(model, name, None)):
            raise OptionError(f"methods: this {type(model).__name__} has no method {name!r}")


def _check_model(model: nn.Module, action: str) -> None:
    """Raise ModelTypeError unless the model is plain and has run, and MergeError if it is gradual."""
    check_plain(model, action)
    check_initialized(model)
    check_finished(model, MergeError)


def _check_eval_mode(model: nn.Module, action: str) -> None:
    """Raise what :func:`_check_model` raises, and MergeError if the model is in train mode."""
    _check_model(model, action)
    if model.training:
        raise MergeError(
            f"this {type(model).__name__} is in train mode, where norms depend on the batch: call model.eval() first"
        )
