"""Which weights of a Linear can be zero: pruners that choose them, by name.

    >>> prune = open_pruner("wanda")
    >>> prune(weight, moment, Pattern.parse("2:4"))[1].float().mean()
    tensor(0.5000)

A pruner is one module with a pure function `prune` (see `Pruner`) and one line here. It sees one weight at a time and
what is known of its inputs: `moment`, the mean of x xᵀ over calibration tokens, of which each method uses what it needs.

Zeros alone make nothing faster or smaller here: `gain.py` says which format gains from which zeros, and why.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from skipstone.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from skipstone.exporters.compress.sparsify.masks import Pattern

_MODULES = {
    "magnitude": "magnitude",
    "wanda": "wanda",
    "sparsegpt": "sparsegpt",
}


class Pruner(Protocol):
    """Chooses weights to remove, and may move the others to make up for them."""

    def __call__(
        self, weight: Tensor, moment: Tensor, pattern: Pattern, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Prune one weight; nothing that is passed in is changed.

        Args:
            weight: float32 [out, in].
            moment: mean of x xᵀ over the inputs x, [in, in].
            pattern: how many weights go.
            mask: which weights stay, bool [out, in], where that was decided before; None: the pruner chooses.

        Returns:
            The new weight, zero where removed, and the mask of those kept.
        """
        ...


def pruner_names() -> tuple[str, ...]:
    """Every pruner, in the order of the table in docs/compress.md."""
    return tuple(_MODULES)


def open_pruner(name: str) -> Pruner:
    """A pruner by its name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in _MODULES:
        raise UsageError(
            f"sparsify: method {name!r} is not known", hint=f"one of {', '.join(pruner_names())}"
        )
    prune: Pruner = import_module(f"{__name__}.{_MODULES[name]}").prune
    return prune
