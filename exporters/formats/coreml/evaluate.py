"""Computing a Core ML package without Core ML: its own operators, one after the other, in numpy.

Core ML runs on Apple's systems alone. This reads the package as they would, every weight and constant as it lies in the
file, and rounds every value to float16 where it is made, as the Neural Engine keeps it. What it cannot tell is how
Apple's compilers order the sums, and how long they take.

    run = Package(Path("model.mlpackage"))
    run.call("head_4", {"hidden": hidden}, {})["logits"]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstone.errors import ExportError
from skipstone.runtimes.quiet import quiet_libraries

Array = NDArray[Any]
FloatArray = NDArray[np.float32]


class Package:
    """A package whose functions can be called.

    Args:
        path: the package's folder.
    """

    def __init__(self, path: Path) -> None:
        with quiet_libraries():
            from coremltools.converters.mil.frontend.milproto.load import load
            from coremltools.models.utils import load_spec

            spec = load_spec(str(path))
            weights = path / "Data" / "com.apple.CoreML" / "weights"
            program = load(
                model_spec=spec,
                specification_version=spec.specificationVersion,
                file_weights_dir=str(weights) + "/",
            )
        self._functions: dict[str, Any] = program.functions
        self._packed: dict[tuple[str, str], FloatArray] = {}

    def states(self, function: str) -> dict[str, FloatArray]:
        """The states that a function declares, all zero."""
        inputs = self._functions[function].inputs
        return {
            name: np.zeros(variable.shape, np.float32)
            for name, variable in inputs.items()
            if "state" in str(variable.sym_type)
        }

    def call(
        self, function: str, inputs: Mapping[str, Array], states: dict[str, FloatArray]
    ) -> dict[str, FloatArray]:
        """Run a function; `states` are changed in place.

        Raises:
            ExportError: an operator that is not known here.
        """
        known: dict[str, Any] = {name: _half(value) for name, value in inputs.items()}
        body = self._functions[function]
        for operation in body.operations:
            kind = operation.op_type
            if kind == "const":
                continue
            given: dict[str, Any] = {
                name: [_value(each, known) for each in held]
                if isinstance(held, (list, tuple))
                else _value(held, known)
                for name, held in operation.inputs.items()
                if name not in ("input", "state")
            }
            made = operation.outputs[0].name
            if kind == "read_state":
                known[made] = states[operation.inputs["input"].name]
            elif kind == "coreml_update_state":
                states[operation.inputs["state"].name] = known[made] = given["value"]
            elif kind == "constexpr_blockwise_shift_scale":
                known[made] = self._unpacked(function, made, given)
            else:
                known[made] = _half(_operator(function, kind)(**given))
        return {output.name: known[output.name] for output in body.outputs}

    def _unpacked(self, function: str, name: str, given: dict[str, Any]) -> FloatArray:
        key = function, name
        if key not in self._packed:
            self._packed[key] = _half(_blockwise(**given))
        return self._packed[key]


def _value(variable: Any, known: Mapping[str, Any]) -> Any:
    """An operand: what was computed, or a constant."""
    if variable.name in known:
        return known[variable.name]
    constant = variable.val
    return _half(constant) if isinstance(constant, np.ndarray) and constant.dtype.kind == "f" else constant


def _half(value: Any) -> Any:
    """Floats rounded to float16 and held as float32; everything else as it is."""
    array = np.asarray(value)
    if array.dtype.kind != "f":
        return array
    with np.errstate(over="ignore"):
        return array.astype(np.float16).astype(np.float32)


def _operator(function: str, kind: str) -> Callable[..., Array]:
    found = _OPERATORS.get(kind)
    if found is None:
        raise ExportError(
            f"{function}: the operator {kind} of Core ML cannot be checked here",
            hint="use another --device for this architecture",
        )
    return found


def _blockwise(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """(data - offset) · scale, a scale for each block."""
    values = np.asarray(data, np.float32)
    for axis, blocks in enumerate(scale.shape):
        scale = np.repeat(scale, values.shape[axis] // blocks, axis)
    if offset is not None:
        raise ExportError("packed weights with offsets cannot be checked here")
    return np.asarray(values * scale, np.float32)


def _linear(x: Array, weight: Array, bias: Array | float = 0.0) -> Array:
    return np.asarray(x @ weight.T + bias)


def _matmul(x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False) -> Array:
    left, right = (
        np.swapaxes(a, -1, -2) if turned else a for a, turned in ((x, transpose_x), (y, transpose_y))
    )
    return np.asarray(left @ right)


def _slice(
    x: Array,
    begin: Array,
    end: Array,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    **_: Any,
) -> Array:
    def bound(values: Array, masked: Array | None, axis: int) -> int | None:
        return None if masked is not None and masked[axis] else int(values[axis])

    cuts = (slice(bound(begin, begin_mask, axis), bound(end, end_mask, axis)) for axis in range(x.ndim))
    return np.asarray(x[tuple(cuts)])


def _select(cond: Array, a: Array, b: Array) -> Array:
    return np.asarray(np.where(cond, a, b))


def _softmax(x: Array, axis: int) -> Array:
    raised = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(raised / raised.sum(axis, keepdims=True))


def _cast(x: Array, dtype: str) -> Array:
    return x.astype({"fp16": np.float32, "fp32": np.float32, "bool": np.bool_}.get(dtype, np.int64))


_OPERATORS: dict[str, Callable[..., Array]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y,
    "pow": lambda x, y: x**y,
    "maximum": np.maximum,
    "greater_equal": lambda x, y: x >= y,
    "select": _select,
    "cast": _cast,
    "reshape": lambda x, shape: x.reshape(shape),
    "transpose": lambda x, perm: x.transpose(perm),
    "expand_dims": lambda x, axes: np.expand_dims(x, tuple(int(axis) for axis in axes)),
    "squeeze": lambda x, axes: np.squeeze(x, tuple(int(axis) for axis in axes)),
    "concat": lambda values, axis, interleave=False: np.concatenate(values, int(axis)),
    "slice_by_index": _slice,
    "gather": lambda x, indices, axis=0, **_: np.take(x, indices.astype(np.int64), int(axis)),
    "linear": _linear,
    "matmul": _matmul,
    "softmax": _softmax,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(tuple(axes), keepdims=bool(keep_dims)),
    "reduce_sum": lambda x, axes, keep_dims: x.sum(tuple(axes), keepdims=bool(keep_dims)),
    "rsqrt": lambda x, epsilon=0.0: 1 / np.sqrt(x + epsilon),
}
