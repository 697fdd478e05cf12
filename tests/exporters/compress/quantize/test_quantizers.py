"""Ways to choose codes, against torchao's, and against every choice there is on tiny matrices."""

import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from skipstone.errors import UsageError
from skipstone.exporters.compress.activations import Inputs
from skipstone.exporters.compress.hessian import inverse_factor
from skipstone.exporters.compress.quantize import open_quantizer, quantizer_names
from skipstone.exporters.compress.quantize.awq import find_scales
from skipstone.exporters.compress.quantize.folds import Fold
from skipstone.exporters.compress.quantize.gptq import settle
from skipstone.exporters.compress.quantize.grid import Grid, Levels, Parts, grid_of
from skipstone.exporters.compress.quantize.hqq import fit_minima, fit_scales
from skipstone.runtimes.quiet import quiet_libraries

ROWS, COLUMNS = 24, 256


def correlated(rows: int = 600, columns: int = COLUMNS, seed: int = 0) -> Inputs:
    """Inputs that move together, some of them strong."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns // 4, generator=made) @ torch.randn(columns // 4, columns, generator=made)
    x = (x + torch.randn(rows, columns, generator=made)) * (
        0.2 + 3 * torch.rand(columns, generator=made) ** 4
    )
    return Inputs(rows, (x.T @ x).double() / rows, x.abs().mean(0), x.abs().amax(0))


def weight(rows: int = ROWS, columns: int = COLUMNS, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5


def output_error(given: Tensor, grid: Grid, parts: Parts, inputs: Inputs) -> float:
    """Mean squared error of the outputs."""
    error = (grid.levels(parts).values(grid.codes(parts)) - given).double()
    return float(((error @ inputs.second_moment) * error).sum())


@pytest.mark.parametrize(
    "name", ["q8_0", "q4_0", "q4_1", "q5_k", "q4_k", "q3_k", "q2_k", "int4_g32", "int2_g32"]
)
def test_gptq_errs_less_in_the_outputs_than_rounding(name: str) -> None:
    grid, given, inputs = grid_of(name), weight(), correlated()
    errors = {
        method: output_error(given, grid, open_quantizer(method)(given, inputs, grid), inputs)
        for method in ("rtn", "imatrix", "gptq")
    }
    assert errors["gptq"] < 0.9 * errors["imatrix"]
    assert errors["gptq"] < 0.8 * errors["rtn"]
    assert errors["imatrix"] <= 1.001 * errors["rtn"] or name.startswith("q5")


def torchaos_gptq() -> Any:
    """torchao's own, which asks for a GPU though nothing in it needs one: the two lines that ask are left out."""
    with quiet_libraries():
        from torchao.prototype.gptq import api
    source = inspect.getsource(api.gptq_quantize)
    for line in (
        'assert device.type == "cuda", "GPTQ only supports CUDA currently"',
        "torch.cuda.synchronize()",
    ):
        assert line in source
        source = source.replace(line, "pass")
    scope = dict(vars(api))
    exec(source, scope)
    return scope["gptq_quantize"]


def test_gptq_chooses_the_codes_that_torchao_chooses() -> None:
    quantize = torchaos_gptq()
    from torchao.prototype.gptq.api import GPTQConfig
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quant_api import Int8WeightOnlyConfig

    given, inputs = weight(), correlated()
    config = GPTQConfig(step="convert", base_config=Int8WeightOnlyConfig(granularity=PerRow(), version=2))
    theirs = quantize(inputs.second_moment.float(), given.clone(), config)
    scale = theirs.scale.reshape(ROWS, 1).float()
    levels = Levels(scale, torch.zeros_like(scale), -128, 127)
    ours = settle(given, inputs.second_moment, levels, damping=0.01, act_order=False)
    assert (levels.nearest(given) == theirs.qdata).float().mean() < 0.75  # plain rounding differs
    assert (ours == theirs.qdata).float().mean() > 0.995  # but for sums at a rounding's edge
    assert (ours - theirs.qdata).abs().max() <= 1


