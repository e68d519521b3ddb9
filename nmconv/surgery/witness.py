"""The second witness: a model recorded before it is changed, and what becomes of it held against that."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from nmconv.errors import NmconvError, WitnessError
from nmconv.flow import is_leaf, recordings_of
from nmconv.planning import Changes, Signature
from nmconv.recording import ModelRaised, NeedsData, Recording, record_again
from nmconv.surgery.gradual import get_slopes, is_dropping
from nmconv.witness import Difference, MergedGroup, allowed_by, broken_groups, compare

__all__ = ["Witness"]


class Witness:
    """What a model did before it was changed.

    Args:
        model: Recorded now, in both modes and at two sizes; read only.
        example_inputs: What it is called with, or None for a guess.
        linear: Whether it may be one of linear layers alone.
        choices: Whether to record it with other truth values among its arguments and at other entry points, too.
        methods: Further methods to record, and example inputs of each.
        call: What a plan says that it is called with: instead of a guess.

    Raises:
        OptionError: If it cannot be called with them.
        ModelTypeError: If it cannot be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any = None,
        *,
        linear: bool = False,
        choices: bool = False,
        methods: Mapping[str, Any] | None = None,
        call: Signature | None = None,
    ) -> None:
        self.recordings = recordings_of(
            model, example_inputs, linear=linear, choices=choices, methods=methods, call=call
        )
        self._model = model

    def check(
        self,
        result: nn.Module,
        changes: Changes | None,
        groups: Iterable[MergedGroup] = (),
        closed: Container[str] = (),
    ) -> None:
        """Hold a changed model against the original, the plan and the merges.

        Args:
            result: What became of the model.
            changes: What a plan has done to it meanwhile, or None.
            groups: What was merged meanwhile.
            closed: Methods that raise now.

        Raises:
            WitnessError: If it does anything else; the text shows the first difference.
        """
        allowed = allowed_by(changes, groups)
        slopes = self._slopes(result, changes)
        gradual = frozenset(name for name, module in result.named_modules() if is_dropping(module))
        for before in self.recordings.runs:
            if before.call.method in closed or before.call.other_way:
                continue
            try:
                after = record_again(result, before, is_leaf)
            except ModelRaised as raised:
                error = raised.error
                if before.call.optional and isinstance(error, NmconvError):
                    continue  # it says so itself
                found = Difference(f"it raises {type(error).__name__}: {error}")
                raise self._error(before, found) from error
            except NeedsData as asked:
                raise self._error(before, Difference(f"it asks for other numbers: {asked}")) from asked
            for slope in slopes:
                difference = compare(before, after, allowed, slope, gradual)
                if difference is not None:
                    raise self._error(before, difference)

    def _slopes(self, result: nn.Module, changes: Changes | None) -> tuple[int | None, ...]:
        """The slopes at which a result is compared: a gradual one at both ends."""
        found = get_slopes(result)
        if not found or changes is None:
            return (None,)
        sites = {change.call.id for change in changes.made}
        if found.keys() != sites:
            one = min(found.keys() ^ sites)
            raise self._error(self.recordings.runs[0], Difference(f"{one} is not mixed though the plan changes it"))
        return (0, 1)

    def broken(self, groups: Sequence[MergedGroup]) -> dict[str, str]:
        """From the heads of groups that are not one convolution in every recording to why."""
        found: dict[str, str] = {}
        for run in self.recordings.runs:
            for head, why in ({} if run.call.closable else self.broken_in(run, groups)).items():
                found.setdefault(head, f"{why} ({run.call.name})")
        called = {frame.path for run in self.recordings.runs for frame in run.frames}
        called |= {fact.label for run in self.recordings.runs for fact in run.facts.values()}
        for group in groups:
            if called.isdisjoint(group.members):
                found[group.head] = "it was never seen called"
        return found

    @staticmethod
    def broken_in(run: Recording, groups: Sequence[MergedGroup]) -> Mapping[str, str]:
        """The same for one recording."""
        return broken_groups(run, allowed_by(None, groups))

    def _error(self, before: Recording, found: Difference) -> WitnessError:
        if self._runs_otherwise(before):
            text = "the model itself runs otherwise each time it is called, so that nothing can be checked"
        else:
            text = f"the result would not be what was asked for ({before.call.name}): {found.text}"
        where = f"exclude the activations that {found.module or 'the model'} asks for" if found.first else "report it"
        return WitnessError(
            f"{_named(self._model)}: {text}; it is as it was: {where}, or pass witness=False if you know better",
            found.module,
            found.first,
            found.second,
        )

    def _runs_otherwise(self, before: Recording) -> bool:
        """Whether the original itself does something else each time."""
        again = record_again(self._model, before, is_leaf)
        return compare(before, again, allowed_by(None)) is not None


def _named(model: nn.Module) -> str:
    return f"this {type(model).__name__}"
