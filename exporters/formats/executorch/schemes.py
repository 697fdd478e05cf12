"""Quantisation schemes of the ExecuTorch format, done by torchao on the cut modules.

    none    float32
    8da4w   int4 weights in groups of 32, activations rounded to int8 row by row while running; int4 embeddings
    8da8w   int8 weights per output channel, activations likewise; int8 embeddings

Activations are rounded while running, so the last bits of a sum may flip a rounding, and batches of different widths
differ by more than those bits, as they do in llama.cpp. The self-test measures by how much (docs/export.md: near-ties).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from skipstone.errors import UsageError

_GROUP = 32


@dataclass(frozen=True)
class Scheme:
    """A scheme.

    Attributes:
        name: what `--quantize` is given.
        weight: torch's dtype of the linear layers' weights; None: float32.
        per_channel: one scale per output channel instead of one per group.
        reference_width: least rows of a batch, where a narrower one computes something else; 1: any width will do.
        min_agreement: share of positions at which the best token must be the float32 model's.
    """

    name: str
    weight: Literal["int4", "int8"] | None
    per_channel: bool
    reference_width: int
    min_agreement: float


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("none", None, False, 1, 0.99),
        Scheme("8da4w", "int4", False, 1, 0.5),
        Scheme("8da8w", "int8", True, 1, 0.8),
    )
}


def scheme_of(name: str) -> Scheme:
    """The scheme of that name; `f32` is `none`.

    Raises:
        UsageError: no such scheme; lists them.
    """
    scheme = SCHEMES.get("none" if name == "f32" else name.lower())
    if scheme is None:
        near = difflib.get_close_matches(name.lower(), SCHEMES, n=1)
        raise UsageError(
            f"--quantize {name}: unknown scheme for --format executorch, expected {', '.join(SCHEMES)}",
            hint=f"did you mean {near[0]}?" if near else "see docs/executorch.md",
        )
    return scheme


def quantize(module: nn.Module, scheme: Scheme) -> None:
    """Quantise a module's linear layers and embeddings in place.

    Raises:
        UsageError: a layer whose width is no multiple of the group.
    """
    if scheme.weight is None:
        return
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    _check_groups(module, scheme)
    dtype = getattr(torch, scheme.weight)
    quantize_(
        module,
        IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerGroup(_GROUP)),
        _is(nn.Embedding),
    )
    granularity = PerAxis(0) if scheme.per_channel else PerGroup(_GROUP)
    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
    quantize_(module, config, _is(nn.Linear))


def _is(kind: type[nn.Module]) -> Callable[[nn.Module, str], bool]:
    return lambda module, _name: isinstance(module, kind)


def _check_groups(module: nn.Module, scheme: Scheme) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and not scheme.per_channel and layer.in_features % _GROUP:
            raise UsageError(
                f"--quantize {scheme.name}: {name} has {layer.in_features} inputs, a multiple of {_GROUP} is needed",
                hint="use --quantize 8da8w",
            )


def weight_bytes(module: nn.Module, scheme: Scheme) -> int:
    """Bytes of weights that one call of a module reads, scales included. Call it before `quantize`."""
    total = 0
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            total += _stored_bytes(parameter, scheme if isinstance(layer, nn.Linear) else SCHEMES["none"])
    return total


def _stored_bytes(weight: torch.Tensor, scheme: Scheme) -> int:
    if scheme.weight is None or weight.dim() < 2:
        return weight.numel() * 4
    bits = 4 if scheme.weight == "int4" else 8
    scales = weight.shape[0] if scheme.per_channel else weight.numel() // _GROUP
    return weight.numel() * bits // 8 + 4 * scales
