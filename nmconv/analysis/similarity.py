"""Similarity of two models' layers: the public function, and its result as plain data in one file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.analysis.hsic import debiased_cka
from nmconv.analysis.layer_features import LayerFeatures
from nmconv.analysis.observed_model import state_preserved
from nmconv.analysis.plot_axes import axes_for_plot
from nmconv.errors import FileError, OptionError
from nmconv.observing import read_batches
from nmconv.planning import nan_if_null, read_json, write_json
from nmconv.surgery import check_initialized, check_plain

__all__ = ["CKA", "cka"]

_FILE_KEY, _FILE_VERSION = "nmconv_cka", 1
_MIN_IMAGES = 4


@dataclass(frozen=True, eq=False)
class CKA:
    """Similarity of each layer of one model to each layer of another.

    Attributes:
        matrix: ``[len(layers_a), len(layers_b)]``, float64: 1 if the features are equal up to a rotation and one
            scale; 0 on average for unrelated features, and occasionally slightly negative; NaN if a layer's features
            are the same for all images.
        layers_a: Names of the first model's layers.
        layers_b: Names of the second model's layers.
        n: Number of images.
    """

    matrix: Tensor
    layers_a: tuple[str, ...]
    layers_b: tuple[str, ...]
    n: int

    def rows(self) -> list[dict[str, Any]]:
        """Return a tidy table for ``pandas.DataFrame`` or a csv file: one dict per pair of layers."""
        return [
            {"layer_a": layer_a, "layer_b": layer_b, "cka": float(self.matrix[row, column]), "n": self.n}
            for row, layer_a in enumerate(self.layers_a)
            for column, layer_b in enumerate(self.layers_b)
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the matrix and the names to one JSON file, atomically. NaN is written as null.

        Raises:
            FileError: If the folder does not exist.
        """
        data = {"matrix": self.matrix.tolist(), "layers_a": self.layers_a, "layers_b": self.layers_b, "n": self.n}
        write_json(path, {_FILE_KEY: _FILE_VERSION, **data})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CKA:
        """Read a file written by :meth:`save`.

        Raises:
            FileError: If the file is not such a table.
            OSError: If it cannot be opened.
        """
        data = read_json(path, _FILE_KEY, _FILE_VERSION, "nmconv.cka")
        try:
            layers_a, layers_b = tuple(data["layers_a"]), tuple(data["layers_b"])
            values = [[nan_if_null(value) for value in row] for row in data["matrix"]]
            matrix = torch.tensor(values, dtype=torch.float64).reshape(len(layers_a), len(layers_b))
            return cls(matrix, layers_a, layers_b, int(data["n"]))
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise FileError(f"{os.fspath(path)} is not a table of nmconv.cka ({error}): measure again") from error

    def plot(self, where: Any = None) -> Any:
        """Plot the matrix as an image. Needs matplotlib.

        Args:
            where: A path to save the figure to, the axes to draw into, or None for new axes.

        Returns:
            The matplotlib axes.

        Raises:
            OptionError: If ``where`` is something else, or matplotlib is not installed.
        """
        with axes_for_plot(where, width=7.0, height=6.0) as axes:
            image = axes.imshow(self.matrix.numpy(), vmin=0.0, vmax=1.0, cmap="magma", aspect="auto")
            axes.set_xticks(range(len(self.layers_b)), self.layers_b, rotation=90, fontsize="xx-small")
            axes.set_yticks(range(len(self.layers_a)), self.layers_a, fontsize="xx-small")
            axes.set(title=f"debiased linear CKA, {self.n} images", xlabel="second network", ylabel="first network")
            axes.figure.colorbar(image, ax=axes)
        return axes


def cka(model_a: nn.Module, model_b: nn.Module, data: Any, layers: Any = None, *, key: str | None = None) -> CKA:
    """Compare the layers of two models on the same images by debiased linear CKA of their spatial means.

    This is centered kernel alignment (Kornblith et al., arXiv 1905.00414) with the unbiased estimator of HSIC (Nguyen
    et al., arXiv 2010.15327, equation 3), over all images at once. Unlike the biased estimator, it does not grow with
    the ratio of channels to images. Memory holds one vector of channels per image and layer, and blocks of rows of the
    ``n × n`` Gram matrices.

    Args:
        model_a: A module in any mode. It runs in eval mode and is left unchanged.
        model_b: Another such module, or the same one.
        data: A tensor ``[images, ...]``, or a loader or iterable of batches: tensors, (x, y) pairs or dicts. Read once.
        layers: Names of modules (``"layer1.0"``) or ids of activations (``"layer1.0.relu#2"``): one list for both
            models, or a pair of lists. None stands for the activations that belong to convolutions, that is, the sites
            of a plan, each model's own. If a layer runs several times in one forward, its last output counts.
        key: The key of the images if batches are dicts.

    Returns:
        The matrix, with the layers' names and the number of images. Maps ``[n, channels, ...]`` are averaged over
        space, and tokens ``[n, ..., channels]`` after linear layers over the axes between.

    Raises:
        ModelTypeError: If a model is not a module, or is wrapped, compiled or scripted.
        OptionError: If there are fewer than 4 images, or a model lacks one of the layers.
        NoSitesError: If ``layers`` is None, and a model has no activation that belongs to a convolution.
        FitError: If a model fails on the images, or a layer does not run, returns no tensor, or does not return one row
            per image.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import nmconv
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> similarity = nmconv.cka(model, model, torch.randn(16, 3, 8, 8), ["0", "1#1"])
        >>> similarity.layers_a, similarity.matrix.diagonal().round(decimals=6).tolist(), similarity.n
        (('0', '1#1'), [1.0, 1.0], 16)
    """
    layers_a, layers_b = _parse_layers(layers)
    for model in (model_a, model_b):
        check_plain(model, "compare")
        check_initialized(model)
    count = 0
    with ExitStack() as stack:
        for model in dict.fromkeys((model_a, model_b)):
            stack.enter_context(state_preserved(model))
        batches = (images for images, _ in read_batches(data, key))
        first = next(batches)
        sides = [LayerFeatures(model_a, layers_a, first[:2]), LayerFeatures(model_b, layers_b, first[:2])]
        for images in itertools.chain([first], batches):
            count += len(images)
            for side in sides:
                side.add(images)
    if count < _MIN_IMAGES:
        raise OptionError(f"data holds {count} images: debiased CKA needs 4 or more, and is good from some hundreds on")
    features_a, features_b = (side.features() for side in sides)
    matrix = debiased_cka(list(features_a.values()), list(features_b.values()))
    return CKA(matrix, tuple(features_a), tuple(features_b), count)


def _parse_layers(layers: Any) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Return the layers of each model, as the user gave them.

    Raises:
        OptionError: If ``layers`` is neither a list of names nor a pair of lists.
    """
    if layers is None:
        return None, None
    if isinstance(layers, Iterable) and not isinstance(layers, str):
        layers = list(layers)
        is_pair = len(layers) == 2 and not any(isinstance(each, str) for each in layers)
        pair = layers if is_pair else [layers, layers]
        if all(_is_list_of_names(names) for names in pair):
            return tuple(dict.fromkeys(pair[0])), tuple(dict.fromkeys(pair[1]))
    raise OptionError(f"layers={layers!r:.80}: give a list of names for both models, or a pair of lists")


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and all(isinstance(name, str) for name in value)
