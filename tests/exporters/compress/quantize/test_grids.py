"""Storage layouts, against gguf-py's and torchao's own reading of what is stored."""

import ctypes

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

from skipstone.errors import UsageError
from skipstone.exporters.compress.quantize import gguf_grid, int_grid
from skipstone.exporters.compress.quantize.grid import Levels, dequantized, grid_of, stored

ROWS, COLUMNS = 5, 512
EVERY = [*gguf_grid.GRIDS, *int_grid.GRIDS]


def weight(seed: int = 0, columns: int = COLUMNS) -> Tensor:
    """A matrix whose columns differ in size."""
    made = torch.Generator().manual_seed(seed)
    sizes = torch.rand(columns, generator=made) + 0.1
    return torch.randn(ROWS, columns, generator=made) * sizes


def read_by_gguf(blocks: Tensor, name: str) -> Tensor:
    """What gguf-py says that blocks stand for."""
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf_grid.GRIDS[name].type))


@pytest.mark.parametrize("name", gguf_grid.GRIDS)
def test_what_blocks_stand_for_is_what_gguf_py_reads(name: str) -> None:
    grid = gguf_grid.GRIDS[name]
    parts = grid.fit(weight(), None)
    found = grid.levels(parts).values(grid.codes(parts))
    assert torch.equal(found, read_by_gguf(parts["blocks"], name))
    assert torch.equal(dequantized(stored(grid, parts)), found)


@pytest.mark.parametrize("name", gguf_grid.GRIDS)
def test_blocks_of_any_bytes_are_read_as_gguf_py_reads_them(name: str) -> None:
    grid = gguf_grid.GRIDS[name]
    parts = grid.fit(weight(), None)
    made = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 256, parts["blocks"].shape, generator=made).to(torch.uint8)
    blocks = noise.reshape(-1, gguf.GGML_QUANT_SIZES[grid.type][1])
    for at in (grid.scale_at, grid.minimum_at):
        if at is not None:  # a float16 of any bytes may be no number
            blocks[:, at : at + 2] = torch.full((len(blocks), 1), 0.37, dtype=torch.float16).view(torch.uint8)
    parts = {"blocks": noise}
    found = grid.levels(parts).values(grid.codes(parts))
    assert torch.equal(found, read_by_gguf(noise, name))


@pytest.mark.parametrize("name", EVERY)
def test_codes_put_in_are_the_codes_read_and_the_levels_stay(name: str) -> None:
    grid = grid_of(name)
    parts = grid.fit(weight(), None)
    levels = grid.levels(parts)
    made = torch.Generator().manual_seed(2)
    codes = torch.randint(levels.low, levels.high + 1, (ROWS, COLUMNS), generator=made).to(torch.int16)
    changed = grid.with_codes(parts, codes)
    assert torch.equal(grid.codes(changed), codes)
    assert torch.equal(grid.levels(changed).scale, levels.scale)
    assert torch.equal(grid.levels(changed).minimum, levels.minimum)
    assert all(torch.equal(grid.with_codes(changed, grid.codes(parts))[key], parts[key]) for key in parts)


@pytest.mark.parametrize("name", EVERY)
def test_levels_that_a_layout_can_store_are_stored_as_they_are(name: str) -> None:
    grid = grid_of(name)
    levels = grid.levels(grid.fit(weight(), None))
    once = grid.levels(grid.with_levels(levels, COLUMNS))
    twice = grid.levels(grid.with_levels(once, COLUMNS))
    tolerance = 0.04 * float(levels.scale.abs().max())  # of q2_k's four bits of scale
    torch.testing.assert_close(once.scale, levels.scale, rtol=0, atol=tolerance)
    torch.testing.assert_close(twice.scale, once.scale, rtol=2e-3, atol=tolerance / 20)
    assert bool((grid.codes(grid.with_levels(levels, COLUMNS)) == 0).all())
    if grid.has_minima:
        allowed = 0.04 * float(levels.minimum.abs().max())
        torch.testing.assert_close(once.minimum, levels.minimum, rtol=0, atol=allowed)
    else:
        assert not once.minimum.any()


