"""Norms as one operator: the same numbers, and nothing else taken for a norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from skipstone.exporters.formats.onnx.graphs import fixed, graphs_of
from skipstone.exporters.formats.onnx.modules import cut_for_graphs
from skipstone.exporters.formats.onnx.norms import NORM_OPSET, fuse_norms
from skipstone.exporters.formats.onnx.walk import Walk
from tests.exporters.conftest import MakeTiny

pytestmark = pytest.mark.slow
ROWS, SLOTS = 4, 16


@pytest.fixture(scope="module", params=["llama", "qwen-3"])
def traced(request: pytest.FixtureRequest, tiny: MakeTiny) -> tuple[dict[str, ir.Model], Any]:
    """Graphs of a tiny model cut after layer 1, and its embeddings."""
    parts = cut_for_graphs(tiny(request.param), (1,), np.array([3, 7], np.int32), SLOTS)
    table: Any = parts.embedding.table
    return dict(graphs_of(parts, 64)), table.weight.numpy()


def logits(graphs: Mapping[str, ir.Model], table: NDArray[np.float32]) -> NDArray[np.float32]:
    walk = Walk(graphs, table, ROWS, SLOTS)
    return np.concatenate([walk.logits([5, 9, 2, 100]), walk.logits([7, 8])])


def test_fused_norms_give_the_same_logits(traced: tuple[dict[str, ir.Model], Any]) -> None:
    graphs, table = traced
    spelled_out = {part: fixed(graph, ROWS, SLOTS) for part, graph in graphs.items()}
    expected = logits(spelled_out, table)
    for graph in spelled_out.values():
        assert fuse_norms(graph) > 0
        assert graph.graph.opset_imports[""] == NORM_OPSET
        assert not {"Pow", "ReduceMean", "Sqrt", "Reciprocal"} & {node.op_type for node in graph.graph}
    np.testing.assert_allclose(logits(spelled_out, table), expected, atol=2e-5)


def test_every_norm_is_found_once(traced: tuple[dict[str, ir.Model], Any]) -> None:
    graphs, _table = traced
    found = {part: fuse_norms(fixed(graph, ROWS, SLOTS)) for part, graph in graphs.items()}
    norms = {"segment_0": 2, "segment_1": 6, "head": 1, "draft_head": 1}
    with_query_and_key = {"segment_0": 4, "segment_1": 12, "head": 1, "draft_head": 1}
    assert found in (norms, with_query_and_key)


def test_a_square_that_begins_no_norm_is_left_alone() -> None:
    entering = ir.val("hidden", dtype=ir.DataType.FLOAT, shape=ir.Shape([1, 4]))
    two = ir.val("two", const_value=ir.tensor(np.array(2, np.float32), name="two"))
    square = ir.node("Pow", [entering, two], name="square")
    root = ir.node("Sqrt", [square.outputs[0]], name="root")
    graph = ir.Graph(
        [entering], root.outputs, nodes=[square, root], initializers=[two], opset_imports={"": 21}
    )
    assert fuse_norms(ir.Model(graph, ir_version=10)) == 0
    assert [node.op_type for node in graph] == ["Pow", "Sqrt"]
