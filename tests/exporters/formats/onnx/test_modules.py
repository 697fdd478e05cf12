"""What the graphs compute, in eager torch: nothing is traced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from skipstone.bundle import past_names, present_names
from skipstone.errors import CheckpointError
from skipstone.exporters.checkpoint import load_eager
from skipstone.exporters.formats.onnx.modules import (
    MASKED,
    GraphSegment,
    Product,
    RotaryTable,
    cut_for_graphs,
)
from tests.exporters.conftest import MakeTiny

CONTEXT = 64


@pytest.mark.parametrize("name", ["llama", "llama-3", "llama-linear", "llama-yarn", "qwen-3"])
def test_the_tables_hold_the_angles_of_transformers_own_rotary_embedding(tiny: MakeTiny, name: str) -> None:
    rotary = load_eager(tiny(name)).model.rotary_emb
    positions = torch.tensor([[0, 63, 5, 5, 17]], dtype=torch.int32)
    hidden = torch.zeros(1, 5, 64)
    found = RotaryTable(rotary, CONTEXT)(hidden, positions)
    expected = rotary(hidden, positions.long())
    assert not torch.equal(expected[0][0, 0], expected[0][0, 1])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_computes_what_its_linear_layer_does(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(5, 3, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        hidden = torch.randn(1, 4, 5, generator=generator)
        torch.testing.assert_close(Product(linear)(hidden), linear(hidden))


@pytest.mark.parametrize("name", ["llama-biases", "llama-3", "qwen-2", "qwen-3", "smollm-3"])
def test_text_in_two_batches_has_the_logits_of_transformers_whole_model(tiny: MakeTiny, name: str) -> None:
    """The second batch sees the first as past, behind slots that are masked and hold anything."""
    parts = cut_for_graphs(tiny(name), (1,), np.array([3, 7], np.int32), CONTEXT)
    tokens, first, rubbish = torch.arange(5, 25)[None], 13, 3
    with torch.no_grad():
        expected = load_eager(tiny(name))(tokens).logits
        found = []
        pasts = [[torch.full(shape, 9.0) for shape in past_shapes(part, rubbish)] for part in parts.segments]
        for start, stop in ((0, first), (first, 20)):
            hidden, count = parts.embedding(tokens[:, start:stop]), stop - start
            mask = torch.full((1, 1, count, rubbish + stop), MASKED)
            for row in range(count):
                mask[..., row, rubbish : rubbish + start + row + 1] = 0.0
            positions = torch.arange(start, stop, dtype=torch.int32)[None]
            for index, segment in enumerate(parts.segments):
                hidden, *present = segment(hidden, positions, mask, pasts[index])
                pasts[index] = [torch.cat(pair, 2) for pair in zip(pasts[index], present, strict=True)]
            found.append(hidden)
        hidden = torch.cat(found, 1)
        torch.testing.assert_close(parts.head(hidden), expected, atol=1e-4, rtol=0)
        assert parts.draft_head is not None
        torch.testing.assert_close(parts.draft_head(hidden), expected[:, :, [3, 7]], atol=1e-4, rtol=0)


def past_shapes(segment: nn.Module, slots: int) -> list[tuple[int, ...]]:
    assert isinstance(segment, GraphSegment)
    return [(1, shape.heads, slots, shape.size) for shape in segment.shapes for _ in range(2)]


def test_names_count_layers_in_the_whole_model(tiny: MakeTiny) -> None:
    parts = cut_for_graphs(tiny("llama"), (1, 3), None, CONTEXT)
    segment = parts.segments[1]
    assert isinstance(segment, GraphSegment)
    assert segment.layer_indices == (1, 2)
    assert list(past_names(segment.layer_indices))[1:3] == [
        "past_key_values.1.value",
        "past_key_values.2.key",
    ]
    assert list(present_names(segment.layer_indices))[-1] == "present.2.value"
    assert past_names([3], "encoder") == ["past_key_values.3.encoder.key", "past_key_values.3.encoder.value"]
    assert present_names([3], "decoder")[0] == "present.3.decoder.key"


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_depend_on_the_texts_length_are_refused_past_what_was_trained(
    tiny: MakeTiny, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    factors = {"long_factor": [2.0] * 16, "short_factor": [1.0] * 16} if kind == "longrope" else {}
    config["rope_parameters"] = {
        "rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32, **factors,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    cut_for_graphs(folder, (), None, 32)
    with pytest.raises(CheckpointError, match=f"rope_type {kind} changes its angles past 32 positions, 33"):
        cut_for_graphs(folder, (), None, 33)
