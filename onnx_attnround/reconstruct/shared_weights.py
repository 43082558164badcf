"""One weight that several layers read: it is rounded once, on what all of them read.

So it is in unrolled recurrent cells, siamese branches, and heads that several scales share. The
weight is stored once, and what its rounding is to make small is the sum of the readers' errors,

    sum_r E |W x_r - Q v_r|^2,

whose moments add up. But the walk comes to one reader after the other, and the inputs of the
later ones depend on how the weight was rounded. So it is rounded at its first reader, on the
moments of that one against the quantised prefix, and on those of the later ones in the float
model, with nothing quantised but their own input. (Waiting for the last reader instead would fit
all layers in between to the errors of a weight that then changes.) A bias is still corrected at
each reader, on what the quantised prefix really feeds it, unless one stored bias serves all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch

from onnx_attnround.config import QuantConfig
from onnx_attnround.graph import tensor_value
from onnx_attnround.reconstruct.walk import walking
from onnx_attnround.records import LayerPlan, QuantParams
from onnx_attnround.rounding.moments import Moments
from onnx_attnround.samples import Samples

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


def one_bias(
    model: ir.Model, readers: Sequence[LayerPlan], params: Mapping[str, QuantParams]
) -> bool:
    """Whether ``readers`` of a weight can store one bias: it is the same, and so is its scale.

    ``params`` are those of activations: the scale of a bias is that of input times weight.
    """
    grids = [params.get(layer.x) for layer in readers]
    scales = {None if p is None or p.spec.dynamic else float(p.scale) for p in grids}
    kinds = {(layer.bias is None, layer.takes_bias) for layer in readers}
    values = [tensor_value(model, layer.bias) for layer in readers if layer.bias is not None]
    same = all(np.array_equal(value, values[0]) for value in values)
    return len(scales) == len(kinds) == 1 and same


def moments_ahead(
    model: ir.Model,
    groups: Collection[Sequence[LayerPlan]],
    samples: Samples,
    config: QuantConfig,
    moments: Callable[[LayerPlan, Batches], Moments],
) -> dict[str, Moments]:
    """For the first of each group of readers, by node, the mean of the moments of the others.

    One pass of the float ``model``; ``moments`` makes those of one layer from what it reads.
    """
    first = {later.node: group[0].node for group in groups for later in group[1:]}
    if not first:
        return {}
    order = {node.name: position for position, node in enumerate(model.graph)}
    layers = sorted((x for group in groups for x in group[1:]), key=lambda x: order[x.node])
    found: dict[str, Moments] = {}
    seen: dict[str, int] = {}
    with walking(model, None, layers, samples, config) as walk:
        for index, layer in enumerate(layers):
            walk.advance(index)
            part, node = moments(layer, walk.inputs(index)), first[layer.node]
            seen[node] = seen.get(node, 0) + 1
            found[node] = found[node].mixed(part, 1 / seen[node]) if node in found else part
    return found
