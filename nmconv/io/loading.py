"""Loading: replay a file's plan and merges on a pristine model, then load its tensors.

A file is checked where each part of it is first used: its header in ``tensor_file``, the text in ``content`` and
``content_checks``, merges against the model in ``merge_checks``, tensors against the model's state in ``state``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from nmconv.errors import FileError, PlanError, WitnessError
from nmconv.finding import flows_of
from nmconv.flow import forward_argument_structures, record_model
from nmconv.io.content import from_text
from nmconv.io.content_checks import check_content
from nmconv.io.problems import DamagedFile, ForeignFile, UnsupportedFormat
from nmconv.io.replaying import replay
from nmconv.io.state import fill, sources_of, state_of
from nmconv.io.tensor_file import File, opened
from nmconv.merging import merged_groups
from nmconv.surgery import UsedParameters, Witness, WorkingCopy, check_examples, check_model, resolve_plan, set_slope

__all__ = ["load"]

_MAX_LENGTH = 600  # in characters, of an error's text that comes from a file


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    inplace: bool = False,
    witness: bool = True,
) -> nn.Module:
    """Turn a pristine model into the one that was saved: converted and merged as the file says, with its weights.

    No decision is made again, no gain is measured, and no forward is run on data. The tensors take the dtype and device
    of the model's own, as with ``load_state_dict``; those of merged convolutions take the dtype and device of
    the convolutions they replace. Parameters on the meta device are allocated on the CPU. The model's mode, train or
    eval, stays.

    Args:
        model: The model before it was converted and merged: built by the same code, with any weights.
        path: A file written by :func:`nmconv.save`.
        example_inputs: What the model is called with, as for :func:`nmconv.convert`. None: what its plan was made with.
        inplace: Whether to change ``model`` itself instead of a copy. A second copy of its weights is kept meanwhile,
            so that it is unchanged if anything fails.
        witness: Whether to record the model before and after, on the meta device, as :func:`nmconv.convert` does.

    Returns:
        The converted and merged model, of the same class.

    Raises:
        FileError: If the file is damaged, has another format, or belongs to another model.
        OptionError: If the model cannot be called with ``example_inputs`` (without them: with guessed inputs).
        WitnessError: If the result behaves differently than the file says.
        OSError: If the file cannot be opened (FileNotFoundError, ...).
        AlreadyConvertedError: If the model is converted or merged already.
        ModelTypeError: If ``model`` is not an ``nn.Module``, is wrapped, compiled or scripted, or is on the meta device
            and has buffers that are in no state dict.

    Example:
        >>> import os, tempfile
        >>> import torch
        >>> import torch.nn as nn
        >>> import nmconv
        >>> def build():
        ...     return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU())
        >>> converted = nmconv.convert(build(), "2:1")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "model.safetensors")
        ...     nmconv.save(converted, path)
        ...     loaded = nmconv.load(build(), path)
        >>> x = torch.randn(1, 3, 8, 8)
        >>> torch.equal(loaded(x), converted(x))
        True
    """
    check_model(model, "load into")
    check_examples(example_inputs)
    name = os.fspath(path)
    try:
        with opened(path) as file:
            work, used = _load(model, file, inplace, example_inputs, witness)
    except WitnessError as error:
        raise WitnessError(f"{name}: {_shortened(error)}", error.module, error.first, error.second) from error
    except DamagedFile as error:
        raise FileError(f"{name}: {_shortened(error)}; copy it again, or save the model again") from error
    except UnsupportedFormat as error:
        raise FileError(
            f"{name}: {_shortened(error)}; install the version of nmconv that wrote it, or save the model again"
        ) from error
    except ForeignFile as error:
        advice = "give the model that was saved as it was before nmconv.convert and nmconv.merge"
        raise FileError(f"{name}: {_shortened(error)}; {advice}") from error
    result = work.finish()
    if used is not None:
        used.freeze_unused(result)
    return result


def _load(
    model: nn.Module, file: File, inplace: bool, example_inputs: Any, witness: bool
) -> tuple[WorkingCopy, UsedParameters | None]:
    content = from_text(file.text)
    check_content(content)
    plan, groups = content.plan, merged_groups(*content.merges)
    linear = plan is not None and plan.linear
    call = None if plan is None else plan.call
    owners = [addition.owner for group in groups for _, addition in group.sums]
    recorded, recordings, resolved = None, None, None
    argument_structure: Mapping[str, str] = {}
    try:
        if witness and (plan is not None or content.merges):
            recorded = Witness(model, example_inputs, linear=linear, call=call)
            recordings = recorded.recordings
        elif plan is not None or owners:
            recordings = record_model(model, example_inputs, both_sizes=False, linear=linear, call=call)
        if plan is not None and recordings is not None:
            resolved = resolve_plan(model, plan, recordings)
    except PlanError as error:
        raise ForeignFile(f"{error}") from error
    if recordings is not None and owners:
        flows = [flow for training in (False, True) for flow in flows_of(model, recordings, training=training)]
        argument_structure = forward_argument_structures(flows, owners)
    work, used = WorkingCopy(model, inplace=inplace, changes_values=True), None
    if resolved is not None and recordings is not None and not content.merges:
        used = UsedParameters(model, resolved.changes, recordings)
    devices = replay(work.model, content, resolved, argument_structure)
    sources = sources_of(state_of(work.model), file, content.aliases)
    if recorded is not None:
        closed = {name for merges in content.merges for merge in merges for name in merge.closed}
        recorded.check(work.model, None if resolved is None else resolved.changes, groups, closed)
    fill(work.model, file, sources, devices)
    if content.slopes:
        set_slope(work.model, dict(content.slopes))
    return work, used


def _shortened(error: Exception) -> str:
    text = str(error).strip()
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}…"
