"""The witness: a recording of a model before a change, with which the changed model is compared."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from nmconv.errors import NmconvError, WitnessError
from nmconv.flow import is_leaf, record_model
from nmconv.planning import Changes, Signature
from nmconv.recording import ModelRaised, NeedsData, Recording, record_again
from nmconv.surgery.slopes import get_slopes, is_dropping
from nmconv.witness import Difference, MergedGroup, allowed_differences, broken_groups, compare

__all__ = ["Witness"]


class Witness:
    """Recordings of a model before it is changed.

    Args:
        model: Recorded now, in both modes and at two sizes; read only.
        example_inputs: What it is called with; None: a guess.
        linear: Whether it may consist of linear layers alone.
        choices: Whether to record it with other bools and enum members as arguments, and at other entry points, too.
        methods: Maps further methods to record to their example inputs.
        call: The call signature that a plan states, to be used instead of a guess.
        options: Which of the options ``exclude`` and ``witness`` the user's function has; errors advise these.

    Attributes:
        recordings: The recordings.

    Raises:
        OptionError: If it cannot be called with these inputs.
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
        options: Container[str] = ("witness",),
    ) -> None:
        self.recordings = record_model(
            model, example_inputs, linear=linear, choices=choices, methods=methods, call=call
        )
        self._model = model
        self._options = options

    def check(
        self,
        result: nn.Module,
        changes: Changes | None,
        groups: Iterable[MergedGroup] = (),
        closed: Container[str] = (),
    ) -> None:
        """Compare a changed model with the original, apart from the given changes and merges.

        Args:
            result: The changed model.
            changes: What a plan has changed, or None.
            groups: What has been merged.
            closed: Methods that now raise on purpose.

        Raises:
            WitnessError: If it differs in any other way; the text states the first difference.
        """
        allowed = allowed_differences(changes, groups)
        slopes = self._slopes_to_compare(result, changes)
        gradual = frozenset(name for name, module in result.named_modules() if is_dropping(module))
        for before in self.recordings.runs:
            if before.call.method in closed or before.call.flipped:
                continue
            try:
                after = record_again(result, before, is_leaf)
            except ModelRaised as raised:
                error = raised.error
                if before.call.may_raise and isinstance(error, NmconvError):
                    continue  # the changed model rejects this call on purpose
                difference = Difference(f"it raises {type(error).__name__}: {error}")
                raise self._error(before, difference) from error
            except NeedsData as asked:
                raise self._error(before, Difference(f"it depends on other data: {asked}")) from asked
            for slope in slopes:
                found = compare(before, after, allowed, slope, gradual)
                if found is not None:
                    raise self._error(before, found)

    def _slopes_to_compare(self, result: nn.Module, changes: Changes | None) -> tuple[int | None, ...]:
        """Return the slopes at which a result is compared: both ends if it is gradual."""
        slopes = get_slopes(result)
        if not slopes or changes is None:
            return (None,)
        sites = {change.call.id for change in changes.made}
        if slopes.keys() != sites:
            site = min(slopes.keys() ^ sites)
            raise self._error(self.recordings.runs[0], Difference(f"{site} is not mixed though the plan changes it"))
        return (0, 1)

    def broken(self, groups: Sequence[MergedGroup]) -> dict[str, str]:
        """Return why groups cannot be one convolution in every recording, by the heads of these groups."""
        reasons: dict[str, str] = {}
        for run in self.recordings.runs:
            for head, why in ({} if run.call.closable else self.broken_in(run, groups)).items():
                reasons.setdefault(head, f"{why} ({run.call.name})")
        called = {frame.path for run in self.recordings.runs for frame in run.frames}
        called |= {fact.label for run in self.recordings.runs for fact in run.facts.values()}
        for group in groups:
            if called.isdisjoint(group.members):
                reasons[group.head] = "it was never seen called"
        return reasons

    @staticmethod
    def broken_in(run: Recording, groups: Sequence[MergedGroup]) -> Mapping[str, str]:
        """Return the same as :meth:`broken`, for one recording."""
        return broken_groups(run, allowed_differences(None, groups))

    def _error(self, before: Recording, difference: Difference) -> WitnessError:
        if self._is_nondeterministic(before):
            text = "the model itself runs differently each time it is called, so that nothing can be checked"
        else:
            text = f"the result differs from what was asked for ({before.call.name}): {difference.text}"
        advice = "report it, unless one of the two was changed by hand"
        if "witness" in self._options:
            excludes = "exclude" in self._options and difference.first  # the difference is in the original
            advice = (
                f"exclude the activations that {difference.module or 'the model'} inspects" if excludes else "report it"
            )
            advice = f"nothing was changed: {advice}, or pass witness=False to skip the check"
        return WitnessError(
            f"this {type(self._model).__name__}: {text}; {advice}",
            difference.module,
            difference.first,
            difference.second,
        )

    def _is_nondeterministic(self, before: Recording) -> bool:
        """Return whether a second recording of the original differs from the first."""
        again = record_again(self._model, before, is_leaf)
        return compare(before, again, allowed_differences(None)) is not None
