"""Quantisation schemes and mixes of the ExecuTorch format."""

import pytest
import torch
from torch import nn

from skipstone.errors import UsageError
from skipstone.exporters.formats.executorch import schemes
from skipstone.exporters.formats.executorch.schemes import parse_mix


def test_a_mix_names_layers_head_and_embedding() -> None:
    mix = parse_mix("8da4w", "head=8da8w, 0-1=none,7=8da8w,embed=f32", 12)
    assert {part: mix.of(part).name for part in ("embed", "layer_0", "layer_1", "layer_2", "layer_7", "head")} == {
        "embed": "none", "layer_0": "none", "layer_1": "none", "layer_2": "8da4w", "layer_7": "8da8w", "head": "8da8w",
    }  # fmt: skip
    assert mix.quantizes
    assert mix.rounds_while_running
    assert not mix.exact
    assert mix.min_agreement == 0.5


def test_a_scheme_alone_is_a_mix_without_exceptions() -> None:
    plain, rounded = parse_mix("none", None, 3), parse_mix("int8", None, 3)
    assert plain.exact
    assert not plain.quantizes
    assert rounded.quantizes
    assert not rounded.rounds_while_running
    assert plain.names == {}


@pytest.mark.parametrize(
    ("quantize", "mix", "message"),
    [
        ("8da4w", "head", "'head' is no part with its scheme"),
        ("8da4w", "tail=none", "'tail' is no part"),
        ("8da4w", "3=q8_0", "--mix q8_0: unknown scheme"),
        ("8da4w", "2-1=none", "no layers 2-1: the model has the layers 0 to 3"),
        ("8da4w", "0-4=none", "no layers 0-4"),
        ("8da4w", "0-2=none,1=8da8w", "layer_1 is named twice"),
        ("fp16", "head=none", "fp16 cannot be mixed"),
        ("8da4w", "0=int8", "int8 cannot be mixed"),
    ],
)
def test_mixes_that_cannot_work_are_refused(quantize: str, mix: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_mix(quantize, mix, 4)


def test_weights_that_do_not_fill_groups_are_refused() -> None:
    with pytest.raises(UsageError, match="has 40 inputs, a multiple of 32"):
        schemes.quantize(nn.Sequential(nn.Linear(40, 8)), schemes.scheme_of("8da4w"))


def test_quantising_is_rounding_to_fifteen_steps_per_group() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 16, bias=False)).requires_grad_(False)
    weight = layer[0].weight.clone()
    assert schemes.weight_bytes(layer, schemes.scheme_of("8da4w")) == 64 * 16 // 2 + 4 * 32
    schemes.quantize(layer, schemes.scheme_of("8da4w"))
    error = (layer(torch.eye(64)).T - weight).abs().reshape(16, 2, 32).amax(-1)
    step = weight.abs().reshape(16, 2, 32).amax(-1) / 7
    assert bool((error <= 0.62 * step + 0.01).all())
    assert float(error.max()) > 0


def test_an_embedding_that_does_not_fill_groups_is_refused() -> None:
    with pytest.raises(UsageError, match="has 40 inputs, a multiple of 32"):
        schemes.quantize(nn.Sequential(nn.Embedding(8, 40)), schemes.scheme_of("8da8w"))


def test_half_the_bytes_in_half_precision() -> None:
    layer = nn.Sequential(nn.Linear(64, 16, bias=False))
    half = schemes.scheme_of("fp16")
    assert schemes.weight_bytes(layer, half) == 64 * 16 * 2
    schemes.quantize(layer, half)
    assert layer[0].weight.dtype == torch.float16
