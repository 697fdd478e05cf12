"""Quantisation schemes of the ExecuTorch format, and mixes of them.

    none    float32
    fp16    float16 weights and sums of the layers and heads; attention in float32
    8da4w   int4 weights in groups of 32, activations rounded to int8 row by row while running; int4 embeddings
    8da8w   int8 weights per output channel, activations likewise; int8 embeddings
    int8    int8 weights per output channel, activations rounded with scales fixed by calibration; int8 embeddings
    4w, 8w  weights as in 8da4w and 8da8w, activations left alone: for targets whose hardware computes in float16

Where activations are rounded while running, the last bits of a sum may flip a rounding, and batches of different widths
differ by more than those bits, as they do in llama.cpp. The self-test measures by how much (docs/export.md: near-ties).

A mix gives parts of the model schemes of their own:

    >>> parse_mix("8da4w", "head=8da8w,0-1=none", num_layers=12).of("layer_1").name
    'none'
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from skipstone.errors import UsageError
from skipstone.exporters.formats.scheme_names import find_scheme
from skipstone.exporters.segments import Parts

_GROUP = 32
_LAYERS = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Scheme:
    """A scheme.

    Attributes:
        name: what `--quantize` is given.
        weight: torch's dtype of the linear layers' weights; None: float32.
        per_channel: one scale per output channel instead of one per group.
        activations: `float`, `dynamic` (rounded row by row while running) or `static` (by calibrated scales).
        min_agreement: share of positions at which the best token must be the float32 model's.
    """

    name: str
    weight: Literal["int4", "int8", "float16"] | None
    per_channel: bool
    activations: Literal["float", "dynamic", "static"]
    min_agreement: float

    @property
    def mixes(self) -> bool:
        """Whether a mix may hold it: it is a matter of single layers, and leaves what flows between them alone."""
        return self.weight != "float16" and self.activations != "static"


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("none", None, False, "float", 0.99),
        Scheme("fp16", "float16", False, "float", 0.95),
        Scheme("8da4w", "int4", False, "dynamic", 0.5),
        Scheme("8da8w", "int8", True, "dynamic", 0.8),
        Scheme("int8", "int8", True, "static", 0.5),
        Scheme("4w", "int4", False, "float", 0.5),
        Scheme("8w", "int8", True, "float", 0.8),
    )
}


@dataclass(frozen=True)
class Mix:
    """Which part of a model gets which scheme.

    Attributes:
        scheme: of what is not named.
        exceptions: by part: `embed`, `layer_0`, …, or `head`, which names the draft head too; or by a matrix within a
            part, say `layer_0.mlp.down_proj`.
    """

    scheme: Scheme
    exceptions: Mapping[str, Scheme]

    def of(self, part: str) -> Scheme:
        """The scheme of a part, or of a matrix within one."""
        whole = self.exceptions.get(part.partition(".")[0], self.scheme)
        return self.exceptions.get(part, whole)

    def within(self, part: str) -> dict[str, Scheme]:
        """The matrices in a part that differ from it, by their names there."""
        prefix = f"{part}."
        return {
            name.removeprefix(prefix): scheme
            for name, scheme in self.exceptions.items()
            if name.startswith(prefix)
        }

    @property
    def schemes(self) -> frozenset[Scheme]:
        """All that occur."""
        return frozenset((self.scheme, *self.exceptions.values()))

    @property
    def quantizes(self) -> bool:
        """Whether any weight is rounded to integers."""
        return any(scheme.weight in ("int4", "int8") for scheme in self.schemes)

    @property
    def rounds_while_running(self) -> bool:
        """Whether activations are rounded with scales found while running."""
        return any(scheme.activations == "dynamic" for scheme in self.schemes)

    @property
    def exact(self) -> bool:
        """Whether everything stays in float32."""
        return all(scheme.weight is None for scheme in self.schemes)

    @property
    def names(self) -> dict[str, str]:
        """The exceptions by name, as the manifest keeps them."""
        return {part: scheme.name for part, scheme in self.exceptions.items()}

    @property
    def min_agreement(self) -> float:
        """See `Scheme.min_agreement`: what the coarsest scheme allows."""
        return min(scheme.min_agreement for scheme in self.schemes)


def scheme_of(name: str, flag: str = "--quantize") -> Scheme:
    """The scheme of that name; `f32` is `none`.

    Raises:
        UsageError: no such scheme; lists them.
    """
    return find_scheme(name, SCHEMES, format="executorch", docs="docs/executorch.md", flag=flag)


def parse_mix(quantize: str, mix: str | None, num_layers: int) -> Mix:
    """`--quantize` and `--mix`, say `head=8da8w,0-2=none,embed=none`.

    Raises:
        UsageError: an unknown scheme or part, a layer the model lacks, a part named twice, or schemes that do not mix.
    """
    scheme = scheme_of(quantize)
    exceptions: dict[str, Scheme] = {}
    for item in mix.split(",") if mix else ():
        part, separator, name = (text.strip() for text in item.partition("="))
        if not separator or not name:
            raise UsageError(
                f"--mix {mix}: {item!r} is no part with its scheme", hint="write it as head=8da8w,0-2=none"
            )
        for key in _parts_named(part, num_layers):
            if key in exceptions:
                raise UsageError(f"--mix {mix}: {key} is named twice")
            exceptions[key] = scheme_of(name, "--mix")
    found = Mix(scheme, exceptions)
    if exceptions and not all(one.mixes for one in found.schemes):
        alone = sorted(one.name for one in found.schemes if not one.mixes)
        able = ", ".join(one.name for one in SCHEMES.values() if one.mixes)
        raise UsageError(f"--mix {mix}: {', '.join(alone)} cannot be mixed", hint=f"these can: {able}")
    return found


def _parts_named(text: str, num_layers: int) -> list[str]:
    """`head`, `embed`, `3` or `0-2` → the parts' names."""
    if text in ("head", "embed"):
        return [text]
    match = _LAYERS.fullmatch(text)
    if match is None:
        raise UsageError(
            f"--mix: {text!r} is no part", hint="expected embed, head, a layer or layers like 0-2"
        )
    first, last = int(match[1]), int(match[2] or match[1])
    if not first <= last < num_layers:
        raise UsageError(f"--mix: no layers {text}: the model has the layers 0 to {num_layers - 1}")
    return [f"layer_{index}" for index in range(first, last + 1)]


