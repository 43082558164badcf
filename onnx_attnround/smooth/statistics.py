"""The statistics of a tensor that the choice of its scales goes by, from one pass over samples."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch

from onnx_attnround.numerics import golden_places
from onnx_attnround.ops import input_grid, matrix_shape
from onnx_attnround.records import Array, LayerPlan
from onnx_attnround.smooth.groups import Group

FOLDS = 2
"""The parts of the samples, by turns, of which each judges what the other suggests."""
KEPT = 1 << 17
"""The most elements of a layer's inputs that are kept of a fold, to judge scales by."""
MOST_ROWS = 256
"""The most rows that these are in."""


class Statistics:
    """The ends and the mean square of each channel of a group, and some rows, per fold."""

    def __init__(self, group: Group, samples: int) -> None:
        """``samples`` is how many there will be in all."""
        self.group = group
        self._low = np.full((FOLDS, group.channels), np.inf, np.float32)
        self._high = np.full((FOLDS, group.channels), -np.inf, np.float32)
        self._squares = np.zeros((FOLDS, group.channels))
        self._counts = np.zeros(FOLDS)
        self._samples = samples
        self.seen = 0
        self._rows: dict[Hashable, list[list[torch.Tensor]]] = {}

    def update(self, x: Array) -> None:
        """Take in the next samples of the tensor, on axis 0."""
        # A layer whose samples are not what it multiplies fails later, with a message of its own.
        if x.ndim < 2 or x.shape[self.group.axis] != self.group.channels:
            return
        fold = np.arange(self.seen, self.seen + len(x)) % FOLDS
        for which in range(FOLDS):
            flat = np.moveaxis(x[fold == which], self.group.axis, -1)
            flat = flat.reshape(-1, self.group.channels)
            np.minimum(self._low[which], flat.min(0, initial=np.inf), out=self._low[which])
            np.maximum(self._high[which], flat.max(0, initial=-np.inf), out=self._high[which])
            self._squares[which] += np.einsum("nc,nc->c", flat, flat)
            self._counts[which] += len(flat)
        for layer in {_patches(layer): layer for layer in self.group.layers}.values():
            self._keep(layer, x, fold)
        self.seen += len(x)

    def _keep(self, layer: LayerPlan, x: Array, fold: Array) -> None:
        """Keep rows of these samples, at places that follow from a sample's number alone."""
        grid = input_grid(layer, torch.from_numpy(np.require(x, requirements="W")))
        depth = matrix_shape(layer)[2]
        wanted = FOLDS * min(KEPT // depth + 1, MOST_ROWS)
        each = min(-(-wanted // self._samples), grid.count)
        places = golden_places(self.seen * each, len(grid.x) * each)
        places = np.floor(places * grid.count).astype(np.int64)
        rows = grid.rows(grid.sources(torch.from_numpy(places.reshape(-1, each)))).clone()
        by_sample = rows.reshape(len(rows), -1, each, rows.shape[-1])
        kept = self._rows.setdefault(_patches(layer), [[] for _ in range(FOLDS)])
        for which in range(FOLDS):
            chosen = torch.from_numpy(np.flatnonzero(fold == which))
            kept[which].append(by_sample[:, chosen].flatten(1, 2))

    def rows(self, layer: LayerPlan, fold: int) -> torch.Tensor:
        """Patches of the inputs of ``layer`` in that fold's samples, ``[g, n, d]``."""
        return torch.cat(self._rows[_patches(layer)][fold], 1)

    def ends(self, folds: Sequence[int]) -> tuple[Array, Array]:
        """The least and the greatest value of each channel, over ``folds``."""
        chosen = list(folds)
        return self._low[chosen].min(0), self._high[chosen].max(0)

    def peak(self, folds: Sequence[int]) -> Array:
        """The largest magnitude of each channel, over ``folds``."""
        low, high = self.ends(folds)
        peak: Array = np.maximum(np.abs(low), np.abs(high))
        return peak

    def root_mean_square(self, folds: Sequence[int]) -> Array:
        """The root mean square of each channel, over ``folds``."""
        chosen = list(folds)
        squares = self._squares[chosen].sum(0) / max(self._counts[chosen].sum(), 1)
        root: Array = np.sqrt(squares).astype(np.float32)
        return root

    @property
    def complete(self) -> bool:
        """Whether each fold has seen samples, finite and not all zero."""
        squares = self._squares.sum(1)
        return bool(self._counts.all() and squares.all() and np.isfinite(squares).all())


def _patches(layer: LayerPlan) -> Hashable:
    """A key that is the same for layers of one group with the same patches."""
    if layer.is_matrix:
        return "rows"
    return layer.op_type, layer.weight_shape[2:], str(sorted(layer.attributes.items()))
