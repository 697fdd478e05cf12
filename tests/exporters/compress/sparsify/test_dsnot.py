"""What refining a mask does to the outputs."""

import itertools

import pytest
import torch
from torch import Tensor

from skipstone.exporters.compress.sparsify import dsnot, magnitude, wanda
from skipstone.exporters.compress.sparsify.masks import Pattern
from tests.exporters.compress.sparsify.layers import Layer, random_layer


def _by_the_papers_rule(layer: Layer, mask: Tensor, cycles: int = 50) -> Tensor:
    """Algorithm 1 of the paper, row by row: means and variances of the inputs, until the error is small."""
    mean, variance = layer.inputs.mean(dim=0), layer.inputs.var(dim=0)
    norm, kept = layer.moment.diagonal().sqrt(), mask.clone()
    for w, m in zip(layer.weight, kept, strict=True):
        for _ in range(cycles):
            error = float(((w * m - w) * mean).sum())
            if abs(error) < 0.1:
                break
            sign = -1.0 if error > 0 else 1.0
            grow = torch.where(m, -torch.inf, sign * w * mean / variance).argmax()
            harmless = m & (sign * w * mean < 0)
            if not harmless.any():
                break
            prune = torch.where(harmless, w.abs() * norm, torch.inf).argmin()
            m[grow], m[prune] = True, False
    return kept


@pytest.mark.parametrize("text", ["0.5", "0.7", "2:4", "4:8"])
@pytest.mark.parametrize("chosen", [wanda, magnitude], ids=["wanda", "magnitude"])
def test_no_output_gets_worse_and_most_get_better(text: str, chosen: object) -> None:
    layer, pattern = random_layer(32, 64), Pattern.parse(text)
    _, mask = chosen.prune(layer.weight, layer.moment, pattern)  # type: ignore[attr-defined]
    refined = dsnot.refine(layer.weight, layer.moment, mask, pattern)
    before, after = layer.error(layer.weight * mask), layer.error(layer.weight * refined)
    assert (after <= before * (1 + 1e-9)).all()
    assert (after < 0.97 * before).float().mean() > 0.5
    assert torch.equal(refined.sum(dim=1), mask.sum(dim=1))
    if pattern.group is not None:
        assert (refined.reshape(-1, pattern.group).sum(dim=1) == pattern.kept).all()


def test_exact_errors_judge_swaps_better_than_the_papers_means_and_variances() -> None:
    layer, pattern = random_layer(32, 64), Pattern(0.5)
    _, mask = wanda.prune(layer.weight, layer.moment, pattern)
    ours = layer.error(layer.weight * dsnot.refine(layer.weight, layer.moment, mask, pattern)).sum()
    theirs = layer.error(layer.weight * _by_the_papers_rule(layer, mask)).sum()
    assert ours < theirs


def test_one_swap_is_the_best_that_growing_first_and_then_pruning_can_make() -> None:
    layer, pattern = random_layer(1, 6), Pattern(0.5)
    mask = torch.tensor([[True, True, True, False, False, False]])
    refined = dsnot.refine(layer.weight, layer.moment, mask, pattern, cycles=1)

    def error(kept: set[int]) -> float:
        chosen = torch.tensor([[index in kept for index in range(6)]])
        return float(layer.error(layer.weight * chosen))

    grown = min(range(3, 6), key=lambda j: error({0, 1, 2, j}))
    expected = min(({0, 1, 2, grown} - {k} for k in range(3)), key=error)
    assert expected in [set(kept) for kept in itertools.combinations(range(6), 3)]
    assert {int(index) for index in refined[0].nonzero()} == expected


def test_a_mask_that_no_swap_betters_stays_as_it_is() -> None:
    layer = random_layer(4, 16)
    moment = torch.eye(16, dtype=torch.float64)
    _, mask = wanda.prune(layer.weight, moment, Pattern(0.5))
    assert torch.equal(dsnot.refine(layer.weight, moment, mask, Pattern(0.5)), mask)
