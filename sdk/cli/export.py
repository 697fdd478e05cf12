"""`skipstone export`: a checkpoint, hub name or .gguf into a bundle."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from skipstone.bundle import Manifest, Parity
from skipstone.cli._options import CompressionRecipe, CompressionSteps, ManifestJson
from skipstone.cli._untested import untested
from skipstone.cli.compress import read_steps
from skipstone.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from skipstone.exporters.formats import Step


def export(
    checkpoint: Annotated[str, typer.Argument(help="Hugging Face folder, hub name, or a .gguf file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle.")],
    device: Annotated[str, typer.Option(help="Device profile; `skipstone devices` lists them.")] = "cpu",
    format: Annotated[
        str | None, typer.Option(help="gguf, executorch or onnx.", show_default="the device's first")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="gguf: none, f16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0, iq4_xs, …; executorch: none, fp16, 8da4w, "
            "8da8w, int8, 4w, 8w; onnx: none, 8da4w, 8da8w, 4w, 8w, and for NPUs others.",
            show_default="the device's first",
        ),
    ] = None,
    exits: Annotated[
        str | None,
        typer.Option(help="Layers to cut at, say 2,4; 'none' for no cuts.", show_default="by model"),
    ] = None,
    encoder_exits: Annotated[
        str | None,
        typer.Option(help="Layers at which an encoder can stop.", show_default="as recorded, or none"),
    ] = None,
    draft_vocab_size: Annotated[
        int | None, typer.Option(help="Rows of the draft head; 0: all.", show_default="a quarter")
    ] = None,
    draft_text: Annotated[
        Path | None, typer.Option(help="Text like what will be generated, to count drafts from.")
    ] = None,
    imatrix: Annotated[Path | None, typer.Option(help="Calibration text for an importance matrix.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text that fixes the scales of activations (executorch int8, qualcomm)."),
    ] = None,
    mix: Annotated[
        str | None,
        typer.Option(help="Schemes of single parts, say head=8da8w,0-1=none,embed=none (executorch)."),
    ] = None,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize",
            help="Round the weights of a compressed checkpoint anew, instead of carrying its codes.",
        ),
    ] = False,
    context_length: Annotated[
        int | None,
        typer.Option(
            help="Positions to plan K/V for (executorch, onnx, encoder-decoders).",
            show_default="the model's, at most 512; onnx 2048",
        ),
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(
            help="Numbers of rows to compile graphs for, say 1,4,8 (onnx, for NPUs).",
            show_default="the device's",
        ),
    ] = None,
    share_weights: Annotated[
        bool,
        typer.Option(
            "--share-weights",
            help="Add graphs for the device that share their weights between widths (qualcomm).",
        ),
    ] = False,
    max_source_length: Annotated[
        int | None, typer.Option(help="Tokens of an encoder's source at most.", show_default="512")
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="Text or .jsonl to measure the artefact's perplexity on.")
    ] = None,
    recipe: CompressionRecipe = None,
    compress: CompressionSteps = None,
    compress_text: Annotated[
        Path | None, typer.Option(help="Text or .jsonl that steps of compression learn from.")
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(help="Checkpoint of a smaller model with the same vocabulary, to draft for this one."),
    ] = None,
    draft_quantize: Annotated[
        str | None, typer.Option(help="The draft model's scheme.", show_default="as --quantize")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle at --output.")] = False,
    json: ManifestJson = False,
) -> None:
    """Export a model, cut at its early exits, and test it against its source."""
    chosen, chosen_of_encoder = parse_exits(exits), parse_exits(encoder_exits, "--encoder-exits")
    from skipstone.exporters.pipeline import export_checkpoint

    steps = read_steps(recipe, compress) if recipe is not None or compress else ()
    with _progress(quiet=json) as report:
        bundle = export_checkpoint(
            checkpoint,
            output,
            device=device,
            format=format,
            quantize=quantize,
            exits=chosen,
            encoder_exits=chosen_of_encoder,
            draft_vocab_size=draft_vocab_size,
            draft_text=draft_text,
            imatrix=imatrix,
            calibration=calibration,
            mix=mix,
            requantize=requantize,
            context_length=context_length,
            widths=parse_exits(widths, "--widths"),
            share_weights=share_weights,
            max_source_length=max_source_length,
            held_out=held_out,
            compress=steps,
            compress_text=compress_text,
            draft=draft,
            draft_quantize=draft_quantize,
            overwrite=overwrite,
            progress=report,
        )
    if json:
        typer.echo(bundle.manifest.model_dump_json(indent=2))
    else:
        _summarise(output, bundle.manifest)


def parse_exits(text: str | None, option: str = "--exits") -> tuple[int, ...] | None:
    """`2,4` → (2, 4), `none` → (), None → None.

    Raises:
        UsageError: anything else.
    """
    if text is None:
        return None
    if text.strip().lower() in ("none", ""):
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"{option} {text}: whole numbers were expected", hint="write them as 2,4 or pass none"
        ) from error


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[Step], None]]:
    """A bar over the steps, on standard error and only on a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("starting", total=None)

        def report(step: Step) -> None:
            progress.update(task, description=step.name, completed=step.index - 1, total=step.total)

        yield report


def _summarise(output: Path, manifest: Manifest) -> None:
    size = sum(entry.size for entry in manifest.files) / 1e6
    exits = ", ".join(map(str, manifest.exits)) or "none"
    console = Console()
    lines = [
        f"[bold]{escape(manifest.model.name)}[/bold] → {escape(str(output))} {manifest.quantization.scheme}, "
        f"{size:.1f} MB, exits {exits}"
    ]
    if manifest.parity is None:
        lines += untested(manifest)
    else:
        lines.append(_self_test(manifest.parity))
        given = "--prompt" if manifest.model.encoder is None else "--source"
        lines.append(f"next: skipstone generate {escape(str(output))} {given} TEXT")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _self_test(parity: Parity) -> str:
    against = ""
    if parity.agreement_with_reference is not None:
        against = f"best token as the reference's at {parity.agreement_with_reference:.0%} of positions, "
    return f"self-test passed: {against}cut against whole ≤ {parity.split:.2g}"
