"""What can be searched over: a module each, which says what levels there are and which step carries a choice out."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from skipstone.exporters.compress.search.levels import Level, Unit
    from skipstone.exporters.compress.search.step import Search
    from skipstone.exporters.compress.steps import Step
    from skipstone.exporters.compress.work import Work

_WAYS = {
    "bits": "over_bits",
    "drop": "over_drop",
    "sparsity": "over_sparsity",
}


class Ways(Protocol):
    """A module of this folder that makes levels."""

    def make_units(
        self, model: Any, work: Work, search: Search, folder: Path
    ) -> tuple[tuple[Unit, ...], float]:
        """What to choose from.

        Args:
            model: as the search finds it, and as it must be afterwards.
            work: of the run.
            search: the step, whose options say what the budget counts.
            folder: where `keep_level` puts weights.

        Returns:
            The units, and what all that is none of them costs.
        """

    def as_step(self, chosen: Mapping[str, Level], search: Search) -> tuple[Step, ...]:
        """The steps that carry a choice of a level for each unit out."""


def ways_over(name: str) -> Ways:
    """The module for a value of `Search.over`."""
    module: Any = import_module(f"skipstone.exporters.compress.search.{_WAYS[name]}")
    ways: Ways = module
    return ways
