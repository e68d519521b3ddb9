"""The public calls: plan, apply, both in one, and asking a model for its plan."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from nmconv.errors import ModelTypeError, NoEffectWarning, PlanError
from nmconv.flow import recordings_of
from nmconv.planning import BOUNDARY, Keep, Options, Plan, Site, current_name, listed
from nmconv.recording import Recordings
from nmconv.surgery.apply import Known, Surgery
from nmconv.surgery.checks import FROZEN, MARK, check_examples, check_has_run, check_model, check_plain, plan_of
from nmconv.surgery.draft import planned
from nmconv.surgery.gradual import check_can_be_gradual, check_hoists_nothing, finish_sites
from nmconv.surgery.hoist import find_hoists
from nmconv.surgery.resolve import ResolvedPlan, resolve_plan
from nmconv.surgery.unconvert import Readers, original_of, thaw, unconvert
from nmconv.surgery.witness import Witness
from nmconv.surgery.working_copy import WorkingCopy, outline_of

__all__ = ["apply_plan", "change", "convert", "finish", "get_plan", "make_plan", "restore"]


def make_plan(
    model: nn.Module,
    ratio: object = "2:1",
    *,
    keep: Keep = BOUNDARY,
    relocate: bool = False,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    linear: bool = False,
    hoist_padding: bool = False,
    example_inputs: Any = None,
) -> Plan:
    """Decide which activations of a model stay, without touching it.

    Args: as for :func:`convert`.

    Returns:
        The plan; print it, edit it, save it as JSON.

    Raises: as :func:`convert` does.
    """
    options = _options(ratio, keep, relocate, include, exclude, linear, hoist_padding, example_inputs)
    check_plain(model, "plan for")
    check_has_run(model)
    options.check()
    original, earlier = original_of(model), plan_of(model)
    call = None if earlier is None else earlier.call
    recordings = recordings_of(original, example_inputs, both_sizes=False, linear=options.linear, call=call)
    return planned(original, options, example_inputs, recordings, call)[0]


def apply_plan(
    model: nn.Module,
    plan: Plan,
    *,
    gradual: bool = False,
    example_inputs: Any = None,
    inplace: bool = False,
    witness: bool = True,
) -> nn.Module:
    """Convert a model as a plan says, or take a converted model from its plan to another one.

    Of a converted model the original's structure comes back first: what goes or moves is what the plan
    says, whatever the earlier one said. Weights, buffers, heads and settings stay as they are, parameters the same
    objects. What :func:`nmconv.get_fit` tells is forgotten.

    Args:
        model: The model the plan was made for, or one of the same structure, converted or not.
        plan: From :func:`make_plan`, ``Plan.edit`` or ``Plan.from_json``.
        gradual: As for :func:`convert`.
        example_inputs: As for :func:`convert`. None: what the plan was made with.
        inplace: Change ``model`` itself instead of a copy.
        witness: As for :func:`convert`.

    Returns:
        The converted model, of the same class, with the same ``state_dict`` keys.

    Raises:
        PlanError: If the plan is for another model, or changes what it does not have.
        OptionError: If the model cannot be called with ``example_inputs``, or if the plan cannot be done by degrees.
        ModelTypeError: If ``model`` is no plain module.
        AlreadyConvertedError: If a part of it was converted by itself.
        MergeError, FitError: If it was merged, or fitted in merged form.
        WitnessError: If the result would do anything else than the plan says; the model is as it was.

    Warns:
        RestoredParametersWarning: If parameters are read again that the earlier plan had left unread.
    """
    check_plain(model, "convert")
    check_has_run(model)
    check_examples(example_inputs)
    if not isinstance(plan, Plan):
        raise PlanError(f"{type(plan).__name__} is no Plan; make one with nmconv.make_plan or Plan.from_json")
    original = original_of(model)
    seen = Witness(original, example_inputs, linear=plan.linear, call=plan.call) if witness else None
    recordings = (
        recordings_of(original, example_inputs, both_sizes=False, linear=plan.linear, call=plan.call)
        if seen is None
        else seen.recordings
    )
    carried = resolve_plan(original, plan, recordings)
    if gradual:
        check_can_be_gradual(original, plan, carried.changes)
    if carried.changes.hoists:
        outline = outline_of(original)
        Surgery(outline, replace(carried.changes, hoists=()), {}, carried.takes).commit()
        movable = {hoist.convs for hoist in find_hoists(outline, example_inputs, plan.call) if not hoist.why}
        for convs in carried.changes.hoists:
            if convs not in movable:
                raise PlanError(
                    f"the plan moves padding to {convs[0]} from {', '.join(convs[1:])}: that is no linear run"
                )
    return _applied(model, original, plan, carried, {}, gradual, inplace, seen, recordings)


def convert(
    model: nn.Module,
    ratio: object = "2:1",
    *,
    keep: Keep = BOUNDARY,
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
        model: Any module: a CNN of timm's, of torchvision's or your own, in any mode, dtype and device.
        ratio: ``"N:M"``, a pair (N, M), or an ordered mapping from patterns to either or None (left alone), of which
            the first that matches wins. A pattern is a glob on qualified names (``"layer3"`` stands for everything in
            it), ``"re:..."``, or ``"stage:2"`` in timm's ``feature_info``.
        keep: Which activations a unit keeps: ``"boundary"``, its end (its first ones where activations stand before
            their convolutions), ``"first"``, the other end, ``"spread"``, evenly spaced, or a function from
            :class:`nmconv.Unit` to the positions in ``unit.sites`` that stay.
        relocate: Move the kept activation to the unit's end where the unit's last convolution has none, behind its
            norm and residual add.
        include: Pattern or patterns; everything else is left alone.
        exclude: Pattern or patterns of what is left alone.
        linear: Count ``nn.Linear`` as a convolution.
        hoist_padding: Move the padding of each linear run (what lies between kept activations) to its first
            convolution, so that :func:`nmconv.merge` can make one convolution of it, exactly, after training. What
            the border of inner maps sees changes with that.
        gradual: Let activations go by degrees while the model trains: each site that the plan drops mixes its input x
            and y = act(x) by a slope s of its own, ``lerp(y, x, s)`` (VanillaNet's deep training, arXiv 2305.12972,
            section 3.1; of a ReLU it makes a Leaky ReLU). At s = 0, where it begins, the model is the original to the
            bit, at s = 1 the hard conversion. A moved activation appears in its new place as it goes from its old one.
            :class:`nmconv.Gradual` or :func:`nmconv.set_slope` set s, ``Gradual.finish`` leaves the hard conversion.
        example_inputs: What the model is called with: a tensor, a tuple of arguments, or a dict of keyword arguments.
            Only their structure, shapes and dtypes are used.
        inplace: Convert ``model`` itself instead of a copy.
        witness: Record the model's own run before and after, on a copy on the meta device, in both modes and at two
            sizes, and raise if the second does anything else than the first less what the plan says. False skips that,
            for whoever knows better.

    Returns:
        The converted model: the same class, methods and ``state_dict`` keys. :func:`get_plan` tells what was done.

    Raises:
        RatioError, PatternError, OptionError: For an argument that is none, or if the model cannot be called with
            ``example_inputs`` or, where there are none, with one image batch; nothing has been touched then. Also for
            ``gradual=True`` together with ``hoist_padding=True``, since padding moves at once, and with a random
            activation (RReLU).
        NoSitesError: If no activation of the model belongs to a convolution.
        ModelTypeError: If ``model`` is no module, or wrapped, compiled or scripted.
        AlreadyConvertedError: If it was converted before.
        WitnessError: If the result would do anything else than the plan says: a forward that asks for an activation's
            class, for instance. The model is as it was then.

    Warns:
        NoEffectWarning: If nothing changes.
    """
    options = _options(ratio, keep, relocate, include, exclude, linear, hoist_padding, example_inputs)
    check_model(model)
    options.check()
    check_hoists_nothing(gradual and options.hoist)
    seen = Witness(model, example_inputs, linear=options.linear) if witness else None
    recordings = (
        recordings_of(model, example_inputs, both_sizes=False, linear=options.linear)
        if seen is None
        else seen.recordings
    )
    plan, carried, known = planned(model, options, example_inputs, recordings)
    if gradual:
        check_can_be_gradual(model, plan, carried.changes)
    return _applied(model, model, plan, carried, known, gradual, inplace, seen, recordings)


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
    return Options(
        ratio=ratio,
        keep=current_name(keep, stacklevel=3),
        relocate=bool(relocate),
        include=listed(include),
        exclude=listed(exclude),
        linear=bool(linear),
        hoist=bool(hoist_padding),
    )


