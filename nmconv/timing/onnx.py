"""Run a module as an ONNX Runtime session whose inputs and outputs are bound to torch's memory."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmconv.errors import OptionError

__all__ = ["session_runner"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def session_runner(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Return a callable that runs the module in ONNX Runtime, as :func:`nmconv.timing.make_runner` describes."""
    session = _session(module, inputs)
    with torch.no_grad():
        outputs = [torch.empty_like(value).contiguous() for value in tree_leaves(module(*inputs))]
    inputs = tuple(value.detach().contiguous() for value in inputs)
    binding = session.io_binding()
    for entry, value in zip(session.get_inputs(), inputs, strict=True):
        binding.bind_input(**_binding(entry, value))
    for entry, value in zip(session.get_outputs(), outputs, strict=True):
        binding.bind_output(**_binding(entry, value))
    if outputs[0].is_cuda:
        torch.cuda.synchronize()  # the session uses its own stream

    def run(_inputs: tuple[Tensor, ...] = inputs) -> list[Tensor]:  # the default keeps the inputs' memory alive
        session.run_with_iobinding(binding)
        return outputs

    for _ in range(2):
        run()
    return run


def _session(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    import onnxruntime

    device = inputs[0].device
    provider = _PROVIDERS.get(device.type)
    if provider not in onnxruntime.get_available_providers():
        raise OptionError(
            f"backend='onnxruntime' does not run on {device.type}: move model and inputs to the cpu"
            + (" or pip install onnxruntime-gpu" if device.type == "cuda" else "")
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    providers = [(provider, {"device_id": device.index or 0})] if device.type == "cuda" else [provider]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "module.onnx")
        with _export_silenced():
            program = torch.onnx.export(module, inputs, dynamo=True, verbose=False)
            assert program is not None
            program.save(path)
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    if session.get_providers()[0] != provider:  # ONNX Runtime falls back to the CPU silently
        raise OptionError(f"backend='onnxruntime' cannot load its {provider}: see its log, or run on the cpu")
    return session


@contextmanager
def _export_silenced() -> Iterator[None]:
    """Suppress the exporter's warnings and log messages, which concern its internals."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        log.setLevel(level)


def _binding(entry: Any, value: Tensor) -> dict[str, Any]:
    """Return the arguments that bind a tensor to a session's input or output, whose type reads ``tensor(float)``."""
    import onnx

    return {
        "name": entry.name,
        "device_type": value.device.type,
        "device_id": value.device.index or 0,
        "element_type": onnx.TensorProto.DataType.Value(entry.type[len("tensor(") : -1].upper()),
        "shape": tuple(value.shape),
        "buffer_ptr": value.data_ptr(),
    }
