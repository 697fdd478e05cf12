"""Levels of a layer: the storage layout of its weights. What it costs is their bytes, scales included.

The embedding and the head have one level, what the scheme says: they are rounded while candidates are judged, and their
bytes count, but there is nothing to choose.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from skipstone.exporters.compress.activations import Block, stacks_of, walk
from skipstone.exporters.compress.folder import measure_size
from skipstone.exporters.compress.quantize import open_quantizer
from skipstone.exporters.compress.quantize.grid import grid_of
from skipstone.exporters.compress.quantize.plan import format_of, layouts, table_names
from skipstone.exporters.compress.quantize.step import Quantize
from skipstone.exporters.compress.search.levels import Level, Unit, keep_level

if TYPE_CHECKING:
    from skipstone.exporters.compress.search.step import Search
    from skipstone.exporters.compress.steps import Step
    from skipstone.exporters.compress.work import Work

_SUPER_BLOCK = 256  # columns that the k layouts need
_DEFAULTS = {
    "k": ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0"),
    "gguf": ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"),
    "executorch": ("8da4w", "8da8w"),
}
_METHOD = "rtn"


@torch.no_grad()
def make_units(model: Any, work: Work, search: Search, folder: Path) -> tuple[tuple[Unit, ...], float]:
    """See `Ways`: one unit per layer, each level quantised by itself, behind layers that are as they were."""
    size = measure_size(model, work)
    scheme = str(search.scheme)
    width = float(torch.float32.itemsize)  # a folder keeps what has no codes so, beside some that have
    base = layouts(model, scheme, {})
    everywhere = [_place(f"{stack.name}.{n}") for stack in stacks_of(model) for n in range(len(stack.blocks))]
    by_label = {
        label: layouts(model, scheme, dict.fromkeys(everywhere, label))
        for label in search.levels or _defaults(model, scheme)
    }
    units, left = _tables(model, base, folder), float(size.parameters)
    for unit in units:
        left -= model.get_parameter(unit.name).numel()
    for block in walk(model, work.calibration.windows, work.calibration.sources):
        work.progress(f"levels of {block.name}", len(units), 0)
        costs = {}
        for label, layout in by_label.items():
            weights = _quantized(block, layout, search)
            keep_level(folder, block.name, label, weights)
            costs[label] = _bytes(weights, layout, width)
        levels = (
            Level(label=label, cost=costs[label]) for label in sorted(costs, key=lambda one: costs[one])
        )
        units.append(Unit(name=block.name, levels=tuple(levels)))
        left -= sum(linear.weight.numel() for linear in block.linears.values())
    return tuple(units), width * left


def as_step(chosen: Mapping[str, Level], search: Search) -> tuple[Step, ...]:
    """See `Ways`: one step that knows every layer's layout."""
    mix = {_place(name): level.label for name, level in chosen.items() if name.rpartition(".")[2].isdigit()}
    return (Quantize(scheme=search.scheme, method=search.method or _METHOD, mix=mix),)


def _tables(model: Any, layout: Mapping[str, str], folder: Path) -> list[Unit]:
    """The embedding and the head, a unit each with nothing to choose; none where they stay as they are."""
    units = []
    for name in table_names(model).values():
        if name in layout:
            weight, grid = model.get_parameter(name), grid_of(layout[name])
            parts = grid.fit(weight, None)
            keep_level(folder, name, grid.name, {name: grid.levels(parts).values(grid.codes(parts))})
            cost = float(grid.num_bytes(*weight.shape))
            units.append(Unit(name=name, levels=(Level(label=grid.name, cost=cost),)))
    return units


def _quantized(block: Block, layout: Mapping[str, str], search: Search) -> dict[str, Tensor]:
    """A block's weights by their names in the model, as their codes have them."""
    quantize, found = open_quantizer(search.method or _METHOD), {}
    for part, linear in block.linears.items():
        weight, name = linear.weight.detach(), f"{block.name}.{part}.weight"
        if name in layout:
            grid = grid_of(layout[name])
            parts = quantize(weight, block.inputs[part], grid)
            weight = grid.levels(parts).values(grid.codes(parts))
        found[name] = weight
    return found


def _bytes(weights: Mapping[str, Tensor], layout: Mapping[str, str], width: float) -> float:
    """Of weights in their layouts, or at so many bytes each where they have none."""
    return sum(
        grid_of(layout[name]).num_bytes(*weight.shape) if name in layout else width * weight.numel()
        for name, weight in weights.items()
    )


def _defaults(model: Any, scheme: str) -> tuple[str, ...]:
    """Layouts that every layer's weights fit."""
    if format_of(scheme) == "executorch":
        return _DEFAULTS["executorch"]
    columns = {
        part.weight.shape[1]
        for stack in stacks_of(model)
        for part in stack.blocks.modules()
        if isinstance(part, nn.Linear)
    }
    return _DEFAULTS["gguf" if any(count % _SUPER_BLOCK for count in columns) else "k"]


def _place(name: str) -> str:
    """A layer as `mix` names it."""
    stack, _, number = name.rpartition(".")
    return f"encoder.{number}" if stack.startswith("encoder") else number
