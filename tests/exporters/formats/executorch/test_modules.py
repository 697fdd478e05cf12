"""What the methods compute, in eager torch: nothing is lowered."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from skipstone.exporters.formats.executorch.modules import Compaction, RowSegment, StaticKeyValues
from skipstone.exporters.segments import Parts, cut_decoder, load_decoder
from tests.exporters.tiny import CASES, make_checkpoint

SLOTS = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("modules") / "llama", CASES["llama"])


@pytest.fixture
def parts(checkpoint: Path) -> Parts:
    return cut_decoder(
        load_decoder(checkpoint), (1, 3), None, lambda shape: StaticKeyValues(shape, SLOTS), RowSegment
    )


def buffers(parts: Parts) -> dict[str, torch.Tensor]:
    """K and V of every layer, [1, slots, heads, size]."""
    found = {
        f"{layer}.{kind}": cast("torch.Tensor", getattr(module.self_attn.key_values, kind))
        for segment in parts.segments
        for layer, module in segment.layers.items()
        for kind in ("keys", "values")
    }
    assert len(found) == 8
    return found


@pytest.mark.parametrize(
    ("sources", "targets"),
    [([5], [3]), ([7, 9, 12], [4, 5, 6]), ([6, 7, 8], [5, 6, 7]), ([8, 7], [7, 8]), ([2, 2], [0, 1])],
    ids=["one", "several", "overlapping", "swapped", "copied"],
)
def test_compaction_moves_rows_of_every_layer_and_leaves_the_rest(
    parts: Parts, sources: list[int], targets: list[int]
) -> None:
    """All sources are read before a target is written."""
    generator = torch.Generator().manual_seed(0)
    for buffer in buffers(parts).values():
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    expected = {name: buffer.numpy().copy() for name, buffer in buffers(parts).items()}
    for array in expected.values():
        array[:, targets] = array[:, sources].copy()
    given = torch.tensor(sources)
    with torch.no_grad():
        returned = Compaction(parts.segments)(given, torch.tensor([targets]))
    assert returned.tolist() == sources
    for name, buffer in buffers(parts).items():
        np.testing.assert_array_equal(buffer.numpy(), expected[name], err_msg=name)
