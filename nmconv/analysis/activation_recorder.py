"""Statistics of a model's activations while it trains."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmconv.analysis.all_reduce import reduced
from nmconv.analysis.observed_sites import sites_of
from nmconv.analysis.site_accumulators import SiteAccumulators
from nmconv.analysis.statistics import ActivationStats
from nmconv.errors import NoSitesError, OptionError
from nmconv.fitting import Hook, home_of
from nmconv.flow import recordings_of
from nmconv.surgery import check_examples, check_has_run, check_plain

__all__ = ["ActivationRecorder"]


class ActivationRecorder:
    """Measures the activations of a model that trains, every so many steps: a context manager.

    Every forward of a recorded step counts, in the mode that the model is in; those without gradients (validation) do
    not. Other steps cost next to nothing. Hooks are on the model within the ``with`` only. Where torch.distributed is
    initialised, sums are added up over all processes: each of them must use a recorder in the same way.

    Args:
        model: Not wrapped, compiled or scripted: with ``DistributedDataParallel`` give ``ddp.module``.
        every: Steps from one that is recorded to the next; the first is.
        example_inputs: What the model is called with, as for :func:`nmconv.convert`; None guesses an image batch.

    Attributes:
        stats: From the number of a step, from 0, to its :class:`nmconv.ActivationStats`; without gradients.

    Raises:
        ModelTypeError: If ``model`` is no module, or wrapped, compiled or scripted.
        OptionError: If ``every`` is no number from 1, or the model cannot be called with ``example_inputs``.
        NoSitesError: If the model calls no activation that nmconv knows.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import nmconv
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
        >>> images = torch.randn(8, 3, 6, 6)
        >>> _ = model(images)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> with nmconv.ActivationRecorder(model, every=2, example_inputs=images) as recorder:
        ...     for _ in range(4):
        ...         loss = model(images).square().mean()
        ...         loss.backward()
        ...         optimizer.step()
        ...         recorder.step()
        >>> list(recorder.stats)
        [0, 2]
    """

    def __init__(self, model: nn.Module, every: int = 1, *, example_inputs: Any = None) -> None:
        check_plain(model, "record")
        check_has_run(model)
        check_examples(example_inputs)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise OptionError(f"every={every!r}: give a number of steps, 1 or more")
        self._model = model
        self._every = every
        sites = sites_of(model, recordings_of(model, example_inputs, linear=True, both_sizes=False))
        self._measured = SiteAccumulators(model, sites)
        if not self._measured.sites:
            raise NoSitesError(
                f"this {type(model).__name__} calls no activation that nmconv knows: see nmconv.register"
            )
        self._hooks = ExitStack()
        self._forward = ExitStack()  # what is on during a forward
        self._on = False
        self._step = 0
        self.stats: dict[int, ActivationStats] = {}

    def __enter__(self) -> ActivationRecorder:
        if self._on:
            raise OptionError("this ActivationRecorder is entered already: make another one")
        self._on = True
        self._measured.clear()
        self._hooks.enter_context(self._measured.watch)
        # Around all other hooks: before the first, and behind the last even where the forward fails.
        begin = self._model.register_forward_pre_hook(Hook(self._begin), prepend=True, with_kwargs=True)
        end = self._model.register_forward_hook(Hook(self._end), always_call=True)
        self._hooks.callback(begin.remove)
        self._hooks.callback(end.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False
        self._forward.close()
        self._hooks.close()

    def step(self) -> None:
        """End a training step; what a recorded one has seen goes to ``stats``.

        Raises:
            OptionError: Outside of the ``with``.
        """
        if not self._on:
            raise OptionError("step() is for within the with: with ActivationRecorder(model) as recorder: ...")
        if self._step % self._every == 0:
            measured = self._measured
            measured.images = reduced(list(measured.sums.values()), measured.images, home_of(self._model)[0])
            if measured.images:
                self.stats[self._step] = measured.stats()
            measured.clear()
        self._step += 1

    def rows(self) -> list[dict[str, Any]]:
        """A tidy table of all steps: the rows of :meth:`nmconv.ActivationStats.rows`, each with its ``step``."""
        return [{"step": step, **row} for step, stats in self.stats.items() for row in stats.rows()]

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._forward.close()  # one that was interrupted
        if self._step % self._every == 0 and torch.is_grad_enabled():
            first = next((value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)), None)
            self._measured.images += len(first) if first is not None and first.dim() else 1
            self._forward.enter_context(self._measured.watch.running())

    def _end(self, *_: object) -> None:
        self._forward.close()
