"""Static int8: activations' scales fixed on a calibration text (torchao's PT2E flow, XNNPACK's quantiser).

Every method is traced with observers in it, the text runs through all of them as it will while generating, and the
observers become roundings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skipstone.exporters.formats.executorch.methods import Method, Shape
from skipstone.runtimes.quiet import quiet_libraries


def calibrated(methods: Sequence[Method], shape: Shape, tokens: NDArray[np.int64]) -> list[Method]:
    """The methods with their linear layers, sums and products in int8.

    Args:
        methods: of a model whose embedding is quantised.
        shape: of the program.
        tokens: calibration text, int64 [n]; all of it is run.

    Returns:
        The same methods over other modules; `embed` and `compact` are left as they are.
    """
    with quiet_libraries():
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        quantizer: Any = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        observed = {
            method.name: method
            if method.name in ("embed", "compact")
            else replace(method, module=prepare_pt2e(method.trace().module(), quantizer))
            for method in methods
        }
        with torch.no_grad():
            for first in range(0, len(tokens), shape.slots):
                _run(observed, shape, torch.from_numpy(tokens[first : first + shape.slots]))
        return [
            method
            if method.name in ("embed", "compact")
            else replace(method, module=convert_pt2e(method.module))
            for method in observed.values()
        ]


def _run(methods: dict[str, Method], shape: Shape, tokens: Tensor) -> None:
    """One context from its first position on, in batches of the widest kind."""
    last = max(int(name.removeprefix("segment_")) for name in methods if name.startswith("segment_"))
    tree = torch.zeros(1, dtype=torch.long)
    for first in range(0, len(tokens), shape.max_width):
        batch = tokens[first : first + shape.max_width]
        places = torch.arange(first, first + len(batch))[None]
        mask = torch.zeros(len(batch), 1)
        hidden = methods["embed"].module(batch[None])
        for index in range(last + 1):
            hidden = methods[f"segment_{index}"].module(hidden, places, places, places[0, :1], mask, tree)
            if index < last and "draft_head" in methods:
                methods["draft_head"].module(hidden)
        methods["head"].module(hidden)
