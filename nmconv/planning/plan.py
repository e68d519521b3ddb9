"""The plan: what happens to every activation of a model, as frozen data that needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from nmconv.errors import PlanError
from nmconv.planning.call_signature import Signature
from nmconv.planning.dataclass_json import from_plain, lines_of, to_plain
from nmconv.planning.plan_parts import Branch, Counts, Hoist, Kernel, check_branches, check_kernels
from nmconv.planning.policies import CONSEQUENCES, OLD_NAMES
from nmconv.planning.site import Site, check_sites
from nmconv.planning.structure import Untraced
from nmconv.planning.text_table import text_table

__all__ = ["Plan"]

_VERSION = 5


@dataclass(frozen=True)
class Plan:
    """What a conversion does, call by call; :func:`nmconv.make_plan` makes it, :func:`nmconv.apply_plan` applies it.

    Attributes:
        model: Class name of the model.
        fingerprint: Identifies the model's structure and the data flow of its forward; independent of weights, sizes,
            dtype, device, mode and classifier.
        ratio: The ratio asked for, as text.
        options: The other options that were given, as (name, text) pairs.
        convs: Number of convolutions on the main path in eval mode, parallel ones counted once.
        sites: Every activation call that was found, in order of execution.
        untraced: Parts of the model that do not run in one of the modes, and what to do about it.
        hoists: Linear runs whose padding moves to their first convolution (``hoist_padding=True``).
        kernels: Linear runs, or parts of them, that :func:`nmconv.fit` replaces by one convolution each.
        branches: Residual branches that are removed.
        registered: Classes in the model that :func:`nmconv.register` was called for, each with its kind.
        call: The arguments that the model was called with when the plan was made, or None if they are not plain. Plans
            that differ in them only are equal.

    Example:
        >>> from torch import nn
        >>> import nmconv
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> plan = nmconv.make_plan(model, "2:1")
        >>> [(site.id, site.action) for site in plan.sites]
        [('1#1', 'keep'), ('3#1', 'drop')]
        >>> plan.counts.activations_before, plan.counts.activations_after, plan.counts.ratio_reached
        (2, 1, '2.00:1')
    """

    model: str
    fingerprint: str
    ratio: str
    options: tuple[tuple[str, str], ...]
    convs: int
    sites: tuple[Site, ...]
    untraced: tuple[Untraced, ...] = ()
    hoists: tuple[Hoist, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    branches: tuple[Branch, ...] = ()
    registered: tuple[tuple[str, str], ...] = ()
    call: Signature | None = field(default=None, compare=False)

    def __deepcopy__(self, memo: object) -> Plan:
        return self  # it is immutable

    @property
    def linear(self) -> bool:
        """Whether linear layers count as convolutions."""
        return dict(self.options).get("linear") == "True"

    @property
    def counts(self) -> Counts:
        """Totals in eval mode."""
        real = [site for site in self.sites if site.is_real and site.modes != "train"]
        after = sum(site.action not in ("drop", "gone") for site in real)
        reached = f"{self.convs / after:.2f}:1" if after else f"{self.convs}:0"
        return Counts(self.convs, len(real), after, self.ratio, reached)

    @property
    def changes(self) -> tuple[Site, ...]:
        """The sites that are dropped or moved."""
        return tuple(site for site in self.sites if site.action in ("drop", "move"))

    @property
    def changes_any(self) -> bool:
        """Whether applying the plan changes a model. Kernels alone do not: :func:`nmconv.fit` makes them."""
        return bool(self.changes or self.hoists or self.branches)

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def edit(self, actions: Mapping[str | Site, str]) -> Plan:
        """Return the plan with other actions for some sites.

        Args:
            actions: From a site (its ``id``, or the Site) to ``"keep"`` or ``"drop"``.

        Returns:
            A new plan; a unit may then keep more activations than the ratio says, or none. Linear runs in which an
            action changes are no longer hoisted and lose their kernels.

        Raises:
            PlanError: If a site is not in the plan or cannot be changed, or an action is neither keep nor drop.

        Example:
            >>> from torch import nn
            >>> import nmconv
            >>> plan = nmconv.make_plan(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()))
            >>> [site.action for site in plan.edit({"1#1": "drop", "3#1": "keep"}).sites]
            ['drop', 'keep']
        """
        if not isinstance(actions, Mapping):
            raise PlanError(
                f"{actions!r:.80} is not an edit: map sites to actions, such as {{'layer1.0.relu#1': 'keep'}}"
            )
        known = {site.id: site for site in self.sites}
        new: dict[str, str] = {}
        for key, action in actions.items():
            name = key.id if isinstance(key, Site) else key
            self._check_edit(name, action, known)
            new[name] = action
        sites = tuple(
            replace(site, action=new[site.id], reason="edited by hand", behind="") if site.id in new else site
            for site in self.sites
        )
        # A run in which an action changes is another run: its padding does not move, its convolutions do not merge.
        touched = {conv for site in self.sites if new.get(site.id, site.action) != site.action for conv in site.convs}
        hoists = tuple(hoist for hoist in self.hoists if not touched.intersection(hoist.convs))
        kernels = tuple(kernel for kernel in self.kernels if not touched.intersection(kernel.convs))
        return replace(self, sites=sites, hoists=hoists, kernels=kernels)

    def _check_edit(self, name: str, action: str, known: Mapping[str, Site]) -> None:
        """Raise PlanError if a site cannot be given an action."""
        if name not in known:
            near = [site for site in known if str(name) in site][:5] or get_close_matches(str(name), known)
            hint = f"did you mean {', '.join(near)}?" if near else "print the plan for the sites it has"
            raise PlanError(f"no site {name!r} in this plan of {self.model}: {hint}")
        if action not in ("keep", "drop"):
            raise PlanError(f"action {action!r} for {name}: give 'keep' or 'drop'")
        site = known[name]
        if site.action == "gone":
            raise PlanError(f"{name} goes with its branch: it cannot be set to {action!r}")
        if site.action == "skip":
            raise PlanError(f"{name} is not a site ({site.reason}): it cannot be set to {action!r}")
        if action == "drop" and site.locked:
            raise PlanError(f"{name} cannot be dropped: {site.locked}")

    def with_kernels(self, kernels: Mapping[tuple[str, ...] | str, str | int]) -> Plan:
        """Return the plan with kernels for some linear runs, in place of the kernels that it has.

        Args:
            kernels: From the convolutions' qualified names, in order of execution (a tuple, or text with commas), to
                the kernel size: ``"exact"``, ``"auto"``, a number such as 3 or ``"3"``, or ``"3x1"``; see
                :class:`nmconv.Kernel`.

        Raises:
            PlanError: If a size is invalid, or a convolution is named twice.

        Example:
            >>> from torch import nn
            >>> import nmconv
            >>> plan = nmconv.make_plan(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()))
            >>> plan.with_kernels({"0, 2": 3}).kernels
            (Kernel(convs=('0', '2'), size='3', dense=False),)
        """
        new = tuple(
            Kernel(tuple(name.strip() for name in (names.split(",") if isinstance(names, str) else names)), str(size))
            for names, size in kernels.items()
        )
        plan = replace(self, kernels=new)
        try:
            _check(plan)
        except ValueError as error:
            raise PlanError(f"{error}") from error
        return plan

    def to_json(self) -> str:
        """Return the plan as versioned JSON text, with one line for each site, for people to read and to edit.

        Example:
            >>> from torch import nn
            >>> import nmconv
            >>> plan = nmconv.make_plan(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()))
            >>> nmconv.Plan.from_json(plan.to_json()) == plan
            True
        """
        return lines_of({"nmconv_plan": _VERSION, **to_plain(self)})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan that :meth:`to_json` returned; it may have been edited by hand.

        Raises:
            PlanError: If the text is not a plan, or one of another version.

        Example:
            >>> import nmconv
            >>> nmconv.Plan.from_json("{}")
            Traceback (most recent call last):
            nmconv.errors.PlanError: this JSON is not an nmconv plan; give the text that Plan.to_json returned
        """
        try:
            data = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise PlanError(f"this is not a plan: {error}; give the text that Plan.to_json returned") from error
        if not isinstance(data, dict) or "nmconv_plan" not in data:
            raise PlanError("this JSON is not an nmconv plan; give the text that Plan.to_json returned")
        version = data.pop("nmconv_plan")
        if version != _VERSION:
            raise PlanError(
                f"a plan of version {version}; this nmconv reads {_VERSION}: make the plan again with nmconv.make_plan"
            )
        try:
            plan: Plan = from_plain(cls, data)
            _check(plan)
        except (TypeError, ValueError, RecursionError) as error:
            raise PlanError(
                f"a damaged plan ({error}): undo what was edited by hand, or make it again with nmconv.make_plan"
            ) from error
        options = dict(plan.options)
        if options.get("keep") in OLD_NAMES:
            options["keep"] = OLD_NAMES[options["keep"]]
            plan = replace(plan, options=tuple(options.items()))
        return plan


