"""Loading: a file's plan and merges replayed on a pristine model, then its tensors loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from nmconv.errors import FileError, PlanError, WitnessError
from nmconv.finding import flows_of
from nmconv.flow import recordings_of, takes_by_forward
from nmconv.io.content import from_text
from nmconv.io.content_checks import check_content
from nmconv.io.problems import DamagedFile, ForeignFile, UnreadFormat
from nmconv.io.replaying import replay
from nmconv.io.state import fill, sources_of, state_of
from nmconv.io.tensor_file import File, opened
from nmconv.merging import groups_of
from nmconv.surgery import Readers, Witness, WorkingCopy, check_examples, check_model, resolve_plan, set_slope

__all__ = ["load"]

_LONGEST = 600  # characters of an error's text that come from a file


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    inplace: bool = False,
    witness: bool = True,
) -> nn.Module:
    """Make of a pristine model the one that was saved: converted and merged as the file says, with its weights.

    Nothing is decided or checked for gain again, and no forward pass is run on data. The tensors take the dtype and
    device of the model's own, as with ``load_state_dict``; merged convolutions take their heads'. Parameters on the
    meta device are made on the CPU. The model's mode, train or eval, stays.

    Args:
        model: As it was before it was converted and merged: built by the same code, with any weights.
        path: What :func:`nmconv.save` wrote.
        example_inputs: What the model is called with, as for :func:`nmconv.convert`. None: what its plan was made with.
        inplace: Change ``model`` itself instead of a copy. A second copy of its weights is kept meanwhile, so that it
            is as it was if anything fails.
        witness: Record the model's own run before and after, on the meta device, as :func:`nmconv.convert` does.

    Returns:
        The model, of the same class.

    Raises:
        FileError: If the file is damaged, of another format, or of another model.
        OptionError: If the model cannot be called with ``example_inputs`` or, where there are none, with a guess.
        WitnessError: If the result would do anything else than what the file says makes of the model.
        OSError: If it cannot be opened (FileNotFoundError, ...).
        AlreadyConvertedError: If the model is converted or merged already.
        ModelTypeError: If it is no module, or wrapped, compiled or scripted; or if it is on the meta device and has
            buffers that no state dict holds.
    """
    check_model(model)
    check_examples(example_inputs)
    name = os.fspath(path)
    try:
        with opened(path) as file:
            work, readers = _loaded(model, file, inplace, example_inputs, witness)
    except WitnessError as error:
        raise WitnessError(f"{name}: {_short(error)}", error.module, error.first, error.second) from error
    except DamagedFile as error:
        raise FileError(f"{name}: {_short(error)}; copy it anew, or save the model again") from error
    except UnreadFormat as error:
        raise FileError(
            f"{name}: {_short(error)}; install the version of nmconv that wrote it, or save anew"
        ) from error
    except ForeignFile as error:
        raise FileError(
            f"{name}: {_short(error)}; give the model that was saved as it was before nmconv.convert and nmconv.merge"
        ) from error
    result = work.finish()
    if readers is not None:
        readers.freeze_unread(result)
    return result


def _loaded(
    model: nn.Module, file: File, inplace: bool, example_inputs: Any, witness: bool
) -> tuple[WorkingCopy, Readers | None]:
    content = from_text(file.text)
    check_content(content)
    plan, groups = content.plan, groups_of(*content.merges)
    linear = plan is not None and plan.linear
    call = None if plan is None else plan.call
    owners = [addition.owner for group in groups for _, addition in group.sums]
    seen, recordings, carried = None, None, None
    takes: Mapping[str, str] = {}
    try:
        if witness and (plan is not None or content.merges):
            seen = Witness(model, example_inputs, linear=linear, call=call)
            recordings = seen.recordings
        elif plan is not None or owners:
            recordings = recordings_of(model, example_inputs, both_sizes=False, linear=linear, call=call)
        if plan is not None and recordings is not None:
            carried = resolve_plan(model, plan, recordings)
    except PlanError as error:
        raise ForeignFile(f"{error}") from error
    if recordings is not None and owners:
        flows = [flow for training in (False, True) for flow in flows_of(model, recordings, training=training)]
        takes = takes_by_forward(flows, owners)
    work, readers = WorkingCopy(model, inplace=inplace, numbers=True), None
    if carried is not None and recordings is not None and not content.merges:
        readers = Readers(model, carried.changes, recordings)
    homes = replay(work.model, content, carried, takes)
    sources = sources_of(state_of(work.model), file, content.aliases)
    if seen is not None:
        closed = {name for merges in content.merges for merge in merges for name in merge.closed}
        seen.check(work.model, None if carried is None else carried.changes, groups, closed)
    fill(work.model, file, sources, homes)
    if content.slopes:
        set_slope(work.model, dict(content.slopes))
    return work, readers


def _short(error: Exception) -> str:
    text = str(error).strip()
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
