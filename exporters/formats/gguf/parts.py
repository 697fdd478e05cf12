"""Reading and writing GGUF files tensor by tensor, raw: a quantised tensor is copied, never recomputed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from skipstone.errors import CheckpointError

RawArray = NDArray[Any]


@dataclass(frozen=True)
class MetaValue:
    """One key's value with its GGUF type (of the elements, for an array)."""

    value: Any
    type: gguf.GGUFValueType
    element_type: gguf.GGUFValueType | None = None


@dataclass(frozen=True)
class TensorPart:
    """One tensor to write.

    Attributes:
        name: GGUF name.
        shape: logical shape, rows first.
        type: ggml type.
        data: gives the raw rows: float arrays in logical shape, other types as uint8 [rows, bytes per row].
    """

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    data: Callable[[], RawArray]

    @property
    def num_bytes(self) -> int:
        """Size of the raw data."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape, dtype=np.int64)) // block * size

    @property
    def num_elements(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape, dtype=np.int64))


class GgufModel:
    """A GGUF file opened for reading; tensors stay memory-mapped.

    Raises:
        CheckpointError: not a GGUF file, truncated, or one of several shards.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{path}: not a readable GGUF file: {error}", hint="download or convert the file again"
            ) from error
        self.meta: dict[str, MetaValue] = {
            key: _meta_value(field) for key, field in reader.fields.items() if not key.startswith("GGUF.")
        }
        self.parts = {tensor.name: _part_of(tensor) for tensor in reader.tensors}
        self.offsets = {tensor.name: int(tensor.data_offset) for tensor in reader.tensors}
        if self.get("split.count", 1) != 1:
            raise CheckpointError(
                f"{path}: one of several shards", hint="merge them with llama.cpp's llama-gguf-split"
            )
        if "general.architecture" not in self.meta:
            raise CheckpointError(f"{path}: general.architecture not found", hint="convert the file again")
        self.arch = str(self.meta["general.architecture"].value)

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a full key."""
        found = self.meta.get(key)
        return default if found is None else found.value

    def fact(self, key: str, default: Any = None) -> Any:
        """Value of an architecture's key, `llama.block_count` by `block_count`.

        Raises:
            CheckpointError: it is missing and there is no default.
        """
        value = self.get(f"{self.arch}.{key}", default)
        if value is None:
            raise CheckpointError(f"{self.path}: {self.arch}.{key} not found", hint="convert the file again")
        return value

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return int(self.fact("block_count"))


def write_parts(path: Path, arch: str, meta: dict[str, MetaValue], parts: Iterable[TensorPart]) -> None:
    """Write a GGUF file, one tensor in memory at a time.

    Args:
        path: target.
        arch: `general.architecture`.
        meta: all other keys.
        parts: tensors in file order.
    """
    parts = list(parts)
    writer = gguf.GGUFWriter(path, arch)
    try:
        for key, entry in meta.items():
            if key != "general.architecture":
                writer.add_key_value(key, entry.value, entry.type, entry.element_type)
        for part in parts:
            dtype = np.dtype(
                np.float32
            )  # ignored beside raw_dtype, except that uint8 would change the shape's meaning
            writer.add_tensor_info(part.name, part.shape, dtype, part.num_bytes, raw_dtype=part.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for part in parts:
            writer.write_tensor_data(np.ascontiguousarray(part.data()))
    finally:
        writer.close()


def array_part(name: str, array: RawArray | list[float]) -> TensorPart:
    """A float32 array as a tensor."""
    data = np.ascontiguousarray(array, dtype=np.float32)
    return TensorPart(name, data.shape, gguf.GGMLQuantizationType.F32, lambda: data)


def zero_part(name: str, *shape: int) -> TensorPart:
    """A float32 tensor of zeros."""
    return TensorPart(name, shape, gguf.GGMLQuantizationType.F32, lambda: np.zeros(shape, np.float32))


def zero_matrix(
    name: str, rows: int, columns: int, kind: gguf.GGMLQuantizationType | None = None
) -> TensorPart:
    """A matrix of zeros; `kind` None: in the smallest type that its rows fit into, none of them rearranged for a matrix
    unit when loaded.
    """
    kinds = (gguf.GGMLQuantizationType.Q1_0, gguf.GGMLQuantizationType.Q5_0, gguf.GGMLQuantizationType.F16)
    if kind is None:
        kind = next(kind for kind in kinds if columns % gguf.GGML_QUANT_SIZES[kind][0] == 0)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    row_bytes = columns // block * size
    return TensorPart(name, (rows, columns), kind, lambda: np.zeros((rows, row_bytes), np.uint8))


def renamed(part: TensorPart, name: str) -> TensorPart:
    """The same tensor under another name."""
    return TensorPart(name, part.shape, part.type, part.data)


def with_rows(
    part: TensorPart, select: Callable[[RawArray], RawArray], num_rows: int | None = None
) -> TensorPart:
    """The tensor with its rows moved or selected."""
    rows = part.shape[0] if num_rows is None else num_rows
    return TensorPart(part.name, (rows, *part.shape[1:]), part.type, lambda: select(part.data()))


def uint32(value: int) -> MetaValue:
    """A uint32 value."""
    return MetaValue(value, gguf.GGUFValueType.UINT32)


def float32(value: float) -> MetaValue:
    """A float32 value."""
    return MetaValue(value, gguf.GGUFValueType.FLOAT32)


def string(value: str) -> MetaValue:
    """A string value."""
    return MetaValue(value, gguf.GGUFValueType.STRING)


def boolean(value: bool) -> MetaValue:
    """A bool value."""
    return MetaValue(value, gguf.GGUFValueType.BOOL)


def array(values: list[Any], element_type: gguf.GGUFValueType) -> MetaValue:
    """An array value."""
    return MetaValue(values, gguf.GGUFValueType.ARRAY, element_type)


def _meta_value(field: gguf.ReaderField) -> MetaValue:
    is_array = field.types[0] == gguf.GGUFValueType.ARRAY
    return MetaValue(field.contents(), field.types[0], field.types[-1] if is_array else None)


def _part_of(tensor: gguf.ReaderTensor) -> TensorPart:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return TensorPart(tensor.name, shape, tensor.tensor_type, lambda: np.asarray(tensor.data))
