"""Measure one cell of the table: three networks on one backend with one batch size."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmconv.bench.results import Latencies, NetworkSize
from nmconv.timing import make_runner, quotients, time_interleaved

__all__ = ["difference", "measure_latencies"]


def measure_latencies(
    networks: tuple[nn.Module, nn.Module, nn.Module],
    merged_size: NetworkSize,
    images: Tensor,
    backend: str,
    *,
    rounds: int,
    seconds: float,
) -> Latencies:
    """Time three networks, and compare the outputs of the merged and the converted network on this backend.

    Args:
        networks: Original, converted and merged network, in eval mode with norms folded.
        merged_size: The size of the merged network.
        images: The batch.
        backend: A backend of :func:`nmconv.timing.make_runner`.
        rounds: Number of samples of each network.
        seconds: Minimum duration of a sample.

    Raises:
        OptionError: If the backend cannot run one of the networks.
        ArithmeticError: If outputs are not finite.
    """
    runners = [make_runner(network, (images,), backend) for network in networks]
    output_difference = difference(runners[2](), runners[1]())
    original, converted, merged = time_interleaved(runners, rounds=rounds, seconds=seconds)
    return Latencies(
        network=merged_size,
        original=original,
        converted=converted,
        merged=merged,
        original_over_converted=quotients(original, converted),
        original_over_merged=quotients(original, merged),
        difference=output_difference,
    )


def difference(actual: object, expected: object) -> float:
    """Return the largest absolute difference between two pytrees of tensors, over the largest expected magnitude.

    Raises:
        ArithmeticError: If a value is not finite.
        ValueError: If the pytrees do not hold the same number of leaves.
    """
    leaves = zip(tree_leaves(actual), tree_leaves(expected), strict=True)
    pairs = [(first, second) for first, second in leaves if isinstance(second, Tensor)]
    if not all(value.isfinite().all() for pair in pairs for value in pair):
        raise ArithmeticError("the outputs are not all finite numbers")
    deviation = max((float((first.double() - second.double()).abs().max()) for first, second in pairs), default=0.0)
    magnitude = max((float(second.double().abs().max()) for _, second in pairs), default=0.0)
    if magnitude == 0 and deviation > 0:
        raise ArithmeticError("the converted network's outputs are all zero, and the merged one's are not")
    return deviation / magnitude if deviation else 0.0
