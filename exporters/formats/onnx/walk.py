"""Running traced graphs on the CPU, one context at a time: to calibrate, and to compare compiled graphs with."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from skipstone.exporters.formats.onnx.modules import MASKED
from skipstone.runtimes.engines.onnxruntime.library import runtime

FloatArray = NDArray[np.float32]
Observer = Callable[[str, Mapping[str, NDArray[Any]]], None]


class Walk:
    """A model whose graphs have one fixed shape, run from the first position of a context on.

    Args:
        graphs: by part: `segment_0`, …, `head`, and perhaps `draft_head`.
        table: embeddings [vocabulary, hidden_size].
        rows: of the graphs' batches.
        slots: of the graphs' past.
        observe: given every part's name and all values of a call; None: nobody looks.
    """

    def __init__(
        self,
        graphs: Mapping[str, ir.Model],
        table: NDArray[np.floating[Any]],
        rows: int,
        slots: int,
        observe: Observer | None = None,
    ) -> None:
        self._table, self._rows, self._slots, self._observe = table, rows, slots, observe
        self._sessions = {part: _open(graph, every=observe is not None) for part, graph in graphs.items()}
        self._segments = sorted(
            (part for part in graphs if part.startswith("segment_")),
            key=lambda part: int(part.removeprefix("segment_")),
        )
        self.begin()

    def begin(self) -> None:
        """Forget the context."""
        self._length = 0
        self._past = {
            part: {
                value.name: np.zeros(value.shape, np.float32)
                for value in self._sessions[part].get_inputs()
                if value.name.startswith("past_")
            }
            for part in self._segments
        }

    def logits(self, tokens: Sequence[int]) -> FloatArray:
        """Continue the context by a batch; logits [n, vocabulary] behind each of its tokens."""
        count, length = len(tokens), self._length
        hidden = np.zeros((1, self._rows, self._table.shape[1]), np.float32)
        hidden[0, :count] = self._table[list(tokens)]
        positions = np.zeros((1, self._rows), np.int32)
        positions[0, :count] = range(length, length + count)
        inputs = {"positions": positions, "mask": self._mask(count)}
        for part in self._segments:
            past = self._past[part]
            found = self._call(part, {"hidden": hidden, **inputs, **past})
            hidden = found["hidden_out"]
            for name, kept in past.items():
                present = found[name.replace("past_key_values", "present")]
                kept[:, :, length : length + count] = present[:, :, :count]
            if part != self._segments[-1] and "draft_head" in self._sessions:
                self._call("draft_head", {"hidden": hidden})
        self._length += count
        return self._call("head", {"hidden": hidden})["logits"][0, :count]

    def head(self, part: str, hidden: FloatArray) -> FloatArray:
        """Logits of a head over hidden states [n, hidden_size], n ≤ rows."""
        batch = np.zeros((1, self._rows, hidden.shape[1]), np.float32)
        batch[0, : len(hidden)] = hidden
        return self._call(part, {"hidden": batch})["logits"][0, : len(hidden)]

    def _call(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, FloatArray]:
        session = self._sessions[part]
        names = [value.name for value in session.get_outputs()]
        found = dict(zip(names, session.run(names, dict(inputs)), strict=True))
        if self._observe is not None:
            self._observe(part, {**inputs, **found})
        return found

    def _mask(self, count: int) -> FloatArray:
        rows, slots = self._rows, self._slots
        mask = np.full((1, 1, rows, slots + rows), MASKED, np.float32)
        own = mask[0, 0, :, slots:]
        mask[0, 0, :count, : self._length] = 0.0
        own[:count, :count][np.tri(count, dtype=bool)] = 0.0
        own[range(rows), range(rows)] = 0.0  # rows that only fill the batch up see themselves
        return mask


def _open(graph: ir.Model, *, every: bool) -> Any:
    """A session; with `every`, all float values of the graph are outputs."""
    if every:
        graph = graph.clone()
        shown = set(graph.graph.outputs)
        made = [value for node in graph.graph for value in node.outputs if value not in shown]
        graph.graph.outputs.extend(value for value in made if value.dtype == ir.DataType.FLOAT)
    ort = runtime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if every:  # as it was traced: fused operators show no values in between
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory(prefix="skipstone-") as folder:
        file = Path(folder) / "graph.onnx"
        ir.save(graph, file, external_data="graph.onnx_data")  # a protobuf message holds 2 GiB at most
        return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
