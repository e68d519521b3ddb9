"""Activations seen while a model runs: what each call is given, before it may be overwritten, and what it gives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmconv.analysis.observed_sites import Moment, Observed
from nmconv.fitting import ForwardTracker, Hook

__all__ = ["SiteWatch"]

See = Callable[[Observed, Tensor], None]


class SiteWatch(ForwardTracker):
    """Tells of every call of the activations, as :class:`ForwardTracker` counts them.

    Args:
        model: In whatever mode: each owner's own mode decides which number of a call counts.
        sites: As :func:`nmconv.analysis.observed_sites.sites_of` gives them.
        given: Called with each input, before the call. It must not keep the tensor.
        made: Called with each output, behind the call.
    """

    def __init__(
        self, model: nn.Module, sites: Mapping[bool, Sequence[Observed]], *, given: See | None = None, made: See
    ) -> None:
        super().__init__(model)
        self._see_given, self._see_made = given, made
        self._inputs: dict[tuple[bool, Moment], list[Observed]] = defaultdict(list)
        self._outputs: dict[tuple[bool, Moment], list[Observed]] = defaultdict(list)
        for training, found in sites.items():
            for site in found:
                self._inputs[training, site.given].append(site)
                self._outputs[training, site.made].append(site)
        moments = {moment for _, moment in (*self._inputs, *self._outputs)}
        self._wanted = {(moment.owner, moment.label) for moment in moments}
        self._owners = {owner: model.get_submodule(owner) for owner, _ in self._wanted}

    def _hook(self) -> None:
        super()._hook()
        for label in sorted({label for _, label in self._wanted if label.startswith("/")}):
            module = self._model.get_submodule(label[1:])
            self._add(module.register_forward_pre_hook(Hook(self._before(label)), with_kwargs=True))
            self._add(module.register_forward_hook(Hook(self._behind(label))))

    def _before(self, label: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._runs and len(self._stack) > 1:  # the last is the module's own
                self._look(self._stack[-2], label, args, kwargs)

        return hook

    def _behind(self, label: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            if self._runs and self._stack:
                self._show(self._stack[-1], label, result)

        return hook

    def calling(self, name: str, args: Any, kwargs: Any) -> None:
        """A function of this name is called, in the forward that is running."""
        if self._stack:
            self._look(self._stack[-1], name, args, kwargs)

    def called(self, name: str, result: Any) -> Any:
        """A function of this name gave this result, in the forward that is running; gives what to go on with."""
        if self._stack:
            self._show(self._stack[-1], name, result)
        return result

    def _look(self, owner: str, label: str, args: Any, kwargs: Any) -> None:
        if (owner, label) not in self._wanted:
            return
        moment = Moment(owner, label, self._count(owner, label))
        sites = self._inputs.get((self._owners[owner].training, moment), ())
        if self._see_given is not None and sites:
            tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            for site in sites:
                if site.position < len(tensors):
                    with torch._C.DisableTorchFunction(), torch.no_grad():
                        self._see_given(site, tensors[site.position].detach())

    def _show(self, owner: str, label: str, result: Any) -> None:
        if (owner, label) not in self._wanted or not isinstance(result, Tensor):
            return
        moment = Moment(owner, label, self._counts[owner, label])
        for site in self._outputs.get((self._owners[owner].training, moment), ()):
            with torch._C.DisableTorchFunction():
                self._see_made(site, result)
