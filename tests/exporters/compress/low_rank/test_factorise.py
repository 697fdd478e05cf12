"""The pair of a rank against numpy's own decomposition, and ranks against every way to share a budget out."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from skipstone.errors import UsageError
from skipstone.exporters.compress.low_rank.allot import Choice, allot, choices
from skipstone.exporters.compress.low_rank.factorise import directions


def layer(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, inputs [200, inputs] of which some are strong and some go together, and their second moment."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    mixing = torch.randn(inputs, inputs, generator=generator) * torch.logspace(0, -2, inputs)
    x = torch.randn(200, inputs, generator=generator) @ mixing.T
    return weight, x, (x.T @ x).double() / len(x)


def error(weight: Tensor, pair: tuple[Tensor, Tensor], x: Tensor) -> float:
    """Mean squared error of the outputs over inputs x, the sum over them."""
    up, down = (part.double() for part in pair)
    return float(((x.double() @ (weight.double() - up @ down).T) ** 2).sum(1).mean())


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_the_error_of_every_rank_is_what_numpys_decomposition_of_the_outputs_leaves(
    shape: tuple[int, int],
) -> None:
    weight, x, moment = layer(*shape)
    found = directions(weight, moment)
    outputs = (x.double() @ weight.double().T).numpy()
    left = np.linalg.svd(outputs, compute_uv=False) ** 2 / len(x)
    for rank in (0, 1, 4, 11):
        expected = float(left[rank:].sum())
        close = pytest.approx(expected, rel=1e-3, abs=1e-5 * float(left.sum()))
        assert float(found.lost()[rank]) == close
        if rank:
            assert error(weight, found.pair(rank), x) == close


def test_at_full_rank_the_pair_is_the_weight_even_where_inputs_were_never_seen() -> None:
    weight, x, _ = layer(12, 20)
    x[:, 5:9] = 0.0
    up, down = directions(weight, (x.T @ x) / len(x)).pair(12)
    assert (up.shape, down.shape) == ((12, 12), (12, 20))
    assert torch.allclose(up @ down, weight, atol=1e-4)


def test_no_pair_nearby_and_no_plain_decomposition_does_better() -> None:
    weight, x, moment = layer(16, 24)
    pair = directions(weight, moment).pair(5)
    best = error(weight, pair, x)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    assert error(weight, (u[:, :5] * s[:5], v[:5]), x) > 1.2 * best
    generator = torch.Generator().manual_seed(1)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            moved = tuple(part * (1 + size * torch.randn(part.shape, generator=generator)) for part in pair)
            assert error(weight, (moved[0], moved[1]), x) > best


def test_channels_between_the_two_are_equally_strong() -> None:
    weight, x, moment = layer(16, 24)
    _, down = directions(weight, moment).pair(8)
    assert torch.allclose((x @ down.T).square().mean(0), torch.ones(8), rtol=1e-2)


def test_ranks_are_shared_out_as_the_best_of_all_ways_would() -> None:
    shapes = {"a": (8, 8), "b": (8, 16), "c": (16, 8)}
    options = {}
    for number, (name, shape) in enumerate(shapes.items()):
        weight, _, moment = layer(*shape, seed=number)
        lost = ((1 + 3 * number) * directions(weight, moment).lost()).tolist()
        options[name] = choices(*shape, lost, 1)
    whole = sum(found[-1].weights for found in options.values())
    optimal = 0
    for budget in np.linspace(0.3, 0.95, 14):
        found = allot(options, float(budget))
        assert sum(choice.weights for choice in found.values()) <= budget * whole
        ways = [
            sum(choice.lost for choice in way)
            for way in itertools.product(*options.values())
            if sum(choice.weights for choice in way) <= budget * whole
        ]
        mine = sum(choice.lost for choice in found.values())
        assert mine <= 1.25 * min(ways)  # what is left over may fit no step
        optimal += mine == pytest.approx(min(ways))
    assert optimal >= 7


def test_a_matrix_is_left_whole_where_its_last_ranks_would_save_nothing() -> None:
    flat = [float(8 - rank) for rank in range(9)]
    assert [choice.rank for choice in choices(8, 8, flat, 2)] == [2, None]
    assert choices(8, 8, flat, 3) == (Choice(3, 48, 64, 5.0), Choice(None, 64, 64, 0.0))
    chosen = allot({"a": choices(8, 8, flat, 1), "b": choices(8, 8, [0.1 * x for x in flat], 1)}, 0.7)
    assert (chosen["a"].rank, chosen["b"].rank) == (None, 1)


def test_a_budget_below_the_least_is_refused_with_the_least() -> None:
    options = {"a": choices(8, 8, [0.0] * 9, 2)}
    with pytest.raises(UsageError, match=r"budget=0.3 is less than the lowest ranks take: 0\.5"):
        allot(options, 0.3)
