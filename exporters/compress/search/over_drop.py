"""Levels of a layer: there, or left out. Cheap to search, and faster on every device."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipstone.exporters.compress.activations import stacks_of
from skipstone.exporters.compress.depth import DropLayers
from skipstone.exporters.compress.search.costs import block_bytes, block_times
from skipstone.exporters.compress.search.levels import Level, Unit

if TYPE_CHECKING:
    from skipstone.exporters.compress.search.step import Search
    from skipstone.exporters.compress.steps import Step
    from skipstone.exporters.compress.work import Work

_LAYER = re.compile(r"(.+)\.(\d+)")
_KEPT, _DROPPED = "kept", "dropped"


def make_units(model: Any, work: Work, search: Search, _: Path) -> tuple[tuple[Unit, ...], float]:
    """See `Ways`: one unit per layer; for a speed, of an encoder-decoder's decoder alone."""
    if search.counts == "time":
        costs, fixed = block_times(model, search.curve)
    else:
        costs, fixed = block_bytes(model, work)
    units = tuple(
        Unit(name=name, levels=(Level(label=_DROPPED, cost=0.0, dropped=True), Level(label=_KEPT, cost=cost)))
        for stack in stacks_of(model)
        for index in range(len(stack.blocks))
        if (cost := costs.get(name := f"{stack.name}.{index}")) is not None
    )
    return units, fixed


def as_step(chosen: Mapping[str, Level], _: Search) -> tuple[Step, ...]:
    """See `Ways`: at most one step for either stack."""
    dropped: dict[str, list[int]] = {}
    for name, level in chosen.items():
        match = _LAYER.fullmatch(name)
        if level.dropped and match is not None:
            side = "encoder" if match[1].startswith("encoder") else "decoder"
            dropped.setdefault(side, []).append(int(match[2]))
    return tuple(DropLayers(layers=tuple(layers), stack=side) for side, layers in dropped.items())  # type: ignore[arg-type]
