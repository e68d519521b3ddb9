"""Debiased linear CKA of features, computed from blocks of rows of the Gram matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["debiased_cka"]

_MAX_VALUES = 2**25  # of all Gram matrices' rows, in memory at a time


def debiased_cka(features_a: Sequence[Tensor], features_b: Sequence[Tensor]) -> Tensor:
    """Return the linear CKA of each pair of features, with the unbiased estimator of HSIC.

    HSIC₁(K, L) = Σᵢⱼ AᵢⱼBᵢⱼ / (n(n - 3)), where A and B are the U-centered Gram matrices K and L: the diagonal is
    removed, row and column sums over n - 2 are subtracted, the total over (n - 1)(n - 2) is added, and the diagonal is
    set to zero. This is equation 3 of Nguyen et al. (arXiv 2010.15327), due to Song et al. (JMLR 13, 2012), written as
    an inner product (Székely and Rizzo 2014). CKA = HSIC₁(K, L) / sqrt(HSIC₁(K, K)·HSIC₁(L, L)) (Kornblith et al.,
    arXiv 1905.00414).

    Args:
        features_a: Features of the first model's layers, each ``[n, channels]`` in float64, n > 3.
        features_b: Features of the second model's layers on the same images.

    Returns:
        ``[len(features_a), len(features_b)]``; NaN where features do not vary.
    """
    layers = [features - features.mean(0) for features in (*features_a, *features_b)]  # does not change A or B
    count = len(layers[0])
    sums = [_off_diagonal_sums(layer) for layer in layers]
    products = layers[0].new_zeros(len(layers), len(layers))
    step = max(1, _MAX_VALUES // (count * len(layers)))
    for start in range(0, count, step):
        rows = torch.stack(
            [
                _u_centered_rows(layer, row_sums, total, start, step)
                for layer, (row_sums, total) in zip(layers, sums, strict=True)
            ]
        ).flatten(1)
        products += rows @ rows.T
    norms = products.diagonal().sqrt()
    cka = products / torch.outer(norms, norms)
    return cka[: len(features_a), len(features_a) :]


def _off_diagonal_sums(layer: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row sums and the total of the Gram matrix without its diagonal."""
    row_sums = layer @ layer.sum(0) - layer.square().sum(1)
    return row_sums, row_sums.sum()


def _u_centered_rows(layer: Tensor, row_sums: Tensor, total: Tensor, start: int, step: int) -> Tensor:
    """Return ``step`` rows of the U-centered Gram matrix, from row ``start`` on."""
    count = len(layer)
    gram = layer[start : start + step] @ layer.T
    gram -= (row_sums[start : start + step, None] + row_sums[None]) / (count - 2)
    gram += total / ((count - 1) * (count - 2))
    rows = torch.arange(len(gram))
    gram[rows, rows + start] = 0.0
    return gram
