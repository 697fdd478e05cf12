"""`skipstone inspect`: what a bundle holds."""

from __future__ import annotations

from dataclasses import asdict
from json import dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from skipstone.bundle import (
    Bundle,
    Calibration,
    CostCurve,
    Manifest,
    Parity,
    Quality,
    open_bundle,
    read_manifest,
)
from skipstone.cli._options import BundleFolder, ManifestJson
from skipstone.cli._untested import untested

if TYPE_CHECKING:
    from skipstone.runtimes.engines.executorch.memory import MemoryReport


def inspect(
    bundle: BundleFolder,
    json: ManifestJson = False,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory", help="Also load it in a process of its own and say what takes how much memory."
        ),
    ] = False,
) -> None:
    """Check a bundle's files and show what it holds."""
    report = _report_memory(bundle) if memory else None
    opened = open_bundle(bundle)
    manifest = opened.manifest
    if json:
        text = manifest.model_dump_json(indent=2)
        typer.echo(text if report is None else dumps(loads(text) | {"memory": asdict(report)}, indent=2))
        return
    console = Console()
    console.print(_facts(manifest))
    console.print(_files(manifest))
    if manifest.parity is None:
        console.print("\n".join(untested(manifest)), highlight=False)
    else:
        console.print(_parity(manifest.parity))
    if manifest.quality is not None:
        console.print(_quality(manifest.quality))
    for calibration in manifest.calibrations:
        console.print(_calibrated(calibration), highlight=False, soft_wrap=True)
    if manifest.cost is not None:
        console.print(_cost(manifest.cost))
    _show_curves(opened, console)
    if report is not None:
        console.print(_memory(report))


def _report_memory(folder: Path) -> MemoryReport:
    """Measure a bundle's memory.

    Raises:
        BundleError: there is no whole bundle.
        UsageError: nothing reports its format's memory.
        EngineError: it cannot be loaded.
    """
    from skipstone.runtimes.engines import EngineOptions
    from skipstone.runtimes.engines.reports import MEMORY_REPORTERS, choose

    reporter = choose(MEMORY_REPORTERS, read_manifest(folder).format, "--memory")
    return reporter(open_bundle(folder), EngineOptions())


def _facts(manifest: Manifest) -> Table:
    model, quantization, origin = manifest.model, manifest.quantization, manifest.provenance
    bits = (
        ""
        if quantization.bits_per_weight is None
        else f", {quantization.bits_per_weight:.2f} bits per weight"
    )
    imatrix = "" if quantization.imatrix_sha256 is None else ", importance matrix"
    mix = "".join(f", {part} {scheme}" for part, scheme in quantization.mix.items())
    rows = {
        "model": f"{model.name} ({model.architecture}, {model.parameters / 1e6:.1f} M parameters)",
        "shape": f"{model.num_layers} layers × {model.hidden_size}, {model.vocab_size} tokens, "
        f"context {model.context_length}",
        "exits": ", ".join(map(str, manifest.exits)) or "none",
        "quantisation": f"{quantization.scheme}{mix}{bits}{imatrix}",
        "format, device": f"{manifest.format}, {manifest.device}",
        "source": origin.source,
        "made by": f"{origin.tool}, {origin.engine}, {origin.created}",
    }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    return table


def _files(manifest: Manifest) -> Table:
    roles = manifest.contents
    table = Table("file", "holds", "MB", "sha256", title="Files", title_justify="left")
    table.columns[2].justify = "right"
    for entry in manifest.files:
        table.add_row(entry.path, roles.get(entry.path, ""), f"{entry.size / 1e6:.2f}", entry.sha256[:12])
    return table


def _parity(parity: Parity) -> Table:
    table = Table(
        "self-test", "largest difference of a logit", "allowed", title="Parity", title_justify="left"
    )
    if parity.reference is not None:
        allowed = "—" if parity.reference_tolerance is None else f"{parity.reference_tolerance:.2g}"
        table.add_row("against the reference in f32", f"{parity.reference:.3g}", allowed)
    if parity.agreement_with_reference is not None:
        table.add_row(
            "best token as the reference's", f"{parity.agreement_with_reference:.1%} of positions", "—"
        )
    table.add_row("segments against the whole", f"{parity.split:.3g}", f"{parity.split_tolerance:.2g}")
    table.add_row("drafted, then verified", f"{parity.draft_verify:.3g}", f"{parity.split_tolerance:.2g}")
    table.add_row("alone or in a wider batch", f"{parity.width_noise:.3g}", "—")
    table.add_row("a near-tie is a gap within", f"{parity.near_tie_margin:.3g}", "—")
    return table


