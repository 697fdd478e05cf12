"""How many weights a pattern removes, and where."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skipstone.errors import UsageError
from skipstone.exporters.compress.sparsify import open_pruner, pruner_names
from skipstone.exporters.compress.sparsify.masks import Pattern, keep_largest, squared_error
from tests.exporters.compress.sparsify.layers import random_layer


@given(st.integers(1, 6), st.integers(1, 40), st.floats(0.0, 0.99), st.integers(0, 9))
def test_every_row_loses_the_share_asked_for(rows: int, width: int, share: float, seed: int) -> None:
    scores = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed))
    kept = keep_largest(scores, Pattern(share))
    assert kept.sum(dim=1).tolist() == [width - int(width * share)] * rows
    for row, mask in zip(scores, kept, strict=True):
        assert row[~mask].numel() == 0 or row[~mask].max() <= row[mask].min()


@pytest.mark.parametrize(("text", "kept", "group"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
@pytest.mark.parametrize("name", pruner_names())
def test_every_group_keeps_as_many_as_the_pattern_says(name: str, text: str, kept: int, group: int) -> None:
    layer = random_layer(12, 32)
    weight, mask = open_pruner(name)(layer.weight, layer.moment, Pattern.parse(text))
    assert (mask.reshape(-1, group).sum(dim=1) == kept).all()
    assert torch.equal(weight != 0, mask)


@pytest.mark.parametrize("name", pruner_names())
def test_a_pruner_keeps_to_the_share_and_changes_nothing_it_is_given(name: str) -> None:
    layer = random_layer(12, 32)
    before = layer.weight.clone()
    weight, mask = open_pruner(name)(layer.weight, layer.moment, Pattern(0.25))
    assert int((~mask).sum()) == 12 * 32 // 4
    assert torch.equal(weight != 0, mask)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("name", pruner_names())
def test_a_pruner_keeps_to_a_mask_that_it_is_given(name: str) -> None:
    layer = random_layer(6, 16)
    mask = torch.rand(6, 16, generator=torch.Generator().manual_seed(3)) > 0.4
    weight, kept = open_pruner(name)(layer.weight, layer.moment, Pattern(0.5), mask)
    assert torch.equal(kept, mask)
    assert torch.equal(weight != 0, mask)


def test_the_error_by_the_moment_is_that_of_the_outputs() -> None:
    layer = random_layer(5, 16)
    other = layer.weight * 0.9
    found = squared_error(other - layer.weight, layer.moment)
    torch.testing.assert_close(found, layer.error(other))


@pytest.mark.parametrize("text", ["half", "1.0", "-0.1", "4:2", "0:4", "2:4:8", "nan"])
def test_what_is_no_sparsity_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no sparsity"):
        Pattern.parse(text)


def test_a_width_that_groups_do_not_fill_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"layers.0.up has 30 inputs, which 4:8 does not divide"):
        Pattern.parse("4:8").check_fits(torch.ones(4, 30), "layers.0.up")


def test_an_unknown_pruner_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(UsageError, match=r"'lottery' is not known \(one of magnitude, wanda, sparsegpt\)"):
        open_pruner("lottery")