def _check(plan: Plan) -> None:
    """Raise ValueError if a value is invalid."""
    check_sites(plan.sites)
    check_kernels(plan.kernels)
    check_branches(plan.branches)


def _lines(plan: Plan) -> Iterator[str]:
    """Yield the lines of a plan's text."""
    counts, keep = plan.counts, dict(plan.options).get("keep", "")
    yield (
        f"{plan.model} at {plan.ratio}: {counts.activations_before} activations -> {counts.activations_after} "
        f"for {counts.convs} convolutions ({counts.ratio_reached})"
    )
    if plan.changes and keep in CONSEQUENCES:
        yield f"keep={keep!r}: {CONSEQUENCES[keep]}"
    rows = [
        (
            site.id,
            site.kind,
            "" if site.chain is None else str(site.chain),
            "" if site.unit is None else str(site.unit),
            site.role,
            site.action,
            site.reason,
        )
        for site in plan.sites
    ]
    yield text_table(("site", "kind", "chain", "unit", "role", "action", "reason"), rows)
    for hoist in plan.hoists:
        if hoist.why:
            yield f"padding stays {hoist.convs[0]}: {hoist.why}"
        else:
            yield f"padding moves to {hoist.convs[0]} from {', '.join(hoist.convs[1:])}"
    for kernel in plan.kernels:
        yield f"{', '.join(kernel.convs)} -> one {'dense ' if kernel.dense else ''}kernel, {kernel.size}"
    for branch in plan.branches:
        yield f"branch removed: {', '.join(branch.convs)}"
    for part in plan.untraced:
        yield f"untraced: {part.name or 'the model itself'}: {part.reason}. {part.hint}"
