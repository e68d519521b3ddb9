"""Statistics of a model's activations while it trains."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmconv.analysis.map_moments import all_reduce_moments
from nmconv.analysis.observed_sites import observed_sites
from nmconv.analysis.site_accumulators import SiteAccumulators
from nmconv.analysis.statistics import ActivationStats
from nmconv.errors import OptionError
from nmconv.flow import record_model
from nmconv.observing import Hook, device_and_dtype_of
from nmconv.surgery import check_examples, check_initialized, check_plain

__all__ = ["ActivationRecorder"]


class ActivationRecorder:
    """A context manager that measures a model's activations at regular training steps.

    In a recorded step, every forward with gradients enabled counts, in the model's current mode; forwards without
    gradients (validation) do not. Steps that are not recorded take almost no time. The model carries hooks only within
    the ``with``. If torch.distributed is initialized, sums are reduced over all processes, so each process must use a
    recorder in the same way.

    Args:
        model: A module that is not wrapped, compiled or scripted: with ``DistributedDataParallel``, give
            ``ddp.module``.
        every: Record every ``every``-th step, beginning with the first.
        example_inputs: Inputs for one forward, as in :func:`nmconv.convert`; None guesses an image batch.

    Attributes:
        stats: The :class:`nmconv.ActivationStats` of each recorded step, without gradients, by the step's number from
            0.

    Raises:
        ModelTypeError: If ``model`` is not a module, or is wrapped, compiled or scripted.
        OptionError: If ``every`` is not a positive integer, or the model cannot be called with ``example_inputs``.
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
        check_initialized(model)
        check_examples(example_inputs)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise OptionError(f"every={every!r}: give a number of steps, 1 or more")
        self._model = model
        self._every = every
        recordings = record_model(model, example_inputs, linear=True, both_sizes=False)
        self._accumulators = SiteAccumulators(model, observed_sites(model, recordings))
        self._hooks = ExitStack()
        self._running_forward = ExitStack()
        self._entered = False
        self._step = 0
        self.stats: dict[int, ActivationStats] = {}

    def __enter__(self) -> ActivationRecorder:
        if self._entered:
            raise OptionError("this ActivationRecorder is already entered: make another one")
        self._entered = True
        self._accumulators.clear()
        self._hooks.enter_context(self._accumulators.watch)
        # Enclose all other hooks: run first before the forward, and last after it, even if it fails.
        begin = self._model.register_forward_pre_hook(Hook(self._begin_forward), prepend=True, with_kwargs=True)
        end = self._model.register_forward_hook(Hook(self._end_forward), always_call=True)
        self._hooks.callback(begin.remove)
        self._hooks.callback(end.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._entered = False
        self._running_forward.close()
        self._hooks.close()

    def step(self) -> None:
        """End a training step. If it was recorded, add its statistics to ``stats``.

        Raises:
            OptionError: If called outside of the ``with``.
        """
        if not self._entered:
            raise OptionError(
                "step() is called outside of the with block: with ActivationRecorder(model) as recorder: ..."
            )
        if self._records_step():
            accumulators = self._accumulators
            device, _ = device_and_dtype_of(self._model)
            accumulators.images = all_reduce_moments(list(accumulators.moments.values()), accumulators.images, device)
            if accumulators.images:
                self.stats[self._step] = accumulators.stats()
            accumulators.clear()
        self._step += 1

    def rows(self) -> list[dict[str, Any]]:
        """Return a tidy table of all steps: the rows of :meth:`nmconv.ActivationStats.rows`, each with its ``step``."""
        return [{"step": step, **row} for step, stats in self.stats.items() for row in stats.rows()]

    def _records_step(self) -> bool:
        return self._step % self._every == 0

    def _begin_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._running_forward.close()  # of a forward that was interrupted
        if self._records_step() and torch.is_grad_enabled():
            first = next((value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)), None)
            self._accumulators.images += len(first) if first is not None and first.dim() else 1
            self._running_forward.enter_context(self._accumulators.watch.running())

    def _end_forward(self, *_: object) -> None:
        self._running_forward.close()
