"""The plan: what happens to every activation of a model, as frozen data without torch in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nmconv.errors import PlanError
from nmconv.planning.call_signature import Signature
from nmconv.planning.dataclass_json import checked, from_plain, lines_of, to_plain
from nmconv.planning.structure import Untraced, call_id
from nmconv.planning.text_table import table

__all__ = ["Branch", "Counts", "Hoist", "Kernel", "Plan", "Site", "Sum"]

_VERSION = 5
_ID = re.compile(r"(?P<name>.*?)(:(?P<function>\w+))?#(?P<call>\d{1,9})(@(?P<owner>.*?))?(?P<train>\(train\))?")


@dataclass(frozen=True)
class Site:
    """One call of an activation and what becomes of it.

    Attributes:
        name: Qualified name of the activation module; for a functional call, of the module whose forward makes it.
        function: None for a module; else the kind of function (``relu``, ``gelu``, ...), in-place or not alike.
        owner: Qualified name of the module whose own forward makes the call ("" is the model itself).
        call: Which call of this module (or of this kind of function) it is within one forward of ``owner``, from 1,
            in eval mode; in train mode for a site that runs in training only.
        train_call: The same in train mode; None if the call is made in eval mode only.
        modes: ``both``, ``eval`` or ``train``: when the call is made.
        kind: The activation's name, such as ``ReLU``.
        action: ``keep``, ``drop``, ``move`` (kept, but at the unit's end), ``gone`` (with the branch that makes the
            call), or ``skip`` (no site).
        reason: Why, in words.
        convs: Qualified names of the convolution that owns it (several where parallel ones are summed).
        role: How it is reached: ``post``, ``residual``, ``gated``, ``parallel``, ``pre``, ``leading``, or "".
        chain: Number of the chain, from 0, or None.
        unit: Number of the unit within the chain, from 0, or None.
        behind: Qualified name of the convolution behind which it moves: behind its norm and residual add, too.
        locked: Why it cannot be dropped, or "".
    """

    name: str
    function: str | None
    owner: str
    call: int
    train_call: int | None
    modes: str
    kind: str
    action: str
    reason: str
    convs: tuple[str, ...] = ()
    role: str = ""
    chain: int | None = None
    unit: int | None = None
    behind: str = ""
    locked: str = ""

    @property
    def is_real(self) -> bool:
        """Whether it belongs to a convolution."""
        return self.action != "skip" and not (self.action == "gone" and self.chain is None)

    @property
    def id(self) -> str:
        """What names it in :meth:`Plan.edit`: ``layer1.0.relu#2``, or ``Mixed_5b.branch1x1:relu#1``, one of a kind."""
        return call_id(self.name, self.function, self.call, self.owner, self.modes)

    def to_row(self) -> dict[str, Any]:
        """What stands in a plan's JSON: its id for what the id tells, and nothing that is usual."""
        usual = {"name": None, "function": None, "owner": None, "call": None}
        if self.train_call == (None if self.modes == "eval" else self.call):
            usual["train_call"] = None
        if self.modes != "eval":
            usual["modes"] = None
        usual["reason"] = None
        row = {"site": self.id, "action": self.action, "kind": self.kind, **to_plain(self, without=usual)}
        return {**row, "reason": self.reason}

    @classmethod
    def from_row(cls, row: dict[str, Any], where: str) -> Site:
        """Read what :meth:`to_row` wrote."""
        text = row.get("site")
        found = _ID.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(f"{where}: {text!r} is no site's id, such as 'layer1.0.relu#1'")
        name, function, call = found["name"], found["function"], int(found["call"])
        owner = found["owner"] if found["owner"] is not None else name if function else name.rpartition(".")[0]
        modes = "train" if found["train"] else row.get("modes", "both")
        told = {"name": name, "function": function, "owner": owner, "call": call, "modes": modes}
        rest = {key: value for key, value in row.items() if key != "site"}
        if (found["train"] and "modes" in rest) or rest.keys() & told.keys() - {"modes"}:
            raise TypeError(f"{where} says twice what its id says")
        return cls(**checked(cls, {"train_call": None if modes == "eval" else call, **rest, **told}, where))


@dataclass(frozen=True)
class Hoist:
    """A linear run whose padding moves to its first convolution.

    Attributes:
        convs: Qualified names of its convolutions, in order.
        why: Why the padding stays where it is, or "".
    """

    convs: tuple[str, ...]
    why: str = ""


