"""The ONNX exporter: the checkpoint's own layers, cut and traced, a graph per part.

checkpoint ─ cut ─▶ segments, heads ─ trace ─▶ graphs ─ the target's writer ─▶ files
                 └▶ embedding ──────────────────────────────────────────────▶ table
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from skipstone.bundle import GraphEntry, GraphsEntry, ModelFacts, OnnxManifest, Quantization, TableEntry
from skipstone.errors import CheckpointError, UsageError
from skipstone.exporters.checkpoint import Checkpoint, open_checkpoint
from skipstone.exporters.draft_material import DraftMaterial, write_vocabulary
from skipstone.exporters.exits import check_exits, default_exits, recorded_exits
from skipstone.exporters.facts import (
    TOKENIZER_FILE,
    check_disk_space,
    checkpoint_facts,
    hash_checkpoint,
    load_tokenizer,
    num_weights,
    planned_context,
)
from skipstone.exporters.formats import Artefacts, ExportOptions, Oracle, refuse_options
from skipstone.exporters.formats.onnx.files import write_table
from skipstone.exporters.formats.onnx.graphs import OPSET, graphs_of
from skipstone.exporters.formats.onnx.modules import GraphSegment, cut_for_graphs
from skipstone.exporters.formats.onnx.schemes import Scheme, scheme_of
from skipstone.exporters.formats.onnx.targets import Target, Task, Written, fitted, target_of
from skipstone.exporters.probe import probe_of
from skipstone.exporters.segments import Parts

_EXACT_TOLERANCE = 1e-4
_DEFAULT_TARGET, _DEFAULT_SCHEME = "cpu", "8da4w"
_ORACLE = "skipstone.exporters.formats.onnx.oracle:EagerDecoder"


@dataclass(frozen=True)
class _Request:
    """What was asked for, checked."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    facts: ModelFacts
    num_weights: int
    target: Target
    exits: tuple[int, ...]
    material: DraftMaterial
    draft_tokens: NDArray[np.int32] | None
    source_sha256: str


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
    scheme = scheme_of(options.quantize or _DEFAULT_SCHEME)
    parts = cut_for_graphs(
        request.checkpoint.path, request.exits, request.draft_tokens, request.facts.context_length
    )
    table = write_table(parts.embedding, not scheme.exact, folder)
    task = Task(
        folder=folder,
        scratch=scratch,
        options=options,
        target=request.target,
        scheme=scheme.name,
        facts=request.facts,
        exits=request.exits,
        checkpoint=request.checkpoint.path,
        tokenizer=request.tokenizer,
        slots=request.facts.context_length,
        table=folder / table.file,
        step=step,
    )
    written = request.target.write(graphs_of(parts, request.facts.hidden_size), task)
    vocabulary = None if request.draft_tokens is None else write_vocabulary(request.draft_tokens, folder)
    draft_table = request.material.write_table(request.facts, folder)
    request.tokenizer.save(str(folder / TOKENIZER_FILE))
    graphs = _entry(request, parts, written, table, vocabulary)
    named = {name for graph in graphs.graphs for name in (graph.file, graph.weights) if name is not None}
    artefacts = (*sorted(named), table.file, *written.files)
    extra = [name for name in (vocabulary, draft_table) if name is not None]
    once = {name for graph in _once(graphs) for name in (graph.file, graph.weights) if name is not None}
    stored = sum((folder / name).stat().st_size for name in (*once, table.file))
    return Artefacts(
        model=request.facts,
        exits=request.exits,
        manifest=partial(OnnxManifest, graphs=graphs),
        draft_table=draft_table,
        quantization=Quantization(
            scheme=scheme.name,
            calibration_sha256=written.calibration_sha256,
            bits_per_weight=8 * stored / request.num_weights,
        ),
        files=(*artefacts, *extra, TOKENIZER_FILE),
        oracle=written.oracle or Oracle(_ORACLE, {"checkpoint": str(request.checkpoint.path)}),
        probe=probe_of(request.tokenizer, request.facts),
        reference=request.checkpoint.path,
        min_agreement=scheme.min_agreement,
        reference_tolerance=_EXACT_TOLERANCE if scheme.exact else None,
        source_sha256=request.source_sha256,
        engine=f"onnxruntime {importlib.metadata.version('onnxruntime')}",
        runs_here=written.status != "compiled",
        slack=scheme.slack,
    )


def _check(source: str, options: ExportOptions, scratch: Path) -> _Request:
    """Read the input and refuse what cannot work, before anything is made."""
    scheme = scheme_of(options.quantize or _DEFAULT_SCHEME)
    target = fitted(target_of(options.target or _DEFAULT_TARGET, scheme.name), options.widths, scheme.name)
    _refuse_options(source, options, target, scheme)
    checkpoint = open_checkpoint(source)
    if checkpoint.is_encoder_decoder:
        raise CheckpointError(
            f"{source}: {checkpoint.architecture} is an encoder-decoder; --format onnx takes decoders alone",
            hint="use --format gguf or executorch",
        )
    tokenizer = load_tokenizer(checkpoint)
    weights = num_weights(checkpoint)
    check_disk_space(scratch, weights, 64.0)
    context = planned_context(checkpoint.config, options.context_length, target.context, target.max_width)
    facts = checkpoint_facts(checkpoint, tokenizer, context, weights)
    wanted = recorded_exits(checkpoint.path, checkpoint.config) if options.exits is None else options.exits
    exits = check_exits(default_exits(facts.num_layers) if wanted is None else wanted, facts.num_layers)
    material = DraftMaterial.find(checkpoint.path, options.draft_text, tokenizer)
    return _Request(
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        facts=facts,
        num_weights=weights,
        target=target,
        exits=exits,
        material=material,
        draft_tokens=material.choose_tokens(facts, options.draft_vocab_size) if exits else None,
        source_sha256=hash_checkpoint(checkpoint),
    )


def _entry(
    request: _Request, parts: Parts, written: Written, table: TableEntry, vocabulary: str | None
) -> GraphsEntry:
    """What the manifest says of the graphs.

    Raises:
        CheckpointError: layers keep K and V of different shapes.
    """
    target = request.target
    shapes = {shape for part in parts.segments if isinstance(part, GraphSegment) for shape in part.shapes}
    if len(shapes) != 1:
        raise CheckpointError(
            f"{request.checkpoint.path}: layers keep K and V of {len(shapes)} shapes, one was expected",
            hint="use --format gguf or executorch",
        )
    (shape,) = shapes
    return GraphsEntry(
        target=target.name,
        status=written.status,
        opset=OPSET,
        slots=request.facts.context_length,
        widths=target.widths,
        max_width=target.max_width,
        masked=target.masked,
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


def _refuse_options(source: str, options: ExportOptions, target: Target, scheme: Scheme) -> None:
    if source.endswith(".gguf"):
        raise UsageError(
            f"{source}: --format onnx starts from a checkpoint",
            hint="pass the Hugging Face folder, or use --format gguf",
        )
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
    refuse_options(options, reasons)
