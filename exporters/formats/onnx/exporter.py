"""The ONNX exporter: the checkpoint's own layers, cut and traced, a graph per part.

checkpoint ─ cut ─▶ segments, heads ─ trace ─▶ graphs ─ the target's writer ─▶ files
                 └▶ embedding ──────────────────────────────────────────────▶ table
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir

from skipstone.bundle import (
    GRAPH_INTERFACE,
    SOURCE_GRAPH_INTERFACE,
    GraphEntry,
    GraphsEntry,
    OnnxManifest,
    Quantization,
    TableEntry,
)
from skipstone.errors import CheckpointError, UsageError
from skipstone.exporters.encoder_decoder import HIDDEN, Cuts, Limits
from skipstone.exporters.formats import Artefacts, ExportOptions, Oracle, refuse_options
from skipstone.exporters.formats.onnx.files import write_table
from skipstone.exporters.formats.onnx.graph_cache import traced_once
from skipstone.exporters.formats.onnx.graphs import OPSET, graphs_of
from skipstone.exporters.formats.onnx.modules import GraphSegment, cut_for_graphs
from skipstone.exporters.formats.onnx.schemes import Scheme, scheme_of
from skipstone.exporters.formats.onnx.source_graphs import graphs_of_source
from skipstone.exporters.formats.onnx.source_modules import SourceGraphSegment, cut_source_for_graphs
from skipstone.exporters.formats.onnx.targets import TARGETS, Target, Task, Written, fitted, target_of
from skipstone.exporters.probe import probe_of
from skipstone.exporters.reading import Reading, Room, read_checkpoint, refuse_gguf
from skipstone.exporters.segments import Embedding, HeadShape

_EXACT_TOLERANCE = 1e-4
_DEFAULT_TARGET, _DEFAULT_SCHEME = "cpu", "8da4w"
_ORACLES = "skipstone.exporters.formats.onnx"


@dataclass(frozen=True)
class _Request:
    """What was asked for, checked."""

    reading: Reading
    target: Target
    scheme: Scheme


@dataclass(frozen=True)
class _CutModel:
    """A model on its way into graphs.

    Attributes:
        embedding: token ids → hidden states.
        shapes: of the K and V that its layers keep.
        graphs: name and graph of every other part.
        interface: what the graphs mean.
        masked: what is added to scores out of sight.
        oracle: class for the self-test, made with the checkpoint's folder.
    """

    embedding: Embedding
    shapes: frozenset[HeadShape]
    graphs: Iterator[tuple[str, ir.Model]]
    interface: int
    masked: float
    oracle: str


def export_onnx(
    source: str, options: ExportOptions, folder: Path, scratch: Path, step: Callable[[str], None]
) -> Artefacts:
    """Write an ONNX bundle's files into `folder`; see `skipstone.exporters.formats.Exporter`.

    Raises:
        CheckpointError: an input that cannot be exported.
        UsageError: an option that does not fit the input or the format.
        ExportError: not enough disk space, or the target's compiler refuses the graphs.
    """
    step("read")
    request = _check(source, options, scratch)
    reading, target, scheme = request.reading, request.target, request.scheme
    facts, checkpoint = reading.facts, reading.checkpoint.path
    model = _cut(request)
    table = write_table(model.embedding, not scheme.exact, folder)
    task = Task(
        folder=folder,
        scratch=scratch,
        options=options,
        target=target,
        scheme=scheme,
        reading=reading,
        table=folder / table.file,
        step=step,
    )
    written = target.write(model.graphs, task)
    beside = reading.write_side_files(folder)
    graphs = _entry(request, model, written, table, beside.vocabulary)
    named = {name for graph in graphs.graphs for name in (graph.file, graph.weights) if name is not None}
    artefacts = (*sorted(named), table.file, *written.files)
    once = {name for graph in _once(graphs) for name in (graph.file, graph.weights) if name is not None}
    stored = sum((folder / name).stat().st_size for name in (*once, table.file))
    return Artefacts(
        model=facts,
        exits=reading.exits,
        manifest=partial(OnnxManifest, graphs=graphs),
        draft_table=beside.draft_table,
        quantization=Quantization(
            scheme=scheme.name,
            calibration_sha256=written.calibration_sha256,
            bits_per_weight=8 * stored / reading.num_weights,
        ),
        files=(*artefacts, *beside.names),
        oracle=written.oracle or Oracle(model.oracle, {"checkpoint": str(checkpoint)}, here=True),
        probe=probe_of(reading.tokenizer, facts),
        reference=checkpoint,
        min_agreement=scheme.min_agreement,
        reference_tolerance=_EXACT_TOLERANCE if scheme.exact else None,
        source_sha256=reading.sha256,
        engine=f"onnxruntime {importlib.metadata.version('onnxruntime')}",
        runs_here=written.status != "compiled",
        slack=scheme.slack,
    )


def _check(source: str, options: ExportOptions, scratch: Path) -> _Request:
    """Read the input and refuse what cannot work, before anything is made."""
    scheme = scheme_of(options.quantize or _DEFAULT_SCHEME)
    target = fitted(target_of(options.target or _DEFAULT_TARGET, scheme), options.widths, scheme)
    refuse_gguf(source, "onnx")
    refuse_options(options, _reasons(target, scheme))
    reading = read_checkpoint(source, options, scratch, Room(target.context, target.max_width))
    if reading.facts.encoder is not None and not target.sources:
        taking = ", ".join(name for name, other in TARGETS.items() if other.sources)
        raise UsageError(
            f"target {target.name}: encoder-decoders are exported for {taking} alone",
            hint="use --device cpu",
        )
    return _Request(reading, target, scheme)


def _cut(request: _Request) -> _CutModel:
    """Cut the model into parts, to be traced one by one."""
    reading = request.reading
    facts, folder = reading.facts, reading.checkpoint.path
    kept = partial(
        traced_once,
        num_bytes=4 * reading.num_weights,
        source=reading.sha256,
        exits=reading.exits,
        draft_tokens=None if reading.draft_tokens is None else reading.draft_tokens.tolist(),
        context=facts.context_length,
        encoder=None if facts.encoder is None else facts.encoder.model_dump(),
    )
    if facts.encoder is None:
        parts = cut_for_graphs(folder, reading.exits, reading.draft_tokens, facts.context_length)
        shapes = {shape for part in parts.segments if isinstance(part, GraphSegment) for shape in part.shapes}
        return _CutModel(
            embedding=parts.embedding,
            shapes=frozenset(shapes),
            graphs=kept(lambda: graphs_of(parts, facts.hidden_size)),
            interface=GRAPH_INTERFACE,
            masked=request.target.masked,
            oracle=f"{_ORACLES}.oracle:EagerDecoder",
        )
    cuts = Cuts(reading.exits, facts.encoder.exits)
    limits = Limits(facts.encoder.max_source_length, facts.context_length)
    whole = cut_source_for_graphs(folder, cuts, limits, reading.draft_tokens)
    return _CutModel(
        embedding=whole.embedding,
        shapes=frozenset(
            shape for part in whole.decoder if isinstance(part, SourceGraphSegment) for shape in part.shapes
        ),
        graphs=kept(lambda: graphs_of_source(whole, facts.hidden_size)),
        interface=SOURCE_GRAPH_INTERFACE,
        masked=HIDDEN,
        oracle=f"{_ORACLES}.source_oracle:EagerEncoderDecoder",
    )


def _entry(
    request: _Request, model: _CutModel, written: Written, table: TableEntry, vocabulary: str | None
) -> GraphsEntry:
    """What the manifest says of the graphs.

    Raises:
        CheckpointError: layers keep K and V of different shapes.
    """
    target, shapes = request.target, model.shapes
    if len(shapes) != 1:
        raise CheckpointError(
            f"{request.reading.checkpoint.path}: layers keep K and V of {len(shapes)} shapes, one was expected",
            hint="use --format gguf or executorch",
        )
    (shape,) = shapes
    return GraphsEntry(
        interface=model.interface,
        target=target.name,
        status=written.status,
        opset=OPSET,
        slots=request.reading.facts.context_length,
        widths=target.widths,
        max_width=target.max_width,
        masked=model.masked,
        key_value_heads=shape.heads,
        head_size=shape.size,
        embedding=table,
        draft_vocabulary=vocabulary,
        graphs=written.graphs,
        qnn=written.qnn,
    )


def _once(graphs: GraphsEntry) -> list[GraphEntry]:
    """A graph of every part: the widest."""
    return [graph for graph in graphs.graphs if graph.width in (None, graphs.max_width)]


def _reasons(target: Target, scheme: Scheme) -> dict[str, str]:
    """Why options cannot be given here; see `refuse_options`."""
    reasons = {
        "imatrix": "importance matrices belong to --format gguf",
        "mix": "mixes of schemes belong to --format executorch",
    }
    if not target.calibrates:
        reasons["calibration"] = f"no scheme of {target.name} rounds activations by fixed scales"
    elif scheme.rounding is None:
        reasons["calibration"] = f"--quantize {scheme.name} rounds nothing by fixed scales"
    if not target.shares:
        reasons["share_weights"] = f"graphs for {target.name} hold their weights once"
    return reasons
