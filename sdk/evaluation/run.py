"""One evaluation from folders to a report."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from skipstone.benchmark.report import this_machine
from skipstone.bundle import hash_file
from skipstone.errors import UsageError
from skipstone.evaluation.report import EvaluationReport, Row, labels
from skipstone.evaluation.speed import SpeedOptions, measure_memory, measure_speed
from skipstone.evaluation.subjects import (
    Subject,
    check_alike,
    check_kv_type,
    find_checkpoint,
    find_subject,
)

if TYPE_CHECKING:
    from skipstone.exporters.probe import Probe
    from skipstone.exporters.quality import HeldOut
    from skipstone.exporters.tune.correction import CorrectionFigures

Progress = Callable[[str, int, int], None]


def _silent(_what: str, _done: int, _total: int) -> None:
    return None


@dataclass(frozen=True)
class EvaluateOptions:
    """How models are evaluated.

    Attributes:
        held_out: text, or .jsonl of `{"text": …}`; for encoder-decoders of `{"source": …, "target": …}`.
        against: the dense model's checkpoint; None: the models are compared with nothing.
        max_tokens: of the text that are read at most.
        max_texts: that an encoder-decoder writes at most; 0: none.
        threads: of the engines; None: one for small models, else one per core.
        kv_type: type of K and V of bundles on llama.cpp; None: the usual one.
        memory: measure every bundle's peak memory.
        speed: how speeds are measured; None: they are not.
        command: the command line, for the report.
    """

    held_out: Path
    against: str | None = None
    max_tokens: int = 8192
    max_texts: int = 256
    threads: int | None = None
    kv_type: str | None = None
    memory: bool = True
    speed: SpeedOptions | None = None
    command: tuple[str, ...] = field(default=())


def evaluate(
    models: Sequence[str], options: EvaluateOptions, progress: Progress = _silent
) -> EvaluationReport:
    """Evaluate bundles and checkpoints on one text, in the same windows.

    Args:
        models: folders or hub names, all of one vocabulary.
        options: how.
        progress: told what is measured, how much is done and how much there is.

    Raises:
        UsageError, BundleError, CheckpointError, VocabularyMismatchError: what cannot be evaluated; nothing has been
            measured then.
        ExportError, EngineError: an engine crashed or refused.
    """
    from skipstone.exporters.tune.correction import score

    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    subjects = [find_subject(model) for model in models]
    for subject in subjects:
        check_kv_type(subject, options.kv_type)
    dense = None if options.against is None else find_checkpoint(options.against)
    for other in (*subjects[1:], *(() if dense is None else (dense,))):
        check_alike(other, subjects[0])
    material = _read(options, [*subjects, *(() if dense is None else (dense,))])
    measured = _Measuring(options, material, dense, progress, len(subjects))
    named = labels(models)
    rows = tuple(measured.row(label, subject) for label, subject in zip(named, subjects, strict=True))
    texts = material.texts
    return EvaluationReport(
        rows=rows,
        against=options.against,
        held_out=options.held_out.name,
        held_out_sha256=hash_file(options.held_out),
        windows=len(material.probes),
        longest_window=max(len(probe.tokens) for probe in material.probes),
        kv_type=options.kv_type,
        uncorrected=score(texts.sources, texts.sources, texts.targets) if texts.sources else None,
        command=options.command,
        started=started,
        machine=this_machine(),
    )


@dataclass(frozen=True)
class _Texts:
    """What encoder-decoders are to write."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]


@dataclass(frozen=True)
class _Material:
    """The held-out text, as every model is given it."""

    probes: tuple[Probe, ...]
    texts: _Texts


def _read(options: EvaluateOptions, subjects: Sequence[Subject]) -> _Material:
    """The held-out text in windows that the narrowest of the models takes."""
    from skipstone.exporters.quality import check_kind, held_out_texts, probes

    first, file = subjects[0], options.held_out
    texts = held_out_texts(file)
    check_kind(file, texts, encodes=first.facts.encoder is not None)
    longest = min(subject.longest for subject in subjects)
    encoders = [subject.facts.encoder for subject in subjects if subject.facts.encoder is not None]
    most = min((encoder.max_source_length for encoder in encoders), default=0)
    facts = first.facts
    if facts.encoder is not None:
        encoder = facts.encoder.model_copy(update={"max_source_length": most})
        facts = facts.model_copy(update={"encoder": encoder})
    found = tuple(probes(first.tokenizer, texts, facts, longest, options.max_tokens))
    if not found:
        raise UsageError(f"--held-out {file}: no two tokens to predict in it", hint="pass a longer text")
    return _Material(found, _writable(first, texts, most, options.max_texts))


def _writable(subject: Subject, texts: Sequence[HeldOut], most: int, count: int) -> _Texts:
    """The first texts whose sources fit every encoder."""
    fitting = (
        text for text in texts if text.source and len(subject.tokenizer.encode(text.source).ids) <= most
    )
    chosen = list(islice(fitting, count))
    return _Texts(tuple(str(text.source) for text in chosen), tuple(text.text for text in chosen))


class _Measuring:
    """Takes the figures of one subject after the other."""

    def __init__(
        self,
        options: EvaluateOptions,
        material: _Material,
        dense: Subject | None,
        progress: Progress,
        subjects: int,
    ) -> None:
        self._options, self._material, self._dense = options, material, dense
        self._progress, self._done, self._total = progress, 0, subjects

    def row(self, label: str, subject: Subject) -> Row:
        """All figures of a subject."""
        from skipstone.exporters.evaluation.measure import measure_folder

        options, dense, probes = self._options, self._dense, self._material.probes
        self._tell(label, "predicting")
        prediction = measure_folder(
            subject.path,
            subject.exits,
            probes,
            None if dense is None else dense.path,
            () if dense is None else subject.dense_exits(dense),
            options.threads,
            options.kv_type,
        )
        correction = self._correction(label, subject)
        memory, speed = None, None
        if subject.is_bundle and options.memory:
            self._tell(label, "memory")
            memory = measure_memory(subject, probes[0], options.threads, options.kv_type)
        if subject.is_bundle and options.speed is not None:
            self._tell(label, "speed")
            speed = measure_speed(subject, options.speed, options.threads, options.kv_type)
        self._done += 1
        return Row(
            label=label,
            given=subject.given,
            format=subject.format,
            quantization=subject.quantization,
            num_layers=subject.facts.num_layers,
            parameters=subject.facts.parameters,
            bytes=subject.bytes,
            prediction=prediction,
            correction=correction,
            memory_mb=memory,
            speed=speed,
        )

    def _correction(self, label: str, subject: Subject) -> CorrectionFigures | None:
        from skipstone.exporters.evaluation.corrections import measure_corrections

        texts = self._material.texts
        if not texts.sources:
            return None
        self._tell(label, "writing")
        options = self._options
        return measure_corrections(
            subject.path, texts.sources, texts.targets, options.threads, options.kv_type
        )

    def _tell(self, label: str, what: str) -> None:
        self._progress(f"{label}: {what}", self._done, self._total)
