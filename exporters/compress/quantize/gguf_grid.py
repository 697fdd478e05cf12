"""The blocks of GGUF: q8_0, q5_0, q5_1, q4_0, q4_1 of 32 weights, and q2_k … q6_k of 256.

A block holds its codes in planes of bits, and a scale: of the small blocks a float16, with another for the minimum; of
the large ones a small integer for every 16 or 32 weights, times a float16. The layouts are those of llama.cpp's
ggml-common.h, and gguf-py's `quants` reads them alike. llama.cpp's own search finds scales (`ggml_quantize_chunk`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import gguf
import torch
from torch import Tensor

from skipstone.errors import EngineError
from skipstone.exporters.compress.quantize.grid import Levels, Parts

_BLOCKS = "blocks"


@dataclass(frozen=True)
class Plane:
    """Some bits of every number of a list, packed: of every `width` bytes, byte j holds those of the numbers j,
    j + width, j + 2·width …, the first in its lowest bits.

    Attributes:
        offset: of the bytes in the block.
        size: bytes.
        bits: of each number.
        width: see above.
    """

    offset: int
    size: int
    bits: int
    width: int

    def read(self, blocks: Tensor) -> Tensor:
        """uint8 [n, bytes of a block] → int16 [n, numbers]."""
        given = blocks[:, self.offset : self.offset + self.size].to(torch.int16)
        apart = given.reshape(len(blocks), -1, 1, self.width) >> self._shifts
        return (apart & (1 << self.bits) - 1).reshape(len(blocks), -1)

    def write(self, blocks: Tensor, numbers: Tensor) -> None:
        """Put the low bits of int16 [n, numbers] into blocks."""
        apart = (numbers & (1 << self.bits) - 1).reshape(len(blocks), -1, 8 // self.bits, self.width)
        packed = (apart << self._shifts).sum(2).reshape(len(blocks), -1)
        blocks[:, self.offset : self.offset + self.size] = packed.to(torch.uint8)

    @property
    def _shifts(self) -> Tensor:
        return torch.arange(0, 8, self.bits, dtype=torch.int16).reshape(1, 1, -1, 1)


@dataclass(frozen=True)
class Multipliers:
    """The small integers of a large block: read and written as int16 [n, groups], minima's after scales'.

    Attributes:
        read: of blocks.
        write: into blocks.
        low: the smallest that fits.
        high: the largest.
    """

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor, Tensor], None]
    low: int
    high: int


@dataclass(frozen=True)
class GgufGrid:
    """A type of block; see `skipstone.exporters.compress.quantize.grid.Grid`.

    Attributes:
        name: of the type, in lower case.
        group: weights under one scale.
        low: the code that is stored as 0.
        high: the largest code.
        planes: bits of the codes, the lowest first.
        scale_at: offset of the scale's float16.
        minimum_at: of the minimum's; None: there is none.
        multipliers: of a large block.
        flip: bits of a stored code that are inverted (the sign of an int8).
    """

    name: str
    group: int
    low: int
    high: int
    planes: tuple[Plane, ...]
    scale_at: int
    minimum_at: int | None = None
    multipliers: Multipliers | None = None
    flip: int = 0

    @property
    def type(self) -> gguf.GGMLQuantizationType:
        """The number that ggml knows it by."""
        return gguf.GGMLQuantizationType[self.name.upper()]

    @property
    def block(self) -> int:
        return int(gguf.GGML_QUANT_SIZES[self.type][0])

    @property
    def has_minima(self) -> bool:
        return self.minimum_at is not None

    @property
    def _block_bytes(self) -> int:
        return int(gguf.GGML_QUANT_SIZES[self.type][1])

    def num_bytes(self, rows: int, columns: int) -> int:
        return rows * columns // self.block * self._block_bytes

    def fit(self, weight: Tensor, importance: Tensor | None) -> Parts:
        weight = weight.detach().float().contiguous()
        rows, columns = weight.shape
        blocks = torch.empty(rows, columns // self.block * self._block_bytes, dtype=torch.uint8)
        weighed = None if importance is None else importance.float().contiguous()
        written = _ggml().ggml_quantize_chunk(
            int(self.type), weight.data_ptr(), blocks.data_ptr(), 0, rows, columns,
            None if weighed is None else weighed.data_ptr(),
        )  # fmt: skip
        if written != blocks.numel():
            raise EngineError(f"{self.name}: llama.cpp wrote {written} bytes instead of {blocks.numel()}")
        return {_BLOCKS: blocks}

    def levels(self, parts: Parts) -> Levels:
        blocks = self._apart(parts)
        rows = len(parts[_BLOCKS])
        factors = [_float16(blocks, at) for at in (self.scale_at, self.minimum_at) if at is not None]
        if self.multipliers is not None:
            numbers = self.multipliers.read(blocks).float().chunk(len(factors), dim=1)
            factors = [factor * part for factor, part in zip(factors, numbers, strict=True)]
        scale, *rest = (factor.reshape(rows, -1) for factor in factors)
        minimum = rest[0] if rest else torch.zeros_like(scale)
        if self.multipliers is not None and rest:
            minimum = -minimum  # large blocks store how far it lies below zero
        return Levels(scale, minimum, max(self.low, -127), self.high)

    def codes(self, parts: Parts) -> Tensor:
        blocks, shift = self._apart(parts), 0
        found = torch.zeros(len(blocks), self.block, dtype=torch.int16)
        for plane in self.planes:
            found |= plane.read(blocks) << shift
            shift += plane.bits
        return ((found ^ self.flip) + self.low).reshape(len(parts[_BLOCKS]), -1)

    def with_codes(self, parts: Parts, codes: Tensor) -> Parts:
        blocks = self._apart(parts).clone()
        left = (codes.to(torch.int16).reshape(len(blocks), -1) - self.low) ^ self.flip
        for plane in self.planes:
            plane.write(blocks, left)
            left = left >> plane.bits
        return {_BLOCKS: blocks.reshape(parts[_BLOCKS].shape)}

    def with_levels(self, levels: Levels, columns: int) -> Parts:
        rows = len(levels.scale)
        blocks = torch.zeros(rows * (columns // self.block), self._block_bytes, dtype=torch.uint8)
        wanted = [(self.scale_at, levels.scale)]
        if self.minimum_at is not None:
            wanted.append((self.minimum_at, levels.minimum if self.multipliers is None else -levels.minimum))
        numbers = []
        for at, level in wanted:
            values = level.reshape(len(blocks), -1)
            if self.multipliers is None:
                _put_float16(blocks, at, values)
                continue
            # The magnitudes' largest gets the largest integer.
            factor = (values.abs().amax(1, keepdim=True) / self.multipliers.high).half().float()
            _put_float16(blocks, at, factor)
            steps = torch.where(factor == 0.0, 0.0, values / torch.where(factor == 0.0, 1.0, factor))
            numbers.append(steps.round().clamp(self.multipliers.low, self.multipliers.high).to(torch.int16))
        if self.multipliers is not None:
            self.multipliers.write(blocks, torch.cat(numbers, dim=1))
        parts = {_BLOCKS: blocks.reshape(rows, -1)}
        return self.with_codes(parts, torch.full((rows, columns), max(self.low, 0), dtype=torch.int16))

    def _apart(self, parts: Parts) -> Tensor:
        """The blocks one by one, uint8 [n, bytes]."""
        return parts[_BLOCKS].reshape(-1, self._block_bytes)


def blocks_of(parts: Parts) -> Tensor:
    """What is stored, uint8 [rows, bytes of a row]."""
    return parts[_BLOCKS]


def _float16(blocks: Tensor, at: int) -> Tensor:
    """A float16 of every block, as float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _put_float16(blocks: Tensor, at: int, values: Tensor) -> None:
    blocks[:, at : at + 2] = values.half().view(torch.uint8)