@pytest.mark.parametrize("name", EVERY)
def test_the_nearest_codes_are_no_further_than_any_other(name: str) -> None:
    grid, given = grid_of(name), weight()
    levels = grid.levels(grid.fit(given, None))
    best = (levels.values(levels.nearest(given)) - given).abs()
    for code in range(levels.low, levels.high + 1):
        other = (levels.values(torch.full_like(given, code, dtype=torch.int16)) - given).abs()
        assert bool((best <= other + 1e-6).all())


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "q3_k", "q2_k", "int4_g32", "int2_g32"])
def test_importances_draw_levels_to_the_columns_that_count(name: str) -> None:
    grid, given = grid_of(name), weight()
    importance = torch.ones(COLUMNS)
    importance[::7] = 100.0

    def weighed_error(importances: Tensor | None) -> float:
        return float(
            ((dequantized(stored(grid, grid.fit(given, importances))) - given) ** 2 * importance).mean()
        )

    assert weighed_error(importance) < 0.9 * weighed_error(None)


def test_llama_cpps_own_reader_agrees() -> None:
    library = llama_cpp.llama_cpp._lib
    for name in ("q4_k", "q5_k", "q6_k", "q3_k", "q2_k"):
        grid = gguf_grid.GRIDS[name]
        parts = grid.fit(weight(), None)
        out = np.empty((ROWS, COLUMNS), np.float32)
        read = getattr(library, f"dequantize_row_{name[:2]}_K")
        read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
        read(parts["blocks"].data_ptr(), out.ctypes.data, out.size)
        np.testing.assert_array_equal(out, grid.levels(parts).values(grid.codes(parts)).numpy())


@pytest.mark.parametrize(
    ("name", "dtype", "granularity"),
    [
        ("int4_g32", torch.int4, PerGroup(32)),
        ("int8_g32", torch.int8, PerGroup(32)),
        ("int8_channel", torch.int8, PerAxis(0)),
    ],
)
def test_integers_are_fitted_as_torchao_rounds(
    name: str, dtype: torch.dtype, granularity: PerGroup | PerAxis
) -> None:
    layer = nn.Linear(COLUMNS, ROWS, bias=False)
    layer.weight = nn.Parameter(weight(), requires_grad=False)
    quantize_(
        layer, Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
    )
    parts = grid_of(name).fit(weight(), None)
    expected: torch.Tensor = layer.weight
    assert torch.equal(parts["codes"], expected.qdata)  # type: ignore[attr-defined]
    assert torch.equal(parts["scales"], expected.scale)  # type: ignore[attr-defined]
    assert torch.equal(dequantized(stored(grid_of(name), parts)), expected.dequantize())


def test_tables_are_fitted_as_torchao_rounds() -> None:
    table = nn.Embedding(ROWS, COLUMNS)
    table.weight = nn.Parameter(weight(), requires_grad=False)
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantize_(table, config, lambda module, _name: isinstance(module, nn.Embedding))
    parts = grid_of("int4_g32").fit(weight(), None)
    assert torch.equal(parts["codes"], table.weight.qdata)  # type: ignore[attr-defined]


def test_sizes_are_those_of_the_device() -> None:
    weights = ROWS * COLUMNS
    sizes = {name: stored(grid_of(name), grid_of(name).fit(weight(), None)).num_bytes for name in EVERY}
    assert sizes["q4_0"] == weights * 18 // 32
    assert sizes["q2_k"] == weights * 84 // 256
    assert sizes["int4_g32"] == weights // 2 + weights // 32 * 4
    assert sizes["int2_g32"] == sizes["int4_g32"]  # there is nothing smaller to store them in
    assert sizes["int8_channel"] == weights + ROWS * 4


def test_an_unknown_layout_is_refused_with_a_list() -> None:
    with pytest.raises(UsageError, match="q9_9: no such storage layout") as caught:
        grid_of("q9_9")
    assert "q4_k" in str(caught.value.hint)


def test_a_scale_of_zero_gives_the_code_zero() -> None:
    levels = Levels(torch.zeros(1, 1), torch.zeros(1, 1), -8, 7)
    assert not levels.nearest(torch.ones(1, 32)).any()
