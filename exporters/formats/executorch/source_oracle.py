"""The uncut encoder-decoder in eager torch, quantised as the program's weights are, for the self-test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from skipstone.bundle import Bundle, ExecuTorchManifest, manifest_of
from skipstone.exporters.encoder_decoder import Cuts, Limits
from skipstone.exporters.formats.executorch.codes import put_codes_in_parts
from skipstone.exporters.formats.executorch.oracle import carried_codes, mix_of
from skipstone.exporters.formats.executorch.source_program import cut_for_slots, named_parts, quantize_parts

FloatArray = NDArray[np.float32]


class EagerEncoderDecoder:
    """See `skipstone.exporters.formats.Oracle`: one segment for each stack, from end to end.

    Args:
        bundle: what it is compared with.
        checkpoint: folder of the source.
    """

    def __init__(self, bundle: Bundle, checkpoint: str) -> None:
        manifest = manifest_of(bundle, ExecuTorchManifest)
        encoder, slots = manifest.model.encoder, manifest.program.slots
        limits = Limits(slots if encoder is None else encoder.max_source_length, slots)
        self._parts = cut_for_slots(Path(checkpoint), Cuts((), ()), limits, None)
        quantize_parts(self._parts, mix_of(manifest.quantization))
        codes = carried_codes(bundle, Path(checkpoint))
        if codes is not None:
            put_codes_in_parts(named_parts(self._parts), codes, None)

    def logits(self, tokens: Sequence[int], source: Sequence[int] = ()) -> FloatArray:
        parts, places = self._parts, torch.arange(len(tokens))
        (encoder,), (decoder,) = parts.encoder, parts.decoder
        distances = (places[:, None] - places).clamp(min=-1)
        with torch.no_grad():
            parts.source(encoder(parts.embedding(torch.tensor([list(source)]))))
            hidden = parts.embedding(torch.tensor([list(tokens)]))
            hidden = decoder(hidden, places[None], distances, torch.arange(len(source)))
            logits = parts.head(hidden)[0]
        return np.asarray(logits.numpy(), np.float32)

    def draft_logits(self, hidden: FloatArray, token_ids: NDArray[np.int32]) -> FloatArray:
        with torch.no_grad():
            logits = self._parts.head(torch.from_numpy(hidden)[None])[0]
        return np.asarray(logits.numpy()[:, token_ids], np.float32)
