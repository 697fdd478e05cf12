"""Output formats: a registry from name to exporter, imported when used.

A new format is one module or package with a function of the type `Exporter`, and one line in `FORMATS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from skipstone.bundle import DraftHeadEntry, EmbeddingEntry, ModelFacts, Quantization, SegmentEntry
from skipstone.errors import UsageError


@dataclass(frozen=True)
class Step:
    """One step of an export, as told to the caller: `index` counts from 1 to `total`."""

    name: str
    index: int
    total: int


Progress = Callable[[Step], None]


@dataclass(frozen=True)
class ExportOptions:
    """What the user asked for; None means the default, which may depend on the model.

    Attributes:
        quantize: scheme; None: q8_0 for a checkpoint, what a .gguf has.
        exits: layer counts to cut at; empty: no cuts.
        draft_vocab_size: rows of the draft head; 0: the whole vocabulary.
        draft_text: text to count tokens and n-grams in.
        imatrix: calibration text for the importance matrix.
        threads: CPU threads.
    """

    quantize: str | None = None
    exits: tuple[int, ...] | None = None
    draft_vocab_size: int | None = None
    draft_text: Path | None = None
    imatrix: Path | None = None
    threads: int = 2


@dataclass(frozen=True)
class Artefacts:
    """What a format wrote: the manifest's parts, and what the self-test compares with.

    Attributes:
        files: names of every file of the bundle.
        whole: the uncut model in the same quantisation, for the self-test alone; the caller deletes it.
        probe: token ids for the self-test.
        reference: checkpoint folder to compare with; None where there is none.
        min_agreement: share of positions at which the best token must be the reference's.
        reference_tolerance: largest difference of a logit; None: only the agreement counts.
        source_sha256: hash of the input.
        engine: library and version.
    """

    model: ModelFacts
    exits: tuple[int, ...]
    segments: tuple[SegmentEntry, ...]
    embedding: EmbeddingEntry
    draft_head: DraftHeadEntry | None
    draft_table: str | None
    quantization: Quantization
    files: tuple[str, ...]
    whole: Path
    probe: tuple[int, ...]
    reference: Path | None
    min_agreement: float
    reference_tolerance: float | None
    source_sha256: str
    engine: str


class Exporter(Protocol):
    """Writes the artefacts of one format into `folder`; `scratch` is deleted afterwards."""

    def __call__(
        self, source: str, options: ExportOptions, folder: Path, scratch: Path, step: Callable[[str], None]
    ) -> Artefacts: ...


FORMATS = {"gguf": "skipstone.exporters.formats.gguf.exporter:export_gguf"}


def exporter_of(name: str) -> Exporter:
    """The exporter of a format.

    Raises:
        UsageError: no such format; lists them.
    """
    target = FORMATS.get(name)
    if target is None:
        raise UsageError(f"--format {name}: unknown format, expected {', '.join(FORMATS)}")
    module, function = target.split(":")
    return cast("Exporter", getattr(importlib.import_module(module), function))