def test_gptq_finds_the_best_codes_of_two_columns() -> None:
    # With two columns to settle, the second's code is the best for the first's; only the first may be chosen ill.
    moment = torch.tensor([[1.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    levels = Levels(torch.full((1, 1), 0.5), torch.zeros(1, 1), -2, 1)
    made = torch.Generator().manual_seed(3)
    found = 0
    for given in 0.8 * torch.randn(200, 1, 2, generator=made):

        def error(codes: Tensor, given: Tensor = given) -> float:
            e = (levels.values(codes) - given).double()
            return float((e @ moment @ e.T).item())

        ours = settle(given, moment, levels, damping=0.0, act_order=False)
        every = [
            torch.tensor([pair], dtype=torch.int16) for pair in itertools.product(range(-2, 2), repeat=2)
        ]
        with_first = [codes for codes in every if codes[0, 0] == ours[0, 0]]
        assert error(ours) <= min(map(error, with_first)) + 1e-9
        found += error(ours) <= min(map(error, every)) + 1e-9
        assert error(ours) <= error(levels.nearest(given)) + 1e-9 or bool(
            (ours != levels.nearest(given)).any()
        )
    assert found > 150


def test_gptq_without_correlation_is_rounding() -> None:
    given, levels = weight(4, 64), Levels(torch.full((4, 2), 0.05), torch.zeros(4, 2), -8, 7)
    codes = settle(given, torch.eye(64, dtype=torch.float64), levels, damping=0.01, act_order=True)
    assert torch.equal(codes, levels.nearest(given))


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_settles_each_column_as_one_at_a_time_would(act_order: bool) -> None:
    # Algorithm 1 word for word, the inverse of what is left computed anew for every column.
    given, inputs = weight(3, 160, seed=5), correlated(columns=160)
    levels = Levels(torch.full((3, 5), 0.04), torch.zeros(3, 5), -8, 7)
    moment = inputs.second_moment + 0.01 * inputs.second_moment.diagonal().mean() * torch.eye(160).double()
    order = inputs.second_moment.diagonal().argsort(descending=True) if act_order else torch.arange(160)
    w, codes = given.double().clone(), torch.zeros(3, 160, dtype=torch.int16)
    for step, j in enumerate(order.tolist()):
        left = order[step:]
        inverse = torch.linalg.inv(moment[left][:, left])
        codes[:, j] = levels.nearest(w.float())[:, j]
        error = (w[:, j] - levels.values(codes)[:, j].double()) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
    ours = settle(given, inputs.second_moment, levels, damping=0.01, act_order=act_order)
    assert (ours == codes).float().mean() > 0.99


def test_the_factor_is_of_the_inverse() -> None:
    moment = correlated(columns=32).second_moment
    u = inverse_factor(moment, 0.1)
    damped = moment + 0.1 * moment.diagonal().mean() * torch.eye(32).double()
    torch.testing.assert_close(u.T @ u @ damped, torch.eye(32).double(), rtol=0, atol=1e-8)
    assert not u.tril(-1).any()


def test_half_quadratic_minima_are_torchaos() -> None:
    with quiet_libraries():
        from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq

    given = weight(16, 128)
    codes, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
        given, nbits=3, group_size=32, compute_dtype=torch.float32, device="cpu", raw_output=True
    )
    groups = given.reshape(16, 4, 32)
    low, high = groups.amin(-1), groups.amax(-1)
    ours = fit_minima(given, Levels((high - low) / 7, low, 0, 7))
    scale, zero = scale.reshape(16, 4), zero.reshape(16, 4)
    torch.testing.assert_close(ours.scale, scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.minimum, -zero * scale, rtol=1e-4, atol=1e-5)
    assert (ours.nearest(given) == codes).float().mean() > 0.999


def test_half_quadratic_minima_let_outliers_be_wrong() -> None:
    """Weights so large that errors are allowed; of ordinary ones the shrinking leaves nothing."""
    with quiet_libraries():
        from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq

    made = torch.Generator().manual_seed(11)
    given = 40 * weight(16, 128)
    given[torch.rand(given.shape, generator=made) < 0.03] *= 6.0
    codes, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
        given, nbits=2, group_size=32, compute_dtype=torch.float32, device="cpu", raw_output=True
    )
    groups = given.reshape(16, 4, 32)
    low, high = groups.amin(-1), groups.amax(-1)
    start = Levels((high - low) / 3, low, 0, 3)
    ours = fit_minima(given, start)
    torch.testing.assert_close(ours.minimum, -(zero * scale).reshape(16, 4), rtol=1e-4, atol=1e-4)
    assert (ours.nearest(given) == codes).float().mean() > 0.999

    error = (ours.values(ours.nearest(given)) - given).abs()
    allowed = error - error ** (0.7 - 1) / 10  # by the shrinking, in its first round
    assert (allowed > 0).float().mean() > 0.5


@pytest.mark.parametrize("seed", range(3))
def test_awq_finds_the_scales_that_torchao_finds(seed: int) -> None:
    with quiet_libraries():
        from torchao.prototype.awq.core import AWQObserver
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    made = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 64, generator=made) * torch.logspace(-1, 1, 64)[torch.randperm(64, generator=made)]
    given = weight(24, 64, seed=seed + 10)
    observer = AWQObserver(given, None, IntxWeightOnlyConfig(torch.int4, PerGroup(32)))
    observer(x, x)
    expected = observer.calculate_qparams()
    inputs = Inputs(400, (x.T @ x).double() / 400, x.abs().mean(0), x.abs().amax(0))
    ours = find_scales([given], inputs, [grid_of("int4_g32")], Fold("norm", ("taker",)))
    assert expected.max() > 1.5 * expected.min()  # there is something to find
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=0)


