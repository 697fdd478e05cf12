"""One ONNX graph, opened: what it takes and gives is compared with the manifest before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstone.errors import BundleError, EngineError, SkipstoneError
from skipstone.runtimes.engines.onnxruntime.library import first_line
from skipstone.runtimes.engines.onnxruntime.targets import open_session

_TYPES = {"tensor(float)": "float32", "tensor(int32)": "int32"}
ANY = -1


@dataclass(frozen=True)
class Array:
    """A tensor's type and shape; `ANY` stands for an axis of any size."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join('any' if size == ANY else str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a graph by name, in order."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


class Graph:
    """A session over one file.

    Args:
        path: the graph.
        target: what it was made for.
        threads: of the CPU's share.
        expected: what it must take and give.

    Raises:
        BundleError: it is damaged, or not the graph that the manifest means.
        EngineError: ONNX Runtime is missing or refuses it.
        DeviceError: the target is not here.
    """

    def __init__(self, path: Path, target: str, threads: int, expected: Signature) -> None:
        self._path = path
        if not path.is_file() or not path.stat().st_size:  # ONNX Runtime opens an empty file without a word
            raise BundleError(f"{path}: not an ONNX graph", hint="export the bundle again")
        try:
            self._session: Any = open_session(path, target, threads)
        except SkipstoneError:
            raise
        except Exception as error:  # ONNX Runtime's own classes, which have no common root of their own
            raise EngineError(
                f"{path}: ONNX Runtime cannot load it: {first_line(error)}",
                hint="the file is damaged, or made for another release; export the bundle again",
            ) from error
        self._check(expected)
        self._outputs = list(expected.outputs)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[np.float32]]:
        """Compute.

        Args:
            inputs: by name, contiguous.

        Returns:
            The outputs in order; the caller owns them.

        Raises:
            EngineError: ONNX Runtime refused, or the graph was closed.
        """
        if self._session is None:
            raise EngineError(f"{self._path}: called after its engine was closed")
        try:
            found: Sequence[NDArray[np.float32]] = self._session.run(self._outputs, inputs)
        except Exception as error:
            raise EngineError(f"{self._path}: it cannot be computed: {first_line(error)}") from error
        return found

    def close(self) -> None:
        """Free the weights. Idempotent."""
        self._session = None

    def _check(self, expected: Signature) -> None:
        pairs = (
            ("input", self._session.get_inputs(), expected.inputs),
            ("output", self._session.get_outputs(), expected.outputs),
        )
        for kind, present, wanted in pairs:
            found = {node.name: _array(node) for node in present}
            if found.keys() != wanted.keys():
                raise BundleError(
                    f"{self._path}: has the {kind}s {', '.join(found)}, by the manifest they were "
                    f"{', '.join(wanted)}",
                    hint="graph and manifest belong to different bundles; export or copy the bundle again",
                )
            for name, array in wanted.items():
                if found[name] != array:
                    raise BundleError(
                        f"{self._path}: {kind} {name} is {found[name]}, by the manifest it were {array}",
                        hint="graph and manifest belong to different bundles; export or copy the bundle again",
                    )


def _array(node: Any) -> Array:
    shape = tuple(size if isinstance(size, int) else ANY for size in node.shape)
    return Array(_TYPES.get(node.type, node.type), shape)
