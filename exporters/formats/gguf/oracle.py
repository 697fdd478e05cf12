"""The uncut GGUF, for the self-test: llama.cpp runs it whole, and the draft head is computed by its definition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import Bundle
from skipstone.exporters.formats.gguf.cut import final_norm
from skipstone.exporters.formats.gguf.library import whole_model
from skipstone.exporters.formats.gguf.parts import GgufModel
from skipstone.runtimes.engines.llamacpp.trust import repacking_is_safe
from skipstone.runtimes.engines.llamacpp.watch import Watch, exact_gelu

FloatArray = NDArray[np.float32]

_MAX_LAYERS = 512  # that llama.cpp takes


class UncutGguf:
    """See `skipstone.exporters.formats.Oracle`.

    Args:
        bundle: what it is compared with.
        whole: the uncut file.
    """

    def __init__(self, bundle: Bundle, whole: str) -> None:
        self._whole, self._repack = Path(whole), repacking_is_safe(bundle)
        encodes = bundle.manifest.model.encoder is not None
        self._exact = encodes and bundle.manifest.quantization.scheme == "f32"

    def logits(self, tokens: Sequence[int], source: Sequence[int] = ()) -> FloatArray:
        watch = Watch(exact_gelu(_MAX_LAYERS)) if self._exact else None
        width = max(len(tokens), len(source))
        callback = None if watch is None else watch.look
        with whole_model(self._whole, width, callback, repack=self._repack) as model:
            if source:
                model.encode(source)
            return model.logits(tokens)

    def draft_logits(self, hidden: FloatArray, token_ids: NDArray[np.int32]) -> FloatArray:
        """W · (h / rms(h) * g): W the head's rows of the draft vocabulary, g the norm's gain."""
        model = GgufModel(self._whole)
        part = model.parts.get("output.weight", model.parts["token_embd.weight"])
        rows = gguf.quants.dequantize(np.ascontiguousarray(part.data()[token_ids]), part.type)
        gain = np.asarray(final_norm(model).data(), np.float32)
        eps = float(model.fact("attention.layer_norm_rms_epsilon"))
        scale = np.sqrt((hidden**2).mean(-1, keepdims=True) + eps)
        return np.asarray(hidden / scale * gain @ np.asarray(rows, np.float32).T, np.float32)
