"""An encoder-decoder on its way into a program."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from skipstone.errors import UsageError
from skipstone.exporters import encoder_decoder, encoder_decoder_modules
from skipstone.exporters.compress.work import FixedCodes
from skipstone.exporters.encoder_decoder import (
    Cuts,
    EncoderDecoderParts,
    Limits,
    cut_encoder_decoder,
    load_encoder_decoder,
    write_for_delegates,
)
from skipstone.exporters.encoder_decoder_modules import source_attention
from skipstone.exporters.formats.executorch import source_modules
from skipstone.exporters.formats.executorch.codes import put_codes_in_parts
from skipstone.exporters.formats.executorch.coreml import infer_rows
from skipstone.exporters.formats.executorch.methods import Method, Shape
from skipstone.exporters.formats.executorch.schemes import Mix, quantize, weight_bytes
from skipstone.exporters.formats.executorch.source_modules import (
    SlotCompaction,
    SlotSegment,
    StaticCores,
    StaticProjection,
)
from skipstone.exporters.formats.executorch.targets import Target

_EXAMPLE_WIDTH, _EXAMPLE_SOURCE = 5, 6
_TARGET = "xnnpack"
_CROSSING = "layer.1.EncDecAttention"


class SourceProgram:
    """See `skipstone.exporters.formats.executorch.exporter.CutModel`.

    Args:
        parts: the model, cut.
        shape: what the decoder can hold.
        source_length: most tokens of a source.
        draft_tokens: token ids of the draft head's rows; None: no draft head.
        codes: those that the checkpoint's weights have; None: they are rounded here.
    """

    def __init__(
        self,
        parts: EncoderDecoderParts,
        shape: Shape,
        source_length: int,
        draft_tokens: NDArray[np.int32] | None = None,
        codes: FixedCodes | None = None,
    ) -> None:
        self._parts, self._shape, self._source_length = parts, shape, source_length
        self._draft_tokens, self._codes = draft_tokens, codes

    def weight_bytes(self, mix: Mix) -> dict[str, int]:
        parts = self._parts
        sizes = {
            f"encoder_{index}": sum(
                weight_bytes(layer, mix.of(part), mix.within(part)) for part, layer in segment.layers.items()
            )
            for index, segment in enumerate(parts.encoder)
        }
        sizes["cross"] = weight_bytes(parts.source.norm, mix.scheme)
        for index, segment in enumerate(parts.decoder):
            every = {
                part: weight_bytes(layer, mix.of(part), mix.within(part))
                for part, layer in segment.layers.items()
            }
            crossing = sum(
                weight_bytes(getattr(source_attention(layer), matrix), mix.of(f"{part}.{_CROSSING}.{matrix}"))
                for part, layer in segment.layers.items()
                for matrix in "kv"
            )
            sizes[f"segment_{index}"] = sum(every.values()) - crossing
            sizes["cross"] += crossing
        sizes["head"] = weight_bytes(parts.head, mix.of("head"))
        if parts.draft_head is not None:
            sizes["draft_head"] = weight_bytes(parts.draft_head, mix.of("head"))
        return sizes

    def methods(self, mix: Mix, step: Callable[[str], None]) -> list[Method]:
        quantize_parts(self._parts, mix)
        if self._codes is not None:
            put_codes_in_parts(named_parts(self._parts), self._codes, self._draft_tokens)
        return list(methods_of(self._parts, self._shape, self._source_length))


def cut_for_slots(
    checkpoint: Path, cuts: Cuts, limits: Limits, draft_tokens: NDArray[np.int32] | None
) -> EncoderDecoderParts:
    """A checkpoint's encoder-decoder, cut into modules over static buffers.

    Args:
        checkpoint: folder.
        cuts: inner exits.
        limits: longest texts.
        draft_tokens: token ids of the draft head's rows; None: no draft head.
    """
    return cut_encoder_decoder(
        write_for_delegates(load_encoder_decoder(checkpoint)),
        cuts,
        limits,
        draft_tokens,
        StaticCores(limits.slots, limits.source),
        decoder_segment=SlotSegment,
        projection=StaticProjection,
    )


def named_parts(parts: EncoderDecoderParts) -> Iterator[tuple[str, nn.Module]]:
    """The parts by the names a mix knows; the encoder's layers, which it does not, as `encoder_layer_0` and so on."""
    yield "embed", parts.embedding
    for layers in (segment.layers for stack in (parts.encoder, parts.decoder) for segment in stack):
        yield from layers.items()
    for head in (parts.head, parts.draft_head):
        if head is not None:
            yield "head", head


def quantize_parts(parts: EncoderDecoderParts, mix: Mix) -> None:
    """Quantise a cut model in place. In float16 the last matrix of a feed-forward stays in float32, as it does in
    transformers: T5's sums go past what float16 holds.

    Raises:
        UsageError: a layer whose width is no multiple of the group.
    """
    for part, module in (*named_parts(parts), ("norm", parts.source.norm)):
        scheme = mix.of(part)
        if scheme.weight != "float16":
            quantize(module, scheme, mix.within(part))
            continue
        for name, parameter in module.named_parameters():
            if "wo" not in name.split("."):
                parameter.data = parameter.data.half()


def methods_of(parts: EncoderDecoderParts, shape: Shape, source_length: int) -> Iterator[Method]:
    """All methods of a cut encoder-decoder."""
    rows = torch.export.Dim("rows", min=1, max=shape.max_width)
    tokens = torch.export.Dim("tokens", min=1, max=max(shape.max_width, source_length))
    given = torch.export.Dim("given", min=1, max=source_length)
    seen = torch.export.Dim("seen", min=1, max=shape.slots)
    count = _EXAMPLE_WIDTH
    hidden, places = torch.zeros(1, count, shape.hidden_size), torch.arange(count)
    yield Method("embed", parts.embedding, (places[None],), ({1: tokens},))
    for index, segment in enumerate(parts.encoder):
        yield Method(f"encoder_{index}", segment, (hidden,), ({1: given},))
    yield Method("cross", parts.source, (hidden,), ({1: given},))
    distances, source = torch.zeros(count, count + 2, dtype=torch.long), torch.arange(_EXAMPLE_SOURCE)
    for index, part in enumerate(parts.decoder):
        inputs = (hidden, places[None], distances, source)
        widths = ({1: rows}, {1: rows}, {0: rows, 1: seen}, {0: given})
        yield Method(f"segment_{index}", part, inputs, widths)
    yield Method("head", parts.head, (hidden,), ({1: rows},))
    if parts.draft_head is not None:
        yield Method("draft_head", parts.draft_head, (hidden,), ({1: rows},))
    yield Method("compact", SlotCompaction(parts.decoder), (places, places[None]), ({0: rows}, {1: rows}))


def suited(target: Target, mix: Mix) -> Target:
    """The target as encoder-decoders are lowered for it: reshapes find the number of rows themselves, so that the
    delegate takes them too.

    Raises:
        UsageError: scales fixed by calibration, or a target other than the CPU.
    """
    if any(scheme.activations == "static" for scheme in mix.schemes):
        raise UsageError(
            f"--quantize {mix.scheme.name}: not for encoder-decoders", hint="use --quantize 8da8w"
        )
    if target.name != _TARGET:
        raise UsageError(
            f"target {target.name}: encoder-decoders are lowered for {_TARGET} alone", hint="use --device cpu"
        )
    return replace(target, passes=lambda: [infer_rows])


def code_hash() -> str:
    """Hash of the modules that encoder-decoders' programs depend on beside those of all programs."""
    digest = hashlib.sha256()
    for module in (source_modules, encoder_decoder, encoder_decoder_modules):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()
