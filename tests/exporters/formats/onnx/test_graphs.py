"""Traced graphs on ONNX Runtime: any shape, fixed shapes, and the modules they were traced from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from skipstone.exporters.formats.onnx.fusion import divide_by_roots
from skipstone.exporters.formats.onnx.graphs import OPSET, fixed, graphs_of
from skipstone.exporters.formats.onnx.modules import MASKED, GraphSegment, cut_for_graphs
from skipstone.exporters.segments import Parts
from tests.exporters.conftest import MakeTiny

HIDDEN = 64
Feed = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def parts(tiny: MakeTiny) -> Parts:
    return cut_for_graphs(tiny("qwen-3"), (1,), np.array([3, 7], np.int32), 64)


@pytest.fixture(scope="module")
def graphs(parts: Parts) -> Mapping[str, ir.Model]:
    return dict(graphs_of(parts, HIDDEN))


def session(graph: ir.Model, folder: Path) -> Any:
    file = folder / "graph.onnx"
    ir.save(graph, file)
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def feed(segment: GraphSegment, rows: int, slots: int, seed: int = 0) -> Feed:
    """Random inputs of a segment; every row sees itself and about half of the rest."""
    random = np.random.default_rng(seed)
    mask = np.where(random.random((1, 1, rows, slots + rows)) < 0.5, 0.0, MASKED).astype(np.float32)
    mask[0, 0, range(rows), range(slots, slots + rows)] = 0.0
    found: Feed = {
        "hidden": random.standard_normal((1, rows, HIDDEN), np.float32),
        "positions": random.integers(64, size=(1, rows), dtype=np.int32),
        "mask": mask,
    }
    for layer, shape in zip(segment.layer_indices, segment.shapes, strict=True):
        for kind in ("key", "value"):
            size = (1, shape.heads, slots, shape.size)
            found[f"past_key_values.{layer}.{kind}"] = random.standard_normal(size, np.float32)
    return found


def computed_by_torch(segment: GraphSegment, given: Feed) -> list[NDArray[np.float32]]:
    hidden, positions, mask, *past = (torch.from_numpy(array) for array in given.values())
    with torch.no_grad():
        return [tensor.numpy() for tensor in segment(hidden, positions, mask, past)]


@pytest.mark.parametrize(("rows", "slots"), [(1, 1), (1, 0), (4, 16), (7, 40), (40, 7)])
def test_a_graph_takes_any_number_of_rows_and_slots(
    parts: Parts, graphs: Mapping[str, ir.Model], tmp_path: Path, rows: int, slots: int
) -> None:
    segment = cast("GraphSegment", parts.segments[1])
    given = feed(segment, rows, slots)
    found = session(graphs["segment_1"], tmp_path).run(None, given)
    for one, other in zip(found, computed_by_torch(segment, given), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_graph_of_a_fixed_shape_computes_what_the_free_one_does(
    parts: Parts, graphs: Mapping[str, ir.Model], tmp_path: Path
) -> None:
    segment = cast("GraphSegment", parts.segments[1])
    narrow, given = fixed(graphs["segment_1"], 4, 16), feed(segment, 4, 16)
    values = [*narrow.graph.inputs, *narrow.graph.outputs]
    assert all(isinstance(size, int) for value in values for size in cast("ir.Shape", value.shape))
    assert not {node.op_type for node in narrow.graph} & {"Shape", "Squeeze"}
    found = session(narrow, tmp_path).run(None, given)
    expected = session(graphs["segment_1"], tmp_path).run(None, given)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_narrowing_leaves_the_free_graph_as_it_was(graphs: Mapping[str, ir.Model]) -> None:
    graph = graphs["segment_0"]
    before = [str(value.shape) for value in graph.graph.inputs]
    fixed(graph, 2, 8)
    assert [str(value.shape) for value in graph.graph.inputs] == before
    assert "rows" in before[0]


def test_what_lies_in_masked_slots_changes_nothing(
    parts: Parts, graphs: Mapping[str, ir.Model], tmp_path: Path
) -> None:
    segment = cast("GraphSegment", parts.segments[0])
    given = feed(segment, 3, 5)
    given["mask"][..., :2] = MASKED
    runs = session(graphs["segment_0"], tmp_path)
    before = runs.run(None, given)
    for name, array in given.items():
        if name.startswith("past"):
            array[:, :, :2] = 77.0
    for one, other in zip(runs.run(None, given), before, strict=True):
        np.testing.assert_array_equal(one, other)
    given["mask"][..., :2] = 0.0
    assert np.abs(runs.run(None, given)[0] - before[0]).max() > 1e-3


def test_heads_give_the_logits_of_their_modules(
    parts: Parts, graphs: Mapping[str, ir.Model], tmp_path: Path
) -> None:
    hidden = np.random.default_rng(0).standard_normal((1, 3, HIDDEN), np.float32)
    for name, head in (("head", parts.head), ("draft_head", parts.draft_head)):
        assert head is not None
        (found,) = session(graphs[name], tmp_path).run(None, {"hidden": hidden})
        with torch.no_grad():
            np.testing.assert_allclose(found, head(torch.from_numpy(hidden)).numpy(), atol=1e-4)


def test_graphs_hold_no_operators_of_a_vendor_and_nothing_of_torch(graphs: Mapping[str, ir.Model]) -> None:
    for graph in graphs.values():
        assert graph.graph.opset_imports == {"": OPSET}
        assert all(not node.domain and not node.metadata_props for node in graph.graph)
        assert all(len(cast("ir.Shape", value.shape)) <= 4 for node in graph.graph for value in node.outputs)


def test_norms_are_taken_together_and_compute_what_they_did(
    parts: Parts, graphs: Mapping[str, ir.Model], tmp_path: Path
) -> None:
    """Qwen3's, of every layer's rows and of its queries and keys."""
    segment = cast("GraphSegment", parts.segments[1])
    given, graph = feed(segment, 3, 5), graphs["segment_1"].clone()
    expected = session(graph, tmp_path).run(None, given)
    norms = sum(node.op_type == "Reciprocal" for node in graph.graph)
    assert norms == 4 * len(segment.layer_indices)
    divide_by_roots(graph)
    assert not any(node.op_type == "Reciprocal" for node in graph.graph)
    for one, other in zip(session(graph, tmp_path).run(None, given), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4  # which warns that the optimised file is for this machine alone
    onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), options, providers=["CPUExecutionProvider"])
    fused = [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]
    assert fused.count("SimplifiedLayerNormalization") == norms
