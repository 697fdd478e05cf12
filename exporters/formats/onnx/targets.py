"""Targets: what ONNX graphs are made for. A new one is one line in `TARGETS`, and its sessions are one function in
`skipstone.runtimes.engines.onnxruntime.targets`.

A target that takes any shape gets one graph of a part; one that wants fixed shapes gets a graph for each of its widths,
from a writer of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from skipstone.bundle import GraphEntry, QnnEntry
from skipstone.errors import UsageError
from skipstone.exporters.formats import ExportOptions, Oracle
from skipstone.exporters.formats.onnx.files import write_graph
from skipstone.exporters.formats.onnx.fusion import divide_by_roots
from skipstone.exporters.formats.onnx.modules import MASKED
from skipstone.exporters.formats.onnx.schemes import Scheme, quantize
from skipstone.exporters.formats.onnx.socs import SOCS
from skipstone.exporters.formats.widths import chosen_widths
from skipstone.exporters.reading import Reading
from skipstone.runtimes.engines.onnxruntime.targets import presence

Step = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """What a writer is given beside the graphs.

    Attributes:
        folder: where the bundle's files go.
        scratch: folder for intermediate files.
        options: the user's.
        target: what for.
        scheme: of quantisation, one of the target's.
        reading: of the checkpoint; `facts.context_length` of it are the positions of K/V.
        table: file of the embeddings, float32 or float16 rows of `facts.hidden_size`.
        step: told of every step by name.
    """

    folder: Path
    scratch: Path
    options: ExportOptions
    target: Target
    scheme: Scheme
    reading: Reading
    table: Path
    step: Step


@dataclass(frozen=True)
class Written:
    """What a writer wrote into the folder.

    Attributes:
        graphs: of every part and width.
        status: whether they run here, and so can be tested.
        files: names of what it wrote beside the graphs and their weights.
        oracle: what the self-test compares with; None: the model with the weights in the graphs.
        calibration_sha256: of the user's text that fixed the scales of activations.
        qnn: what the manifest says of context binaries.
    """

    graphs: tuple[GraphEntry, ...]
    status: Literal["runs", "emulated", "compiled"] = "runs"
    files: tuple[str, ...] = ()
    oracle: Oracle | None = None
    calibration_sha256: str | None = None
    qnn: QnnEntry | None = None


Writer = Callable[[Iterator[tuple[str, ir.Model]], Task], Written]


@dataclass(frozen=True)
class Target:
    """A target.

    Attributes:
        name: what device profiles call it.
        schemes: names of the quantisation schemes it computes with.
        write: from name and graph of every part, its rows and slots symbols, to files.
        widths: numbers of rows that it gets graphs for; empty: any up to `max_width`.
        max_width: rows of a batch at most.
        context: positions of K/V where the user names none.
        masked: what is added to scores out of sight.
        calibrates: whether a text may be given that fixes the scales of activations.
        shares: whether graphs of several widths can share their weights.
        sources: whether it takes encoder-decoders.
    """

    name: str
    schemes: tuple[str, ...]
    write: Writer
    widths: tuple[int, ...]
    max_width: int
    context: int
    masked: float
    calibrates: bool = False
    shares: bool = False
    sources: bool = False


def target_of(name: str, scheme: Scheme) -> Target:
    """The target of that name.

    Raises:
        UsageError: no such target, or one that cannot compute with the scheme; lists what can.
    """
    target = TARGETS.get(name)
    if target is None:
        raise UsageError(f"target {name}: expected one of {', '.join(TARGETS)}")
    if scheme.name not in target.schemes:
        raise UsageError(
            f"--quantize {scheme.name}: the target {name} takes {', '.join(target.schemes)}",
            hint="choose one of these, or another --device",
        )
    return target


def fitted(target: Target, widths: tuple[int, ...] | None, scheme: Scheme) -> Target:
    """The target with the widths that the user and the scheme leave.

    Raises:
        UsageError: widths that do not rise, or for a target that takes any.
    """
    if not target.widths:
        if widths is not None:
            raise UsageError(
                f"--widths {_listed(widths)}: graphs for {target.name} take any number of rows",
                hint="leave it out",
            )
        return target
    wanted = chosen_widths(widths, target.widths)
    least = scheme.least_width
    kept = tuple(width for width in wanted if width >= least)
    if not kept:
        raise UsageError(
            f"--widths {_listed(wanted)}: --quantize {scheme.name} computes otherwise in fewer than {least} rows",
            hint=f"add a width of {least} or more",
        )
    return replace(target, widths=kept, max_width=kept[-1])


def _listed(widths: Sequence[int]) -> str:
    return ",".join(map(str, widths))


def write_any_width(graphs: Iterator[tuple[str, ir.Model]], task: Task) -> Written:
    """One graph of a part, weights quantised."""
    entries = []
    task.step("trace")
    for part, graph in graphs:
        divide_by_roots(graph)
        quantize(graph, task.scheme)
        entries.append(write_graph(graph, part, None, task.folder))
    return Written(tuple(entries), presence(task.target.name))


def _write_contexts(graphs: Iterator[tuple[str, ir.Model]], task: Task) -> Written:
    from skipstone.exporters.formats.onnx.qnn import write_contexts

    return write_contexts(graphs, task)


_NPU = Target(
    "qnn",
    ("a16w8", "a16w4", "a8w8", "fp16"),
    _write_contexts,
    (1, 4, 8, 32),
    32,
    256,
    MASKED,
    calibrates=True,
    shares=True,
)

TARGETS = {
    target.name: target
    for target in (
        Target("cpu", ("none", "8da4w", "8da8w", "4w"), write_any_width, (), 64, 2048, MASKED, sources=True),
        Target("webgpu", ("none", "4w", "8w"), write_any_width, (), 64, 2048, MASKED),
    )
} | dict.fromkeys(SOCS, _NPU)
