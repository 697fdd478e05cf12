"""Carries a recipe out: checkpoint → smaller checkpoint.

    >>> record = compress("samples/models/coder", "smaller/", steps, calibration="text.py", held_out="held_out.jsonl")
    >>> record.steps[-1].fidelity.kl_divergence

What cannot work is refused before anything is loaded. Every finished step is kept in the user's cache, so that a run
that was cut off goes on behind its last one. The output appears when all is done.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipstone.bundle import Compression, CompressionStep, bundle_in_progress
from skipstone.errors import UsageError
from skipstone.exporters.checkpoint import Checkpoint
from skipstone.exporters.compress import cache
from skipstone.exporters.compress.fidelity import measure_fidelity
from skipstone.exporters.compress.folder import measure_size, read_codes, write_folder
from skipstone.exporters.compress.recipe import options_of
from skipstone.exporters.compress.record import RECORD_FILE, read_record
from skipstone.exporters.compress.shapes import facts_of, open_source, shape_of
from skipstone.exporters.compress.steps import Step, Target
from skipstone.exporters.compress.texts import read_windows
from skipstone.exporters.compress.work import Progress, Windows, Work, silent
from skipstone.exporters.exits import recorded_encoder_exits, recorded_exits
from skipstone.exporters.factors import load_factored
from skipstone.exporters.facts import hash_checkpoint, load_tokenizer

CALIBRATION_TOKENS = 8192


def compress(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    steps: Sequence[Step],
    *,
    target: Target | None = None,
    calibration: str | os.PathLike[str] | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    held_out: str | os.PathLike[str] | None = None,
    text_flag: str = "--calibration",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Compression:
    """Make a checkpoint smaller and write it as an ordinary checkpoint folder.

    Args:
        source: checkpoint folder or hub name.
        output: folder of the new checkpoint.
        steps: what to do, in order (`skipstone.exporters.compress.recipe`).
        target: what the result is for: a step that it could not carry is refused; None: any format.
        calibration: text that steps learn from; .jsonl of `{"source": …, "target": …}` for an encoder-decoder.
        calibration_tokens: of it to read at most.
        held_out: text to measure every step on; None: the calibration text.
        text_flag: what the user names the calibration text with.
        overwrite: replace a compressed checkpoint that stands at `output`.
        progress: told what is being done, how much of it is done, and how much there is.

    Returns:
        What was done, as compression.json holds it.

    Raises:
        UsageError: a step that cannot work on this model or for this target, a text that cannot be read.
        CheckpointError: a source that cannot be compressed.
        BundleError: `output` cannot be written.
    """
    texts = _Texts(
        None if calibration is None else Path(calibration),
        None if held_out is None else Path(held_out),
        calibration_tokens,
        text_flag,
    )
    run = _prepare(source, steps, target or Target(), texts, progress or silent)
    kind = {"marker": RECORD_FILE, "what": "compressed checkpoint"}
    with bundle_in_progress(Path(output), overwrite=overwrite, **kind) as folder:
        model, work, record = _carry_out(run)
        write_folder(model, work, record, folder)
    return record


@dataclass(frozen=True)
class _Texts:
    """Files to learn from and to measure on, how many tokens of them to read, and the first one's flag."""

    calibration: Path | None
    held_out: Path | None
    tokens: int
    flag: str


@dataclass(frozen=True)
class _Run:
    """What was asked for, checked.

    Attributes:
        checkpoint: the source.
        steps: in order.
        work: as it is before the first step.
        measured: the text that every step is measured on; None: there is none.
        source_sha256: of the source.
        keys: by step, what the model after it is kept under.
    """

    checkpoint: Checkpoint
    steps: tuple[Step, ...]
    work: Work
    measured: Windows | None
    source_sha256: str
    keys: tuple[str, ...]


