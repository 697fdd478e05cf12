"""The parts of a bundle: for each, its graphs by the number of rows they take."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import Bundle, OnnxManifest
from skipstone.errors import EngineError
from skipstone.runtimes.engines.onnxruntime.graph import ANY, Graph
from skipstone.runtimes.engines.onnxruntime.signature import longest, signature

FloatArray = NDArray[np.float32]


class Part:
    """One part of the model.

    Args:
        name: `segment_0`, …, `head`, `draft_head`, `encoder_0`, … or `cross`.
        graphs: by width, ascending; the single one of a part that takes any number of rows is under `ANY`.
        max_width: rows at most.
    """

    def __init__(self, name: str, graphs: Mapping[int, Graph], max_width: int) -> None:
        self._name, self._graphs, self._max_width = name, graphs, max_width
        fixed = [width for width in graphs if width != ANY]
        self._widths = [next((w for w in fixed if w >= n), n) for n in range(max_width + 1)]

    def width(self, count: int) -> int:
        """The least number of rows that as many can be run in.

        Raises:
            EngineError: the part takes no so wide a batch.
        """
        if not 1 <= count <= self._max_width:
            raise EngineError(f"{self._name}: {count} rows, the graphs take 1 to {self._max_width}")
        return self._widths[count]

    def run(self, width: int, inputs: Mapping[str, NDArray[Any]]) -> Sequence[FloatArray]:
        """Compute a batch of a width from `width`; see `Graph.run`."""
        graph = self._graphs.get(width) or self._graphs[ANY]
        return graph.run(inputs)

    def close(self) -> None:
        """Free the weights. Idempotent."""
        for graph in self._graphs.values():
            graph.close()


def open_parts(
    bundle: Bundle, manifest: OnnxManifest, names: Collection[str], draft_rows: int, threads: int
) -> dict[str, Part]:
    """Open parts of a bundle.

    Args:
        bundle: opened.
        manifest: its manifest.
        names: of the parts.
        draft_rows: tokens in its draft vocabulary.
        threads: of the CPU's share.

    Raises:
        BundleError: a graph that is damaged, or not what the manifest means.
        EngineError: ONNX Runtime is missing or refuses one.
        DeviceError: the target is not here.
    """
    entry, parts = manifest.graphs, {}
    for name in names:
        graphs = {}
        for graph in entry.of(name):
            expected = signature(manifest, name, graph.width, draft_rows)
            graphs[graph.width or ANY] = Graph(bundle.file(graph.file), entry.target, threads, expected)
        parts[name] = Part(name, graphs, longest(manifest, name))
    return parts
