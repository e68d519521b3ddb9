"""Settings and measurements of a benchmark, as frozen plain data."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from nmconv.atomic_files import write_atomically
from nmconv.timing import Spread, Timing

__all__ = ["Cell", "Environment", "Latencies", "NetworkSize", "Result", "Settings"]

_VERSION = 1


@dataclass(frozen=True)
class Settings:
    """Settings of a benchmark.

    Attributes:
        ratio: The ratio to convert to; ``"none"`` merges the original network.
        relocate: As in :func:`nmconv.convert`.
        hoist_padding: As in :func:`nmconv.convert`.
        gate: As in :func:`nmconv.merge`. With ``"latency"``, the network is merged separately for each backend and
            batch size.
        min_gain: As in :func:`nmconv.merge`.
        backends: Backends of :func:`nmconv.timing.make_runner`, in the order measured; () stands for all, and those
            that are not installed are reported.
        batches: Batch sizes, in the order measured.
        size: Height and width of the images, in pixels.
        threads: Number of threads of torch and of ONNX Runtime.
        rounds: Number of samples of each timing.
        seconds: Minimum duration of a sample.
        device: torch's name of the device.
        weights: Path of a state dict for a network built by name; "" for random weights.
        channels_last: Whether all networks and images use ``memory_format=torch.channels_last``.
    """

    ratio: str = "2:1"
    relocate: bool = False
    hoist_padding: bool = False
    gate: str = "multiply_adds"
    min_gain: float = 1.05
    backends: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 8)
    size: int = 224
    threads: int = 1
    rounds: int = 11
    seconds: float = 0.2
    device: str = "cpu"
    weights: str = ""
    channels_last: bool = False


@dataclass(frozen=True)
class Environment:
    """The machine that ran a benchmark.

    Attributes:
        device: The name of the processor or of the GPU.
        cores: Number of logical processors.
        system: Operating system and architecture.
        versions: Pairs of a package and its version, "" if it is not installed.
        date: Time of the measurement in UTC, ISO 8601.
    """

    device: str
    cores: int
    system: str
    versions: tuple[tuple[str, str], ...]
    date: str


@dataclass(frozen=True)
class NetworkSize:
    """The size of a network whose norms are folded.

    Attributes:
        activations: Number of activations that own a convolution.
        convs: Number of convolutions in one forward, counted while it runs.
        multiply_adds: Multiply-adds for one image: half of the operations that ``torch.utils.flop_counter`` counts.
    """

    activations: int
    convs: int
    multiply_adds: int


@dataclass(frozen=True)
class Latencies:
    """Latencies of the three networks on one backend with one batch size.

    Attributes:
        network: Size of the merged network. With the latency gate, each backend and batch size has its own.
        original: Seconds per batch.
        converted: Seconds per batch.
        merged: Seconds per batch.
        original_over_converted: Quotients of the times, round by round: above 1, the converted network is faster.
        original_over_merged: The same quotients for the merged network.
        difference: Largest difference between merged and converted outputs on this backend, over the largest converted
            output.
    """

    network: NetworkSize
    original: Timing
    converted: Timing
    merged: Timing
    original_over_converted: Spread
    original_over_merged: Spread
    difference: float


@dataclass(frozen=True)
class Cell:
    """Measurements on one backend with one batch size.

    Attributes:
        backend: ``eager``, ``compile``, ``frozen`` or ``onnxruntime``.
        batch: Images per batch.
        measured: The latencies, or None.
        why: ``not measured: `` and the reason if there are none, else "".
    """

    backend: str
    batch: int
    measured: Latencies | None
    why: str = ""


@dataclass(frozen=True)
class Result:
    """Results of one run of the benchmark.

    Attributes:
        model: Name of the model.
        settings: Settings of the run.
        environment: The machine that ran it.
        original: Size of the original network, norms folded.
        converted: Size of the converted network, norms folded.
        cells: One for each backend and batch size.
        notes: Remarks, for instance that nothing was merged.
    """

    model: str
    settings: Settings
    environment: Environment
    original: NetworkSize
    converted: NetworkSize
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the result as JSON; times are in seconds, with median and quartiles."""
        return json.dumps({"version": _VERSION} | _to_plain(self), indent=2, ensure_ascii=False, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON atomically.

        Raises:
            FileError: If the folder does not exist.
            OSError: If the file cannot be written.
        """
        write_atomically(path, lambda temporary: Path(temporary).write_text(self.to_json() + "\n", encoding="utf-8"))


def _to_plain(value: Any) -> Any:
    if isinstance(value, Timing):
        return asdict(value.spread) | {"seconds": list(value.seconds)}
    if isinstance(value, Environment):
        return asdict(value) | {"versions": dict(value.versions)}
    if is_dataclass(value):
        return {field.name: _to_plain(getattr(value, field.name)) for field in fields(value)}
    return [_to_plain(item) for item in value] if isinstance(value, tuple) else value
