"""Quantised products: what the packed weights stand for, and which products become so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from skipstone.errors import UsageError
from skipstone.exporters.formats.onnx.graphs import trace_segment
from skipstone.exporters.formats.onnx.modules import cut_for_graphs
from skipstone.exporters.formats.onnx.oracle import matrices
from skipstone.exporters.formats.onnx.schemes import SCHEMES, pack, quantize, scheme_of, unpack
from tests.exporters.conftest import MakeTiny

INPUTS, OUTPUTS = 80, 6  # not a multiple of a block


def product(weight: np.ndarray) -> ir.Model:
    """A graph that multiplies with a weight and with what it is given."""
    left, other = (
        ir.val(name, ir.DataType.FLOAT, shape)
        for name, shape in (("left", (3, weight.shape[0])), ("other", (weight.shape[1], 2)))
    )
    right = ir.val("w.weight", const_value=ir.tensor(weight, name="w.weight"))
    first = ir.node("MatMul", [left, right])
    second = ir.node("MatMul", [first.outputs[0], other])
    made = second.outputs[0]
    made.name, made.shape, made.type = "made", ir.Shape([3, 2]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [left, other], [made], nodes=[first, second], initializers=[right], opset_imports={"": 21}
    )
    return ir.Model(graph, ir_version=10)


def run(graph: ir.Model, folder: Path, **inputs: np.ndarray) -> Any:
    file = folder / "graph.onnx"
    ir.save(graph, file)
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, inputs)[0]


@pytest.mark.parametrize(("bits", "steps"), [(4, 16), (8, 256)])
def test_rounding_errs_by_half_a_step_of_each_block_at_most(bits: int, steps: int) -> None:
    weight = np.random.default_rng(0).standard_normal((INPUTS, OUTPUTS), np.float32)
    packed, scales = pack(weight, bits)
    found = unpack(packed, scales, INPUTS, bits)
    assert found.shape == weight.shape
    for start in range(0, INPUTS, 32):
        block = slice(start, start + 32)
        largest = np.abs(weight[block]).max(axis=0)
        error = np.abs(found[block] - weight[block]).max(axis=0)
        assert (
            error <= largest / (steps / 2) * 1.001
        ).all()  # of the far side, which has one step less, a whole one
        assert error.max() > 0


@pytest.mark.parametrize("name", ["4w", "8w"])
def test_the_runtime_multiplies_with_what_unpacking_gives(name: str, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    weight, left, other = (
        random.standard_normal(shape, np.float32) for shape in ((INPUTS, OUTPUTS), (3, INPUTS), (OUTPUTS, 2))
    )
    graph = product(weight)
    quantize(graph, SCHEMES[name])
    ((held, value),) = list(matrices(graph))
    assert held == "w.weight"
    found = run(graph, tmp_path, left=left, other=other)
    np.testing.assert_allclose(found, left @ value @ other, atol=1e-4)
    assert np.abs(found - left @ weight @ other).max() > 1e-3


def test_products_without_a_weight_are_left_alone(tmp_path: Path) -> None:
    graph = product(np.ones((INPUTS, OUTPUTS), np.float32))
    quantize(graph, SCHEMES["8da4w"])
    assert [node.op_type for node in graph.graph] == ["MatMulNBits", "MatMul"]
    assert graph.graph.node(0).attributes["accuracy_level"].as_int() == 4
    assert "w.weight" not in graph.graph.initializers


def test_every_matrix_of_a_segment_is_quantised(tiny: MakeTiny) -> None:
    segment = cut_for_graphs(tiny("llama"), (), None, 64).segments[0]
    graph = trace_segment(segment, 64)
    before = {name for name, _ in matrices(graph)}
    quantize(graph, SCHEMES["4w"])
    assert {name for name, _ in matrices(graph)} == before
    assert sum(node.op_type == "MatMulNBits" for node in graph.graph) == len(before) == 4 * 7


def test_an_unknown_scheme_is_refused_with_the_known_ones() -> None:
    assert scheme_of("f32").exact
    with pytest.raises(UsageError, match=r"--quantize q4_0: unknown scheme for --format onnx, expected none"):
        scheme_of("q4_0")
    with pytest.raises(UsageError, match="did you mean 8da4w"):
        scheme_of("8da4")
