"""Find a model's linear runs: maximal sequences of linear modules between activations, forks and other operations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from nmconv.finding.flow_analysis import flows_of
from nmconv.finding.linear_values import LinearValue, linear_values
from nmconv.finding.mode_matching import same_flows
from nmconv.finding.module_users import CallsSeen, ModuleUsers, inspected_modules
from nmconv.finding.run_elements import Element, LinearRun, ParallelSum, Step, steps_of
from nmconv.flow import Flow, Op, ancestors, leaf_op, record_model
from nmconv.recording import Recordings

__all__ = ["linear_runs"]

_REPLACEABLE = (Op.CONV, Op.NORM, Op.PAD, Op.POOL)
_Links = set[tuple[str, str]]  # pairs of identifiers of consecutive elements


def linear_runs(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    recordings: Recordings | None = None,
    sizes: bool = True,
    pools: bool = False,
) -> tuple[LinearRun, ...]:
    """Return the maximal linear runs of a model in eval mode that hold a convolution, in order of execution.

    Where train mode computes something else, runs are cut to what both modes share.

    Args:
        model: Any module; not modified.
        example_inputs: What the model is called with; only structure and shapes are used.
        recordings: Recordings of the model, if it was recorded already.
        sizes: Whether to find the shapes of the runs' inputs.
        pools: Whether an average pool after a run is its last element.
    """
    recordings = recordings or record_model(model, example_inputs, both_sizes=False)
    eval_flows, train_flows = (flows_of(model, recordings, training=training) for training in (False, True))
    main = [run for training in (False, True) for run in recordings.of_mode(training=training)]
    leaves = [name for name, module in model.named_modules() if leaf_op(module) in _REPLACEABLE]
    users = ModuleUsers(
        model,
        [CallsSeen.of(flow) for flow in (*eval_flows, *train_flows)],
        inspected_modules(model, main, leaves),
        (failure.path for failure in recordings.failures),
    )
    links = None
    if not same_flows(eval_flows, train_flows):
        lost_sizes = recordings.lost_sizes[:1]  # the others are positions among the nodes of eval mode
        links = {
            link
            for flow in train_flows
            for value in linear_values(flow, users, lost_sizes, pools=pools).values()
            for link in _links(value.elements)
        }
    return tuple(
        run
        for flow in eval_flows
        for run in _runs(flow, linear_values(flow, users, recordings.lost_sizes, pools=pools), links, sizes)
    )


def _runs(flow: Flow, values: dict[int, LinearValue], train_links: _Links | None, sizes: bool) -> Iterator[LinearRun]:
    """Yield the maximal runs of a flow that hold a convolution, in order of execution."""
    readers = flow.all_readers()
    covered: set[int] = set()
    runs: list[tuple[int, LinearRun]] = []
    for index in sorted(values, key=lambda index: (-len(values[index].nodes), index)):
        if index in covered:
            continue
        value = values[index]
        covered.update(value.nodes)
        parts = list(_split(value.elements, train_links))
        shape = flow.nodes[value.source].shape if sizes and len(parts) == 1 else None
        source = None if shape is None else shape[1:]
        if not _starts_with_conv(parts[0]) and _overwrites_source(flow, readers, value):
            parts[0] = _from_first_conv(parts[0])
        for part in parts:
            if any(step.kind == "conv" for step in steps_of(part)):
                run = LinearRun(tuple(part), _crossed_modules(flow, value), source, tuple(sorted(value.flags)))
                runs.append((index, run))
    return iter(run for _, run in sorted(runs, key=lambda pair: pair[0]))


def _crossed_modules(flow: Flow, value: LinearValue) -> tuple[str, ...]:
    """Return the names of modules that begin or end within a value's computation."""
    paths = [[frame.path for frame in ancestors(flow.nodes[index].frame)] for index in value.nodes]
    common = set(paths[0]).intersection(*paths[1:])
    return tuple(dict.fromkeys(path for above in paths for path in above if path not in common))


def _overwrites_source(flow: Flow, readers: list[list[int]], value: LinearValue) -> bool:
    """Return whether an in-place operation changes the source's memory between a value's first and last nodes.

    Elements before the first convolution become identities when the run is merged, and would then return what is in
    that memory by the time the convolution reads it.
    """
    convs = [index for index in value.nodes if flow.nodes[index].op is Op.CONV]
    if not convs:
        return False
    origin = value.source
    while flow.nodes[origin].inputs and (flow.nodes[origin].view or flow.nodes[origin].partial):
        origin = flow.nodes[origin].inputs[0]
    aliases, todo, writers = {origin}, [origin], []
    while todo:
        for reader in readers[todo.pop()]:
            node = flow.nodes[reader]
            if node.inplace and node.inputs[0] in aliases:
                writers.append(reader)
            if reader not in aliases and (node.view or node.partial):
                aliases.add(reader)
                todo.append(reader)
    first, last = min(value.nodes), max(convs)
    return any(first < writer < last for writer in writers)


def _starts_with_conv(elements: list[Element]) -> bool:
    return bool(elements) and isinstance(elements[0], Step) and elements[0].kind == "conv"


def _from_first_conv(elements: list[Element]) -> list[Element]:
    """Return the elements from the first convolution on; none if that is in a branch."""
    for position, element in enumerate(elements):
        if isinstance(element, ParallelSum):
            return []
        if element.kind == "conv":
            return elements[position:]
    return []


# What both modes share -----------------------------------------------------------------------------------------------


def _links(elements: Iterable[Element]) -> Iterator[tuple[str, str]]:
    """Yield the identifiers of each element alone and of each pair of consecutive ones, without identities."""
    before = ""
    for element in elements:
        if isinstance(element, Step):
            if element.is_identity:
                continue
            name = element.name
        else:
            name = repr(element.branches)
            for branch in element.branches:
                yield from _links(branch)
        yield "", name
        if before:
            yield before, name
        before = name


def _split(elements: list[Element], train_links: _Links | None) -> Iterator[list[Element]]:
    """Yield the parts of a run that train mode has, too; all of it if ``train_links`` is None."""
    if train_links is None:
        yield elements
        return
    part: list[Element] = []
    last: list[Element] = []
    for element in elements:
        if last and not set(_links([*last, element])) <= train_links:
            yield part
            part = []
        part.append(element)
        last = last if element.is_identity else [element]
    yield part
