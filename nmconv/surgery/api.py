"""The public functions that plan and make conversions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from nmconv.errors import NoEffectWarning, OptionError, PlanError, warn_user
from nmconv.flow import record_model
from nmconv.planning import DEFAULT_KEEP, Keep, Options, Plan, Signature, as_patterns, current_keep
from nmconv.recording import Recordings
from nmconv.surgery.apply import MethodCache, Surgery
from nmconv.surgery.checks import FROZEN, PLAN, check_examples, check_initialized, check_model, check_plain, plan_of
from nmconv.surgery.gradual import check_can_be_gradual, check_hoists_nothing
from nmconv.surgery.plans import ResolvedPlan, draft_plan, hoists_after, resolve_plan
from nmconv.surgery.restoring import original_of, unconvert
from nmconv.surgery.unused_parameters import UsedParameters, unfreeze
from nmconv.surgery.witness import Witness
from nmconv.surgery.working_copy import WorkingCopy

__all__ = ["apply_plan", "convert", "make_changes", "make_plan", "plan_to_keep_all"]


def make_plan(
    model: nn.Module,
    ratio: object = "2:1",
    *,
    keep: Keep = DEFAULT_KEEP,
    relocate: bool = False,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    linear: bool = False,
    hoist_padding: bool = False,
    example_inputs: Any = None,
) -> Plan:
    """Decide which activations of a model stay, without touching it.

    Args:
        model: Any module. For a converted one, the plan is for its original.
        ratio: As for :func:`convert`, like all arguments that follow.
        keep: Which activations a unit keeps.
        relocate: Whether to move kept activations to their unit's end.
        include: Patterns of what to convert.
        exclude: Patterns of what to leave alone.
        linear: Whether to count ``nn.Linear`` as a convolution.
        hoist_padding: Whether to move padding to each linear run's first convolution.
        example_inputs: What the model is called with.

    Returns:
        The plan: print it, edit it, save it as JSON.

    Raises: as :func:`convert` does, but a converted model is allowed unless it was merged, fitted in merged form or
        converted in part.

    Example:
        >>> from torch import nn
        >>> import nmconv
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> plan = nmconv.make_plan(model, "2:1")
        >>> [(site.id, site.action) for site in plan.sites]
        [('1#1', 'keep'), ('3#1', 'drop')]
    """
    options = _options(ratio, keep, relocate, include, exclude, linear, hoist_padding, example_inputs)
    return _planned(model, options, example_inputs)


def plan_to_keep_all(model: nn.Module, example_inputs: Any) -> Plan:
    """Return the plan that drops nothing, for functions that have no option ``linear`` to advise."""
    return _planned(model, Options("1:1"), example_inputs, advises_linear=False)


def _planned(model: nn.Module, options: Options, example_inputs: Any, *, advises_linear: bool = True) -> Plan:
    check_plain(model, "plan for")
    check_initialized(model)
    options.check()
    original, current_plan = original_of(model), plan_of(model)
    call = None if current_plan is None else current_plan.call
    recordings = record_model(original, example_inputs, both_sizes=False, linear=options.linear, call=call)
    return draft_plan(original, options, example_inputs, recordings, call, advises_linear=advises_linear)[0]


def apply_plan(
    model: nn.Module,
    plan: Plan,
    *,
    gradual: bool = False,
    example_inputs: Any = None,
    inplace: bool = False,
    witness: bool = True,
) -> nn.Module:
    """Convert a model by a plan; a converted model changes from its own plan to this one.

    A converted model gets the original's structure back first: the new plan alone decides what is dropped or moved.
    Weights, buffers, heads and settings stay as they are, and parameters stay the same objects. What
    :func:`nmconv.get_fit` returned is forgotten.

    Args:
        model: The model the plan was made for, or one of the same structure, converted or not.
        plan: From :func:`make_plan`, ``Plan.edit`` or ``Plan.from_json``.
        gradual: As for :func:`convert`.
        example_inputs: As for :func:`convert`. None: the inputs that the plan was made with.
        inplace: Change ``model`` itself instead of a copy.
        witness: As for :func:`convert`.

    Returns:
        The converted model, of the same class, with the same ``state_dict`` keys.

    Raises:
        PlanError: If the plan is for another model, or changes what it does not have.
        OptionError: If the model cannot be called with ``example_inputs``, or the plan cannot be made gradually.
        ModelTypeError: If ``model`` is not a plain module.
        AlreadyConvertedError: If only a part of it was converted.
        MergeError, FitError: If it was merged, or fitted in merged form.
        WitnessError: If the result differs from the original in anything but what the plan says; the model is
            unchanged then.

    Warns:
        NoEffectWarning: If nothing changes.
        RestoredParametersWarning: If the result uses parameters that the model did not use by its earlier plan.

    Example:
        >>> from torch import nn
        >>> import nmconv
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> plan = nmconv.make_plan(model, "2:1").edit({"1#1": "drop", "3#1": "keep"})
        >>> nmconv.apply_plan(model, plan)
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1))
          (3): ReLU()
        )
    """
    check_plain(model, "convert")
    check_initialized(model)
    check_examples(example_inputs)
    _check_flags(gradual=gradual, inplace=inplace, witness=witness)
    if not isinstance(plan, Plan):
        raise PlanError(f"{type(plan).__name__} is not a Plan: make one with nmconv.make_plan or Plan.from_json")
    original = original_of(model)
    checker, recordings = _record(original, example_inputs, witness, plan.linear, plan.call)
    resolved = resolve_plan(original, plan, recordings, "make a plan for this model with nmconv.make_plan")
    if gradual:
        check_can_be_gradual(original, plan, resolved.changes)
    _check_hoists(original, plan, resolved, example_inputs)
    return _converted(model, original, plan, resolved, {}, gradual, inplace, checker, recordings)


def convert(
    model: nn.Module,
    ratio: object = "2:1",
    *,
    keep: Keep = DEFAULT_KEEP,
    relocate: bool = False,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    linear: bool = False,
    hoist_padding: bool = False,
    gradual: bool = False,
    example_inputs: Any = None,
    inplace: bool = False,
    witness: bool = True,
) -> nn.Module:
    """Turn a model's convolutions into N:M proportional units (arXiv 1709.06247): N convolutions, M activations.

    Args:
        model: Any module: a CNN from timm, from torchvision or your own, in any mode, dtype and device.
        ratio: ``"N:M"``, a pair (N, M), or an ordered mapping from patterns to either or None (left alone); the first
            pattern that matches wins. A pattern is a glob on qualified names (``"layer3"`` stands for everything in
            it), ``"re:..."``, or ``"stage:2"`` in timm's ``feature_info``.
        keep: Which activations a unit keeps: ``"first"``, its first ones (its last where activations stand before
            their convolutions), ``"boundary"``, those at its other end, ``"spread"``, evenly spaced, or a function
            from :class:`nmconv.Unit` to the positions in ``unit.sites`` that stay. ``"first"`` lost less
            accuracy in ResNet-20, ``"boundary"`` in MobileNetV2 (docs/study.md); ``"boundary"`` is also what
            :func:`nmconv.merge` needs, often together with ``hoist_padding``.
        relocate: Move the kept activation to the unit's end where the unit's last convolution has none, after its
            norm and residual addition.
        include: Pattern or patterns of what to convert; everything else is left alone.
        exclude: Pattern or patterns of what to leave alone.
        linear: Count ``nn.Linear`` as a convolution.
        hoist_padding: Move the padding of each linear run (what lies between kept activations) to its first
            convolution, so that :func:`nmconv.merge` can later turn it into one convolution, exactly. This changes the
            values at the borders of inner maps.
        gradual: Drop activations gradually during training: each site that the plan drops mixes its input x and
            y = act(x) by a slope s of its own, ``lerp(y, x, s)`` (VanillaNet's deep training, arXiv 2305.12972,
            section 3.1; a ReLU becomes a Leaky ReLU). At s = 0, the initial value, the model is bit for bit the
            original, at s = 1 the hard conversion. A moved activation appears in its new place as it disappears from
            its old one. :class:`nmconv.Gradual` or :func:`nmconv.set_slope` set s, and ``Gradual.finish`` leaves the
            hard conversion.
        example_inputs: What the model is called with: a tensor, a tuple of arguments, or a dict of keyword arguments.
            Only their structure, shapes and dtypes matter. None: one image batch, by the model family's configuration
            if it states one.
        inplace: Convert ``model`` itself instead of a copy.
        witness: Record the model before and after, on a copy on the meta device, in both modes and at two input sizes,
            and raise if the second differs from the first in anything but what the plan says. False skips the check.

    Returns:
        The converted model: the same class, methods and ``state_dict`` keys. :func:`get_plan` returns what was done.

    Raises:
        RatioError, PatternError, OptionError: If an argument is invalid, or the model cannot be called with
            ``example_inputs`` or, without them, with one image batch; nothing has been changed then. Also for
            ``gradual=True`` together with ``hoist_padding=True``, since padding moves at once, and with a random
            activation (RReLU).
        NoSitesError: If no activation of the model belongs to a convolution.
        ModelTypeError: If ``model`` is not a module, or is wrapped, compiled or scripted.
        AlreadyConvertedError: If it is already converted.
        WitnessError: If the result differs from the original in anything but what the plan says: for example, a
            forward depends on an activation's class. The model is unchanged then.

    Warns:
        NoEffectWarning: If nothing changes.

    Example:
        >>> from torch import nn
        >>> import nmconv
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> nmconv.convert(model, "2:1")
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): ReLU()
          (2): Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1))
          (3): Identity()
        )
    """
    options = _options(ratio, keep, relocate, include, exclude, linear, hoist_padding, example_inputs)
    _check_flags(gradual=gradual, inplace=inplace, witness=witness)
    check_model(model)
    options.check()
    check_hoists_nothing(gradual and options.hoist)
    checker, recordings = _record(model, example_inputs, witness, options.linear)
    plan, resolved, cache = draft_plan(model, options, example_inputs, recordings)
    if gradual:
        check_can_be_gradual(model, plan, resolved.changes)
    return _converted(model, model, plan, resolved, cache, gradual, inplace, checker, recordings)


def _options(
    ratio: object,
    keep: Keep,
    relocate: bool,
    include: str | Iterable[str],
    exclude: str | Iterable[str],
    linear: bool,
    hoist_padding: bool,
    example_inputs: Any,
) -> Options:
    check_examples(example_inputs)
    _check_flags(relocate=relocate, linear=linear, hoist_padding=hoist_padding)
    return Options(
        ratio=ratio,
        keep=current_keep(keep),
        relocate=bool(relocate),
        include=as_patterns(include),
        exclude=as_patterns(exclude),
        linear=bool(linear),
        hoist=bool(hoist_padding),
    )


def _check_flags(**flags: object) -> None:
    """Raise OptionError if an option that is on or off is text, which is always true."""
    for name, value in flags.items():
        if isinstance(value, str):
            raise OptionError(f"{name}={value!r}: give True or False")


def _record(
    model: nn.Module, example_inputs: Any, witness: bool, linear: bool, call: Signature | None = None
) -> tuple[Witness | None, Recordings]:
    """Return a witness of a model, None if ``witness`` is False, and the model's recordings."""
    if witness:
        checker = Witness(model, example_inputs, linear=linear, call=call, options=("exclude", "witness"))
        return checker, checker.recordings
    return None, record_model(model, example_inputs, both_sizes=False, linear=linear, call=call)


