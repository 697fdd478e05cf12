"""The Core ML exporter: the checkpoint's own layers, cut, converted to functions, and joined in one package.

checkpoint ─ cut ─▶ segments, heads ─ convert, quantise ─▶ functions ─ join ─▶ package ─ check, compute ─▶ bundle
                 └▶ embedding ────────────────────────────────────────────────────────────────────────▶ table
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from skipstone.bundle import CoreMlManifest, FunctionEntry, PackageEntry, Quantization, TableEntry, part_names
from skipstone.errors import CheckpointError, ExportError
from skipstone.exporters.formats import Artefacts, ExportOptions, refuse_options
from skipstone.exporters.formats.coreml.contents import Contents, check_contents, read_contents
from skipstone.exporters.formats.coreml.convert import check_tools, function_name, write_package
from skipstone.exporters.formats.coreml.evaluate import Package
from skipstone.exporters.formats.coreml.modules import StatefulSegment, cut_for_package
from skipstone.exporters.formats.coreml.schemes import scheme_of
from skipstone.exporters.formats.coreml.walk import PackageWalk
from skipstone.exporters.formats.onnx.files import write_table
from skipstone.exporters.formats.onnx.modules import MASKED
from skipstone.exporters.formats.widths import chosen_widths
from skipstone.exporters.probe import Probe, probe_of
from skipstone.exporters.reading import Reading, Room, read_checkpoint, refuse_gguf
from skipstone.exporters.reference import EagerReference
from skipstone.exporters.segments import HeadShape, Parts

_PACKAGE = "model.mlpackage"
_DEFAULT_SCHEME = "4w"
_WIDTHS = (1, 4, 8, 32)
_CONTEXT = 512


def export_coreml(
    source: str, options: ExportOptions, folder: Path, scratch: Path, step: Callable[[str], None]
) -> Artefacts:
    """Write a Core ML bundle's files into `folder`; see `skipstone.exporters.formats.Exporter`.

    Raises:
        CheckpointError: an input that cannot be exported.
        UsageError: an option that does not fit the input or the format.
        ExportError: coremltools is missing, the disk is full, Core ML lacks an operator, or what the package computes
            is not the checkpoint's model.
    """
    step("read")
    scheme, widths = scheme_of(options.quantize or _DEFAULT_SCHEME), chosen_widths(options.widths, _WIDTHS)
    refuse_gguf(source, "coreml")
    refuse_options(options, _REASONS)
    check_tools()
    reading = read_checkpoint(source, options, scratch, Room(_CONTEXT, widths[-1]))
    facts, checkpoint = reading.facts, reading.checkpoint.path
    if facts.encoder is not None:
        raise CheckpointError(
            f"{source}: {facts.architecture} is an encoder-decoder; --format coreml takes decoders alone",
            hint="use --format gguf or executorch with --device cpu",
        )
    parts = cut_for_package(checkpoint, reading.exits, reading.draft_tokens, facts.context_length)
    shape = _shape(checkpoint, parts)
    table = write_table(parts.embedding, True, folder)
    step("lower")
    alone = write_package(parts, widths, facts.context_length, scheme, folder / _PACKAGE, scratch)
    names = part_names(len(reading.exits), parts.draft_head is not None)
    contents = read_contents(folder / _PACKAGE)
    functions = {part: tuple(function_name(part, width) for width in widths) for part in names}
    check_contents(contents, functions, alone, packed=scheme.quantises)
    probe = probe_of(reading.tokenizer, facts)
    agreement = _agreement(reading, folder / _PACKAGE, folder / table.file, widths, probe)
    check_agreement(agreement, scheme.min_agreement)
    beside = reading.write_side_files(folder)
    package = _entry(reading, folder, contents, widths, shape, table, beside.vocabulary, agreement)
    stored = package.stored_bytes + (folder / table.file).stat().st_size
    return Artefacts(
        model=facts,
        exits=reading.exits,
        manifest=partial(CoreMlManifest, package=package),
        draft_table=beside.draft_table,
        quantization=Quantization(scheme=scheme.name, bits_per_weight=8 * stored / reading.num_weights),
        files=(*package.files, table.file, *beside.names),
        oracle=None,
        probe=probe,
        reference=checkpoint,
        min_agreement=scheme.min_agreement,
        reference_tolerance=None,
        source_sha256=reading.sha256,
        engine=f"coremltools {importlib.metadata.version('coremltools')}",
        runs_here=False,
    )


_REASONS = {
    "imatrix": "importance matrices belong to --format gguf",
    "mix": "mixes of schemes belong to --format executorch",
    "calibration": "no scheme of Core ML packages rounds activations",
    "share_weights": "the functions of a Core ML package always share their weights",
}


def check_agreement(found: float, least: float) -> None:
    """Refuse artefacts that compute something else than the checkpoint does.

    Raises:
        ExportError: naming both shares.
    """
    if not found >= least:
        raise ExportError(
            f"computed without the device, the best token is the checkpoint's at {found:.0%} of positions, at least "
            f"{least:.0%} were expected",
            hint="try another --quantize; hidden states may leave the range of its numbers",
        )


def _shape(checkpoint: Path, parts: Parts) -> HeadShape:
    """Measures of every layer's K and V.

    Raises:
        CheckpointError: they differ.
    """
    found = {shape for part in parts.segments if isinstance(part, StatefulSegment) for shape in part.shapes}
    if len(found) != 1:
        raise CheckpointError(
            f"{checkpoint}: layers keep K and V of {len(found)} shapes, one was expected",
            hint="use --format gguf or executorch",
        )
    return found.pop()


def _agreement(reading: Reading, package: Path, table: Path, widths: Sequence[int], probe: Probe) -> float:
    """Share of the probe's positions at which the package's best token is the checkpoint's: in batches that fill the
    widest function, those that are left over in narrower ones.
    """
    facts = reading.facts
    rows = np.fromfile(table, "<f2").reshape(facts.vocab_size, facts.hidden_size)
    walk = PackageWalk(Package(package), len(reading.exits) + 1, rows, facts.context_length)
    tokens, found = list(probe.tokens), []
    while tokens:
        width = max((each for each in widths if each <= len(tokens)), default=widths[0])
        found.append(walk.logits(tokens[:width], width))
        del tokens[:width]
    expected = EagerReference(reading.checkpoint.path).logits(probe.tokens)
    logits = np.concatenate(found)
    same = (logits.argmax(-1) == expected.argmax(-1)) & np.isfinite(logits).all(-1)
    return float(same.mean())


def _entry(
    reading: Reading,
    folder: Path,
    contents: Contents,
    widths: tuple[int, ...],
    shape: HeadShape,
    table: TableEntry,
    vocabulary: str | None,
    agreement: float,
) -> PackageEntry:
    """What the manifest says of the package."""
    files = sorted(path for path in (folder / _PACKAGE).rglob("*") if path.is_file())
    return PackageEntry(
        package=_PACKAGE,
        files=tuple(path.relative_to(folder).as_posix() for path in files),
        specification=contents.specification,
        stored_bytes=contents.stored_bytes,
        slots=reading.facts.context_length,
        widths=widths,
        masked=MASKED,
        key_value_heads=shape.heads,
        head_size=shape.size,
        embedding=table,
        draft_vocabulary=vocabulary,
        agreement=agreement,
        functions=tuple(
            FunctionEntry(
                part=part,
                width=width,
                name=function_name(part, width),
                weight_bytes=contents.functions[function_name(part, width)].weight_bytes,
            )
            for part in part_names(len(reading.exits), vocabulary is not None)
            for width in widths
        ),
    )
