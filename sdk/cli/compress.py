"""`skipstone compress`: a checkpoint into a smaller one, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from skipstone.bundle import Compression, Fidelity, ModelSize
from skipstone.cli._options import CompressionRecipe, CompressionSteps
from skipstone.cli._progress import progress_bar
from skipstone.errors import UsageError

if TYPE_CHECKING:
    from skipstone.exporters.compress.steps import Step


def compress(
    checkpoint: Annotated[str, typer.Argument(help="Hugging Face folder or hub name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the smaller checkpoint.")],
    recipe: CompressionRecipe = None,
    compress: CompressionSteps = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text or .jsonl that steps learn from.", show_default=False)
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=2, help="Tokens of it to read at most.")] = 8192,
    held_out: Annotated[
        Path | None,
        typer.Option(help="Text or .jsonl to measure every step on.", show_default="the calibration text"),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="gguf, executorch or onnx: refuse what it cannot carry.", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the compressed checkpoint at --output.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Make CHECKPOINT smaller, measure every step, and write an ordinary Hugging Face folder.

    Finished steps are kept in the cache: the same command goes on where it was cut off.
    """
    try:
        from skipstone.exporters.compress.run import compress as run
    except ModuleNotFoundError as error:
        raise UsageError(
            f"compress needs {error.name}, which is not installed", hint="pip install 'skipstone[export]'"
        ) from error
    from skipstone.exporters.compress.steps import Target
    from skipstone.exporters.formats import exporter_of

    if format is not None:
        exporter_of(format)
    steps = read_steps(recipe, compress)
    with progress_bar("reading") as report:
        record = run(
            checkpoint,
            output,
            steps,
            target=Target(format=format),
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            held_out=held_out,
            overwrite=overwrite,
            progress=report,
        )
    if json:
        typer.echo(record.model_dump_json(indent=2))
        return
    console = Console()
    console.print(compression_table(record))
    console.print(
        f"next: skipstone export {escape(str(output))} --output BUNDLE", highlight=False, soft_wrap=True
    )


def read_steps(recipe: Path | None, flags: list[str] | None) -> tuple[Step, ...]:
    """The steps of a recipe file, or of `--compress` flags.

    Raises:
        UsageError: both, or a step that cannot be read.
    """
    from skipstone.exporters.compress.recipe import load_recipe, parse_steps

    if recipe is not None and flags:
        raise UsageError("--recipe and --compress: one of them was expected", hint="leave out one")
    return parse_steps(flags or ()) if recipe is None else load_recipe(recipe)


def compression_table(record: Compression) -> Table:
    """By step, what became of the model, and how long it took."""
    table = Table(
        title="After each step, in float32, against the source",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("step", no_wrap=True)
    for name in ("weights", "zeros", "size", "perplexity", "KL", "same", "exits", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("source", *_figures(record.before, record.before_fidelity), "")
    for step in record.steps:
        table.add_row(step.kind, *_figures(step.size, step.fidelity), f"{step.seconds:.1f}")
    return table


def _figures(size: ModelSize, fidelity: Fidelity | None) -> tuple[str, ...]:
    zeros = 1.0 - size.nonzero / max(size.parameters, 1)
    sizes = f"{size.parameters / 1e6:.2f} M", f"{zeros:.0%}", f"{size.num_bytes / 1e6:.2f} MB"
    if fidelity is None:
        return (*sizes, "—", "—", "—", "—")
    exits = "\n".join(f"{found.exit}: {found.own_last:.0%}" for found in fidelity.exits)
    return (
        *sizes,
        f"{fidelity.perplexity:.3f}",
        f"{fidelity.kl_divergence:.4f}",
        f"{fidelity.agreement:.0%}",
        exits or "—",
    )