@dataclass(frozen=True)
class Kernel:
    """Convolutions that follow one another, with all that is dropped between them, and the one that replaces them.

    :func:`nmconv.fit` makes it; until then the model has them as they were.

    Attributes:
        convs: Qualified names of all of them, in order of execution.
        size: ``"exact"``, the size that merging them gives; a smaller one, ``"3"`` or ``"3x1"``; or ``"auto"``.
        dense: Whether it has no groups where the exact merge has some.
    """

    convs: tuple[str, ...]
    size: str = "exact"
    dense: bool = False


@dataclass(frozen=True)
class Sum:
    """An addition that goes, one operand taking its place.

    Attributes:
        owner: Qualified name of the module whose forward adds.
        label: What the addition is called there.
        number: Which call of that label it is, from 1.
        keep: Position of the operand that stays.
    """

    owner: str
    label: str
    number: int
    keep: int


@dataclass(frozen=True)
class Branch:
    """A residual branch that is not computed any more; its modules and their parameters stay in the model, unused.

    Attributes:
        sum: What added it.
        convs: Qualified names of its convolutions.
    """

    sum: Sum
    convs: tuple[str, ...]


@dataclass(frozen=True)
class Counts:
    """Totals in eval mode: convolutions on the main path, sites before and after, the ratio asked and reached."""

    convs: int
    activations_before: int
    activations_after: int
    ratio_asked: str
    ratio_reached: str


@dataclass(frozen=True)
class Plan:
    """What a conversion does, call by call. Made by :func:`nmconv.make_plan`, done by :func:`nmconv.apply_plan`.

    Attributes:
        model: Class name of the model.
        fingerprint: Identifies the model's structure and what its forward does with it; the same for any weights,
            sizes, dtype, device, mode and classifier.
        ratio: The ratio asked for, as text.
        options: The other options that were given, as (name, text) pairs.
        convs: Convolutions on the main path in eval mode, parallel ones counted once.
        sites: Every activation call that was found, in order of execution.
        untraced: Parts of the model that do not run in one of the modes, and what to do about it.
        hoists: Linear runs whose padding moves to their first convolution (``hoist_padding=True``).
        kernels: Linear runs, or parts of them, that :func:`nmconv.fit` makes one convolution of.
        branches: Residual branches that go.
        registered: Classes of the model that :func:`nmconv.register` told of, each with its kind.
        call: What the model was called with when the plan was made, or None if that cannot be put into words. Two plans
            that differ in it only are equal.
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
        return self  # nothing in it can change

    @property
    def linear(self) -> bool:
        """Whether linear layers count as convolutions in it."""
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
        """Whether applying it changes a model. Kernels alone change nothing: :func:`nmconv.fit` makes them."""
        return bool(self.changes or self.hoists or self.branches)

    def __str__(self) -> str:
        counts = self.counts
        head = (
            f"{self.model} at {self.ratio}: {counts.activations_before} activations -> {counts.activations_after} "
            f"for {counts.convs} convolutions ({counts.ratio_reached})"
        )
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
            for site in self.sites
        ]
        lines = [head, table(("site", "kind", "chain", "unit", "role", "action", "reason"), rows)]
        lines += [
            f"padding {'stays' if hoist.why else 'moves to'} {hoist.convs[0]}"
            + (f": {hoist.why}" if hoist.why else f" from {', '.join(hoist.convs[1:])}")
            for hoist in self.hoists
        ]
        lines += [
            f"{', '.join(kernel.convs)} -> one {'dense ' if kernel.dense else ''}kernel, {kernel.size}"
            for kernel in self.kernels
        ]
        lines += [f"branch goes: {', '.join(branch.convs)}" for branch in self.branches]
        lines += [f"untraced: {part.name or 'the model itself'}: {part.reason}. {part.hint}" for part in self.untraced]
        return "\n".join(lines)

    def edit(self, actions: Mapping[str | Site, str]) -> Plan:
        """The plan with other actions for some sites.

        Args:
            actions: From a site (its ``id``, or the Site) to ``"keep"`` or ``"drop"``.

        Returns:
            A new plan; a unit may then keep more than the ratio says, or none. Linear runs in which an action changes
            are no longer hoisted, and become no kernels.

        Raises:
            PlanError: If a site is not in the plan, cannot be changed, or the action is another.
        """
        wanted: dict[str, str] = {}
        known = {site.id: site for site in self.sites}
        for key, action in actions.items():
            name = key.id if isinstance(key, Site) else key
            if name not in known:
                near = [site for site in known if str(name) in site][:5]
                hint = f"did you mean {', '.join(near)}?" if near else "print the plan for the sites it has"
                raise PlanError(f"no site {name!r} in this plan of {self.model}: {hint}")
            if action not in ("keep", "drop"):
                raise PlanError(f"action {action!r} for {name}: give 'keep' or 'drop'")
            site = known[name]
            if site.action == "gone":
                raise PlanError(f"{name} goes with its branch: it cannot be set to {action!r}")
            if site.action == "skip":
                raise PlanError(f"{name} is no site ({site.reason}): it cannot be set to {action!r}")
            if action == "drop" and site.locked:
                raise PlanError(f"{name} cannot be dropped: {site.locked}")
            wanted[name] = action
        sites = tuple(
            replace(site, action=wanted[site.id], reason="edited by hand", behind="") if site.id in wanted else site
            for site in self.sites
        )
        # A run in which an action changes is another run: its padding stays where it was, its convolutions apart.
        touched = {
            conv for site in self.sites if wanted.get(site.id, site.action) != site.action for conv in site.convs
        }
        hoists = tuple(hoist for hoist in self.hoists if not touched.intersection(hoist.convs))
        kernels = tuple(kernel for kernel in self.kernels if not touched.intersection(kernel.convs))
        return replace(self, sites=sites, hoists=hoists, kernels=kernels)

    def with_kernels(self, kernels: Mapping[tuple[str, ...] | str, str | int]) -> Plan:
        """The plan with kernels for some linear runs, in place of those that it has.

        Args:
            kernels: From the convolutions' qualified names, in order of execution (a tuple, or text with commas), to
                the size: ``"exact"``, ``"auto"``, a number such as 3 or ``"3"``, or ``"3x1"``.

        Raises:
            PlanError: If a size is none, or a convolution is named twice.
        """
        made = tuple(
            Kernel(tuple(part.strip() for part in (names.split(",") if isinstance(names, str) else names)), str(size))
            for names, size in kernels.items()
        )
        plan = replace(self, kernels=made)
        try:
            _check(plan)
        except ValueError as error:
            raise PlanError(f"{error}") from error
        return plan

    def to_json(self) -> str:
        """The plan as versioned JSON text: a line a site, for people to read and to edit.

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
        """Read what :meth:`to_json` wrote, or what somebody made of it by hand.

        Raises:
            PlanError: If the text is no plan, or one of another version.
        """
        try:
            data = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise PlanError(f"this is no plan: {error}; give the text that Plan.to_json returned") from error
        if not isinstance(data, dict) or "nmconv_plan" not in data:
            raise PlanError("this JSON is no nmconv plan; give the text that Plan.to_json returned")
        version = data.pop("nmconv_plan")
        if version != _VERSION:
            raise PlanError(
                f"a plan of version {version}; this nmconv reads {_VERSION}: make the plan anew with nmconv.make_plan"
            )
        try:
            plan: Plan = from_plain(cls, data)
            _check(plan)
        except (TypeError, ValueError, RecursionError) as error:
            raise PlanError(
                f"a damaged plan ({error}): undo what was edited by hand, or make it anew with nmconv.make_plan"
            ) from error
        return plan


