"""The two verbs of the package, importing what they need when they are called."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipstone.bundle import Bundle
    from skipstone.model import Model
    from skipstone.placing import Place


def load(
    path: str | os.PathLike[str],
    *,
    context_length: int | None = None,
    threads: int | None = None,
    kv_type: str | None = None,
    gpu_layers: int = 0,
    curve: str | os.PathLike[str] | None = None,
    place: Place | None = None,
) -> Model:
    """Open a bundle for generation; see `skipstone.model.load_model`. Never imports torch."""
    from skipstone.model import load_model

    return load_model(
        path,
        context_length=context_length,
        threads=threads,
        kv_type=kv_type,
        gpu_layers=gpu_layers,
        curve=curve,
        place=place,
    )


def export(source: str | os.PathLike[str], output: str | os.PathLike[str], **options: Any) -> Bundle:
    """Export a checkpoint to a bundle; see `skipstone.exporters.pipeline.export_checkpoint` (needs `[export]`)."""
    from skipstone.exporters.pipeline import export_checkpoint

    return export_checkpoint(source, output, **options)
