"""`skipstone inspect`: what a bundle holds."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from skipstone.bundle import CostCurve, Manifest, open_bundle
from skipstone.cli._options import BundleFolder, ManifestJson


def inspect(bundle: BundleFolder, json: ManifestJson = False) -> None:
    """Check a bundle's files and show what it holds."""
    manifest = open_bundle(bundle).manifest
    if json:
        typer.echo(manifest.model_dump_json(indent=2))
        return
    console = Console()
    console.print(_facts(manifest))
    console.print(_files(manifest))
    console.print(_parity(manifest))
    if manifest.cost is not None:
        console.print(_cost(manifest.cost))


def _facts(manifest: Manifest) -> Table:
    model, quantization, origin = manifest.model, manifest.quantization, manifest.provenance
    bits = (
        ""
        if quantization.bits_per_weight is None
        else f", {quantization.bits_per_weight:.2f} bits per weight"
    )
    imatrix = "" if quantization.imatrix_sha256 is None else ", importance matrix"
    rows = {
        "model": f"{model.name} ({model.architecture}, {model.parameters / 1e6:.1f} M parameters)",
        "shape": f"{model.num_layers} layers × {model.hidden_size}, {model.vocab_size} tokens, "
        f"context {model.context_length}",
        "exits": ", ".join(map(str, manifest.exits)) or "none",
        "quantisation": f"{quantization.scheme}{bits}{imatrix}",
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


def _parity(manifest: Manifest) -> Table:
    parity = manifest.parity
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


def _cost(cost: CostCurve) -> Table:
    title = f"Milliseconds per call by rows in the batch ({cost.threads} threads, {cost.machine})"
    table = Table("part", *map(str, cost.widths), title=title, title_justify="left")
    for index, curve in enumerate(cost.segments):
        table.add_row(f"segment {index}", *(f"{seconds * 1e3:.3f}" for seconds in curve))
    if cost.draft_head:
        table.add_row("draft head", *(f"{seconds * 1e3:.3f}" for seconds in cost.draft_head))
    return table
