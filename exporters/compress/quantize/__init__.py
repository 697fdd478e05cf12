"""Quantisation: storage layouts (`grid`), ways to choose codes in them by name, and the step that carries it out
(`step`).

    >>> quantize = open_quantizer("gptq")
    >>> parts = quantize(weight, inputs, grid_of("q4_k"))

A quantiser is one module with a pure function `quantize` (see `Quantizer`) and one line here. It sees one weight at a
time and what is known of its inputs. What changes several weights at once, so that codes fit them better, is a `fold`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from skipstone.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from skipstone.exporters.compress.activations import Inputs
    from skipstone.exporters.compress.quantize.grid import Grid, Parts

# Name → module, and whether it needs to know the inputs.
_MODULES = {
    "rtn": ("rtn", False),
    "imatrix": ("imatrix", True),
    "gptq": ("gptq", True),
    "hqq": ("hqq", False),
}


class Quantizer(Protocol):
    """Chooses codes, and maybe levels, for one weight."""

    def __call__(self, weight: Tensor, inputs: Inputs | None, grid: Grid) -> Parts:
        """Quantise one weight; nothing that is passed in is changed.

        Args:
            weight: float32 [rows, columns].
            inputs: what the layer is given; None only where the quantiser does without.
            grid: the storage layout; its block divides the columns.
        """
        ...


def quantizer_names() -> tuple[str, ...]:
    """Every quantiser, in the order of the table in docs/compress.md."""
    return tuple(_MODULES)


def needs_inputs(name: str) -> bool:
    """Whether a quantiser goes by a layer's inputs."""
    return _MODULES[name][1]


def open_quantizer(name: str) -> Quantizer:
    """A quantiser by its name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in _MODULES:
        raise UsageError(
            f"quantize: method {name!r} is not known", hint=f"one of {', '.join(quantizer_names())}"
        )
    quantize: Quantizer = import_module(f"{__name__}.{_MODULES[name][0]}").quantize
    return quantize
