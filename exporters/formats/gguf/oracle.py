"""The uncut GGUF, for the self-test: llama.cpp runs it whole, and the draft head is computed by its definition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import Bundle
from skipstone.exporters.formats.gguf.library import whole_model
from skipstone.exporters.formats.gguf.parts import GgufModel
from skipstone.runtimes.engines.llamacpp.trust import repacking_is_safe

FloatArray = NDArray[np.float32]


class UncutGguf:
    """See `skipstone.exporters.formats.Oracle`.

    Args:
        bundle: what it is compared with.
        whole: the uncut file.
    """

    def __init__(self, bundle: Bundle, whole: str) -> None:
        self._whole, self._repack = Path(whole), repacking_is_safe(bundle)

    def logits(self, tokens: Sequence[int]) -> FloatArray:
        with whole_model(self._whole, len(tokens), repack=self._repack) as model:
            return model.logits(tokens)

    def draft_logits(self, hidden: FloatArray, token_ids: NDArray[np.int32]) -> FloatArray:
        """W · (h / rms(h) * g): W the head's rows of the draft vocabulary, g the norm's gain."""
        model = GgufModel(self._whole)
        part = model.parts.get("output.weight", model.parts["token_embd.weight"])
        rows = gguf.quants.dequantize(np.ascontiguousarray(part.data()[token_ids]), part.type)
        gain = np.asarray(model.parts["output_norm.weight"].data(), np.float32)
        eps = float(model.fact("attention.layer_norm_rms_epsilon"))
        scale = np.sqrt((hidden**2).mean(-1, keepdims=True) + eps)
        return np.asarray(hidden / scale * gain @ np.asarray(rows, np.float32).T, np.float32)