def _check(plan: Plan) -> None:
    """Refuse values that no plan of ours has, with ValueError."""
    for site in plan.sites:
        known = (
            (site.action, ("keep", "drop", "move", "gone", "skip")),
            (site.modes, ("both", "eval", "train")),
        )
        for value, allowed in known:
            if value not in allowed:
                raise ValueError(f"{site.name}: {value!r} is none of {', '.join(allowed)}")
        if (site.action == "move") != bool(site.behind):
            raise ValueError(f"{site.id}: 'behind' goes with the action 'move', and with no other")
        if site.action == "drop" and site.locked:
            raise ValueError(f"{site.id} cannot be dropped: {site.locked}")
    taken = [conv for kernel in plan.kernels for conv in kernel.convs]
    for kernel in plan.kernels:
        numbers = kernel.size.split("x")
        fine = kernel.size in ("exact", "auto") or all(part.isascii() and part.isdecimal() for part in numbers)
        if not fine or any(part.strip("0") == "" for part in numbers):
            raise ValueError(f"a kernel of size {kernel.size!r}: give 'exact', 'auto', a number such as 3, or '3x1'")
        if not kernel.convs or any(taken.count(conv) > 1 for conv in kernel.convs):
            raise ValueError(f"a kernel for {', '.join(kernel.convs) or 'nothing'}: name each convolution once")
    for branch in plan.branches:
        if branch.sum.keep not in (0, 1) or branch.sum.number < 1:
            raise ValueError(f"{branch.sum.owner}: it keeps operand {branch.sum.keep} of sum {branch.sum.number}")
    ids = [site.id for site in plan.sites]
    if len(set(ids)) != len(ids):
        raise ValueError("a site stands twice in it")
