"""Layers whose weights are trained to be -1, 0 or 1 times one scale a matrix: BitNet b1.58 (arXiv 2402.17764, §2).

    W̃ = RoundClip(W / γ, -1, 1),    γ = mean |W|, or the median of |W| (arXiv 2407.09527, for small models)

The optimizer moves W; what is computed with is γ W̃, whose gradient counts as W's (straight-through). Inputs are rounded
to 8 bits, the largest of each token to 127, likewise, much as engines round what meets such weights.

    >>> ternarise(model, recipe.ternary)    # before training
    >>> settle(model)                       # afterwards: the weights are γ W̃, and the layers ordinary ones
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipstone.exporters.tune.recipe import Ternary

_LEAST = (
    2.0**-14
)  # the smallest number that float16, which layouts keep scales in, holds as exactly as others


class TernaryLinear(nn.Linear):
    """A linear layer that computes with γ W̃. Its parameter is W, under the name it always had.

    Attributes:
        scaling: `mean` or `median`.
        rounds_inputs: whether inputs are rounded to 8 bits.
    """

    scaling: str
    rounds_inputs: bool

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`."""
        inputs = _straight_through(input, _in_8_bits(input)) if self.rounds_inputs else input
        weight = _straight_through(self.weight, self.ternary())
        return functional.linear(inputs, weight, self.bias)

    def ternary(self) -> Tensor:
        """γ W̃, exactly, in the weight's type and without a gradient."""
        weight = self.weight.detach().float()
        magnitudes = weight.abs()
        found = magnitudes.median() if self.scaling == "median" else magnitudes.mean()
        # exact in bfloat16, which checkpoints are stored in, and in float16
        scale = found.clamp(min=_LEAST).bfloat16().float()
        return ((weight / scale).round().clamp(-1, 1) * scale).to(self.weight.dtype)


def ternarise(model: nn.Module, options: Ternary) -> None:
    """Have the linear layers of a decoder's blocks compute with ternary weights; the embedding and the head do not.

    Args:
        model: a decoder (`skipstone.exporters.tune.objective.check_decoder`), changed in place.
        options: how; with scale `none` nothing changes.
    """
    if options.scale == "none":
        return
    for module in cast(nn.Module, cast(nn.Module, model.model).layers).modules():
        if type(module) is nn.Linear:
            module.__class__ = TernaryLinear
            ternary = cast(TernaryLinear, module)
            ternary.scaling, ternary.rounds_inputs = options.scale, options.activation_bits == 8


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Put γ W̃ in place of W, and ordinary layers in place of `TernaryLinear`s."""
    for module in _ternary_layers(model):
        module.weight.copy_(module.ternary())
        module.__class__ = nn.Linear  # type: ignore[assignment]


def _ternary_layers(model: nn.Module) -> Iterator[TernaryLinear]:
    return (module for module in list(model.modules()) if isinstance(module, TernaryLinear))


def _straight_through(given: Tensor, used: Tensor) -> Tensor:
    """`used`, bit by bit, with the gradient of `given`."""
    return used + (given - given.detach())


def _in_8_bits(inputs: Tensor) -> Tensor:
    values = inputs.detach().float()
    step = values.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return ((values / step).round() * step).to(inputs.dtype)
