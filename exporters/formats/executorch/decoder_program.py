"""A decoder on its way into a program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from skipstone.exporters.compress.work import FixedCodes
from skipstone.exporters.formats.executorch.calibration import calibrated
from skipstone.exporters.formats.executorch.calibration_text import CalibrationText
from skipstone.exporters.formats.executorch.codes import put_codes_in_parts
from skipstone.exporters.formats.executorch.methods import Method, Shape, methods_of
from skipstone.exporters.formats.executorch.modules import RowSegment, StaticKeyValues
from skipstone.exporters.formats.executorch.schemes import Mix, named_parts, quantize_parts, weight_bytes
from skipstone.exporters.segments import cut_decoder, load_decoder


class DecoderProgram:
    """See `skipstone.exporters.formats.executorch.exporter.CutModel`.

    Args:
        checkpoint: folder.
        exits: inner exits.
        draft_tokens: token ids of the draft head's rows; None: no draft head.
        shape: what the program can hold.
        calibration: text that fixes the scales of activations, where the scheme needs one.
        codes: those that the checkpoint's weights have; None: they are rounded here.
    """

    def __init__(
        self,
        checkpoint: Path,
        exits: tuple[int, ...],
        draft_tokens: NDArray[np.int32] | None,
        shape: Shape,
        calibration: CalibrationText | None,
        codes: FixedCodes | None = None,
    ) -> None:
        self._shape, self._calibration, self._codes, self._draft_tokens = (
            shape,
            calibration,
            codes,
            draft_tokens,
        )
        self._parts = cut_decoder(
            load_decoder(checkpoint),
            exits,
            draft_tokens,
            lambda head: StaticKeyValues(head, shape.slots),
            RowSegment,
        )

    def weight_bytes(self, mix: Mix) -> dict[str, int]:
        parts = self._parts
        sizes = {
            f"segment_{index}": sum(
                weight_bytes(layer, mix.of(part), mix.within(part)) for part, layer in segment.layers.items()
            )
            for index, segment in enumerate(parts.segments)
        }
        sizes["head"] = weight_bytes(parts.head, mix.of("head"))
        if parts.draft_head is not None:
            sizes["draft_head"] = weight_bytes(parts.draft_head, mix.of("head"))
        return sizes

    def methods(self, mix: Mix, step: Callable[[str], None]) -> list[Method]:
        quantize_parts(self._parts, mix)
        if self._codes is not None:
            put_codes_in_parts(named_parts(self._parts), self._codes, self._draft_tokens)
        methods = list(methods_of(self._parts, self._shape))
        if self._calibration is None:
            return methods
        step("calibrate")
        return calibrated(methods, self._shape, self._calibration.tokens)
