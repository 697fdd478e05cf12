"""Computing an Ethos-U program without the NPU: its TOSA graph on TOSA's reference model, integer for integer.

What lies around the NPU's part, rounding its inputs and turning its outputs back into floats, is done in numpy.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstone.errors import ExportError
from skipstone.exporters.formats.ethosu.lowering import Lowered, Step
from skipstone.exporters.formats.ethosu.tools import quiet_tools, tool

Array = NDArray[Any]


class ReferenceProgram:
    """A program that can be called.

    Args:
        name: for messages.
        lowered: the program.
    """

    def __init__(self, name: str, lowered: Lowered) -> None:
        self._name, self._tosa, self._around = name, lowered.tosa, lowered.around
        self._inputs = tosa_inputs(lowered.tosa)

    def __call__(self, inputs: Sequence[Array]) -> list[Array]:
        """Outputs of a call, in the graph's order.

        Raises:
            ExportError: the reference model refuses the graph.
        """
        known: dict[str, Any] = dict(zip(self._around.inputs, inputs, strict=True))
        for step in self._around.steps:
            known[step.name] = self._value(step, known)
        return [known[name] for name in self._around.outputs]

    def _value(self, step: Step, known: dict[str, Any]) -> Any:
        if "executorch_call_delegate" in step.operator:
            return self._run({name: known[name] for name in step.inputs})
        value = known[step.inputs[0]]
        if "dequantize_per_tensor" in step.operator:
            scale, zero = step.constants[:2]
            return (value.astype(np.float32) - np.float32(zero)) * np.float32(scale)
        if "quantize_per_tensor" in step.operator:
            scale, zero, least, most = step.constants[:4]
            rounded = np.rint(value * np.float32(1 / scale)) + zero
            return np.clip(rounded, least, most).astype(np.int8 if most < 128 else np.int16)
        return value[step.constants[0]]

    def _run(self, inputs: dict[str, Array]) -> list[Array]:
        model = tool("tosa_reference_model")
        ordered = [np.ascontiguousarray(inputs[name]) for name in self._inputs]
        with quiet_tools(io.StringIO()):
            outputs, status = model.run(
                self._tosa, ordered, verbosity="LOW", initialize_variable_tensor_from_numpy=True
            )
        if status != model.GraphStatus.TOSA_VALID:
            raise ExportError(f"{self._name}: TOSA's reference model does not take the graph: {status}")
        return list(outputs)


def tosa_inputs(graph: bytes) -> list[str]:
    """Names of a TOSA graph's inputs."""
    block = tool("tosa.TosaGraph").TosaGraph.GetRootAs(graph, 0).Regions(0).Blocks(0)
    return [block.Inputs(index).decode() for index in range(block.InputsLength())]
