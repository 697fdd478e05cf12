"""How many weights are removed, and the mask that keeps the largest scores.

>>> Pattern.parse("2:4")
Pattern(share=0.5, kept=2, group=4)
>>> keep_largest(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), Pattern.parse("2:4"))
tensor([[ True, False, False,  True]])
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from skipstone.errors import UsageError

_GROUPED = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class Pattern:
    """How many weights of a Linear are removed.

    Attributes:
        share: of the weights that is removed, 0 … 1.
        kept: weights kept of every `group` inputs that follow each other; None: anywhere in a row.
        group: see there.
    """

    share: float
    kept: int | None = None
    group: int | None = None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """A share (`0.5`), or how many of so many weights are kept (`2:4`, `4:8`).

        Raises:
            UsageError: it is neither.
        """
        if grouped := _GROUPED.fullmatch(text):
            kept, group = int(grouped[1]), int(grouped[2])
            if 0 < kept < group:
                return cls(1.0 - kept / group, kept, group)
        else:
            try:
                share = float(text)
            except ValueError:
                share = -1.0
            if 0.0 <= share < 1.0:
                return cls(share)
        raise UsageError(
            f"sparsify: {text!r} is no sparsity",
            hint="a share from 0 to below 1 such as 0.5, or N:M such as 2:4: N weights kept of every M",
        )

    def check_fits(self, weight: Tensor, name: str) -> None:
        """Refuse a weight whose rows do not fill the groups.

        Raises:
            UsageError: naming the weight.
        """
        if self.group is not None and weight.shape[1] % self.group:
            raise UsageError(
                f"sparsify: {name} has {weight.shape[1]} inputs, which {self.kept}:{self.group} does not divide",
                hint="give a share of weights instead, such as sparsity = 0.5",
            )


def keep_largest(scores: Tensor, pattern: Pattern, *, over_all: bool = False) -> Tensor:
    """Keep the weights with the largest scores; of equal scores, those further right.

    Args:
        scores: [out, in], not negative.
        pattern: how many stay.
        over_all: compare all weights of the matrix with each other, not those of a row; without meaning for N:M.

    Returns:
        bool [out, in], true for those kept.
    """
    if pattern.group is not None and pattern.kept is not None:
        compared, removed = scores.reshape(-1, pattern.group), pattern.group - pattern.kept
    else:
        compared = scores.reshape(1, -1) if over_all else scores
        removed = int(compared.shape[1] * pattern.share)
    order = compared.argsort(dim=1, stable=True)
    kept = torch.ones_like(compared, dtype=torch.bool)
    kept.scatter_(1, order[:, :removed], False)
    return kept.reshape(scores.shape)


def squared_error(difference: Tensor, moment: Tensor) -> Tensor:
    """Mean squared error of every output that a change of the weight makes: dᵀ H d of every row d.

    Args:
        difference: of the weights, [out, in].
        moment: mean of x xᵀ, [in, in].

    Returns:
        [out], in the outputs' units squared.
    """
    return ((difference @ moment) * difference).sum(dim=1)