def test_awq_goes_by_all_that_take_the_inputs_and_leaves_floats_out() -> None:
    inputs, grid = correlated(columns=64), grid_of("q4_0")
    first, second = weight(24, 64), 100 * weight(24, 64, seed=2)  # the second counts for more
    fold = Fold("norm", ("first", "second"))
    alone = find_scales([second], inputs, [grid], Fold("norm", ("second",)))
    assert torch.equal(find_scales([first, second], inputs, [grid, grid], fold), alone)
    assert torch.equal(find_scales([first, second], inputs, [None, grid], fold), alone)
    assert torch.equal(find_scales([first, second], inputs, [None, None], fold), torch.ones(64))


def test_half_quadratic_scales_are_torchaos() -> None:
    with quiet_libraries():
        from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_scale_only_hqq

    given = weight(16, 128)
    codes, scale = _choose_qparams_and_quantize_scale_only_hqq(given, [1, 32], -8, 7, early_stop_tol=0.0)
    start = given.reshape(16, 4, 32).abs().amax(-1) / 8
    ours = fit_scales(given, Levels(start, torch.zeros_like(start), -8, 7))
    torch.testing.assert_close(ours.scale, scale, rtol=1e-4, atol=1e-7)
    assert (ours.nearest(given) == codes).float().mean() > 0.999


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q3_k", "q2_k", "int4_g32"])
def test_half_quadratic_levels_keep_the_bulk_of_the_weights_close(name: str) -> None:
    made = torch.Generator().manual_seed(7)
    given = weight()
    given[torch.rand(given.shape, generator=made) < 0.01] *= 8.0  # outliers
    grid = grid_of(name)

    def mean_error(parts: Parts) -> float:
        return float((grid.levels(parts).values(grid.codes(parts)) - given).abs().mean())

    plain, ours = (open_quantizer(method)(given, None, grid) for method in ("rtn", "hqq"))
    assert mean_error(ours) < 1.05 * mean_error(plain)


@pytest.mark.parametrize("method", quantizer_names())
def test_nothing_passed_in_is_changed(method: str) -> None:
    given, inputs = weight(), correlated()
    before = given.clone(), inputs.second_moment.clone()
    open_quantizer(method)(given, inputs, grid_of("q4_0"))
    assert torch.equal(given, before[0])
    assert torch.equal(inputs.second_moment, before[1])


def test_an_unknown_quantizer_is_refused_with_a_list() -> None:
    with pytest.raises(UsageError, match="method 'best' is not known") as caught:
        open_quantizer("best")
    assert "gptq" in str(caught.value.hint)