def _prepare(
    source: str | os.PathLike[str],
    steps: Sequence[Step],
    target: Target,
    texts: _Texts,
    progress: Progress,
) -> _Run:
    """Read the input and refuse what cannot work, before anything is done."""
    checkpoint = open_source(source)
    check_steps(checkpoint, steps, target, has_text=texts.calibration is not None, flag=texts.flag)
    tokenizer, facts = load_tokenizer(checkpoint), facts_of(checkpoint)
    text, measured = (
        None if file is None else read_windows(file, flag, tokenizer, facts, texts.tokens)
        for file, flag in ((texts.calibration, texts.flag), (texts.held_out, "--held-out"))
    )
    measured = text if measured is None else measured
    work = Work(
        source=checkpoint.path,
        target=target,
        tokenizer=tokenizer,
        text=text,
        exits=recorded_exits(checkpoint.path, checkpoint.config),
        encoder_exits=recorded_encoder_exits(checkpoint.path, checkpoint.config),
        **_codes_in(checkpoint.path),
        cache=cache.kept_models(),
        progress=progress,
    )
    source_sha256 = hash_checkpoint(checkpoint)
    keys = cache.step_keys(
        steps,
        source=source_sha256,
        exits=(work.exits, work.encoder_exits),
        target=dataclasses.asdict(target),
        calibration=None if text is None else (text.sha256, text.tokens),
        measured=None if measured is None else (measured.sha256, measured.tokens),
    )
    return _Run(checkpoint, tuple(steps), work, measured, source_sha256, tuple(keys))


def check_steps(
    checkpoint: Checkpoint,
    steps: Sequence[Step],
    target: Target,
    *,
    has_text: bool,
    flag: str = "--calibration",
) -> None:
    """Refuse steps that cannot work, each on the model that those before it leave; `flag` would give a text.

    Raises:
        UsageError: naming the step; or there is none at all.
    """
    if not steps:
        raise UsageError("no step to take", hint="pass --recipe FILE or --compress drop_layers:count=3")
    shape = shape_of(checkpoint)
    for step in steps:
        if step.needs_calibration and not has_text:
            raise UsageError(f"{step.kind}: needs a text to learn from", hint=f"pass {flag} TEXT")
        shape = step.check(shape, target)


def _carry_out(run: _Run) -> tuple[Any, Work, Compression]:
    """Take the steps, behind the last one that was kept from before."""
    done, folder = next(
        ((n, kept) for n in range(len(run.steps), 0, -1) if (kept := cache.fetch(run.keys[n - 1]))),
        (0, None),
    )
    if folder is None:
        model, work = load_factored(run.checkpoint.path), run.work
        record = _first_record(run, model)
    else:
        model, record = load_factored(folder), _record_of(folder, run)
        work = _as_left(run.work, folder, record)
    for number in range(done, len(run.steps)):
        step = run.steps[number]
        work.progress(step.kind, number, len(run.steps))
        start = time.perf_counter()
        details = step.apply(model, work)
        seconds = time.perf_counter() - start
        entry = CompressionStep(
            kind=step.kind,
            options={key: value for key, value in options_of(step).items() if key != "kind"},
            details=dict(details),
            size=measure_size(model, work),
            fidelity=None if run.measured is None else measure_fidelity(model, work, run.measured),
            seconds=seconds,
        )
        record = record.model_copy(update={"steps": (*record.steps, entry), "kept": dict(work.kept)})
        cache.keep(run.keys[number], lambda draft, r=record: write_folder(model, work, r, draft))  # type: ignore[misc]
    return model, work, record


def _first_record(run: _Run, model: Any) -> Compression:
    """What there is to say before the first step."""
    text, measured = run.work.text, run.measured
    before = read_record(run.checkpoint.path)
    return Compression(
        source=run.checkpoint.source,
        source_sha256=run.source_sha256,
        calibration_sha256=None if text is None else text.sha256,
        measured_sha256=None if measured is None else measured.sha256,
        before=measure_size(model, run.work),
        before_fidelity=None if measured is None else measure_fidelity(model, run.work, measured),
        earlier=() if before is None else (*before.earlier, *before.steps),
        steps=(),
    )


def _record_of(folder: Path, run: _Run) -> Compression:
    record = read_record(folder)
    if record is None:  # `fetch` has seen it
        raise UsageError(f"{folder}: vanished while it was read", hint="run again")
    return record.model_copy(update={"source": run.checkpoint.source})


def _as_left(work: Work, folder: Path, record: Compression) -> Work:
    """What the steps share, as the last one kept left it."""
    exits = recorded_exits(folder, None), recorded_encoder_exits(folder, None)
    return dataclasses.replace(
        work, exits=exits[0], encoder_exits=exits[1], kept=dict(record.kept), **_codes_in(folder)
    )


def _codes_in(folder: Path) -> dict[str, Any]:
    """What `Work` says of the codes in a checkpoint's folder."""
    found = read_codes(folder)
    if found is None:
        return {"codes": {}, "scheme": None, "tables": {}}
    return {"codes": dict(found.weights), "scheme": found.scheme, "tables": dict(found.tables)}
