"""What was asked, and what was measured: frozen plain data."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from nmconv.timing import Spread, Timing

__all__ = ["Cell", "Environment", "Latencies", "NetworkSize", "Result", "Settings"]

_VERSION = 1


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Attributes:
        ratio: ``N:M``, or ``none`` for no conversion.
        relocate: As in :func:`nmconv.convert`.
        hoist_padding: As in :func:`nmconv.convert`.
        gate: As in :func:`nmconv.merge`.
        min_gain: As in :func:`nmconv.merge`.
        backends: In the order measured.
        batches: In the order measured.
        size: Height and width of the images, in pixels.
        threads: Of torch and of ONNX Runtime.
        rounds: Samples of each timing.
        seconds: Least duration of a sample.
        device: As torch names it.
        weights: Path of the weights, or "" where they are random.
        channels_last: Whether networks and images are, in memory.
    """

    ratio: str
    relocate: bool
    hoist_padding: bool
    gate: str
    min_gain: float
    backends: tuple[str, ...]
    batches: tuple[int, ...]
    size: int
    threads: int
    rounds: int
    seconds: float
    device: str
    weights: str
    channels_last: bool


@dataclass(frozen=True)
class Environment:
    """Where it was measured.

    Attributes:
        device: The name of the processor or of the GPU.
        cores: Processors of the machine.
        system: Operating system and architecture.
        versions: Pairs of a package and its version; "" where it is not installed.
        date: Of the measurement, UTC, ISO 8601.
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
        activations: Those that own a convolution.
        convs: Convolutions in one forward, as counted while it runs.
        multiply_adds: Of one image, as ``torch.utils.flop_counter`` counts them while it runs, halved.
    """

    activations: int
    convs: int
    multiply_adds: int


@dataclass(frozen=True)
class Latencies:
    """Times of the three networks on one backend, for one batch.

    Attributes:
        network: The merged one. (By latency, each backend and batch has its own.)
        original: Seconds a batch.
        converted: Seconds a batch.
        merged: Seconds a batch.
        original_over_converted: Quotients of the times, round by round: above 1, the converted one is faster.
        original_over_merged: The same for the merged one.
        difference: Largest difference of merged from converted outputs on this backend, over the largest output.
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
    """One backend and batch.

    Attributes:
        backend: ``eager``, ``compile``, ``frozen`` or ``onnxruntime``.
        batch: Images in a batch.
        measured: The times, or None.
        why: ``not measured: `` and the reason, where there are none; else "".
    """

    backend: str
    batch: int
    measured: Latencies | None
    why: str = ""


@dataclass(frozen=True)
class Result:
    """All that one run of the benchmark has found.

    Attributes:
        model: Its name.
        settings: What was asked for.
        environment: Where it was measured.
        original: The network as it was, norms folded.
        converted: The converted one, norms folded.
        cells: One for each backend and batch.
        notes: What else is to be known: that nothing pays, for instance.
    """

    model: str
    settings: Settings
    environment: Environment
    original: NetworkSize
    converted: NetworkSize
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """All of it as JSON; times in seconds, with median and quartiles."""
        return json.dumps({"version": _VERSION} | _plain(self), indent=2, ensure_ascii=False, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON: the file is there whole, or as it was before.

        Raises:
            OSError: If it cannot be written.
        """
        target = Path(path)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.to_json() + "\n")
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, 0o666 & ~umask)  # mkstemp lets only the owner read
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise


def _plain(value: Any) -> Any:
    if isinstance(value, Timing):
        return asdict(value.spread) | {"seconds": list(value.seconds)}
    if isinstance(value, Environment):
        return asdict(value) | {"versions": dict(value.versions)}
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