def _check_hoists(original: nn.Module, plan: Plan, resolved: ResolvedPlan, example_inputs: Any) -> None:
    """Raise PlanError if a plan moves padding that cannot move in this model."""
    if not resolved.changes.hoists:
        return
    hoists = hoists_after(original, resolved, {}, example_inputs, plan.call)
    possible = {hoist.convs for hoist in hoists if not hoist.why}
    for convs in resolved.changes.hoists:
        if convs not in possible:
            raise PlanError(
                f"the plan moves padding to {convs[0]} from {', '.join(convs[1:])}, which are not a linear run of this "
                "model: make a plan for it with nmconv.make_plan"
            )


def _converted(
    model: nn.Module,
    original: nn.Module,
    plan: Plan,
    resolved: ResolvedPlan,
    cache: MethodCache,
    gradual: bool,
    inplace: bool,
    witness: Witness | None,
    recordings: Recordings,
) -> nn.Module:
    if not plan.changes_any and original is model:
        has_units = any(site.unit is not None for site in plan.sites)
        why = "every unit has few enough activations" if has_units else "the patterns given leave everything alone"
        warn_user(f"nothing to change in this {type(model).__name__} at {plan.ratio}: {why}", NoEffectWarning)
    frozen = vars(model).get(FROZEN, ())
    used = UsedParameters(original, resolved.changes, recordings)

    def changed(gradual: bool) -> WorkingCopy:
        work = WorkingCopy(model, inplace=inplace)
        unconvert(work.model)
        make_changes(work.model, plan, resolved, cache, gradual=gradual)
        if witness is not None and (plan.changes_any or original is not model):
            witness.check(work.model, resolved.changes)
        return work

    work = changed(gradual)
    if gradual and witness is not None:
        changed(gradual=False)  # what `Gradual.finish` will leave is checked, too
    result = work.finish()
    unfreeze(result, frozen)
    if not gradual:
        used.freeze_unused(result)
    return result


def make_changes(
    model: nn.Module, plan: Plan, resolved: ResolvedPlan, cache: MethodCache | None = None, *, gradual: bool = False
) -> None:
    """Make the changes of a plan to a working copy, unchecked.

    Args:
        model: The working copy.
        plan: The plan, which is recorded on it.
        resolved: What the plan does to this model.
        cache: Methods that were rewritten before.
        gradual: Whether dropped and moved activations are mixed with their inputs instead.

    Raises:
        RewriteError: If a method cannot be rewritten; nothing is changed then.
    """
    Surgery(
        model, resolved.changes, {} if cache is None else cache, resolved.argument_structure, gradual=gradual
    ).commit()
    model.__dict__[PLAN] = plan
