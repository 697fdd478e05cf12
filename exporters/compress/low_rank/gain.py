"""What pairs of matrices are worth in a format: which carry two where the model has one."""

from __future__ import annotations

CARRYING = ("executorch", "onnx", "coreml")


def carries_pairs(format: str | None) -> bool:
    """Whether a format keeps both matrices; for None, a format that is not known yet, they are kept."""
    return format is None or format in CARRYING


def gain_of_pairs(format: str | None) -> str:
    """What a format makes of pairs, for the record of a step.

    >>> gain_of_pairs("gguf")
    'no gain on this device: a GGUF has one matrix where the model has one, so the product is stored'

    Args:
        format: a name in `skipstone.exporters.formats.FORMATS`; None: not known.
    """
    if format is None:
        return f"fewer weights in {', '.join(CARRYING)}; a GGUF stores the products, as many as before"
    if carries_pairs(format):
        return "fewer weights: both matrices are carried"
    what = "a GGUF" if format == "gguf" else format
    return f"no gain on this device: {what} has one matrix where the model has one, so the product is stored"
