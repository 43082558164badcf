"""Bits per layer under a budget: from the coding length of its weights, or from measured errors.

For the weights of a layer as ``m`` vectors in ``R^n``, the number of bits that
code them up to a mean squared error ``eps^2`` is (Ma, Derksen, Hong and Wright,
"Segmentation of Multivariate Mixed Data via Lossy Coding and Compression",
IEEE TPAMI 2007)

    L(W) = (m + n)/2 * log2 det(I + n/(m eps^2) W W').

Here ``eps^2`` is a share of the power of the vectors, so that rescaling a layer
does not change its bits. The share is proportional to the number of weights: a
model's relative errors add up, and the least sum under a budget of bits gives
each layer an error in proportion to what its bits cost. The more bits a weight
then takes to code, the wider its codes.

The other allocator, ``gram``, is given the error that each width of each layer
costs (``reconstruct/sensitivity.py``), and spends the budget where it saves most of it.

Without a budget all layers have one width, but for a few: the first and the last, or, where
errors are measured, those that cause most of it, as many weights in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np

from onnx_attnround.config import QuantConfig
from onnx_attnround.plan.patterns import values_for
from onnx_attnround.records import Array, BitAllocation, LayerErrors, LayerPlan, readers_of

DISTORTION = 0.25
"""``eps^2`` as a share of the mean power, for a layer of average size (docs/experiments.md)."""


def coding_length(matrix: Array, distortion: float = DISTORTION) -> float:
    """Lossy coding length of the rows of ``matrix [m, n]``, in bits per degree of freedom.

    That is ``L / ((m + n) min(m, n))``: half the base-2 logarithm of the
    signal-to-distortion ratio, averaged over the principal directions.
    ``distortion`` is ``eps^2`` as a share of the mean power of the rows. Zero for
    an all-zero matrix; invariant to a common factor.
    """
    rows = matrix.astype(np.float64)
    m, n = rows.shape
    power = float((rows * rows).sum()) / m
    if power == 0.0:
        return 0.0
    gram = rows @ rows.T if m <= n else rows.T @ rows
    gram *= n / (m * distortion * power)
    gram[np.diag_indices_from(gram)] += 1.0
    log_determinant = float(np.linalg.slogdet(gram)[1])
    length: float = 0.5 * log_determinant / (math.log(2.0) * min(m, n))
    return length


def measures(config: QuantConfig) -> bool:
    """Whether the bits depend on errors measured on calibration samples."""
    if config.mean_bits is not None:
        return config.allocator in MEASURING
    return config.budgeted


def moves_wide(layers: Iterable[LayerPlan], config: QuantConfig) -> bool:
    """Whether measured errors tell which layers have ``first_last_bits``.

    Nothing need be measured where no other layer is as small as the first and last ones together.
    Of narrow activations it is those of the first and last layers that are wider, and their
    weights with them.
    """
    budgeted = config.mean_bits is not None or config.budgeted
    if budgeted or config.first_last_bits <= config.weight_bits or config.act_bits < 8:
        return False
    room, others = 0, []
    for layer in layers:
        if layer.first_or_last:
            room += layer.parameters
        else:
            others.append(layer.parameters)
    return min(others, default=room + 1) <= room


def allocate(
    layers: Sequence[LayerPlan],
    matrix: Callable[[str], Array],
    config: QuantConfig,
    errors: LayerErrors | None = None,
) -> BitAllocation:
    """Bits per layer: pinned ones as asked, the others uniform or under ``mean_bits``.

    Layers that read one weight have one width, unless ``layer_bits`` gives them others.
    Of the layers that would be pinned as the first and last ones, others take the place if
    ``errors`` tell that they need the bits more (:func:`moves_wide`).
    ``matrix`` gives the weight of a node as ``[g, o, d]``, and is asked for one at a time. Where
    the allocator ``measures`` and there are no ``errors``, layers that are not
    pinned are left out, and the mean is unknown.
    """
    lengths = {} if config.mean_bits is None else _lengths(layers, matrix)
    asked = values_for(config.layer_bits, [layer.node for layer in layers])
    groups, bits = _shared_widths(layers, asked, config)
    if errors and moves_wide(layers, config):
        bits = _wide_moved({node: groups[node][0] for node in bits}, bits, errors, config)
    free = [groups[node][0] for node, width in bits.items() if width is None]
    chosen = {layer.node: config.weight_bits for layer in free}
    if measures(config) and errors is None:
        chosen, free = {}, []
    elif config.mean_bits is not None and free:
        widths = ALLOCATORS[config.allocator](free, lengths, errors or {}, config)
        chosen = {layer.node: width for layer, width in zip(free, widths, strict=True)}
    bits = {node: chosen.get(node) if width is None else width for node, width in bits.items()}
    total = sum(layer.parameters for layer in free)
    spent = sum(layer.parameters * (bits[layer.node] or 0) for layer in free)
    widths_of = {
        layer.node: asked.get(layer.node) or bits[groups[layer.node][0].node] for layer in layers
    }
    return BitAllocation(
        bits={node: width for node, width in widths_of.items() if width is not None},
        coding_length=lengths,
        mean_bits=spent / total if total else float("nan"),
    )


def free_layers(
    layers: Sequence[LayerPlan], config: QuantConfig
) -> tuple[tuple[LayerPlan, ...], ...]:
    """The layers whose bits nothing pins, those that share a weight together."""
    asked = values_for(config.layer_bits, [layer.node for layer in layers])
    groups, bits = _shared_widths(layers, asked, config)
    return tuple(groups[node] for node, width in bits.items() if width is None)


def _shared_widths(
    layers: Sequence[LayerPlan], asked: Collection[str], config: QuantConfig
) -> tuple[Mapping[str, tuple[LayerPlan, ...]], dict[str, int | None]]:
    """The readers of the weight of each layer that is not ``asked`` for, and the pinned bits.

    The latter are told of the first reader of each weight, ``None`` where nothing pins them.
    """
    groups = readers_of(layer for layer in layers if layer.node not in asked)
    stored = [group for node, group in groups.items() if group[0].node == node]
    return groups, {group[0].node: _pinned(group, config) for group in stored}


def _lengths(
    layers: Sequence[LayerPlan], matrix: Callable[[str], Array]
) -> dict[str, float]:
    """The coding length of each layer, its distortion in proportion to its size."""
    first = {node: group[0].node for node, group in readers_of(layers).items()}
    stored = [layer for layer in layers if first[layer.node] == layer.node]
    usual = sum(layer.parameters for layer in stored) / len(stored)
    found = {
        layer.node: coding_length(_rows(matrix(layer.node)), DISTORTION * layer.parameters / usual)
        for layer in stored
    }
    return {node: found[source] for node, source in first.items()}


def _rows(matrix: Array) -> Array:
    return matrix.reshape(-1, matrix.shape[-1])


def under_budget(
    rates: Sequence[float], sizes: Sequence[int], choices: Sequence[int], mean_bits: float
) -> list[int]:
    """The widest codes whose size-weighted mean is within ``mean_bits``, in the order of ``rates``.

    A layer with a higher rate never gets fewer bits than one with a lower rate.
    Each layer takes the widest choice within ``rate + c``, for the largest ``c``
    that the budget admits; the rest goes to the layers of the highest rates, as far as it does.
    """
    order = sorted(range(len(rates)), key=lambda i: (-rates[i], i))
    budget = mean_bits * sum(sizes)
    level = [0] * len(rates)

    def cost(levels: Sequence[int]) -> int:
        return sum(size * choices[at] for size, at in zip(sizes, levels, strict=True))

    # Between two of these ``c`` no layer changes its choice, so that no others need be tried.
    offsets = sorted({choice - rate for rate in rates for choice in choices})
    for offset in offsets:
        trial = [_level(rate + offset, choices) for rate in rates]
        if cost(trial) > budget:
            break
        level = trial
    for position, i in enumerate(order):
        while level[i] + 1 < len(choices):
            raised = level[:i] + [level[i] + 1] + level[i + 1 :]
            above = order[position - 1] if position else None
            if cost(raised) > budget or (above is not None and raised[i] > level[above]):
                break
            level = raised
    return [choices[at] for at in level]


def _level(wanted: float, choices: Sequence[int]) -> int:
    """Index of the widest choice within ``wanted`` (rounding error forgiven), at least 0."""
    return max(sum(choice <= wanted + 1e-9 for choice in choices) - 1, 0)


def _pinned(readers: Sequence[LayerPlan], config: QuantConfig) -> int | None:
    """The width of a weight of which some reader is a first or last layer; else ``None``."""
    if not any(layer.first_or_last for layer in readers):
        return None
    if config.budgeted:
        return config.first_last_bits
    return max(config.first_last_bits, config.weight_bits)


def _wide_moved(
    layers: Mapping[str, LayerPlan],
    pinned: Mapping[str, int | None],
    errors: LayerErrors,
    config: QuantConfig,
) -> dict[str, int | None]:
    """The pinned bits, with those of the most error per weight pinned in place of others.

    They hold no more weights in all, and are taken one after the other, as far as they fit.
    """
    room = sum(layers[node].parameters for node, width in pinned.items() if width is not None)
    moved: dict[str, int | None] = dict.fromkeys(pinned)

    def urgency(node: str) -> float:
        return errors[node][config.weight_bits] / layers[node].parameters

    for node in sorted(pinned, key=urgency, reverse=True):
        if layers[node].parameters <= room:
            room -= layers[node].parameters
            moved[node] = config.first_last_bits
    return moved


def least_error(
    errors: Sequence[Mapping[int, float]],
    sizes: Sequence[int],
    choices: Sequence[int],
    mean_bits: float,
) -> list[int]:
    """The widths whose errors add up to the least within a size-weighted mean of ``mean_bits``.

    ``errors`` tell for each layer what each of ``choices`` costs. Along the lower
    convex hull of a layer's errors, each step saves less per bit than the one before;
    the steps of all layers are taken in the order of what they save per bit of size
    (Everett's Lagrangian, Operations Research 1963), those that no longer fit left
    out. A larger budget never spends less, and never ends with more error.
    """
    widths = [choices[0]] * len(sizes)
    left = mean_bits * sum(sizes) - choices[0] * sum(sizes)
    steps = [
        (-saved / size, layer, low, high)
        for layer, (of_layer, size) in enumerate(zip(errors, sizes, strict=True))
        for saved, low, high in _hull_steps(of_layer, choices)
    ]
    for _, layer, low, high in sorted(steps):
        cost = (high - low) * sizes[layer]
        if widths[layer] == low and cost <= left:
            widths[layer] = high
            left -= cost
    return widths


def by_error_saved(
    errors: Sequence[Mapping[int, float]], costs: Sequence[Mapping[int, int]]
) -> Iterator[list[int]]:
    """Widths of all layers, from those that cost least to those with the least error.

    ``errors`` and ``costs`` tell for each layer what each width causes, and what storing it
    takes. Each step widens one layer, that which saves most error per cost (the lower
    convex hull of all allocations: see :func:`least_error`). Of widths that cost the same, the
    one with the least error stands for all.
    """
    best = [
        {
            cost: min((b for b in of if of[b] == cost), key=lambda b: (errors[layer][b], -b))
            for cost in sorted(set(of.values()))
        }
        for layer, of in enumerate(costs)
    ]
    widths = [of[min(of)] for of in best]
    yield list(widths)
    steps = [
        (-saved, layer, of[high])
        for layer, of in enumerate(best)
        for saved, _, high in _hull_steps({c: errors[layer][b] for c, b in of.items()}, list(of))
    ]
    for _, layer, width in sorted(steps, key=lambda step: step[:2]):
        widths[layer] = width
        yield list(widths)


def _hull_steps(
    errors: Mapping[int, float], choices: Sequence[int]
) -> Iterator[tuple[float, int, int]]:
    """``(error saved per bit, from, to)`` along the lower convex hull, the steepest first."""
    low = choices[0]
    while wider := [choice for choice in choices if choice > low]:
        saved, high = max(((errors[low] - errors[b]) / (b - low), b) for b in wider)
        if saved <= 0:
            return
        yield saved, low, high
        low = high


Allocator = Callable[
    [Sequence[LayerPlan], Mapping[str, float], LayerErrors, QuantConfig], list[int]
]


def _by_coding_length(
    layers: Sequence[LayerPlan],
    lengths: Mapping[str, float],
    errors: LayerErrors,
    config: QuantConfig,
) -> list[int]:
    rates, sizes = [lengths[one.node] for one in layers], [one.parameters for one in layers]
    return under_budget(rates, sizes, config.bit_choices, config.mean_bits or 0.0)


def _by_error(
    layers: Sequence[LayerPlan],
    lengths: Mapping[str, float],
    errors: LayerErrors,
    config: QuantConfig,
) -> list[int]:
    measured, sizes = [errors[one.node] for one in layers], [one.parameters for one in layers]
    return least_error(measured, sizes, config.bit_choices, config.mean_bits or 0.0)


ALLOCATORS: dict[str, Allocator] = {"coding-length": _by_coding_length, "gram": _by_error}
MEASURING = frozenset({"gram"})
"""Allocators that read ``LayerErrors``, for which there must be calibration samples."""
