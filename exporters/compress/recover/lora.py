"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685): the linear layers stay, and B A is learnt beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipstone.exporters.compress.activations import stacks_of
from skipstone.exporters.factors import put_in_place


class Adapted(nn.Module):
    """A linear layer W that stays, with a change of low rank: (W + α/r B A) x.

    Weights that are zero stay zero: the change is masked there, and then need not be of low rank.

    Args:
        base: the layer.
        rank: r.
        alpha: α.
        generator: draws A; B begins with zeros, and the layer with what it was.
    """

    kept: Tensor | None

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        drawn = torch.randn(rank, base.in_features, generator=generator) * base.in_features**-0.5
        self.a, self.b = nn.Parameter(drawn), nn.Parameter(torch.zeros(base.out_features, rank))
        kept = base.weight.detach() != 0
        self.register_buffer("kept", None if bool(kept.all()) else kept, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is not None:
            return functional.linear(x, self.merged(), self.base.bias)
        out: Tensor = self.base(x)
        return out + self.scale * functional.linear(functional.linear(x, self.a), self.b)

    @property
    def weight(self) -> Tensor:
        """The base's, which T5 asks for its type."""
        return self.base.weight

    def merged(self) -> Tensor:
        """W + α/r B A, [outputs, inputs]."""
        change = self.scale * (self.b @ self.a)
        return self.base.weight + (change if self.kept is None else change * self.kept)


@contextmanager
def adapted(model: Any, rank: int, alpha: float, seed: int) -> Iterator[Sequence[nn.Parameter]]:
    """The model with adapters on all linear layers of its blocks, which are merged into these afterwards.

    Args:
        model: changed in place.
        rank: of the adapters.
        alpha: of their scale, α/r.
        seed: of what they begin with.

    Returns:
        The adapters' weights, which are to be trained alone.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {
        f"{stack.name}.{index}.{name}": Adapted(linear, rank, alpha, generator)
        for stack in stacks_of(model)
        for index, block in enumerate(stack.blocks)
        for name, linear in block.named_modules()
        if isinstance(linear, nn.Linear)
    }
    for path, layer in found.items():
        put_in_place(model, path, layer)
    try:
        yield [weight for layer in found.values() for weight in (layer.a, layer.b)]
    finally:
        with torch.no_grad():
            for path, layer in found.items():
                layer.base.weight.copy_(layer.merged())
                put_in_place(model, path, layer.base)
