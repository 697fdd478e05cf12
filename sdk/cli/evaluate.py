"""`skipstone evaluate`: how good bundles and checkpoints are, side by side."""

from __future__ import annotations

import json as json_
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skipstone.cli import _options as flags
from skipstone.cli._common import check_strategy
from skipstone.errors import UsageError

if TYPE_CHECKING:
    from skipstone.evaluation.speed import SpeedOptions


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Bundles, checkpoint folders or hub names.")],
    held_out: Annotated[
        Path,
        typer.Option(
            help='Text, or .jsonl of {"text": …}; for encoder-decoders of {"source": …, "target": …}.'
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(help="The dense model's checkpoint, to compare with.", show_default="nothing"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to read at most.")] = 8192,
    max_texts: Annotated[
        int, typer.Option(min=0, help="Texts that an encoder-decoder writes at most; 0: none.")
    ] = 256,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="HTML page to write, plots included.", show_default=False),
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Also measure tokens per second here; let nothing else run.")
    ] = False,
    strategy: Annotated[str, typer.Option(help="With --speed: takes turns with plain decoding.")] = "auto",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='With --speed: JSONL file with {"prompt": …} or {"source": …} lines.',
            show_default="a few built in",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="With --speed: tokens per prompt.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="With --speed: passes over the prompts.")] = 3,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Do not measure peak memory.")] = False,
    threads: flags.Threads = None,
    kv_type: flags.KvType = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare bundles and checkpoints on held-out text: perplexity, distance from the dense model, exits, size."""
    from rich.console import Console

    from skipstone.benchmark.report import check_writable
    from skipstone.cli._progress import progress_bar
    from skipstone.evaluation import EvaluateOptions
    from skipstone.evaluation import evaluate as run
    from skipstone.evaluation.page import check_plots, write_page
    from skipstone.evaluation.render import show

    if output is not None:
        check_writable(output, "--output")
        check_plots()
    options = EvaluateOptions(
        held_out=held_out,
        against=against,
        max_tokens=max_tokens,
        max_texts=max_texts,
        threads=threads,
        kv_type=kv_type,
        memory=not no_memory,
        speed=_speed(strategy, prompts, max_new_tokens, repeats) if speed else None,
        command=("skipstone", *sys.argv[1:]),
    )
    with progress_bar("reading") as progress:
        report = run(models, options, progress)
    if output is not None:
        write_page(report, output)
    if json:
        typer.echo(json_.dumps(report.as_json(), indent=2, ensure_ascii=False))
    else:
        show(report, Console())


def _speed(strategy: str, prompts: Path | None, max_new_tokens: int, repeats: int) -> SpeedOptions:
    """How speeds are measured.

    Raises:
        UsageError: an unknown strategy, one that needs a draft model, or prompts that cannot be read.
    """
    from skipstone.benchmark.prompts import Texts, read_prompts
    from skipstone.builtin_texts import PROMPTS, SOURCES
    from skipstone.evaluation.speed import SpeedOptions

    check_strategy(strategy)
    if strategy == "draft-model":
        raise UsageError("--strategy draft-model: evaluate opens no draft model", hint="use skipstone bench")
    texts = Texts(PROMPTS, SOURCES) if prompts is None else read_prompts(prompts)
    return SpeedOptions(strategy, texts.prompts, texts.sources, max_new_tokens, repeats)