def _in_plane(plane: Plane) -> Multipliers:
    """Unsigned multipliers in one plane."""
    return Multipliers(plane.read, plane.write, 0, (1 << plane.bits) - 1)


def _signed_6_bits(low_bits: Plane, high_bits: Plane) -> Multipliers:
    """Multipliers of 6 bits in two planes, 32 being zero."""

    def read(blocks: Tensor) -> Tensor:
        return (low_bits.read(blocks) | high_bits.read(blocks) << low_bits.bits) - 32

    def write(blocks: Tensor, numbers: Tensor) -> None:
        low_bits.write(blocks, numbers + 32)
        high_bits.write(blocks, numbers + 32 >> low_bits.bits)

    return Multipliers(read, write, -32, 31)


def _signed_8_bits(plane: Plane) -> Multipliers:
    return Multipliers(lambda blocks: (plane.read(blocks) ^ 128) - 128, plane.write, -128, 127)


def _sixes(offset: int) -> Multipliers:
    """Eight scales and eight minima of 6 bits in 12 bytes: four bytes of scales, four of minima, and four that hold the
    low halves of the last four of each, whose upper two bits lie on top of the first eight bytes.
    """

    def read(blocks: Tensor) -> Tensor:
        given = blocks[:, offset : offset + 12].to(torch.int16)
        first, last = given[:, :8], given[:, 8:]
        halves = torch.cat([last & 15, last >> 4], dim=1) | (first >> 6) << 4
        scale, minimum = ((first & 63)[:, part] for part in (slice(0, 4), slice(4, 8)))
        return torch.cat([scale, halves[:, :4], minimum, halves[:, 4:]], dim=1)

    def write(blocks: Tensor, numbers: Tensor) -> None:
        scale, more_scales, minimum, more_minima = numbers.chunk(4, dim=1)
        upper = torch.cat([more_scales, more_minima], dim=1) >> 4
        first = torch.cat([scale, minimum], dim=1) | upper << 6
        last = (more_scales & 15) | (more_minima & 15) << 4
        blocks[:, offset : offset + 12] = torch.cat([first, last], dim=1).to(torch.uint8)

    return Multipliers(read, write, 0, 63)


