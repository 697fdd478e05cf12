"""Rounded graphs on ONNX Runtime's CPU provider: how far they are off, and what must survive rounding exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from skipstone.exporters.formats.onnx.calibration import measure_ranges
from skipstone.exporters.formats.onnx.graphs import fixed, graphs_of
from skipstone.exporters.formats.onnx.modules import MASKED, cut_for_graphs
from skipstone.exporters.formats.onnx.norms import fuse_norms
from skipstone.exporters.formats.onnx.qdq import Grid, Range, Ranges, Rounding, round_graph
from skipstone.exporters.formats.onnx.walk import Walk
from tests.exporters.conftest import MakeTiny

pytestmark = pytest.mark.slow
ROWS, SLOTS = 8, 32
TEXT = np.random.default_rng(1).integers(3, 260, 96).tolist()
Graphs = Mapping[str, ir.Model]


@pytest.fixture(scope="module")
def table(tiny: MakeTiny) -> NDArray[np.float32]:
    return cut_table(tiny)[1]


@pytest.fixture(scope="module")
def graphs(tiny: MakeTiny) -> Graphs:
    return cut_table(tiny)[0]


@pytest.fixture(scope="module")
def ranges(graphs: Graphs, table: NDArray[np.float32]) -> Mapping[str, Ranges]:
    return measure_ranges(graphs, table, TEXT, SLOTS)


def cut_table(tiny: MakeTiny) -> tuple[Graphs, NDArray[np.float32]]:
    parts = cut_for_graphs(tiny("gentle"), (1,), np.array([3, 7], np.int32), SLOTS)
    module: Any = parts.embedding.table
    return dict(graphs_of(parts, 64)), module.weight.numpy()


def rounded(graphs: Graphs, ranges: Mapping[str, Ranges], rounding: Rounding, rows: int = ROWS) -> Graphs:
    found = {part: fixed(graph, rows, SLOTS) for part, graph in graphs.items()}
    for part, graph in found.items():
        fuse_norms(graph)
        round_graph(graph, rounding, ranges[part])
    return found


def logits(graphs: Graphs, table: NDArray[np.float32], rows: int = ROWS) -> NDArray[np.float32]:
    walk = Walk(graphs, table, rows, SLOTS)
    return np.concatenate([walk.logits(TEXT[first : first + rows]) for first in range(0, SLOTS, rows)])


@given(st.floats(-100, 100), st.floats(0, 100), st.sampled_from([8, 16]))
def test_a_grid_holds_zero_and_is_off_by_half_a_step_at_most(low: float, span: float, bits: int) -> None:
    grid = Grid.over(Range(low, low + span), bits)
    assert 0 <= grid.zero < 2**bits
    values = np.linspace(min(low, 0.0), max(low + span, 0.0), 101, dtype=np.float32)
    again = (grid.rounded(values).astype(np.float64) - grid.zero) * grid.scale
    assert np.abs(again - values).max() <= grid.scale * 1.01
    assert grid.rounded(np.zeros(1, np.float32))[0] == grid.zero


@pytest.mark.parametrize(
    ("rounding", "allowed"), [(Rounding(16, 8), 0.02), (Rounding(16, 4), 0.35), (Rounding(8, 8), 0.15)]
)
def test_logits_stay_as_near_as_the_bits_allow(
    graphs: Graphs,
    table: NDArray[np.float32],
    ranges: Mapping[str, Ranges],
    rounding: Rounding,
    allowed: float,
) -> None:
    plain = {part: fixed(graph, ROWS, SLOTS) for part, graph in graphs.items()}
    expected = logits(plain, table)
    found = logits(rounded(graphs, ranges, rounding), table)
    error = float(np.sqrt(((found - expected) ** 2).mean()) / expected.std())
    assert 0.0 < error < allowed


def test_a_graph_keeps_the_names_of_its_inputs_and_outputs(
    graphs: Graphs, ranges: Mapping[str, Ranges]
) -> None:
    for part, graph in rounded(graphs, ranges, Rounding(16, 8)).items():
        for before, after in (
            (graphs[part].graph.inputs, graph.graph.inputs),
            (graphs[part].graph.outputs, graph.graph.outputs),
        ):
            assert [value.name for value in before] == [value.name for value in after]


def test_keys_and_values_leave_on_the_grid_on_which_they_enter(
    graphs: Graphs, ranges: Mapping[str, Ranges]
) -> None:
    segment = rounded(graphs, ranges, Rounding(16, 8))["segment_1"].graph
    constants = {name: value.const_value for name, value in segment.initializers.items()}
    pairs = [
        (f"past_key_values.{n}.{kind}", f"present.{n}.{kind}") for n in (1, 2) for kind in ("key", "value")
    ]
    for past, present in pairs:
        for what in ("scale", "zero"):
            one, other = constants[f"{past}_{what}"], constants[f"{present}_{what}"]
            assert one is not None
            assert other is not None
            np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_a_context_run_in_other_batches_gives_the_same_logits(
    graphs: Graphs, table: NDArray[np.float32], ranges: Mapping[str, Ranges]
) -> None:
    """K and V pass through the host in between: rounding them a second time must change nothing."""
    rounding = Rounding(16, 8)
    wide, narrow = (rounded(graphs, ranges, rounding, rows) for rows in (SLOTS, 4))
    at_once, in_parts = logits(wide, table, SLOTS), logits(narrow, table, 4)
    # the provider computes in float32 between the roundings: a rare value falls to the other side of a step
    assert np.quantile(np.abs(at_once - in_parts), 0.99) < 2e-3 * at_once.std()


def test_the_mask_leaves_precision_for_the_scores(ranges: Mapping[str, Ranges]) -> None:
    mask = ranges["segment_0"]["mask"]
    assert MASKED / 10 < mask.low < -16.0
    assert mask.high == 0.0


def test_rows_out_of_sight_do_not_matter(
    graphs: Graphs, table: NDArray[np.float32], ranges: Mapping[str, Ranges]
) -> None:
    found = rounded(graphs, ranges, Rounding(16, 8))
    clean, littered = (Walk(found, table, ROWS, SLOTS) for _ in range(2))
    for past in littered._past.values():
        for name, kept in past.items():
            kept[:] = np.random.default_rng(2).uniform(-1, 1, kept.shape) * (0.1 if "key" in name else 1.0)
    one, other = clean.logits(TEXT[:ROWS]), littered.logits(TEXT[:ROWS])
    np.testing.assert_allclose(one, other, atol=5e-3 * one.std())
