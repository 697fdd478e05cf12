"""Storage layouts of quantised weights, as algorithms see them: codes, and what the codes stand for.

A weight [rows, columns] is stored as integer codes with a scale, and in some layouts a minimum, for every few columns of
a row: value = scale · code + minimum. A grid reads codes and levels out of what is stored and puts other codes in,
the levels kept, so that any way to choose codes works on any layout.

    >>> grid = grid_of("q4_k")
    >>> parts = grid.fit(weight, importance)           # levels by the layout's own search
    >>> levels = grid.levels(parts)
    >>> parts = grid.with_codes(parts, levels.nearest(weight))
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from skipstone.errors import UsageError
from skipstone.exporters.compress.work import Codes

Parts: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Levels:
    """What codes stand for.

    Attributes:
        scale: float32 [rows, groups]; may be negative or zero.
        minimum: likewise, what code 0 stands for; zeros in layouts without.
        low: the smallest code.
        high: the largest code.
    """

    scale: Tensor
    minimum: Tensor
    low: int
    high: int

    def nearest(self, weight: Tensor) -> Tensor:
        """The codes nearest to a weight [rows, columns]: int16, likewise."""
        scale, minimum = (_by_column(x, weight.shape[1]) for x in (self.scale, self.minimum))
        return self.nearest_of(weight, scale, minimum)

    def nearest_of(self, weight: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
        """The codes nearest to values whose scales and minima are given one by one; all of one shape."""
        steps = torch.where(scale == 0.0, 0.0, (weight - minimum) / torch.where(scale == 0.0, 1.0, scale))
        return steps.round().clamp(self.low, self.high).to(torch.int16)

    def values(self, codes: Tensor) -> Tensor:
        """What codes [rows, columns] stand for, float32."""
        scale, minimum = (_by_column(x, codes.shape[1]) for x in (self.scale, self.minimum))
        return codes * scale + minimum

    def by_column(self, columns: int) -> tuple[Tensor, Tensor]:
        """Scale and minimum of every weight, float32 [rows, columns]."""
        return _by_column(self.scale, columns), _by_column(self.minimum, columns)


def _by_column(levels: Tensor, columns: int) -> Tensor:
    return levels.repeat_interleave(columns // levels.shape[1], dim=1)


class Grid(Protocol):
    """A storage layout.

    Attributes:
        name: what recipes and records call it.
        block: a row's columns must be a multiple of it; 1: any number.
        has_minima: whether codes start at a minimum of their own.
    """

    @property
    def name(self) -> str: ...

    @property
    def block(self) -> int: ...

    @property
    def has_minima(self) -> bool: ...

    def num_bytes(self, rows: int, columns: int) -> int:
        """Of a weight of that shape on the device."""

    def fit(self, weight: Tensor, importance: Tensor | None) -> Parts:
        """A weight stored with levels by the layout's own search, and the codes that this found.

        Args:
            weight: float32 [rows, columns].
            importance: how much an error in each column counts, float32 [columns]; None: all alike.
        """

    def levels(self, parts: Parts) -> Levels:
        """What codes stand for."""

    def codes(self, parts: Parts) -> Tensor:
        """The codes, int16 [rows, columns]."""

    def with_codes(self, parts: Parts, codes: Tensor) -> Parts:
        """The same levels with other codes."""

    def with_levels(self, levels: Levels, columns: int) -> Parts:
        """The storable levels next to these, all codes the smallest in magnitude."""


# By prefix of the name: the module whose `grid` makes them.
_MADE_BY = {
    "q": "skipstone.exporters.compress.quantize.gguf_grid",
    "int": "skipstone.exporters.compress.quantize.int_grid",
}


def grid_of(name: str) -> Grid:
    """The grid of a name.

    Raises:
        UsageError: no such grid; lists them.
    """
    module = next((module for prefix, module in _MADE_BY.items() if name.startswith(prefix)), None)
    grids: Mapping[str, Grid] = {} if module is None else importlib.import_module(module).GRIDS
    if name not in grids:
        known = [grid for made_by in _MADE_BY.values() for grid in importlib.import_module(made_by).GRIDS]
        raise UsageError(f"{name}: no such storage layout", hint=f"one of {', '.join(known)}")
    return grids[name]


def stored(grid: Grid, parts: Parts) -> Codes:
    """Parts as a run keeps them."""
    return Codes(grid.name, parts, grid.num_bytes(*grid.codes(parts).shape))


def dequantized(codes: Codes) -> Tensor:
    """What stored codes stand for, float32 [rows, columns]."""
    grid = grid_of(codes.grid)
    return grid.levels(codes.parts).values(grid.codes(codes.parts))
