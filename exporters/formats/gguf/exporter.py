"""The GGUF exporter: whole file, quantised by llama.cpp, cut at the exits, with a trimmed draft head beside
it.

    checkpoint ─ write ─▶ whole.gguf ─ quantise ─▶ q8_0.gguf ─ cut ─▶ segment-0.gguf … draft-head.gguf

Quantising comes before cutting because some schemes choose a tensor's type by its layer's place in the whole
model.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

from skipstone.bundle import (
    DraftHeadEntry,
    EmbeddingEntry,
    EncoderFacts,
    EncoderSegmentEntry,
    GgufManifest,
    ModelFacts,
    Quantization,
    SegmentEntry,
)
from skipstone.exporters.draft_material import DraftMaterial, write_side_files
from skipstone.exporters.exits import choose_exits
from skipstone.exporters.formats import Artefacts, ExportOptions, Oracle, refuse_options
from skipstone.exporters.formats.gguf import cut, cut_t5
from skipstone.exporters.formats.gguf.parts import GgufModel
from skipstone.exporters.formats.gguf.prepare import bits_per_weight, prepare
from skipstone.exporters.probe import probe_of

_EXACT_TOLERANCE = 1e-3
_CARRIED_AGREEMENT = 0.8  # with weights equal to the reference's, where activations alone are rounded
_NOT_HERE = {
    "widths": "its graphs take any number of rows",
    "share_weights": "its weights lie in the file once",
    "calibration": "calibrated activations belong to --format executorch",
    "mix": "llama.cpp's schemes are mixes already",
}
_DRAFT_HEAD = "draft-head.gguf"


def export_gguf(
    source: str, options: ExportOptions, folder: Path, scratch: Path, step: Callable[[str], None]
) -> Artefacts:
    """Write a GGUF bundle's files into `folder`; see `skipstone.exporters.formats.Exporter`.

    Raises:
        CheckpointError: an input that cannot be exported.
        UsageError: an option that does not fit the input.
        ExportError: not enough disk space, or llama.cpp failed.
    """
    step("read")
    refuse_options(options, _NOT_HERE)
    prepared = prepare(source, options, scratch, step)
    model, layers = GgufModel(prepared.whole), prepared.facts.num_layers
    exits = choose_exits(options.exits, prepared.exits, layers, cut.cut_period(model.arch))
    step("split")
    encoder_segments = _write_encoder_segments(model, prepared.facts.encoder, folder)
    segments = _write_segments(model, exits, prepared.facts, folder)
    step("draft head")
    material = DraftMaterial.find(prepared.reference, options.draft_text, prepared.tokenizer)
    tokens = material.choose_tokens(prepared.facts, options.draft_vocab_size) if exits else None
    beside = write_side_files(material, tokens, prepared.facts, prepared.tokenizer, folder)
    draft_head = None
    if tokens is not None and beside.vocabulary is not None:
        cut.write_draft_head(model, tokens, folder / _DRAFT_HEAD)
        draft_head = DraftHeadEntry(file=_DRAFT_HEAD, vocabulary=beside.vocabulary, rows=len(tokens))
    return Artefacts(
        model=prepared.facts,
        exits=exits,
        manifest=partial(
            GgufManifest,
            encoder_segments=encoder_segments,
            segments=segments,
            embedding=_embedding_entry(folder, segments[-1].file),
            draft_head=draft_head,
        ),
        draft_table=beside.draft_table,
        quantization=Quantization(
            scheme=prepared.scheme.name,
            imatrix_sha256=prepared.imatrix_sha256,
            codes_sha256=None if options.codes is None else options.codes.sha256,
            bits_per_weight=bits_per_weight(model),
        ),
        files=(
            *(entry.file for entry in encoder_segments),
            *(entry.file for entry in segments),
            *(() if draft_head is None else (draft_head.file,)),
            *beside.names,
        ),
        oracle=Oracle("skipstone.exporters.formats.gguf.oracle:UncutGguf", {"whole": str(prepared.whole)}),
        probe=probe_of(prepared.tokenizer, prepared.facts),
        reference=prepared.reference,
        min_agreement=prepared.scheme.min_agreement if options.codes is None else _CARRIED_AGREEMENT,
        reference_tolerance=_EXACT_TOLERANCE if prepared.scheme.name == "f32" else None,
        source_sha256=prepared.source_sha256,
        engine=f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}",
    )


def _write_encoder_segments(
    model: GgufModel, encoder: EncoderFacts | None, folder: Path
) -> tuple[EncoderSegmentEntry, ...]:
    if encoder is None:
        return ()
    entries = []
    for index, (first, stop) in enumerate(pairwise((0, *encoder.exits, encoder.num_layers))):
        name = f"encoder-{index}.gguf"
        cut_t5.write_encoder_segment(model, first, stop, folder / name)
        entries.append(EncoderSegmentEntry(first=first, stop=stop, file=name))
    return tuple(entries)


def _write_segments(
    model: GgufModel, exits: tuple[int, ...], facts: ModelFacts, folder: Path
) -> tuple[SegmentEntry, ...]:
    if facts.encoder is None:
        cut.check_can_be_cut(model)
    write = cut.write_segment if facts.encoder is None else cut_t5.write_decoder_segment
    entries = []
    for index, piece in enumerate(cut.plan_cuts(model, exits, facts.num_layers)):
        name = f"segment-{index}.gguf"
        write(model, piece, folder / name)
        entries.append(SegmentEntry(first=piece.first, stop=piece.stop, file=name, output=piece.output))
    return tuple(entries)


def _embedding_entry(folder: Path, name: str) -> EmbeddingEntry:
    last = GgufModel(folder / name)
    part = last.parts["token_embd.weight"]
    return EmbeddingEntry(
        file=name,
        offset=last.offsets["token_embd.weight"],
        rows=part.shape[0],
        columns=part.shape[1],
        type=part.type.name,
    )
