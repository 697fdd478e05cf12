"""Graphs for Qualcomm's Hexagon NPU: rounded to integers, a context binary for each part and number of rows.

graphs ─ calibrate ─▶ ranges ─▶ fixed shapes ─ fuse norms, round ─▶ QDQ graphs ─ Qualcomm's compiler ─▶ context binaries

The embedding stays on the host, and so do K and V: the NPU's share of a model is everything between.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from skipstone.bundle import GraphEntry, QnnEntry, SharedEntry, hash_file
from skipstone.errors import ExportError
from skipstone.exporters.formats import Oracle
from skipstone.exporters.formats.onnx.calibration import measure_ranges, read_tokens, write_tokens
from skipstone.exporters.formats.onnx.files import write_graph
from skipstone.exporters.formats.onnx.graphs import fixed
from skipstone.exporters.formats.onnx.norms import fuse_norms
from skipstone.exporters.formats.onnx.qdq import Ranges, Rounding, round_graph
from skipstone.exporters.formats.onnx.schemes import Scheme
from skipstone.exporters.formats.onnx.socs import SOCS, TARGET, Soc
from skipstone.exporters.formats.onnx.targets import Task, Written
from skipstone.exporters.isolation import run_isolated
from skipstone.runtimes.engines.onnxruntime.targets import presence

_COMPILE = "skipstone.exporters.formats.onnx.qnn_compiler:compile_graphs"
_ORACLE = "skipstone.exporters.formats.onnx.qnn_oracle:RoundedDecoder"
_ORACLE_FOLDER = "rounded"
_SHARED = "shared"
_HEAD_BITS = 8  # of its weights, at least: it is where four bits cost most
_ORACLE_ROWS = 64


@dataclass(frozen=True)
class _Model:
    """Graphs on their way to the compiler: as traced, and for integers the ranges of their values."""

    graphs: Mapping[str, ir.Model]
    ranges: Mapping[str, Ranges]
    scheme: Scheme
    slots: int

    def lowered(self, part: str, rows: int) -> ir.Model:
        """A part's graph as the compiler gets it."""
        narrow = fixed(self.graphs[part], rows, self.slots)
        fuse_norms(narrow)
        rounding = self.scheme.rounding
        if rounding is not None:
            weights = rounding.weights if part.startswith("segment_") else max(rounding.weights, _HEAD_BITS)
            round_graph(narrow, Rounding(rounding.activations, weights), self.ranges[part])
        return narrow


def write_contexts(graphs: Iterator[tuple[str, ir.Model]], task: Task) -> Written:
    """Compile every part for every width; see `skipstone.exporters.formats.onnx.targets.Writer`.

    Raises:
        UsageError: a calibration text that cannot be used.
        ExportError: the NPU does not take a graph from end to end, or the compiler fails.
    """
    soc, scheme, facts = SOCS[str(task.options.target)], task.scheme, task.reading.facts
    task.step("calibrate")
    traced = dict(graphs)
    table = np.memmap(task.table, np.float16, "r").reshape(-1, facts.hidden_size)
    ranges, text_sha256 = _calibrate(traced, table, task)
    model = _Model(traced, ranges, scheme, facts.context_length)
    task.step("quantise")
    oracle = _write_oracle(model, table, task.scratch / _ORACLE_FOLDER)
    task.step("lower")
    entries: list[GraphEntry] = []
    shared: list[SharedEntry] = []
    for part in traced:
        files = [_lowered_file(model, part, width, task.scratch) for width in task.target.widths]
        entries += _compile(part, files, soc, task)
        if task.options.share_weights:
            shared += _compile_shared(part, files, soc, task)
        for file in files:
            file.delete()
    named = {name for entry in shared for name in (entry.file, entry.binary)}
    return Written(
        graphs=tuple(entries),
        status=presence(TARGET),
        files=tuple(sorted(named)),
        oracle=oracle,
        calibration_sha256=text_sha256,
        qnn=QnnEntry(
            soc=soc.name,
            soc_id=soc.id,
            arch=soc.arch,
            compiler=f"onnxruntime-qnn {importlib.metadata.version('onnxruntime-qnn')}",
            shared=tuple(shared),
        ),
    )


def _calibrate(
    graphs: Mapping[str, ir.Model], table: NDArray[Any], task: Task
) -> tuple[dict[str, Ranges], str | None]:
    """The ranges of all values, and the hash of the user's text."""
    if task.scheme.rounding is None:
        return {}, None
    file, facts = task.options.calibration, task.reading.facts
    slots = facts.context_length
    if file is None:
        tokens, text_sha256 = write_tokens(graphs, table, facts, slots), None
    else:
        tokens, text_sha256 = read_tokens(file, task.reading.tokenizer), hash_file(file)
    return {**measure_ranges(graphs, table, tokens, slots)}, text_sha256


def _write_oracle(model: _Model, table: NDArray[Any], folder: Path) -> Oracle:
    """The same graphs for the self-test, to be computed by ONNX Runtime's CPU provider."""
    folder.mkdir()
    rows = min(_ORACLE_ROWS, model.slots)
    for part in model.graphs:
        write_graph(model.lowered(part, rows), part, None, folder)
    np.save(folder / "table.npy", table)
    return Oracle(_ORACLE, {"folder": str(folder), "rows": str(rows), "slots": str(model.slots)})


@dataclass(frozen=True)
class _File:
    """A graph that can be compiled."""

    path: Path
    weights: str | None
    width: int
    weight_bytes: int

    @property
    def name(self) -> str:
        return self.path.name

    def delete(self) -> None:
        self.path.unlink()
        if self.weights is not None:
            self.path.with_name(self.weights).unlink()


def _lowered_file(model: _Model, part: str, width: int, scratch: Path) -> _File:
    entry = write_graph(model.lowered(part, width), part, width, scratch)
    return _File(scratch / entry.file, entry.weights, width, entry.weight_bytes)


def _compile(part: str, files: Sequence[_File], soc: Soc, task: Task) -> Iterator[GraphEntry]:
    """A binary for each width."""
    compiled = _run(part, files, task.folder, soc, task, share=False)
    for file, binary in zip(files, compiled, strict=True):
        yield GraphEntry(
            part=part, width=file.width, file=file.name, weights=binary, weight_bytes=file.weight_bytes
        )


def _compile_shared(part: str, files: Sequence[_File], soc: Soc, task: Task) -> Iterator[SharedEntry]:
    """One binary for all widths."""
    folder = task.folder / _SHARED
    folder.mkdir(exist_ok=True)
    compiled = _run(part, files, folder, soc, task, share=True)
    for file, binary in zip(files, compiled, strict=True):
        yield SharedEntry(
            part=part, width=file.width, file=f"{_SHARED}/{file.name}", binary=f"{_SHARED}/{binary}"
        )


def _run(part: str, files: Sequence[_File], folder: Path, soc: Soc, task: Task, *, share: bool) -> list[str]:
    """Compile in a process of its own; names of the binaries.

    Raises:
        ExportError: the compiler fails, or compiles for another SoC (it takes numbers it does not know for an old one).
    """
    found = run_isolated(
        _COMPILE,
        graphs=[[str(file.path), str(folder / file.name)] for file in files],
        soc_id=soc.id,
        half=task.scheme.rounding is None,
        share=share,
    )
    for made in found:
        if (made["soc"], made["arch"]) != (soc.name, soc.arch):
            raise ExportError(
                f"{part}: compiled for {made['soc']} (v{made['arch']}), {soc.name} (v{soc.arch}) was expected",
                hint="this release of onnxruntime-qnn does not know the SoC; install the pinned one",
            )
    return [str(made["binary"]) for made in found]
