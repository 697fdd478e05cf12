"""Levels of a layer: how much of its weights are zero. No engine here gains from zeros, so the budget counts the weights
that are left, not bytes or seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from skipstone.exporters.compress.activations import walk
from skipstone.exporters.compress.search.levels import Level, Unit, keep_level
from skipstone.exporters.compress.sparsify.masks import Pattern
from skipstone.exporters.compress.sparsify.step import Sparsify

if TYPE_CHECKING:
    from skipstone.exporters.compress.search.step import Search
    from skipstone.exporters.compress.steps import Step
    from skipstone.exporters.compress.work import Work

_SHARES = ("0.9", "0.8", "0.7", "0.6", "0.5", "0.4", "0.3", "0.2", "0.1", "0")
_METHOD = "wanda"


@torch.no_grad()
def make_units(model: Any, work: Work, search: Search, folder: Path) -> tuple[tuple[Unit, ...], float]:
    """See `Ways`: one unit per layer, each level pruned by itself, behind layers that are as they were."""
    shares = sorted(search.levels or _SHARES, key=lambda text: -Pattern.parse(text).share)
    step = Sparsify(method=search.method or _METHOD)
    units: list[Unit] = []
    for block in walk(model, work.calibration.windows, work.calibration.sources):
        work.progress(f"levels of {block.name}", len(units), 0)
        for share in shares:
            pattern = Pattern.parse(share)
            pruned = {
                f"{block.name}.{name}.weight": step.pruned(
                    linear.weight, block.inputs[name].second_moment, pattern
                )[0]
                for name, linear in block.linears.items()
            }
            keep_level(folder, block.name, share, pruned)
        weights = sum(linear.weight.numel() for linear in block.linears.values())
        levels = tuple(
            Level(label=share, cost=weights * (1.0 - Pattern.parse(share).share)) for share in shares
        )
        units.append(Unit(name=block.name, levels=levels))
    return tuple(units), 0.0


def as_step(chosen: Mapping[str, Level], search: Search) -> tuple[Step, ...]:
    """See `Ways`: one step that knows every layer's share."""
    shares = {}
    for name, level in chosen.items():
        stack, _, number = name.rpartition(".")
        shares[f"encoder.{number}" if stack.startswith("encoder") else number] = level.label
    return (Sparsify(method=search.method or _METHOD, layers=shares),)
