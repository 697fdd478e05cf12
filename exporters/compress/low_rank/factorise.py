"""The two matrices of a given rank whose outputs are nearest to those of one, on the inputs that it is given.

SVD-LLM (https://arxiv.org/abs/2403.07378, section 3.2; DRONE, NeurIPS 2021, has the same optimum): with S Sᵀ = E x xᵀ
the mean squared error of the outputs is ‖(W − W')S‖². The singular value decomposition W S = U Σ Vᵀ cut to rank r is
nearest, W' = U_r Σ_r V_rᵀ S⁻¹ = U_r U_rᵀ W, and loses the squares of the singular values that go.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_DAMPING = 1e-6  # of the mean diagonal: inputs that the text never had keep a little weight


@dataclass(frozen=True)
class Directions:
    """A weight's outputs in the directions in which they vary most.

    Attributes:
        basis: U, orthonormal columns, the strongest first, float64 [outputs, n], n = min(outputs, inputs).
        weight: W, float64 [outputs, inputs].
        energy: mean square of the outputs along each, float64 [n].
    """

    basis: Tensor
    weight: Tensor
    energy: Tensor

    def lost(self) -> Tensor:
        """By rank from 0 to n, the outputs' mean squared error, the sum over them, float64 [n + 1]."""
        left = self.energy.flip(0).cumsum(0).flip(0)
        return torch.cat((left, left.new_zeros(1)))

    def pair(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best pair of a rank.

        What flows between them has the same mean square in every channel: where it is rounded, by one step for all,
        no channel drowns in another's.

        Returns:
            up, float32 [outputs, rank], and down, float32 [rank, inputs].
        """
        basis = self.basis[:, :rank]
        spread = self.energy[:rank].sqrt()
        spread = spread.clamp(min=1e-6 * float(spread[0].clamp(min=1e-30)))
        return (basis * spread).float(), ((basis.T @ self.weight) / spread[:, None]).float()


def directions(weight: Tensor, moment: Tensor) -> Directions:
    """What a weight makes of its inputs, by direction.

    Args:
        weight: W, [outputs, inputs].
        moment: E x xᵀ over its inputs x, [inputs, inputs].
    """
    whole = weight.double()
    basis, values, _ = torch.linalg.svd(whole @ root(moment), full_matrices=False)
    return Directions(basis, whole, values.square())


def root(moment: Tensor) -> Tensor:
    """S with S Sᵀ = M, slightly damped, float64 [n, n]; M is symmetric and may be singular."""
    values, vectors = torch.linalg.eigh(moment.double())
    least = (_DAMPING * values.mean()).clamp(min=1e-12)
    found: Tensor = vectors * values.clamp(min=float(least)).sqrt()
    return found
