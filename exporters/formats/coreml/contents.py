"""What a Core ML package holds, read out of its description: operators, states, and where every weight lies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipstone.errors import ExportError
from skipstone.runtimes.quiet import quiet_libraries

IOS_18 = 9  # Core ML's specification version
OPERATORS = "CoreML8"  # the set of operators of iOS 18
_BLOCK = 64  # bytes that the file of weights is aligned to
PACKED = "constexpr_blockwise_shift_scale"  # integers that stand for float16 weights


@dataclass(frozen=True)
class Function:
    """One function of a package.

    Attributes:
        operators: how many there are of each, constants left out.
        operator_set: version that they are of.
        states: shape of every state by name.
        weights: bytes of every weight by the offset in the package's file of weights.
    """

    operators: Mapping[str, int]
    operator_set: str
    states: Mapping[str, tuple[int, ...]]
    weights: Mapping[int, int]

    @property
    def weight_bytes(self) -> int:
        """Of all its weights."""
        return sum(self.weights.values())


@dataclass(frozen=True)
class Contents:
    """A package.

    Attributes:
        specification: Core ML's number of its version.
        functions: by name.
        file_bytes: of the file of weights.
    """

    specification: int
    functions: Mapping[str, Function]
    file_bytes: int

    @property
    def _stored(self) -> dict[int, int]:
        return {at: size for each in self.functions.values() for at, size in each.weights.items()}

    @property
    def stored_bytes(self) -> int:
        """Of all weights, each counted once."""
        return sum(self._stored.values())

    @property
    def expected_bytes(self) -> int:
        """Of a file that holds every weight once: a header, and one before each weight; weights fill whole blocks."""
        return _BLOCK + sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for size in self._stored.values())


def read_contents(package: Path) -> Contents:
    """Read a package's description.

    Raises:
        ExportError: it is none.
    """
    with quiet_libraries():
        from coremltools.models.utils import load_spec

        try:
            spec = load_spec(str(package))
        except Exception as error:  # coremltools raises what its parsers raise
            raise ExportError(f"{package.name}: not a readable Core ML package: {error}") from error
    states = {
        each.name: {state.name: tuple(state.type.stateType.arrayType.shape) for state in each.state}
        for each in spec.description.functions
    }
    functions = {}
    for name, function in spec.mlProgram.functions.items():
        operations = function.block_specializations[function.opset].operations
        functions[name] = Function(
            operators=Counter(each.type for each in operations if each.type != "const"),
            operator_set=function.opset,
            states=states.get(name, {}),
            weights=_weights(operations),
        )
    return Contents(spec.specificationVersion, functions, weights_file(package).stat().st_size)


def weights_file(package: Path) -> Path:
    """Where a package keeps its weights."""
    return package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"


def check_contents(
    contents: Contents, parts: Mapping[str, tuple[str, ...]], alone: Mapping[str, int], *, packed: bool
) -> None:
    """Refuse a package that is not what it was meant to be.

    Args:
        contents: of the package.
        parts: names of the functions of each part.
        alone: bytes of the file of weights that each function needs by itself.
        packed: whether the weights of linear layers are integers.

    Raises:
        ExportError: another version or set of operators than iOS 18's, functions that lack or are too many, those of one
            part with weights or states of their own, a linear layer whose weights are not packed, or a file of weights
            that holds what no function reads, or is larger than one function of each part needs.
    """
    expected = {name for names in parts.values() for name in names}
    problems = []
    if contents.specification != IOS_18:
        problems.append(f"specification {contents.specification}, {IOS_18} was expected")
    if contents.functions.keys() != expected:
        problems.append(
            f"functions {', '.join(sorted(contents.functions))} in place of {', '.join(sorted(expected))}"
        )
    else:
        problems += [text for names in parts.values() for text in _unlike(contents, names)]
    for name, function in contents.functions.items():
        if function.operator_set != OPERATORS:
            problems.append(f"{name} has operators of {function.operator_set}, not of {OPERATORS}")
        linear, integers = (function.operators.get(kind, 0) for kind in ("linear", PACKED))
        if integers != (linear if packed else 0):
            problems.append(f"{name} has {integers} packed weights for {linear} linear layers")
    if contents.file_bytes != contents.expected_bytes:
        problems.append(
            f"the file of weights has {contents.file_bytes} bytes, those that the functions read take "
            f"{contents.expected_bytes}"
        )
    enough = sum(max(alone[name] for name in names) for names in parts.values())
    if contents.file_bytes > enough:
        problems.append(
            f"the file of weights has {contents.file_bytes} bytes, {enough} are enough for one function of each part"
        )
    if problems:
        raise ExportError(f"the Core ML package is not as planned: {'; '.join(problems)}")


def _unlike(contents: Contents, names: tuple[str, ...]) -> list[str]:
    """Functions of one part that do not share everything with the first one."""
    first, *others = (contents.functions[name] for name in names)
    return [
        f"{name} and {names[0]} do not share their weights and states"
        for name, other in zip(names[1:], others, strict=True)
        if (other.weights, other.states) != (first.weights, first.states)
    ]


def _weights(operations: Iterable[Any]) -> dict[int, int]:
    """Bytes by offset of all that lies in the file of weights: constants, and what packed weights are made of."""
    values = (
        value
        for operation in operations
        for value in (
            *operation.attributes.values(),
            *(given.value for held in operation.inputs.values() for given in held.arguments),
        )
        if value.WhichOneof("value") == "blobFileValue"
    )
    return {value.blobFileValue.offset: _bytes(value.type.tensorType) for value in values}


def _bytes(tensor: Any) -> int:
    count = math.prod(int(dimension.constant.size) for dimension in tensor.dimensions)
    return -(-count * _BITS[_type_name(tensor.dataType)] // 8)


_BITS = {"FLOAT16": 16, "FLOAT32": 32, "INT8": 8, "UINT8": 8, "INT4": 4, "UINT4": 4, "INT32": 32, "BOOL": 8}


def _type_name(number: int) -> str:
    from coremltools.proto import MIL_pb2

    return str(MIL_pb2.DataType.Name(number))