def quantize_parts(parts: Parts, mix: Mix) -> None:
    """Quantise a cut model in place, but for what calibration does (`calibrated`).

    Raises:
        UsageError: a layer whose width is no multiple of the group.
    """
    for part, module in named_parts(parts):
        quantize(module, mix.of(part), mix.within(part))


def named_parts(parts: Parts) -> Iterator[tuple[str, nn.Module]]:
    """The parts that a mix names, in the model's order; the draft head goes by the name of the head."""
    yield "embed", parts.embedding
    for segment in parts.segments:
        yield from segment.layers.items()
    for head in (parts.head, parts.draft_head):
        if head is not None:
            yield "head", head


def quantize(module: nn.Module, scheme: Scheme, within: Mapping[str, Scheme] | None = None) -> None:
    """Quantise a module's linear layers and embeddings in place; embeddings alone where activations are calibrated.

    Args:
        module: of a model in float32.
        scheme: of all layers that `within` does not name.
        within: schemes of single layers, by their names in the module.

    Raises:
        UsageError: a layer whose width is no multiple of the group.
    """
    if within:
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                quantize(layer, within.get(name, scheme))
        return
    if scheme.weight is None:
        return
    if scheme.weight == "float16":
        module.half()
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
    if scheme.activations == "dynamic":
        rounding = Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
        quantize_(module, rounding, _is(nn.Linear))
    elif scheme.activations == "float":
        alone = IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
        quantize_(module, alone, _is(nn.Linear))


def _is(kind: type[nn.Module]) -> Callable[[nn.Module, str], bool]:
    return lambda module, _name: isinstance(module, kind)


def _check_groups(module: nn.Module, scheme: Scheme) -> None:
    """Embeddings are always rounded in groups, linear layers where the scheme says so."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and not scheme.per_channel:
            width, instead = layer.in_features, "8da8w"
        elif isinstance(layer, nn.Embedding):
            width, instead = layer.embedding_dim, "none"
        else:
            continue
        if width % _GROUP:
            raise UsageError(
                f"--quantize {scheme.name}: {name} has {width} inputs, a multiple of {_GROUP} is needed",
                hint=f"use --quantize {instead}",
            )


def weight_bytes(module: nn.Module, scheme: Scheme, within: Mapping[str, Scheme] | None = None) -> int:
    """Bytes of weights that one call of a module reads, scales included; as `quantize`, and to be called before it."""
    total = 0
    for name, layer in module.named_modules():
        own = scheme if within is None else within.get(name, scheme)
        for parameter in layer.parameters(recurse=False):
            total += _stored_bytes(parameter, own, isinstance(layer, nn.Linear))
    return total


def _stored_bytes(weight: torch.Tensor, scheme: Scheme, matrix: bool) -> int:
    if scheme.weight == "float16":
        return weight.numel() * 2
    if scheme.weight is None or not matrix or weight.dim() < 2:
        return weight.numel() * 4
    bits = 4 if scheme.weight == "int4" else 8
    scales = weight.shape[0] if scheme.per_channel else weight.numel() // _GROUP
    return weight.numel() * bits // 8 + 4 * scales
