"""The uncut model in eager torch, quantised as the program's weights are, for the self-test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from skipstone.bundle import Bundle, ExecuTorchManifest, Quantization, manifest_of
from skipstone.exporters.compress.folder import read_codes
from skipstone.exporters.compress.work import FixedCodes
from skipstone.exporters.factors import load_factored
from skipstone.exporters.formats.executorch.calibration import calibrated
from skipstone.exporters.formats.executorch.codes import put_codes
from skipstone.exporters.formats.executorch.methods import Shape, methods_of
from skipstone.exporters.formats.executorch.modules import RowSegment, StaticKeyValues
from skipstone.exporters.formats.executorch.schemes import (
    Mix,
    quantize,
    quantize_parts,
    scheme_of,
)
from skipstone.exporters.segments import cut_decoder, load_decoder

FloatArray = NDArray[np.float32]


class EagerDecoder:
    """See `skipstone.exporters.formats.Oracle`.

    Args:
        bundle: what it is compared with.
        checkpoint: folder of the source.
    """

    def __init__(self, bundle: Bundle, checkpoint: str) -> None:
        model = load_factored(Path(checkpoint))
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
        _quantize(model, bundle.manifest.quantization, carried_codes(bundle, Path(checkpoint)))
        self._model = model
        self._dtype = next(model.model.layers.parameters()).dtype

    def logits(self, tokens: Sequence[int]) -> FloatArray:
        with torch.no_grad():
            logits = self._model(torch.tensor([list(tokens)])).logits[0]
        return np.asarray(logits.float().numpy(), np.float32)

    def draft_logits(self, hidden: FloatArray, token_ids: NDArray[np.int32]) -> FloatArray:
        decoder = self._model.model
        norm = decoder.norm if hasattr(decoder, "norm") else decoder.final_layernorm
        with torch.no_grad():
            logits = self._model.lm_head(norm(torch.from_numpy(hidden).to(self._dtype)))
        return np.asarray(logits.float().numpy()[:, token_ids], np.float32)


class CalibratedDecoder(EagerDecoder):
    """The same for static int8: one segment from end to end, calibrated on the same text.

    The draft head is compared with the one in float32.

    Args:
        bundle: what it is compared with.
        checkpoint: folder of the source.
        calibration: file of token ids.
    """

    def __init__(self, bundle: Bundle, checkpoint: str, calibration: str) -> None:
        super().__init__(bundle, checkpoint)
        program = manifest_of(bundle, ExecuTorchManifest).program
        shape = Shape(bundle.manifest.model.hidden_size, program.slots, program.max_width)
        parts = cut_decoder(
            load_decoder(Path(checkpoint)),
            (),
            None,
            lambda head: StaticKeyValues(head, program.slots),
            RowSegment,
        )
        quantize_parts(parts, mix_of(bundle.manifest.quantization))
        methods = calibrated(tuple(methods_of(parts, shape)), shape, np.load(calibration))
        self._methods = {method.name: method.module for method in methods}

    def logits(self, tokens: Sequence[int]) -> FloatArray:
        ids = torch.tensor([list(tokens)])
        places = torch.arange(ids.shape[1])[None]
        mask = torch.zeros(ids.shape[1], 1)
        start = tree = torch.zeros(1, dtype=torch.long)
        with torch.no_grad():
            hidden = self._methods["embed"](ids)
            hidden = self._methods["segment_0"](hidden, places, places, start, mask, tree)
            logits = self._methods["head"](hidden)[0]
        return np.asarray(logits.numpy(), np.float32)


def mix_of(quantization: Quantization) -> Mix:
    """The mix that a manifest names."""
    exceptions = {part: scheme_of(name) for part, name in quantization.mix.items()}
    return Mix(scheme_of(quantization.scheme), exceptions)


def carried_codes(bundle: Bundle, checkpoint: Path) -> FixedCodes | None:
    """The codes that a bundle was given from its checkpoint; None: its weights were rounded when it was made."""
    return None if bundle.manifest.quantization.codes_sha256 is None else read_codes(checkpoint)


def _quantize(model: Any, quantization: Quantization, codes: FixedCodes | None) -> None:
    """Quantise transformers' model part by part; what calibration rounds stays in float32."""
    mix = mix_of(quantization)
    decoder = model.model
    parts = {"embed": nn.ModuleList([decoder.embed_tokens]), "head": nn.ModuleList([model.lm_head])}
    parts |= {f"layer_{index}": layer for index, layer in enumerate(decoder.layers)}
    for part, module in parts.items():
        quantize(module, mix.of(part), mix.within(part))
        if codes is not None:
            put_codes(part, module, codes)
    decoder.embed_tokens, model.lm_head = parts["embed"][0], parts["head"][0]
    if mix.scheme.weight == "float16":
        model.half()
