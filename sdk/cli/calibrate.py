"""`skipstone calibrate`: how far early stopping may go."""

from __future__ import annotations

import json as json_
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skipstone.bundle import Knob, Risk
from skipstone.cli import _options as flags
from skipstone.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from skipstone.calibration import Outcome


def calibrate(
    bundle: flags.BundleFolder,
    prompts: Annotated[
        Path,
        typer.Option(
            help='JSONL file of held-out texts: {"source": …} lines, {"prompt": …} for decoders; '
            "for --risk quality with a reference or target."
        ),
    ],
    knob: Annotated[Knob, typer.Option(help="Threshold to calibrate.")] = "early-exit-margin",
    risk: Annotated[
        Risk,
        typer.Option(
            help="text: difference from the whole model's output; quality: how much farther from the reference."
        ),
    ] = "text",
    max_loss: Annotated[float, typer.Option(help="Loss to allow, in edits per character.")] = 0.02,
    confidence: Annotated[float, typer.Option(help="With which it is to be shown.")] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens per text at most.")] = 128,
    context_length: flags.ContextLength = None,
    threads: flags.Threads = None,
    kv_type: flags.KvType = None,
    json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Find the lowest threshold of early stopping whose loss stays small, and keep it in BUNDLE.

    `skipstone generate BUNDLE --early-exit-margin calibrated` uses it from then on. Thresholds fall until the expected
    loss cannot be shown to stay under --max-loss with this confidence.
    """
    from rich.console import Console

    from skipstone.bundle import hash_file, read_manifest, store_calibration
    from skipstone.calibration import (
        CalibrationOptions,
        RiskBound,
        check_samples,
        key_of,
        read_samples,
    )
    from skipstone.calibration import calibrate as run
    from skipstone.cli._progress import progress_bar
    from skipstone.model import load_model
    from skipstone.runtimes.generate import GenerationLimits

    # Everything that can be said without the weights is said before they are loaded.
    options = CalibrationOptions(knob, risk, RiskBound(max_loss, confidence), max_new_tokens)
    GenerationLimits(max_new_tokens)
    samples = read_samples(prompts, key_of(read_manifest(bundle)), references=risk == "quality")
    check_samples(samples, options.bound)
    if not os.access(bundle, os.W_OK):
        raise UsageError(
            f"{bundle}: cannot be written, and the outcome is to be kept there", hint="copy it first"
        )
    digest = hash_file(prompts)
    with (
        load_model(bundle, context_length=context_length, threads=threads, kv_type=kv_type) as model,
        progress_bar("measuring costs") as show_progress,
    ):
        outcome = run(model, samples, options, show_progress)
    console = Console(quiet=json)
    console.print(_table(outcome))
    store_calibration(bundle, outcome.record(digest))
    console.print(_conclusion(outcome, bundle), highlight=False, markup=False, soft_wrap=True)
    if json:
        typer.echo(json_.dumps(_record(outcome), ensure_ascii=False))


def _record(outcome: Outcome) -> dict[str, object]:
    options = outcome.options
    return {
        "knob": options.knob,
        "value": outcome.value,
        "risk": options.risk,
        "max_loss": options.bound.max_loss,
        "confidence": options.bound.confidence,
        "samples": outcome.samples,
        "max_new_tokens": options.max_new_tokens,
        "trials": [asdict(trial) for trial in outcome.trials],
        "plain_seconds": outcome.plain_seconds,
    }


def _table(outcome: Outcome) -> Table:
    """A line per threshold that was tried."""
    from rich.table import Table

    options = outcome.options
    saved = "tokens out early" if options.knob == "early-exit-margin" else "encoder layers saved"
    title = f"--{options.knob}: {options.risk} loss over {outcome.samples} texts"
    table = Table(title=title, title_justify="left")
    for name in ("threshold", "mean loss", "p-value", saved, "× plain decoding"):
        table.add_column(name, justify="right")
    table.add_column(f"≤ {options.bound.max_loss:g}")
    for trial in outcome.trials:
        speed = outcome.plain_seconds / trial.seconds if trial.seconds else 0.0
        table.add_row(
            f"{trial.value:g}",
            f"{trial.mean_loss:.4f}",
            f"{trial.p_value:.2g}",
            f"{trial.saved:.1%}",
            f"{speed:.2f}",
            "shown" if trial.holds else "not shown",
        )
    return table


def _conclusion(outcome: Outcome, bundle: Path) -> str:
    bound, flag = outcome.options.bound, f"--{outcome.options.knob}"
    shown = f"{outcome.options.risk} loss of at most {bound.max_loss:g} with confidence {bound.confidence:g}"
    if outcome.value is None:
        return f"No threshold has a {shown}: with {flag} calibrated nothing stops early. Kept in {bundle}."
    return f"{flag} {outcome.value:g} has a {shown}. Kept in {bundle}: use it with {flag} calibrated."
