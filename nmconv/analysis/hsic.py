"""Debiased linear CKA of features: Gram matrices without their diagonals, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["debiased_cka"]

_NUMBERS = 2**25  # of all Gram matrices' rows that are in memory at a time


def debiased_cka(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Linear CKA by the unbiased estimator of HSIC, of each with each.

    HSIC₁(K, L) = Σᵢⱼ AᵢⱼBᵢⱼ / (n(n - 3)), with A and B the Gram matrices K and L U-centred: without the diagonal, less
    row and column sums over n - 2, plus the total over (n - 1)(n - 2), and a diagonal of zeros. That is equation 3 of
    Nguyen et al. (arXiv 2010.15327), of Song et al. (JMLR 13, 2012), written as an inner product (Székely and Rizzo
    2014). CKA = HSIC₁(K, L) / sqrt(HSIC₁(K, K)·HSIC₁(L, L)) (Kornblith et al., arXiv 1905.00414).

    Args:
        first: ``[n, channels]`` each, in float64, n > 3.
        second: The same for the same images.

    Returns:
        ``[len(first), len(second)]``; NaN where features do not vary.
    """
    layers = [one - one.mean(0) for one in (*first, *second)]  # which changes no U-centred matrix
    count = len(layers[0])
    sums = [_sums(layer) for layer in layers]
    products = layers[0].new_zeros(len(layers), len(layers))
    step = max(1, _NUMBERS // (count * len(layers)))
    for start in range(0, count, step):
        rows = torch.stack([_centred(layer, *sums[at], start, step) for at, layer in enumerate(layers)])
        rows = rows.flatten(1)
        products += rows @ rows.T
    norms = products.diagonal().sqrt()
    cka = products / torch.outer(norms, norms)
    return cka[: len(first), len(first) :]


def _sums(layer: Tensor) -> tuple[Tensor, Tensor]:
    """Row sums and the total of the Gram matrix without its diagonal."""
    rows = layer @ layer.sum(0) - layer.square().sum(1)
    return rows, rows.sum()


def _centred(layer: Tensor, sums: Tensor, total: Tensor, start: int, step: int) -> Tensor:
    """Some rows of the U-centred Gram matrix."""
    count = len(layer)
    gram = layer[start : start + step] @ layer.T
    gram -= (sums[start : start + step, None] + sums[None]) / (count - 2)
    gram += total / ((count - 1) * (count - 2))
    at = torch.arange(len(gram))
    gram[at, at + start] = 0.0
    return gram
