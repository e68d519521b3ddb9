"""What the analysis of a model found, as plain data: activations, chains of convolutions, and who owns which."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

__all__ = ["Activation", "Chain", "Item", "Place", "Structure", "Untraced"]


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

    The attributes are those of :class:`nmconv.Site`; ``skip`` is the reason why it is no site, or "".
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
        steps: What the forward does in eval mode, step by step: convolutions, norms, activations, sums and products.
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
        return act.owner, act.name, act.function, act.call, act.train_call, act.kind, act.inplace, act.copy, act.how
