"""The uncut model in eager torch, quantised as the program's weights are, for the self-test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from skipstone.bundle import Bundle
from skipstone.exporters.checkpoint import quiet_loading
from skipstone.exporters.formats.executorch.schemes import quantize, scheme_of

FloatArray = NDArray[np.float32]


class EagerDecoder:
    """See `skipstone.exporters.formats.Oracle`.

    Args:
        bundle: what it is compared with.
        checkpoint: folder of the source.
    """

    def __init__(self, bundle: Bundle, checkpoint: str) -> None:
        from transformers import AutoModelForCausalLM

        kind: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
        with quiet_loading():
            model: Any = AutoModelForCausalLM.from_pretrained(Path(checkpoint), **kind)
        model.eval().requires_grad_(False)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
        quantize(model, scheme_of(bundle.manifest.quantization.scheme))
        self._model = model

    def logits(self, tokens: Sequence[int]) -> FloatArray:
        with torch.no_grad():
            return np.asarray(self._model(torch.tensor([list(tokens)])).logits[0].numpy(), np.float32)

    def draft_logits(self, hidden: FloatArray, token_ids: NDArray[np.int32]) -> FloatArray:
        decoder = self._model.model
        norm = decoder.norm if hasattr(decoder, "norm") else decoder.final_layernorm
        with torch.no_grad():
            logits = self._model.lm_head(norm(torch.from_numpy(hidden)))
        return np.asarray(logits.numpy()[:, token_ids], np.float32)