def get_plan(model: nn.Module) -> Plan | None:
    """The plan that a model was converted by, or None if it was not.

    Raises:
        ModelTypeError: If ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise ModelTypeError(f"{type(model).__name__} is no nn.Module: give the model itself")
    return plan_of(model)


def restore(model: nn.Module, *, example_inputs: Any = None, inplace: bool = False) -> nn.Module:
    """Give a converted model the structure that it had before: activations, paddings and branches come back.

    Weights, buffers, new heads and settings stay as they are, and parameters the same objects.

    Args:
        model: Converted by :func:`convert` or :func:`apply_plan`, trained since or not; not merged.
        example_inputs: As for :func:`convert`. None: what its plan was made with.
        inplace: Change ``model`` itself instead of a copy.

    Raises:
        PlanError: If it was not converted.
        MergeError, FitError: If it was merged, or fitted in merged form.
        WitnessError: If the converted model is not the restored one less what its plan says.

    Warns:
        RestoredParametersWarning: If parameters are read again that the plan had left unread.

    Example:
        >>> from torch import nn
        >>> import nmconv
        >>> net = nmconv.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()), "2:1")
        >>> nmconv.restore(net)[1]
        ReLU()
    """
    check_plain(model, "restore")
    check_examples(example_inputs)
    plan = plan_of(model)
    if plan is None:
        raise PlanError(f"this {type(model).__name__} was not converted: there is nothing to restore")
    original = original_of(model)
    seen = Witness(original, example_inputs, linear=plan.linear, call=plan.call)
    seen.check(model, resolve_plan(original, plan, seen.recordings).changes)
    work, frozen = WorkingCopy(model, inplace=inplace), vars(model).get(FROZEN, ())
    unconvert(work.model)
    result = work.finish()
    thaw(result, frozen)
    return result


def _applied(
    model: nn.Module,
    original: nn.Module,
    plan: Plan,
    carried: ResolvedPlan,
    known: Known,
    gradual: bool,
    inplace: bool,
    witness: Witness | None,
    recordings: Recordings,
) -> nn.Module:
    if not plan.changes_any and original is model:
        warnings.warn(
            f"nothing to change in this {type(model).__name__} at {plan.ratio}: every unit has few enough activations",
            NoEffectWarning,
            stacklevel=3,
        )
    work, frozen = WorkingCopy(model, inplace=inplace), vars(model).get(FROZEN, ())
    readers = Readers(original, carried.changes, recordings)
    unconvert(work.model)
    change(work.model, plan, carried, known, gradual=gradual)
    if witness is not None and (plan.changes_any or original is not model):
        witness.check(work.model, carried.changes)
    result = work.finish()
    thaw(result, frozen)
    if not gradual:
        readers.freeze_unread(result)
    return result


def finish(model: nn.Module) -> None:
    """Leave of a gradual model what a hard conversion leaves, in place, whatever the slopes are.

    Args:
        model: It, or a module that holds it.

    Raises:
        ModelTypeError: If it is no plain module.
    """
    finish_sites(model)
    for converted in list(model.modules()):
        plan = plan_of(converted)
        if plan is not None and any(_may_have_parameters(converted, site) for site in plan.changes):
            original = original_of(converted)
            recordings = recordings_of(original, both_sizes=False, linear=plan.linear, call=plan.call)
            Readers(original, resolve_plan(original, plan, recordings).changes, recordings).freeze_unread(converted)


def _may_have_parameters(model: nn.Module, site: Site) -> bool:
    """Whether an activation that was dropped has parameters; a function is given them (PReLU)."""
    path = site.id.rpartition("#")[0]
    return site.kind == "PReLU" or (":" not in path and next(model.get_submodule(path).parameters(), None) is not None)


def change(
    model: nn.Module, plan: Plan, carried: ResolvedPlan, known: Known | None = None, *, gradual: bool = False
) -> None:
    """Do to a working copy what a plan says, unchecked.

    Raises:
        RewriteError: If a method cannot be rewritten; nothing is changed then.
    """
    Surgery(model, carried.changes, {} if known is None else known, carried.takes, gradual=gradual).commit()
    model.__dict__[MARK] = plan
