"""SparseGPT against least squares done column by column, by brute force."""

import pytest
import torch
from torch import Tensor

from skipstone.exporters.compress.sparsify import sparsegpt, wanda
from skipstone.exporters.compress.sparsify.masks import Pattern
from tests.exporters.compress.sparsify.layers import Layer, random_layer


def _refit(layer: Layer, row: Tensor, original: Tensor, settled: int) -> Tensor:
    """The row with the weights after the first `settled` fitted anew, so that its output is nearest the original's."""
    target = layer.inputs @ original - layer.inputs[:, :settled] @ row[:settled]
    free = torch.linalg.lstsq(layer.inputs[:, settled:], target[:, None]).solution[:, 0]
    return torch.cat([row[:settled], free])


def _removal_cost(layer: Layer, row: Tensor, original: Tensor, column: int) -> Tensor:
    """What removing a weight costs at least if only those to its right make good for it."""
    removed = torch.cat([row[:column], torch.zeros(1, dtype=row.dtype), row[column + 1 :]])
    if column + 1 < len(row):
        removed = _refit(layer, removed, original, column + 1)
    return ((layer.inputs @ (removed - original)) ** 2).mean()


def _by_brute_force(layer: Layer, kept: int, group: int) -> Tensor:
    """N:M pruning with every choice and every fit done by least squares on the inputs themselves."""
    rows = []
    for original in layer.weight:
        row = original.clone()
        for j in range(len(row)):
            if j % group == 0:
                costs = [_removal_cost(layer, row, original, column) for column in range(j, j + group)]
                removed = {j + int(index) for index in torch.stack(costs).argsort()[: group - kept]}
            if j in removed:
                row[j] = 0.0
                if j + 1 < len(row):
                    row = _refit(layer, row, original, j + 1)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("block", [4, 8, 128])
def test_weights_and_masks_are_those_of_least_squares(block: int) -> None:
    layer = random_layer(6, 12)
    weight, mask = sparsegpt.prune(layer.weight, layer.moment, Pattern.parse("2:4"), block=block, damping=0.0)
    expected = _by_brute_force(layer, 2, 4)
    assert torch.equal(mask, expected != 0)
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("text", ["0.5", "0.7", "2:4"])
def test_outputs_stay_nearer_than_those_of_weights_that_are_only_removed(text: str) -> None:
    layer, pattern = random_layer(32, 64), Pattern.parse(text)
    pruned, mask = sparsegpt.prune(layer.weight, layer.moment, pattern)
    assert layer.error(pruned).sum() < 0.9 * layer.error(layer.weight * mask).sum()
    assert layer.error(pruned).sum() < layer.error(wanda.prune(layer.weight, layer.moment, pattern)[0]).sum()


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    layer = random_layer(8, 16)
    silent = Layer(layer.weight, layer.inputs * (torch.arange(16) % 5 != 0))
    pruned, _ = sparsegpt.prune(silent.weight, silent.moment, Pattern(0.25))
    assert torch.isfinite(pruned).all()
    # a fifth and more of the weights do nothing; they go first, so that next to nothing is lost
    assert silent.error(pruned).sum() < 0.02 * silent.error(torch.zeros_like(pruned)).sum()
