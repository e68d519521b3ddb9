"""One cell of the table: three networks on one backend, for one batch."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmconv.bench.results import Latencies, NetworkSize
from nmconv.timing import interleaved, ratios, runner

__all__ = ["difference", "measured"]


def measured(
    networks: tuple[nn.Module, nn.Module, nn.Module],
    merged: NetworkSize,
    images: Tensor,
    backend: str,
    *,
    rounds: int,
    seconds: float,
) -> Latencies:
    """Times, and how far the merged network's outputs are from the converted one's on this backend.

    Args:
        networks: Original, converted, merged; all in eval mode with norms folded.
        merged: The size of the last of them.
        images: The batch.
        backend: As in :func:`nmconv.timing.runner`.
        rounds: Samples of each.
        seconds: Least duration of a sample.

    Raises:
        OptionError: If the backend cannot run one of them.
        ArithmeticError: If outputs are not finite.
    """
    runners = [runner(network, (images,), backend) for network in networks]
    apart = difference(runners[2](), runners[1]())
    original, converted, last = interleaved(runners, rounds=rounds, seconds=seconds)
    return Latencies(
        network=merged,
        original=original,
        converted=converted,
        merged=last,
        original_over_converted=ratios(original, converted),
        original_over_merged=ratios(original, last),
        difference=apart,
    )


def difference(found: object, wanted: object) -> float:
    """The largest difference between two structures of tensors, over the largest value wanted.

    Raises:
        ArithmeticError: If a value is not finite.
        ValueError: If they do not hold the same number of tensors.
    """
    pairs = [
        (one, two) for one, two in zip(tree_leaves(found), tree_leaves(wanted), strict=True) if isinstance(two, Tensor)
    ]
    if not all(value.isfinite().all() for pair in pairs for value in pair):
        raise ArithmeticError("the outputs are not all finite numbers")
    apart = max((float((one.double() - two.double()).abs().max()) for one, two in pairs), default=0.0)
    largest = max((float(two.double().abs().max()) for _, two in pairs), default=0.0)
    if largest == 0 and apart > 0:
        raise ArithmeticError("the converted network's outputs are all zero, and the merged one's are not")
    return apart / largest if apart else 0.0
