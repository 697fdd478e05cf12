"""Compression as the first step of an export: the smaller checkpoint lies in the export's scratch folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from skipstone.errors import UsageError
from skipstone.exporters.checkpoint import Checkpoint
from skipstone.exporters.compress.run import compress
from skipstone.exporters.compress.shapes import open_source, shape_of
from skipstone.exporters.compress.steps import Step, Target

_FOLDER = "compressed"


def compress_first(
    source: str | os.PathLike[str],
    steps: Sequence[Step],
    target: Target,
    scratch: Path,
    *,
    text: str | os.PathLike[str] | None,
    held_out: str | os.PathLike[str] | None,
    report: Callable[[str], None],
) -> str:
    """Take the steps, and give the folder of the checkpoint that they leave, under its own name.

    Args:
        source: checkpoint folder or hub name.
        steps: in order.
        target: what it is exported for.
        scratch: folder to write into.
        text: what steps learn from (`--compress-text`).
        held_out: what they are measured on; None: `text`.
        report: told of `compress` as each part of it begins.

    Raises:
        UsageError: the source has codes, or a step would choose some.
        SkipstoneError: see `compress`.
    """
    checkpoint = open_source(source)
    _refuse_codes(checkpoint, steps)
    folder = scratch / _FOLDER / checkpoint.name
    compress(
        source,
        folder,
        steps,
        target=target,
        calibration=text,
        held_out=held_out,
        text_flag="--compress-text",
        progress=lambda what, done, total: report("compress"),
    )
    return os.fspath(folder)


def _refuse_codes(checkpoint: Checkpoint, steps: Sequence[Step]) -> None:
    """Refuse what has codes before or after the steps: the export would have to know them before it chose a scheme."""
    found = "the checkpoint" if shape_of(checkpoint).quantized is not None else None
    for step in steps:
        if step.kind == "quantize" or getattr(step, "over", None) == "bits":
            found = f"step {step.kind!r}"
    if found is not None:
        raise UsageError(
            f"{found} fixes codes, which an export cannot carry out of its own compression",
            hint="run skipstone compress first, then export the folder that it writes",
        )
