"""A plan's sites: activation calls and what happens to them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nmconv.planning.dataclass_json import checked, to_plain
from nmconv.planning.structure import call_id

__all__ = ["Site", "check_sites"]

_ACTIONS = ("keep", "drop", "move", "gone", "skip")
_MODES = ("both", "eval", "train")
_ID = re.compile(r"(?P<name>.*?)(:(?P<function>\w+))?#(?P<call>\d{1,9})(@(?P<owner>.*?))?(?P<train>\(train\))?")


@dataclass(frozen=True)
class Site:
    """One call of an activation and what happens to it.

    Attributes:
        name: Qualified name of the activation module; for a functional call, of the module whose forward makes it.
        function: None for a module; else the kind of function (``relu``, ``gelu``, ...), the same for its in-place
            variant.
        owner: Qualified name of the module whose own forward makes the call ("" is the model itself).
        call: Which call of this module (or of this kind of function) it is within one forward of ``owner``, from 1,
            in eval mode; in train mode for a site that runs in training only.
        train_call: The same in train mode; None if the call is made in eval mode only.
        modes: When the call is made: ``both``, ``eval`` or ``train``.
        kind: The activation's name, such as ``ReLU``.
        action: ``keep``, ``drop``, ``move`` (kept, but at the unit's end), ``gone`` (removed with the branch that makes
            the call), or ``skip`` (not a site).
        reason: The reason for the action.
        convs: Qualified names of the convolution that owns it (several if parallel ones are summed).
        role: How it is reached from its convolution: ``post``, ``residual``, ``gated``, ``parallel``, ``pre``,
            ``leading``, or "".
        chain: Number of the chain, from 0, or None.
        unit: Number of the unit within the chain, from 0, or None.
        behind: For ``move``, the qualified name of the convolution after which it moves, and after that one's norm
            and residual add; else "".
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
        """Its name in :meth:`Plan.edit`, unique in a plan: ``layer1.0.relu#2``, ``Mixed_5b.branch1x1:relu#1``."""
        return call_id(self.name, self.function, self.call, self.owner, self.modes)

    def to_row(self) -> dict[str, Any]:
        """Return the site as a row of a plan's JSON, without defaults and what the id says."""
        omitted = {"name", "function", "owner", "call", "reason"}
        if self.train_call == _default_train_call(self.call, self.modes):
            omitted.add("train_call")
        if self.modes != "eval":
            omitted.add("modes")
        row = {"site": self.id, "action": self.action, "kind": self.kind, **to_plain(self, without=omitted)}
        return {**row, "reason": self.reason}

    @classmethod
    def from_row(cls, row: dict[str, Any], where: str) -> Site:
        """Read a row that :meth:`to_row` returned.

        Raises:
            ValueError: If its id is malformed.
            TypeError: If a field is missing, unknown, of another type, or given twice.
        """
        text = row.get("site")
        match = _ID.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"{where}: {text!r} is not a site's id, such as 'layer1.0.relu#1'")
        name, function, call = match["name"], match["function"], int(match["call"])
        owner = match["owner"] if match["owner"] is not None else name if function else name.rpartition(".")[0]
        modes = "train" if match["train"] else row.get("modes", "both")
        from_id = {"name": name, "function": function, "owner": owner, "call": call, "modes": modes}
        rest = {key: value for key, value in row.items() if key != "site"}
        if (match["train"] and "modes" in rest) or rest.keys() & from_id.keys() - {"modes"}:
            raise TypeError(f"{where} has a field that repeats what its id says")
        values = {"train_call": _default_train_call(call, modes), **rest, **from_id}
        return cls(**checked(cls, values, where))


def _default_train_call(call: int, modes: str) -> int | None:
    return None if modes == "eval" else call


def check_sites(sites: Sequence[Site]) -> None:
    """Raise ValueError if a plan cannot have these sites."""
    for site in sites:
        for value, allowed in ((site.action, _ACTIONS), (site.modes, _MODES)):
            if value not in allowed:
                raise ValueError(f"{site.name}: {value!r} is not one of {', '.join(allowed)}")
        if (site.action == "move") != bool(site.behind):
            raise ValueError(f"{site.id}: 'behind' is for the action 'move', and only for it")
        if site.action == "drop" and site.locked:
            raise ValueError(f"{site.id} cannot be dropped: {site.locked}")
    if len({site.id for site in sites}) != len(sites):
        raise ValueError("it has a site twice")
