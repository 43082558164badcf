"""Second moments ``G = E[v v']`` of a layer's input, in the form that its size asks for.

Of ``d`` inputs it has ``d^2`` entries, 2.5 GB at 25,088. From ``n < d`` samples its rank
is ``n``, and to keep the samples costs less, in memory and in each product, and loses
nothing: ``G = V' V / n + r I``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

LEAST_POWER = 1e-12
"""A ridge is a share of the inputs' mean power, or of this where that is less.

So the matrix of inputs that are always zero can be inverted, too.
"""


class Gram(ABC):
    """``G`` of each group, ``[g, d, d]``, behind the few products that a rounding needs of it."""

    @property
    @abstractmethod
    def diagonal(self) -> torch.Tensor:
        """The power of each input, ``[g, d]``."""

    @abstractmethod
    def part(self, part: slice) -> torch.Tensor:
        """Its rows and columns ``part`` as a matrix, ``[g, b, b]``."""

    @abstractmethod
    def times(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows @ G``, ``[g, o, d]``."""

    @abstractmethod
    def times_part(self, rows: torch.Tensor, part: slice) -> torch.Tensor:
        """``rows @ G[part]``, ``[g, o, d]`` for ``rows [g, o, b]``."""

    @abstractmethod
    def solve(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows @ G^-1``, ``[g, o, d]``; zeros where ``G`` is singular in its precision."""

    @abstractmethod
    def ridged(self, share: float) -> Gram:
        """The same with ``share`` of the mean power added to the diagonal."""

    @abstractmethod
    def centred(self, mean: torch.Tensor) -> Gram:
        """The second moments of ``v`` less its ``mean [g, d]``."""

    @abstractmethod
    def mixed(self, other: Gram, share: float) -> Gram:
        """The mean of this and ``other``, of the same form, which has ``share`` of the weight."""

    @property
    @abstractmethod
    def finite(self) -> bool:
        """Whether no entry overflowed."""


@dataclass(frozen=True, slots=True)
class _Dense(Gram):
    """The matrix itself."""

    matrix: torch.Tensor

    @property
    def diagonal(self) -> torch.Tensor:
        return self.matrix.diagonal(dim1=1, dim2=2)

    def part(self, part: slice) -> torch.Tensor:
        return self.matrix[:, part, part]

    def times(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.matrix

    def times_part(self, rows: torch.Tensor, part: slice) -> torch.Tensor:
        return rows @ self.matrix[:, part]

    def solve(self, rows: torch.Tensor) -> torch.Tensor:
        return _solved(self.matrix, rows.transpose(1, 2)).transpose(1, 2)

    def ridged(self, share: float) -> _Dense:
        matrix = self.matrix.clone()
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal += share * diagonal.mean(-1, keepdim=True).clamp_min(LEAST_POWER)
        return _Dense(matrix)

    def centred(self, mean: torch.Tensor) -> _Dense:
        return _Dense(self.matrix - mean[:, :, None] * mean[:, None, :])

    def mixed(self, other: Gram, share: float) -> _Dense:
        return _Dense(torch.lerp(self.matrix, other.part(slice(None)), share))

    @property
    def finite(self) -> bool:
        return bool(self.matrix.isfinite().all())


@dataclass(frozen=True, slots=True)
class _Factored(Gram):
    """``rows' rows + ridge I`` with ``rows [g, n, d]`` and ``ridge [g]``; there may be no rows."""

    rows: torch.Tensor
    ridge: torch.Tensor

    @property
    def diagonal(self) -> torch.Tensor:
        return self.rows.square().sum(1) + self.ridge[:, None]

    def part(self, part: slice) -> torch.Tensor:
        rows = self.rows[..., part]
        unit = torch.eye(rows.shape[-1], device=rows.device)
        return rows.transpose(1, 2) @ rows + self.ridge[:, None, None] * unit

    def times(self, rows: torch.Tensor) -> torch.Tensor:
        return self.times_part(rows, slice(None))

    def times_part(self, rows: torch.Tensor, part: slice) -> torch.Tensor:
        result = (rows @ self.rows[..., part].transpose(1, 2)) @ self.rows
        result[..., part] += self.ridge[:, None, None] * rows
        return result

    def solve(self, rows: torch.Tensor) -> torch.Tensor:
        # By Woodbury's identity: (V'V + r I)^-1 = (I - V' (V V' + r I)^-1 V) / r.
        kernel = self.rows @ self.rows.transpose(1, 2)
        kernel.diagonal(dim1=1, dim2=2).add_(self.ridge[:, None])
        seen = _solved(kernel, self.rows @ rows.transpose(1, 2))
        return (rows - seen.transpose(1, 2) @ self.rows) / self.ridge[:, None, None]

    def ridged(self, share: float) -> _Factored:
        ridge = share * self.diagonal.mean(-1).clamp_min(LEAST_POWER)
        return _Factored(self.rows, self.ridge + ridge)

    def centred(self, mean: torch.Tensor) -> _Factored:
        offset = mean[:, None, :] / max(self.rows.shape[1], 1) ** 0.5
        return _Factored(self.rows - offset, self.ridge)

    def mixed(self, other: Gram, share: float) -> _Factored:
        if not isinstance(other, _Factored):
            raise TypeError(f"got a {type(other).__name__}, expected a {type(self).__name__}")
        rows = torch.cat([self.rows * (1 - share) ** 0.5, other.rows * share**0.5], 1)
        return _Factored(rows, torch.lerp(self.ridge, other.ridge, share))

    @property
    def finite(self) -> bool:
        return bool(self.diagonal.isfinite().all())


@dataclass(frozen=True, slots=True)
class _Diagonal(Gram):
    """Inputs taken uncorrelated: ``powers [g, d]`` on the diagonal, and nothing beside."""

    powers: torch.Tensor

    @property
    def diagonal(self) -> torch.Tensor:
        return self.powers

    def part(self, part: slice) -> torch.Tensor:
        return torch.diag_embed(self.powers[:, part])

    def times(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * self.powers[:, None, :]

    def times_part(self, rows: torch.Tensor, part: slice) -> torch.Tensor:
        result = rows.new_zeros(*rows.shape[:2], self.powers.shape[-1])
        result[..., part] = rows * self.powers[:, None, part]
        return result

    def solve(self, rows: torch.Tensor) -> torch.Tensor:
        return rows / self.powers[:, None, :].clamp_min(torch.finfo(rows.dtype).tiny)

    def ridged(self, share: float) -> _Diagonal:
        mean = self.powers.mean(-1, keepdim=True).clamp_min(LEAST_POWER)
        return _Diagonal(self.powers + share * mean)

    def centred(self, mean: torch.Tensor) -> _Diagonal:
        return _Diagonal((self.powers - mean.square()).clamp_min(0.0))

    def mixed(self, other: Gram, share: float) -> _Diagonal:
        return _Diagonal(torch.lerp(self.powers, other.diagonal, share))

    @property
    def finite(self) -> bool:
        return bool(self.powers.isfinite().all())


def _solved(matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``matrix^-1 columns`` of a positive definite matrix, zeros where it is singular."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    found = torch.cholesky_solve(columns, factor)
    sound = (failed == 0)[:, None, None] & found.isfinite()
    return torch.where(sound, found, torch.zeros_like(found))


def dense(matrix: torch.Tensor) -> Gram:
    """``G`` as it is, ``[g, d, d]``."""
    return _Dense(matrix)


def factored(rows: torch.Tensor) -> Gram:
    """The mean of ``v v'`` over the rows ``v`` of ``rows [g, n, d]``."""
    return _Factored(rows / rows.shape[1] ** 0.5, rows.new_zeros(len(rows)))


def diagonal(powers: torch.Tensor) -> Gram:
    """Uncorrelated inputs of these ``powers [g, d]``."""
    return _Diagonal(powers)


def identity(weight: torch.Tensor) -> Gram:
    """Uncorrelated inputs of power 1, for a weight ``[g, o, d]``."""
    return _Diagonal(weight.new_ones(weight.shape[0], weight.shape[2]))