def _quality(quality: Quality) -> Table:
    title = f"Quality on held-out text ({quality.tokens} tokens, {quality.text_sha256[:12]})"
    table = Table("", "this artefact", "the checkpoint in f32", title=title, title_justify="left")
    reference = "—" if quality.reference_perplexity is None else f"{quality.reference_perplexity:.3f}"
    table.add_row("perplexity", f"{quality.perplexity:.3f}", reference)
    if quality.kl_divergence is not None:
        table.add_row("divergence from the checkpoint, nats", f"{quality.kl_divergence:.4f}", "0")
    if quality.agreement is not None:
        table.add_row("best token as the checkpoint's", f"{quality.agreement:.1%}", "")
    for found in quality.exits:
        table.add_row(f"exit {found.exit}'s best token as the last layer's", f"{found.own_last:.1%}", "")
        if found.dense is not None:
            name = f"exit {found.exit}'s best token as the checkpoint's there"
            table.add_row(name, f"{found.dense:.1%}", "")
    return table


def _calibrated(found: Calibration) -> str:
    value = "never" if found.value is None else f"{found.value:g}"
    return (
        f"--{found.knob} calibrated: {value} ({found.risk} loss ≤ {found.max_loss:g} with confidence "
        f"{found.confidence:g}, {found.samples} texts)"
    )


def _show_curves(bundle: Bundle, console: Console) -> None:
    """The curves kept beside the bundle; one line for each file that is of no use."""
    from skipstone.devices.curves import kept_curves

    for found in kept_curves(bundle):
        if found.content is None:
            console.print(escape(f"{found.path}: ignored: {found.problem}"), highlight=False, soft_wrap=True)
            continue
        key = found.content.key
        console.print(_cost(found.content.curve))
        console.print(
            escape(
                f"kept in {found.path}; {found.content.measured}, {key.library}, {key.processor}, {key.cores} cores, "
                f"K/V {key.kv_type}, {key.gpu_layers} GPU layers"
            ),
            highlight=False,
            soft_wrap=True,
        )


def _cost(cost: CostCurve) -> Table:
    """The widths that are powers of two, which fit a terminal."""
    title = f"Milliseconds per call by rows in the batch ({cost.threads} threads, {cost.machine})"
    shown = [index for index, width in enumerate(cost.widths) if width & (width - 1) == 0]
    table = Table("part", *(str(cost.widths[at]) for at in shown), title=title, title_justify="left")
    for index, curve in enumerate(cost.segments):
        table.add_row(f"segment {index}", *(f"{curve[at] * 1e3:.3f}" for at in shown))
    if cost.draft_head:
        table.add_row("draft head", *(f"{cost.draft_head[at] * 1e3:.3f}" for at in shown))
    return table


def _memory(report: MemoryReport) -> Table:
    """Planned in the file on the left, taken by a process on the right."""
    title = (
        f"Memory in MB: K/V for {report.slots} positions and activations of the widest batch, one arena of each for "
        f"all methods; grown by loading and by the first call"
    )
    table = Table("part", title=title, title_justify="left")
    for name in ("weights", "K/V", "activations", "loading", "first call"):
        table.add_column(name, justify="right")

    def row(name: str, *sizes: int | None, style: str = "") -> None:
        cells = ("" if size is None else f"{size / 1e6:.2f}" for size in sizes)
        table.add_row(name, *cells, style=style)

    row(
        f"file opened ({report.file_bytes / 1e6:.1f} MB)",
        report.constant_bytes,
        None,
        None,
        report.opening.total,
    )
    for method in report.methods:
        row(
            method.name,
            method.weight_bytes,
            method.key_value_bytes,
            method.activation_bytes,
            method.loading.total,
            method.calling.total,
        )
    table.add_section()
    grown, called = report.loaded - report.idle, report.called - report.loaded
    weights = report.packed_bytes + report.constant_bytes
    row(
        "all",
        weights,
        report.key_value_bytes,
        report.activation_bytes,
        grown.total,
        called.total,
        style="bold",
    )
    row("of it private", None, None, None, grown.private, called.private)
    return table
