"""The public calls: plan, apply, both in one, and asking a model for its plan."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from nmconv.errors import ModelTypeError, NoEffectWarning, NoSitesError, PlanError
from nmconv.graph import callable_methods, fingerprint, read, recordings_of
from nmconv.planning import Keep, Options, Plan, Site, Structure, draw_up, listed
from nmconv.recording import Recordings
from nmconv.surgery._apply import Known, Surgery, copy_of, outline_of
from nmconv.surgery._guard import check_examples, check_model, plan_of
from nmconv.surgery._hoist import find_hoists
from nmconv.surgery._witness import Witness

__all__ = ["apply_plan", "check_flow", "convert", "get_plan", "make_plan"]


def make_plan(
    model: nn.Module,
    ratio: object = "2:1",
    *,
    keep: Keep = "last",
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
    check_model(model)
    options.check()
    recordings = recordings_of(model, example_inputs, both_sizes=False, linear=options.linear)
    return _planned(model, options, example_inputs, recordings)[0]


def apply_plan(
    model: nn.Module, plan: Plan, *, example_inputs: Any = None, inplace: bool = False, witness: bool = True
) -> nn.Module:
    """Convert a model as a plan says.

    Args:
        model: The model the plan was made for, or one of the same structure.
        plan: From :func:`make_plan`, ``Plan.edit`` or ``Plan.from_json``.
        example_inputs: As for :func:`convert`.
        inplace: Change ``model`` itself instead of a copy.
        witness: As for :func:`convert`.

    Returns:
        The converted model, of the same class, with the same ``state_dict`` keys.

    Raises:
        PlanError: If the plan is for another model, or names methods that no forward calls.
        OptionError: If the model cannot be called with ``example_inputs``.
        ModelTypeError: If ``model`` is no plain module.
        AlreadyConvertedError: If it was converted before.
        WitnessError: If the result would do anything else than the plan says; the model is as it was.
    """
    check_model(model)
    check_examples(example_inputs)
    if not isinstance(plan, Plan):
        raise PlanError(f"{type(plan).__name__} is no Plan; make one with nmconv.make_plan or Plan.from_json")
    found = fingerprint(model)
    if found != plan.fingerprint:
        raise PlanError(
            f"this plan is for a {plan.model} with fingerprint {plan.fingerprint}, the model is a "
            f"{type(model).__name__} with {found}: make a plan for this model with nmconv.make_plan"
        )
    _check_methods(model, plan)
    seen = Witness(model, example_inputs) if witness else None
    if seen is not None:
        check_flow(model, plan, seen.recordings)
    return _applied(model, plan, {}, inplace, seen)


def convert(
    model: nn.Module,
    ratio: object = "2:1",
    *,
    keep: Keep = "last",
    relocate: bool = False,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    linear: bool = False,
    hoist_padding: bool = False,
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
        keep: Which activations a unit keeps: ``"last"``, its boundary (the first ones where activations stand before
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
            ``example_inputs`` or, where there are none, with one image batch; nothing has been touched then.
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
    seen = Witness(model, example_inputs, linear=options.linear) if witness else None
    recordings = (
        recordings_of(model, example_inputs, both_sizes=False, linear=options.linear)
        if seen is None
        else seen.recordings
    )
    plan, known = _planned(model, options, example_inputs, recordings)
    return _applied(model, plan, known, inplace, seen)


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
        keep=keep,
        relocate=bool(relocate),
        include=listed(include),
        exclude=listed(exclude),
        linear=bool(linear),
        examples=example_inputs is not None,
        hoist=bool(hoist_padding),
    )


def _check_methods(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan that names methods which no forward calls: rewriting traces them, and so runs them.

    Raises:
        PlanError: If it does.
    """
    named = [(site.method, site) for site in plan.changes if site.how == "rewrite" or site.function]
    named += [(site.place.method, site) for site in plan.changes if site.place and site.place.how == "rewrite"]
    callable_ones = callable_methods(model) if named else frozenset()
    for method, site in named:
        if method not in callable_ones:
            raise PlanError(f"it would rewrite a method {method!r} for {site.id}, which no forward of this model calls")


def check_flow(model: nn.Module, plan: Plan, recordings: Recordings) -> None:
    """Refuse a plan for a model of the same layers that does something else with them.

    Args:
        model: What the plan is to be carried out on.
        plan: Of this model or another one.
        recordings: Of the model.

    Raises:
        PlanError: If the model's data flow can be compared with the plan's, and is another.
    """
    options = dict(plan.options)
    if plan.untraced or (options.get("example_inputs") == "given" and not recordings.runs):
        return
    structure = read(model, recordings, linear=options.get("linear") == "True")
    if structure.digest() != plan.flow and not structure.untraced:
        raise PlanError(
            f"this plan is for a {plan.model} of the same layers as this {type(model).__name__}, but their forwards "
            "differ: make a plan for this model with nmconv.make_plan"
        )


