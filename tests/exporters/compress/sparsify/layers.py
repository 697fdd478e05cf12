"""Random layers whose inputs depend on each other, as those of real models do."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """A weight [out, in], its inputs [tokens, in] and their second moment [in, in]."""

    weight: Tensor
    inputs: Tensor

    @property
    def moment(self) -> Tensor:
        return self.inputs.T @ self.inputs / len(self.inputs)

    def error(self, weight: Tensor) -> Tensor:
        """Mean squared error of every output, measured on the inputs themselves: [out]."""
        return ((self.inputs @ (weight - self.weight).T) ** 2).mean(dim=0)


def random_layer(out: int, width: int, tokens: int = 256, seed: int = 0) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    scales = torch.rand(width, generator=generator, dtype=torch.float64) * 3 + 0.1
    inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(out, width, generator=generator, dtype=torch.float64)
    return Layer(weight, (inputs + 0.5 * inputs @ mixing + 0.3) * scales)
