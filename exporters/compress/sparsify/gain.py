"""What zeros are worth on a device: a table of kernels, looked up in the engines' sources."""

from __future__ import annotations

from skipstone.exporters.compress.sparsify.masks import Pattern

_NONE = "no gain on this device"
_REASONS = {
    "gguf": "llama.cpp stores and multiplies every weight, zeros too",
    "executorch": "XNNPACK has sparse kernels for 1x1 convolutions in float16 and float32 alone, and a linear layer is "
    "none of them",
    "onnx": "ONNX Runtime multiplies dense matrices; its one sparse product takes float32 in formats that nothing is "
    "exported to",
}


def gain_of_zeros(pattern: Pattern, format: str | None) -> str:
    """What a format's engine makes of a pattern of zeros, for the record of a step.

    >>> gain_of_zeros(Pattern.parse("2:4"), "gguf")
    'no gain on this device: llama.cpp stores and multiplies every weight, zeros too'

    Args:
        pattern: of the zeros.
        format: a name in `skipstone.exporters.formats.FORMATS`; None: not known.
    """
    if format is not None:
        return f"{_NONE}: {_REASONS.get(format, 'its engine is not known to have sparse kernels')}"
    if pattern.group == 4 and pattern.kept == 2:
        return "none in any engine here; 2:4 is what NVIDIA's sparse tensor cores take"
    return "none in any engine here"
