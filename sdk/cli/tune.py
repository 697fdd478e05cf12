"""`skipstone tune`: make a checkpoint exit well."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def tune(
    checkpoint: Annotated[
        str | None,
        typer.Argument(help="Folder or hub name of the model to continue; leave out with --from-config."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write the tuned checkpoint to.")
    ] = Path("tuned"),
    recipe: Annotated[
        str, typer.Option(help="'layerskip', or the path of a recipe file (TOML).")
    ] = "layerskip",
    from_config: Annotated[
        Path | None,
        typer.Option(help="Train from scratch a model with this config.json.", show_default=False),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text file, .jsonl or folder to train on; may be repeated. Default: the recipe's corpus."
        ),
    ] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Minutes to train.", show_default=False)] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Optimizer steps to train.", show_default=False)
    ] = None,
    save_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 10.0,
    dtype: Annotated[
        str, typer.Option(help="bfloat16 (over a float32 master copy) or float32.")
    ] = "bfloat16",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of this run.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")
    ] = False,
    compile: Annotated[bool, typer.Option(help="Compile layers and heads; needs a C++ compiler.")] = True,
    cpu: Annotated[bool, typer.Option("--cpu", help="Stay on the CPU.")] = False,
) -> None:
    """Train CHECKPOINT so that its early exits agree with its last layer, and evaluate every exit.

    The output is an ordinary Hugging Face folder with exit_report.json, exit_report.png and a model card beside the
    weights. `accelerate launch` spreads the run over several devices unchanged.
    """
    from skipstone.errors import UsageError

    try:
        from skipstone.exporters.tune.run import TuneOptions
        from skipstone.exporters.tune.run import tune as run
    except ModuleNotFoundError as error:
        raise UsageError(
            f"tune needs {error.name}, which is not installed", hint="pip install 'skipstone[export]'"
        ) from error
    options = TuneOptions(
        output=output,
        checkpoint=checkpoint,
        from_config=from_config,
        recipe=recipe,
        data=tuple(data or ()),
        max_minutes=max_minutes,
        max_steps=max_steps,
        save_minutes=save_minutes,
        dtype=dtype,
        resume=resume,
        overwrite=overwrite,
        compile=compile,
        cpu=cpu,
    )
    run(options)
