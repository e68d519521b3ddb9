"""A model's structure as plain data: activation calls, chains of convolutions, and which convolution owns which."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

__all__ = ["Activation", "Chain", "Item", "Place", "Structure", "Untraced", "call_id"]


def call_id(name: str, function: str | None, call: int, owner: str, modes: str) -> str:
    """Return the unique name of an activation call: ``layer1.0.relu#2``, or ``Mixed_5b.branch1x1:relu#1``."""
    kind = f":{function}" if function else ""
    train = "(train)" if modes == "train" else ""
    # If a module other than the activation's parent makes the call, name it.
    caller = "" if function or name.rpartition(".")[0] == owner else f"@{owner}"
    return f"{name}{kind}#{call}{caller}{train}"


@dataclass(frozen=True)
class Untraced:
    """A part of a model that does not run in one of the modes.

    Attributes:
        name: Its qualified name ("" is the model itself).
        reason: The mode, and the exception that it raises.
        hint: The inputs to pass so that it runs.
    """

    name: str
    reason: str
    hint: str


@dataclass(frozen=True)
class Place:
    """An insertion point: the result of the ``call``-th call of ``op`` in one method of a module.

    Attributes:
        owner: Qualified name of the module whose forward computes the value.
        method: Name of the method of ``owner`` that computes it.
        op: A child's name relative to ``owner``, or a function's name such as ``add``.
        call: Which call of ``op`` it is within one call of the method, from 1.
        how: ``rewrite`` (the method), ``insert`` (after a child of a Sequential) or ``slot`` (fill the slot ``op``).
        argument_structure: For ``rewrite``, the structure of the arguments that ``method`` is called with, as JSON.
    """

    owner: str
    method: str
    op: str
    call: int
    how: str
    argument_structure: str = ""


@dataclass(frozen=True)
class Activation:
    """One call of an elementwise activation.

    Attributes:
        name: Qualified name of the activation module; for a functional call, of the module whose forward makes it.
        function: None for a module; else the kind of function (``relu``, ``gelu``, ...), the same for its in-place
            variant.
        owner: Qualified name of the module whose own forward makes the call ("" is the model itself).
        method: The method of ``owner`` that makes the call, usually ``forward``.
        call: Which call of this module (or of this kind of function) it is within one forward of ``owner``, from 1,
            in eval mode; in train mode for a call that is made in training only.
        train_call: The same in train mode; None if the call is made in eval mode only.
        step: Like ``call``, but counted within ``method`` only.
        train_step: The same in train mode.
        argument_structure: For ``rewrite``, the structure of the arguments that ``method`` is called with, as JSON.
        modes: When the call is made: ``both``, ``eval`` or ``train``.
        kind: The activation's name, such as ``ReLU``.
        inplace: Whether the call overwrites its input.
        copy: Whether the identity that replaces it must copy its input, so that two readers do not share memory.
        how: ``swap`` if replacing a submodule is enough, ``rewrite`` if the method must be rewritten.
        movable: Whether it can move to the unit's end; with parameters, it cannot.
        skip: Why it is not a site, or "".
    """

    name: str
    function: str | None
    owner: str
    method: str
    call: int
    train_call: int | None
    step: int
    train_step: int | None
    argument_structure: str
    modes: str
    kind: str
    inplace: bool
    copy: bool
    how: str
    movable: bool
    skip: str = ""

    @property
    def id(self) -> str:
        """Its unique name; see :class:`nmconv.Site`."""
        return call_id(self.name, self.function, self.call, self.owner, self.modes)


@dataclass(frozen=True)
class Item:
    """One convolution of a chain (several that are summed count as one) and the activation it owns.

    Attributes:
        convs: Qualified names.
        order: Its position in the order of execution.
        act: Index into ``Structure.activations``, or None.
        role: How the activation is reached: ``post``, ``residual``, ``gated``, ``parallel``, ``pre``, or "".
        end: The insertion point of an activation after this convolution, or None.
        end_reason: Why ``end`` is None.
    """

    convs: tuple[str, ...]
    order: int
    act: int | None = None
    role: str = ""
    end: Place | None = None
    end_reason: str = ""


@dataclass(frozen=True)
class Chain:
    """Consecutive convolutions.

    Attributes:
        items: The convolutions, in order of execution.
        pre: Whether activations precede their convolutions.
        modes: When it runs: ``both``, ``eval`` or ``train``.
    """

    items: tuple[Item, ...]
    pre: bool
    modes: str


@dataclass(frozen=True)
class Structure:
    """All that planning needs to know about a model.

    Attributes:
        model: Class name.
        activations: Every activation call, in order of execution; then activation modules that are never called.
        chains: Every chain, in order of execution.
        leading: Activations next to convolutions that always stay: the index of each, and the reason.
        stages: For each entry of timm's ``feature_info``, the position at which the last of its module runs, in the
            same count as ``Item.order`` (-1: it never does); empty if the model has none.
        untraced: Parts that do not run in one of the modes.
        classifier: Names of the modules that depend on the number of classes.
        steps: The convolutions, norms, activations, sums and products of the forward in eval mode, in order of
            execution: the kind of each, and the name of those that are modules.
    """

    model: str
    activations: tuple[Activation, ...]
    chains: tuple[Chain, ...]
    leading: tuple[tuple[int, str], ...]
    stages: tuple[int, ...]
    untraced: tuple[Untraced, ...]
    classifier: tuple[str, ...] = ()
    steps: tuple[tuple[str, str], ...] = ()

    def digest(self) -> str:
        """Return a hash of the data flow without the classifier: 16 hexadecimal digits."""
        facts: list[object] = [step for step in self.steps if not self._is_classifier(step[1])]
        for chain in self.chains:
            items = [item for item in chain.items if not any(map(self._is_classifier, item.convs))]
            facts += [(chain.pre, item.convs, item.role, self._call(item.act)) for item in items]
        facts += [self._call(index) for index, _ in self.leading]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def _is_classifier(self, name: str) -> bool:
        return any(name == head or name.startswith((f"{head}.", f"{head}:")) for head in self.classifier)

    def _call(self, index: int | None) -> object:
        if index is None:
            return None
        act = self.activations[index]
        return act.id, act.train_call, act.kind
