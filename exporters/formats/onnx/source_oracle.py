"""The uncut encoder-decoder in eager torch with the weights that a bundle's graphs hold, for the self-test."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from skipstone.bundle import Bundle, OnnxManifest, manifest_of
from skipstone.exporters.factors import load_factored
from skipstone.exporters.formats.onnx.oracle import as_parameter, matrices, read_table

FloatArray = NDArray[np.float32]
_LAYER = re.compile(r"^layers\.(encoder_)?layer_(\d+)\.(.+)$")


class EagerEncoderDecoder:
    """See `skipstone.exporters.formats.Oracle`: transformers' T5, its matrices and embeddings read out of the bundle.

    Args:
        bundle: what it is compared with.
        checkpoint: folder of the source.
    """

    def __init__(self, bundle: Bundle, checkpoint: str) -> None:
        graphs, model = manifest_of(bundle, OnnxManifest).graphs, load_factored(Path(checkpoint))
        modules = dict(model.named_modules())
        for entry in graphs.graphs:
            if entry.part == "draft_head":
                continue
            for name, weight in matrices(ir.load(bundle.file(entry.file))):
                modules[_place(name)].weight = as_parameter(weight.T)
        rows = as_parameter(read_table(bundle, graphs.embedding))
        for stack in (model.encoder, model.decoder):  # which share their table with a tied head
            stack.embed_tokens.weight = rows
        self._model: Any = model

    def logits(self, tokens: Sequence[int], source: Sequence[int] = ()) -> FloatArray:
        given = {"input_ids": torch.tensor([list(source)]), "decoder_input_ids": torch.tensor([list(tokens)])}
        with torch.no_grad():
            logits = self._model(**given).logits[0]
        return np.asarray(logits.numpy(), np.float32)

    def draft_logits(self, hidden: FloatArray, token_ids: NDArray[np.int32]) -> FloatArray:
        model = self._model
        with torch.no_grad():
            states = model.decoder.final_layer_norm(torch.from_numpy(hidden))
            if model.config.scale_decoder_outputs:
                states = states * model.config.d_model**-0.5
            logits = model.lm_head(states)
        return np.asarray(logits.numpy()[:, token_ids], np.float32)


def _place(name: str) -> str:
    """Where a weight of a graph belongs in transformers' model."""
    owner = name.removesuffix(".weight")
    found = _LAYER.match(owner)
    if found is None:
        return "lm_head"  # the one matrix outside the layers
    stack, number, rest = found.groups()
    return f"{'decoder' if stack is None else 'encoder'}.block.{number}.{rest}"