GRIDS = {
    grid.name: grid
    for grid in (
        GgufGrid("q8_0", 32, -128, 127, (Plane(2, 32, 8, 32),), 0, flip=128),
        GgufGrid("q5_0", 32, -16, 15, (Plane(6, 16, 4, 16), Plane(2, 4, 1, 1)), 0),
        GgufGrid("q5_1", 32, 0, 31, (Plane(8, 16, 4, 16), Plane(4, 4, 1, 1)), 0, 2),
        GgufGrid("q4_0", 32, -8, 7, (Plane(2, 16, 4, 16),), 0),
        GgufGrid("q4_1", 32, 0, 15, (Plane(4, 16, 4, 16),), 0, 2),
        GgufGrid("q2_k", 16, 0, 3, (Plane(16, 64, 2, 32),), 80, 82, _in_plane(Plane(0, 16, 4, 16))),
        GgufGrid(
            "q3_k", 16, -4, 3, (Plane(32, 64, 2, 32), Plane(0, 32, 1, 32)), 108, None,
            _signed_6_bits(Plane(96, 8, 4, 8), Plane(104, 4, 2, 4)),
        ),
        GgufGrid("q4_k", 32, 0, 15, (Plane(16, 128, 4, 32),), 0, 2, _sixes(4)),
        GgufGrid("q5_k", 32, 0, 31, (Plane(48, 128, 4, 32), Plane(16, 32, 1, 32)), 0, 2, _sixes(4)),
        GgufGrid(
            "q6_k", 16, -32, 31, (Plane(0, 128, 4, 64), Plane(128, 64, 2, 32)), 208, None,
            _signed_8_bits(Plane(192, 16, 8, 16)),
        ),
    )
}  # fmt: skip


@lru_cache(maxsize=1)
def _ggml() -> Any:
    """llama.cpp's library, its quantiser declared."""
    import llama_cpp

    library = llama_cpp.llama_cpp._lib
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    return library
