"""Observe the inputs and outputs of activation calls while a model runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmconv.analysis.observed_sites import CallId, ObservedSite
from nmconv.observing import ForwardTracker, Hook

__all__ = ["SiteWatch"]

Observer = Callable[[ObservedSite, Tensor], None]


class SiteWatch(ForwardTracker):
    """Call observers with the inputs and outputs of activations.

    Args:
        model: The model to watch, in any mode: the owner's own mode selects the sites that apply to a call.
        sites: Its activation calls, as :func:`nmconv.analysis.observed_sites.observed_sites` returns them.
        on_input: Called with each input before the activation may overwrite it. It must not keep the tensor.
        on_output: Called with each output after the call.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[bool, Sequence[ObservedSite]],
        *,
        on_input: Observer | None = None,
        on_output: Observer,
    ) -> None:
        super().__init__(model)
        self._on_input, self._on_output = on_input, on_output
        self._sites_by_input: dict[tuple[bool, CallId], list[ObservedSite]] = defaultdict(list)
        self._sites_by_output: dict[tuple[bool, CallId], list[ObservedSite]] = defaultdict(list)
        for training, sites_in_mode in sites.items():
            for site in sites_in_mode:
                self._sites_by_input[training, site.input_call].append(site)
                self._sites_by_output[training, site.output_call].append(site)
        calls = {call for _, call in (*self._sites_by_input, *self._sites_by_output)}
        self._watched = {(call.owner, call.label) for call in calls}
        self._owners = {owner: model.get_submodule(owner) for owner, _ in self._watched}

    def _hook(self) -> None:
        super()._hook()
        for label in sorted({label for _, label in self._watched if label.startswith("/")}):
            module = self._model.get_submodule(label[1:])
            self._add(module.register_forward_pre_hook(Hook(self._pre_hook(label)), with_kwargs=True))
            self._add(module.register_forward_hook(Hook(self._post_hook(label))))

    def _pre_hook(self, label: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._is_running and len(self._stack) > 1:  # the top of the stack is the called module itself
                self._observe_input(self._stack[-2], label, args, kwargs)

        return hook

    def _post_hook(self, label: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            if self._is_running and self._stack:
                self._observe_output(self._stack[-1], label, result)

        return hook

    def calling(self, name: str, args: Any, kwargs: Any) -> None:
        """Observe the input of a function that the running forward is about to call."""
        if self._stack:
            self._observe_input(self._stack[-1], name, args, kwargs)

    def called(self, name: str, result: Any) -> Any:
        """Observe and return the result of a function that the running forward has called."""
        if self._stack:
            self._observe_output(self._stack[-1], name, result)
        return result

    def _observe_input(self, owner: str, label: str, args: Any, kwargs: Any) -> None:
        if (owner, label) not in self._watched:
            return
        call = CallId(owner, label, self._count(owner, label))
        sites = self._sites_by_input.get((self._owners[owner].training, call), ())
        if self._on_input is not None and sites:
            tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            for site in sites:
                if site.input_position < len(tensors):
                    with torch._C.DisableTorchFunction(), torch.no_grad():
                        self._on_input(site, tensors[site.input_position].detach())

    def _observe_output(self, owner: str, label: str, result: Any) -> None:
        if (owner, label) not in self._watched or not isinstance(result, Tensor):
            return
        call = CallId(owner, label, self._counts[owner, label])
        for site in self._sites_by_output.get((self._owners[owner].training, call), ()):
            with torch._C.DisableTorchFunction():
                self._on_output(site, result)
