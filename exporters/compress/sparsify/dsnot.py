"""DSnoT ([2310.08915](https://arxiv.org/abs/2310.08915)): removed weights grow back where they help most, and others go
in their place; nothing is trained.

The paper judges a swap by the inputs' means and variances. Here the whole second moment is at hand, so each swap is
judged by what it does to the mean squared error of its output: no swap makes it worse, and none has to be undone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skipstone.exporters.compress.sparsify.masks import Pattern

_CYCLES = 50  # swaps per output at most, as in the paper
_LEAST_GAIN = 1e-12  # of what the whole row puts out: below that rounding decides


def refine(weight: Tensor, moment: Tensor, mask: Tensor, pattern: Pattern, cycles: int = _CYCLES) -> Tensor:
    """Swap weights in and out of a mask, in every output as often as that lowers its error.

    Args:
        weight: before anything was removed, float32 [out, in].
        moment: mean of x xᵀ over the inputs x, [in, in].
        mask: which weights stay, bool [out, in].
        pattern: what the mask keeps to; under N:M a weight is swapped for one of its own group.
        cycles: swaps per output at most.

    Returns:
        A mask of as many weights in every row (and group), whose `squared_error` is no larger in any row.
    """
    w, h = weight.double(), moment.double()
    kept, least = mask.clone(), -_LEAST_GAIN * (w * w * h.diagonal()).sum(dim=1)
    rows = torch.arange(len(w), device=w.device)
    # e = H (w − m∘w): how the error of each output leans on each input; dᵀ H d is its squared error.
    e = torch.where(kept, 0.0, w) @ h
    for _ in range(cycles):
        # Growing j changes the squared error by −2 w_j e_j + w_j² H_jj, pruning k by 2 w_k e_k + w_k² H_kk, and both
        # together by −2 w_j w_k H_jk more.
        growth = torch.where(kept, torch.inf, w * (w * h.diagonal() - 2.0 * e))
        loss = torch.where(kept, w * (w * h.diagonal() + 2.0 * e), torch.inf)
        swap = _swap_anywhere if pattern.group is None else _swap_in_groups
        change, grow, prune = swap(w, h, growth, loss, pattern.group or 1)
        better = change < least
        if not bool(better.any()):
            break
        at = rows[better]
        kept[at, grow[better]] = True
        kept[at, prune[better]] = False
        e[at] += w[at, prune[better], None] * h[prune[better]] - w[at, grow[better], None] * h[grow[better]]
    return kept


def _swap_anywhere(
    w: Tensor, h: Tensor, growth: Tensor, loss: Tensor, _: int
) -> tuple[Tensor, Tensor, Tensor]:
    """In every row, the weight that is best grown back, and then the one that is cheapest to remove: what the swap
    changes, and the two, [out] each.
    """
    gain, grow = growth.min(dim=1)
    cost, prune = (loss - 2.0 * w.gather(1, grow[:, None]) * w * h[grow]).min(dim=1)
    return gain + cost, grow, prune


def _swap_in_groups(
    w: Tensor, h: Tensor, growth: Tensor, loss: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """In every row, the best of all swaps within groups of `size` inputs: as `_swap_anywhere`."""
    starts = range(0, w.shape[1], size)
    near = torch.stack([h[start : start + size, start : start + size] for start in starts])  # [groups, j, k]
    grouped, gains, costs = (x.reshape(len(w), -1, size) for x in (w, growth, loss))
    both = grouped[..., :, None] * grouped[..., None, :] * near
    change, place = (gains[..., :, None] + costs[..., None, :] - 2.0 * both).flatten(1).min(dim=1)
    first = place // (size * size) * size
    return change, first + place // size % size, first + place % size
