"""How alike two networks' layers are: a matrix, as plain data in one file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nmconv.analysis.axes import drawn
from nmconv.errors import FileError
from nmconv.planning import number, read_json, write_json

__all__ = ["CKA"]

_MARK, _VERSION = "nmconv_cka", 1


@dataclass(frozen=True, eq=False)
class CKA:
    """How alike each layer of one network is to each of another.

    Attributes:
        matrix: ``[len(layers_a), len(layers_b)]``, float64: 1 for features that are the same but for a rotation and one
            scale, 0 on average for unrelated ones, and now and then a little below; NaN where a layer gives the same
            for all images.
        layers_a: Names of the first network's layers.
        layers_b: Of the second's.
        n: How many images.
    """

    matrix: Tensor
    layers_a: tuple[str, ...]
    layers_b: tuple[str, ...]
    n: int

    def rows(self) -> list[dict[str, Any]]:
        """A tidy table: one dict for each pair, for ``pandas.DataFrame`` or a csv file."""
        return [
            {"layer_a": one, "layer_b": two, "cka": float(self.matrix[at, other]), "n": self.n}
            for at, one in enumerate(self.layers_a)
            for other, two in enumerate(self.layers_b)
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it to one JSON file, as a whole or not at all; what is NaN is null there."""
        data = {"matrix": self.matrix.tolist(), "layers_a": self.layers_a, "layers_b": self.layers_b, "n": self.n}
        write_json(path, {_MARK: _VERSION, **data})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CKA:
        """Read what :meth:`save` wrote.

        Raises:
            FileError: If it is something else.
            OSError: If it cannot be opened.
        """
        data = read_json(path, _MARK, _VERSION, "nmconv.cka")
        try:
            layers_a, layers_b = tuple(data["layers_a"]), tuple(data["layers_b"])
            numbers = [[number(value) for value in row] for row in data["matrix"]]
            matrix = torch.tensor(numbers, dtype=torch.float64).reshape(len(layers_a), len(layers_b))
            return cls(matrix, layers_a, layers_b, int(data["n"]))
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise FileError(f"{os.fspath(path)} is no table of nmconv.cka ({error}): measure anew") from error

    def plot(self, where: Any = None) -> Any:
        """The matrix as a picture; needs matplotlib.

        Args:
            where: A path to save the picture at, the axes to draw into, or None for new axes.

        Returns:
            The axes.

        Raises:
            OptionError: If ``where`` is something else, or there is no matplotlib.
        """
        with drawn(where, width=7.0, height=6.0) as axes:
            image = axes.imshow(self.matrix.numpy(), vmin=0.0, vmax=1.0, cmap="magma", aspect="auto")
            axes.set_xticks(range(len(self.layers_b)), self.layers_b, rotation=90, fontsize="xx-small")
            axes.set_yticks(range(len(self.layers_a)), self.layers_a, fontsize="xx-small")
            axes.set(title=f"debiased linear CKA, {self.n} images", xlabel="second network", ylabel="first network")
            axes.figure.colorbar(image, ax=axes)
        return axes
