"""Rounding graphs to integers, as NPUs compute: every value is quantised and dequantised again where it is made.

A pair of QuantizeLinear and DequantizeLinear stands behind each value, and compilers read from it with which integers an
operator works. Activations become unsigned integers with one scale and one zero point, weight matrices signed ones with
a scale per output.

What only moves a value (a reshape, a concatenation) must not round it again: such operators share one range between all
they take and give. So K and V leave a graph on the very grid on which the next call takes them in, and a row means the
same to the rows that are computed beside it and to those that read it from the cache.

    ranges = measure_ranges(…)                # by text that runs through the model in float32
    round_graph(graph, Rounding(16, 8), share_ranges(graph, ranges))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

_MOVES = {"Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
_UNSIGNED = {8: np.uint8, 16: np.uint16}
_SIGNED = {4: ml_dtypes.int4, 8: np.int8}
_LEAST_SPAN = 1e-6
# Shares of a matrix column's largest weight that its integers may end at, by bits.
_CLIPPED = {4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55), 8: (1.0,)}
# Scores out of sight end so far below the least one in sight; exp(-16) is less than a step of the softmax's output.
_OUT_OF_SIGHT = 16.0


@dataclass(frozen=True)
class Rounding:
    """Bits of an activation (8 or 16) and of a weight (4 or 8)."""

    activations: int
    weights: int


@dataclass(frozen=True)
class Range:
    """Least and largest value seen."""

    low: float
    high: float

    def joined(self, other: Range) -> Range:
        """What covers both."""
        return Range(min(self.low, other.low), max(self.high, other.high))


@dataclass(frozen=True)
class Grid:
    """Integers q of so many bits that stand for (q - zero) · scale; 0 is one of them."""

    scale: float
    zero: int
    bits: int

    @classmethod
    def over(cls, values: Range, bits: int) -> Grid:
        """The grid that covers a range and 0."""
        low, high = min(values.low, 0.0), max(values.high, 0.0)
        scale = float(np.float32(max(high - low, _LEAST_SPAN) / (2**bits - 1)))
        return cls(scale, min(round(-low / scale), 2**bits - 1), bits)

    def rounded(self, array: NDArray[np.float32]) -> NDArray[np.unsignedinteger]:
        """The nearest integers."""
        found = np.clip(np.rint(array / self.scale) + self.zero, 0, 2**self.bits - 1)
        return np.asarray(found, _UNSIGNED[self.bits])


Ranges = Mapping[str, Range]


def share_ranges(graph: ir.Model, ranges: Ranges) -> dict[str, Range]:
    """One range for all values between which data only moves, and masks that end where nothing is seen of them.

    Args:
        graph: of one part, norms fused.
        ranges: of all its float values, by name, measured with a mask of `modules.MASKED`.
    """
    known = dict(ranges) | dict(_constants(graph)) | dict(_masks(graph, ranges))
    leaders = {name: name for name in known}

    def leader(name: str) -> str:
        while leaders[name] != name:
            name = leaders[name]
        return name

    for node in graph.graph:
        if node.op_type in _MOVES:
            first, *others = [str(v.name) for v in (*node.outputs, *node.inputs) if v and v.name in known]
            for other in others:
                leaders[leader(other)] = leader(first)
    joined: dict[str, Range] = {}
    for name, values in known.items():
        joined[leader(name)] = joined.get(leader(name), values).joined(values)
    return {name: joined[leader(name)] for name in known}


def round_graph(graph: ir.Model, rounding: Rounding, ranges: Ranges) -> None:
    """Quantise a graph, in place.

    Args:
        graph: of one part, norms fused, its shapes fixed.
        rounding: bits.
        ranges: from `share_ranges`.
    """
    inner = graph.graph
    matrices = {node.inputs[1] for node in inner if node.op_type == "MatMul"}
    constants = [value for value in inner.initializers.values() if _is_float(value)]
    made = [value for node in inner for value in node.outputs if _is_float(value)]
    for value in (*filter(_is_float, inner.inputs), *made):
        _round_value(inner, value, Grid.over(ranges[str(value.name)], rounding.activations))
    for value in constants:
        array = _array(value)
        if value in matrices and array.ndim == 2:
            _replace_constant(inner, value, *_rounded_matrix(array, rounding.weights), axis=1)
            continue
        covered = Range(float(array.min()), float(array.max()))
        grid = Grid.over(ranges.get(str(value.name), covered), rounding.activations)
        _replace_constant(inner, value, grid.rounded(array), *_parameters(grid), axis=None)


def _constants(graph: ir.Model) -> Iterator[tuple[str, Range]]:
    """Ranges of tables that are looked up: the text need not have come to all of their rows."""
    for node in graph.graph:
        if node.op_type in _MOVES:
            for value in node.inputs:
                if value is not None and value.const_value is not None and _is_float(value):
                    array = _array(value)
                    yield str(value.name), Range(float(array.min()), float(array.max()))


def _masks(graph: ir.Model, ranges: Ranges) -> Iterator[tuple[str, Range]]:
    """Ranges of the mask and of the scores it was added to.

    Covering the mask's own value would leave no precision for the scores. What lies below the range becomes its least
    value, and that is far enough.
    """
    mask = next((value for value in graph.graph.inputs if value.name == "mask"), None)
    if mask is None:
        return
    reach = Range(0.0, 0.0)
    for use in mask.uses():
        scores = next(ranges[str(v.name)] for v in use.node.inputs if v is not None and v is not mask)
        low = min(scores.low, 0.0) - _OUT_OF_SIGHT
        reach = reach.joined(Range(low - max(scores.high, 0.0), 0.0))
        yield str(use.node.outputs[0].name), Range(low, scores.high)
    yield "mask", reach


def _round_value(graph: ir.Graph, value: ir.Value, grid: Grid) -> None:
    """Let everything behind a value see it rounded; an output of the graph keeps its name."""
    name, uses = str(value.name), list(value.uses())
    scale, zero = (
        _initializer(graph, f"{name}_{kind}", array)
        for kind, array in zip(("scale", "zero"), _parameters(grid), strict=True)
    )
    down = ir.node("QuantizeLinear", [value, scale, zero], name=f"{name}_quantize")
    up = ir.node("DequantizeLinear", [down.outputs[0], scale, zero], name=f"{name}_dequantize")
    rounded, again = down.outputs[0], up.outputs[0]
    rounded.name, rounded.shape, rounded.type = f"{name}_rounded", value.shape, zero.type
    again.name, again.shape, again.type = f"{name}_again", value.shape, value.type
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], [down, up])
    else:
        graph.insert_after(producer, [down, up])
    for use in uses:
        use.node.replace_input_with(use.idx, again)
    if value in graph.outputs:
        graph.outputs[graph.outputs.index(value)] = again
        value.name, again.name = f"{name}_exact", name


def _rounded_matrix(
    array: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.signedinteger], NDArray[np.float32], NDArray[np.signedinteger]]:
    """A matrix [inputs, outputs] rounded symmetrically, a scale for each output: of a few that clip the largest weights,
    the one with the least squared error.
    """
    top = 2 ** (bits - 1) - 1
    largest = np.maximum(np.abs(array).max(0), _LEAST_SPAN) / top
    best, scales = np.full(array.shape[1], np.inf), largest
    for share in _CLIPPED[bits]:
        scale = largest * share
        error = ((np.clip(np.rint(array / scale), -top, top) * scale - array) ** 2).sum(0)
        scales = np.where(error < best, scale, scales)
        best = np.minimum(error, best)
    scales = scales.astype(np.float32)
    rounded = np.clip(np.rint(array / scales), -top, top).astype(_SIGNED[bits])
    return rounded, scales, np.zeros(len(scales), _SIGNED[bits])


def _replace_constant(
    graph: ir.Graph,
    value: ir.Value,
    rounded: NDArray[np.generic],
    scale: NDArray[np.float32],
    zero: NDArray[np.generic],
    *,
    axis: int | None,
) -> None:
    name = str(value.name)
    held = [
        _initializer(graph, f"{name}_{kind}", array)
        for kind, array in (("rounded", rounded), ("scale", scale), ("zero", zero))
    ]
    up = ir.node("DequantizeLinear", held, {} if axis is None else {"axis": axis}, name=f"{name}_dequantize")
    again = up.outputs[0]
    again.name, again.shape, again.type = f"{name}_again", value.shape, value.type
    graph.insert_before(graph[0], up)
    for use in list(value.uses()):
        use.node.replace_input_with(use.idx, again)
    del graph.initializers[name]


def _parameters(grid: Grid) -> tuple[NDArray[np.float32], NDArray[np.generic]]:
    return np.array(grid.scale, np.float32), np.array(grid.zero, _UNSIGNED[grid.bits])


def _initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _is_float(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT


def _array(value: ir.Value) -> NDArray[np.float32]:
    held = value.const_value
    if held is None:
        raise TypeError(f"{value.name}: a constant was expected")
    return np.asarray(held.numpy(), np.float32)
