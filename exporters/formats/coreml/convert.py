"""Modules → one Core ML package, a function for each part and number of rows.

Core ML takes shapes within bounds too, but plans such functions for the CPU alone where the Neural Engine would have to
run them; a function for each width costs little, because functions share their weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from skipstone.errors import ExportError
from skipstone.exporters.formats.coreml.contents import weights_file
from skipstone.exporters.formats.coreml.schemes import Scheme, quantize
from skipstone.exporters.segments import Parts
from skipstone.runtimes.quiet import quiet_libraries

_TORCH: dict[Any, torch.dtype] = {np.float16: torch.float32, np.int32: torch.int32}


@dataclass(frozen=True)
class Input:
    """An input of a function: its name, shape, and numpy's type of its numbers."""

    name: str
    shape: tuple[int, ...]
    type: type[np.generic] = np.float16


def check_tools() -> None:
    """Refuse to begin where packages cannot be written.

    Raises:
        ExportError: coremltools is missing.
    """
    try:
        with quiet_libraries():
            import coremltools  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"Core ML packages cannot be written: {error}",
            hint="export on macOS or x86-64 Linux: `pip install coremltools==9.0`",
        ) from error


def function_name(part: str, width: int) -> str:
    """What Core ML is given to load a function, say `segment_0_8`."""
    return f"{part}_{width}"


def write_package(
    parts: Parts, widths: Sequence[int], slots: int, scheme: Scheme, package: Path, scratch: Path
) -> dict[str, int]:
    """Convert every part for every width, and join the functions into one package.

    Args:
        parts: from `cut_for_package`.
        widths: numbers of rows.
        slots: positions of K/V.
        scheme: of quantisation.
        package: folder to write, named `….mlpackage`.
        scratch: folder for a package of each function.

    Returns:
        Bytes of the file of weights of every function's own package, by the function's name.

    Raises:
        ExportError: an operator that Core ML does not have.
    """
    from coremltools.models.utils import MultiFunctionDescriptor, save_multifunction

    joined, alone = MultiFunctionDescriptor(), {}
    with quiet_libraries():
        for part, module, width, inputs, output in _functions(parts, widths, slots):
            name = function_name(part, width)
            single = scratch / f"{name}.mlpackage"
            quantize(_convert(name, module, inputs, output), scheme).save(str(single))
            joined.add_function(str(single), "main", name)
            alone[name] = weights_file(single).stat().st_size
        joined.default_function_name = function_name("segment_0", widths[0])
        save_multifunction(joined, str(package))
    return alone


def _functions(
    parts: Parts, widths: Sequence[int], slots: int
) -> Iterator[tuple[str, nn.Module, int, list[Input], str]]:
    """Part, module, width, inputs and name of the output of every function."""
    hidden_size = next(parts.embedding.table.parameters()).shape[1]
    heads = [("head", parts.head), ("draft_head", parts.draft_head)]
    for width in widths:
        hidden = Input("hidden", (1, width, hidden_size))
        rows = [
            hidden,
            Input("positions", (1, width), np.int32),
            Input("places", (slots, width)),
            Input("mask", (1, 1, width, slots)),
        ]
        for index, segment in enumerate(parts.segments):
            yield f"segment_{index}", segment, width, rows, "hidden_out"
        for part, head in heads:
            if head is not None:
                yield part, head, width, [hidden], "logits"


def _convert(name: str, module: nn.Module, inputs: Sequence[Input], output: str) -> Any:
    """A Core ML model for iOS 18, computing in float16."""
    import coremltools

    examples = tuple(torch.zeros(given.shape, dtype=_TORCH[given.type]) for given in inputs)
    with torch.no_grad():
        program = torch.export.export(module, examples, strict=False).run_decompositions({})
    tensor = coremltools.TensorType
    try:
        return coremltools.convert(
            program,
            inputs=[tensor(name=given.name, shape=given.shape, dtype=given.type) for given in inputs],
            outputs=[tensor(name=output, dtype=np.float16)],
            minimum_deployment_target=coremltools.target.iOS18,
            compute_precision=coremltools.precision.FLOAT16,
            skip_model_load=True,
        )
    except NotImplementedError as error:  # coremltools names the operator
        raise ExportError(
            f"{name}: Core ML refuses an operator: {str(error).splitlines()[0]}",
            hint="use another --device for this architecture",
        ) from error
