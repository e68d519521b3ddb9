"""What the analysis of a model found, as plain data: activations, chains of convolutions, and who owns which."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

__all__ = ["Activation", "Chain", "Item", "Place", "Structure", "Untraced", "call_id"]


def call_id(name: str, function: str | None, call: int, owner: str, modes: str) -> str:
    """What names an activation call: ``layer1.0.relu#2``, or ``Mixed_5b.branch1x1:relu#1``, one of a kind."""
    kind = f":{function}" if function else ""
    train = "(train)" if modes == "train" else ""
    # a call through another module than the one that holds it says who calls
    caller = "" if function or name.rpartition(".")[0] == owner else f"@{owner}"
    return f"{name}{kind}#{call}{caller}{train}"


@dataclass(frozen=True)
class Untraced:
    """A part of a model that does not run in one of the modes.

    Attributes:
        name: Its qualified name ("" is the model itself).
        reason: In which mode, and what it raises.
        hint: What to pass to reach it.
    """

    name: str
    reason: str
    hint: str


@dataclass(frozen=True)
class Place:
    """A value inside one module's forward: the result of the ``call``-th call of ``op`` in it.

    Attributes:
        owner: Qualified name of the module whose forward computes the value.
        method: Name of the method of ``owner`` that computes it.
        op: A child's name relative to ``owner``, or the name of a function such as ``add``.
        call: 1-based count of calls of ``op`` within one call of the method.
        how: ``rewrite`` the method, ``insert`` behind a child of a Sequential, or fill the ``slot`` named ``op``.
        takes: The structure of the arguments ``method`` is called with, as JSON, where it is rewritten.
    """

    owner: str
    method: str
    op: str
    call: int
    how: str
    takes: str = ""


@dataclass(frozen=True)
class Activation:
    """One call of an elementwise activation.

    Attributes:
        name: Qualified name of the activation module; for a functional call, of the module whose forward makes it.
        function: None for a module; else the kind of function (``relu``, ``gelu``, ...), in-place or not alike.
        owner: Qualified name of the module whose own forward makes the call ("" is the model itself).
        method: The method of ``owner`` that makes the call, mostly ``forward``.
        call: Which call of this module (or of this kind of function) it is within one forward of ``owner``, from 1,
            in eval mode; in train mode for a call that is made in training only.
        train_call: The same in train mode; None if the call is made in eval mode only.
        step: Like ``call``, but counted within ``method`` alone.
        train_step: The same in train mode.
        takes: Where ``how`` is ``rewrite``: the structure of the arguments ``method`` is called with, as JSON.
        modes: ``both``, ``eval`` or ``train``: when the call is made.
        kind: The activation's name, such as ``ReLU``.
        inplace: Whether the call overwrites its input.
        copy: Whether the identity that replaces it must copy, lest two readers share memory.
        how: ``swap`` if replacing a submodule is enough, ``rewrite`` if the owner's method must be.
        movable: Whether it can be called elsewhere.
        skip: Why it is no site, or "".
    """

    name: str
    function: str | None
    owner: str
    method: str
    call: int
    train_call: int | None
    step: int
    train_step: int | None
    takes: str
    modes: str
    kind: str
    inplace: bool
    copy: bool
    how: str
    movable: bool
    skip: str = ""

    @property
    def id(self) -> str:
        """As of :class:`nmconv.Site`."""
        return call_id(self.name, self.function, self.call, self.owner, self.modes)


@dataclass(frozen=True)
class Item:
    """One convolution of a chain (several that are summed count as one) and the activation it owns.

    Attributes:
        convs: Qualified names.
        order: Position in the order of execution.
        act: Index into ``Structure.activations``, or None.
        role: How the activation is reached: post, residual, gated, parallel, pre.
        end: Where an activation could be put behind this convolution, or None.
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
    """Convolutions that follow one another. ``pre``: activations stand before their convolutions."""

    items: tuple[Item, ...]
    pre: bool
    modes: str


@dataclass(frozen=True)
class Structure:
    """All that planning needs to know of a model.

    Attributes:
        model: Class name.
        activations: Every activation call seen, in order of execution.
        chains: Every chain, in order of execution.
        leading: Activations that always stay although convolutions are near: index and reason.
        stages: For each part of timm's ``feature_info``, when the last of its module has run, in the order that items
            count in (-1: it never does); empty where there is none.
        untraced: Parts that do not run in one of the modes.
        classifier: Names of modules that depend on the number of classes.
        steps: What the forward does in eval mode, step by step: kinds of convolutions, norms, activations, sums and
            products, and names of those that are modules.
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
        """A short text that differs where another data flow was found; the classifier does not count."""
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