def get_plan(model: nn.Module) -> Plan | None:
    """The plan that a model was converted by, or None if it was not.

    Raises:
        ModelTypeError: If ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise ModelTypeError(f"{type(model).__name__} is no nn.Module: give the model itself")
    return plan_of(model)


def _planned(model: nn.Module, options: Options, example_inputs: Any, recordings: Recordings) -> tuple[Plan, Known]:
    """The plan, hoists included; the methods written for it."""
    plan, known = _drawn_up(model, options, recordings)
    if options.hoist:
        trial = outline_of(model)
        Surgery(trial, plan, known).commit()
        plan = replace(plan, hoists=find_hoists(trial, example_inputs))
    return plan, known


def _drawn_up(model: nn.Module, options: Options, recordings: Recordings) -> tuple[Plan, Known]:
    """The plan, with what cannot be rewritten locked; the methods written to find that out."""
    structure = read(model, recordings, linear=options.linear)
    if not any(item.act is not None for chain in structure.chains for item in chain.items):
        raise NoSitesError(_no_sites(structure, options.linear))
    identity = fingerprint(model)
    locked: dict[int, str] = {}
    known: Known = {}
    while True:
        plan = draw_up(structure, options, identity, locked)
        failures = Surgery(model, plan, known).failures()
        if not failures and _all_dropped(plan) is None:
            return plan, known
        if not failures:  # so that a plan says of every site whether it can be dropped, for those who edit it
            failures = Surgery(model, _all_dropped(plan) or plan, {}).failures()
            for index, site in enumerate(plan.sites):
                if site.action == "keep" and (site.owner, site.method) in failures and site.how == "rewrite":
                    locked[index] = str(failures[site.owner, site.method])
            return draw_up(structure, options, identity, locked), known
        for index, site in enumerate(plan.sites):
            places = [(site.owner, site.method)] if site.how == "rewrite" and site.action != "keep" else []
            places += [(site.place.owner, site.place.method)] if site.place is not None else []
            for place in places:
                if place in failures:
                    locked[index] = str(failures[place])


def _all_dropped(plan: Plan) -> Plan | None:
    """The plan with every site dropped whose method it leaves alone, or None if there is no such site."""
    touched = {(site.owner, site.method) for site in plan.changes}
    left: dict[str | Site, str] = {}
    for site in plan.sites:
        free = site.action == "keep" and site.how == "rewrite" and not site.locked
        if free and (site.owner, site.method) not in touched:
            left[site] = "drop"
    return plan.edit(left) if left else None


_SEEN = (  # how a reason begins, and the same of one activation and of several
    ("gate", "is a gate", "are gates"),
    ("it activates a linear layer", "follows a linear layer", "follow linear layers"),
    ("the value before it", "follows a value with other readers", "follow values with other readers"),
    ("it activates a parameter", "is of a parameter", "are of parameters"),
    ("no convolution next to it", "has no convolution next to it", "have no convolution next to them"),
    ("nothing that is returned", "reaches no output", "reach no output"),
    ("stands before a chain", "stands before a chain", "stand before chains"),
    ("the forward never calls it", "is never called", "are never called"),
    ("inside an activation", "is a part of another activation", "are parts of other activations"),
    ("a part of", "is a part of one indivisible layer", "are parts of indivisible layers"),
)


def _no_sites(structure: Structure, linear: bool) -> str:
    text = f"no activation of this {structure.model} belongs to a convolution"
    if structure.untraced:
        parts = "; ".join(f"{part.name or 'the model itself'}: {part.reason}" for part in structure.untraced[:3])
        hints = dict.fromkeys(part.hint for part in structure.untraced)
        return f"{text} that runs ({parts}). {'. '.join(hints)}"
    leading = dict(structure.leading)
    reasons = [leading.get(at, act.skip) for at, act in enumerate(structure.activations)]
    counts = Counter(next((words for words in _SEEN if reason.startswith(words[0])), reason) for reason in reasons)
    seen = [
        f"{count} stay{'s' * (count == 1)}: {words}" if isinstance(words, str) else f"{count} {words[1 + (count > 1)]}"
        for words, count in counts.items()
    ]
    what = ", ".join(seen) or (
        "it calls none that nmconv knows; of those that a forward works out by hand, such as x * torch.sigmoid(x), it "
        "knows expressions in one value, within one forward, of which nobody reads a part"
    )
    return f"{text}: {what}" if linear else f"{text}: {what}; linear=True counts linear layers as well"


def _applied(model: nn.Module, plan: Plan, known: Known, inplace: bool, witness: Witness | None) -> nn.Module:
    if not plan.changes_any:
        warnings.warn(
            f"nothing to change in this {type(model).__name__} at {plan.ratio}: every unit has few enough activations",
            NoEffectWarning,
            stacklevel=3,
        )
    if not inplace:
        model = copy_of(model)
    Surgery(model, plan, known).commit(witness)
    return model
