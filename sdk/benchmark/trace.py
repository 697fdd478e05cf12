"""Tracing a benchmark: a runner that records its generations, and the file they go into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from skipstone import __version__
from skipstone.benchmark.measure import Sample, StrategyRunner
from skipstone.benchmark.ranks import exit_ranks
from skipstone.benchmark.report import write_text
from skipstone.benchmark.subject import Subject
from skipstone.benchmark.tracing import Recorder, TracedEngine
from skipstone.bundle import Bundle
from skipstone.devices.accepted import keep_acceptance
from skipstone.devices.curves import MeasuredCurve
from skipstone.devices.simulator import PLAIN
from skipstone.devices.traces import DRAFT_MODEL, DraftModelFacts, Run, Trace, TraceHeader, trace_lines
from skipstone.errors import UsageError
from skipstone.inputs import ModelInput
from skipstone.runtimes.engines.base import Engine


@dataclass
class Tracer:
    """Records a benchmark's first pass.

    Attributes:
        recorder: watches the generation that runs.
        runs: what was recorded.
        begun: strategies that were recorded already.
    """

    recorder: Recorder = field(default_factory=Recorder)
    runs: list[Run] = field(default_factory=list)
    begun: set[str] = field(default_factory=set)

    def target(self, engine: Engine) -> Engine:
        """The target's engine, watched."""
        return TracedEngine(engine, self.recorder)

    def draft(self, engine: Engine) -> Engine:
        """The draft model's, watched."""
        return TracedEngine(engine, self.recorder, DRAFT_MODEL)

    def first_pass(self, strategy: str) -> bool:
        """Whether this is the first time that a runner of the strategy is made."""
        fresh = strategy not in self.begun
        self.begun.add(strategy)
        return fresh

    def header(
        self, target: Subject, draft: Subject | None, *, greedy: bool, tokens: int, prompts: int, source: str
    ) -> TraceHeader:
        """What a trace of these subjects says of itself.

        Raises:
            UsageError: an engine without a curve that could be planned with.
        """
        model, own = target.bundle.manifest.model, _own_curve(target)
        return TraceHeader(
            model=model.name,
            quantization=target.bundle.manifest.quantization.scheme,
            curve=own,
            planned_with=None if target.curve.machine == own.curve.machine else target.curve.machine,
            draft_model=None
            if draft is None
            else DraftModelFacts(model=draft.bundle.manifest.model.name, curve=_own_curve(draft)),
            greedy=greedy,
            max_new_tokens=tokens,
            prompts=prompts,
            prompts_source=source,
            tool=f"skipstone {__version__}",
            started=own.measured,
        )


@dataclass
class TracedRunner:
    """A strategy's runner whose generations are recorded; called for one prompt after the other.

    What the exits say of a text is looked up once, after its plain decoding, and outside any time that is taken.
    """

    runner: StrategyRunner
    tracer: Tracer
    strategy: str
    prompt: int = 0

    def __call__(self, given: ModelInput) -> Sample:
        sample = self.runner(given)
        run = self.tracer.recorder.finish(self.strategy, self.prompt, sample.tokens)
        if self.strategy == PLAIN and self.runner.sampling.greedy:
            ranks = exit_ranks(self.runner.subjects[0].session, given, sample.tokens)
            run = run.model_copy(update={"ranks": ranks})
        self.tracer.runs.append(run)
        self.prompt += 1
        return sample


def write_trace(path: Path, header: TraceHeader, runs: Sequence[Run], bundle: Bundle) -> None:
    """Write a trace as a whole or not at all, and keep beside the bundle what it tells of acceptance.

    Raises:
        UsageError: the disk refuses; nothing is left behind.
    """
    trace = Trace(header, tuple(runs))
    lines = trace_lines(trace)
    write_text(path, "".join(f"{line}\n" for line in lines), "--trace")
    keep_acceptance(bundle, trace)


def _own_curve(subject: Subject) -> MeasuredCurve:
    try:
        return subject.own_curve()
    except ValidationError as error:
        raise UsageError(
            f"--trace: {subject.bundle.path}: its cost curve cannot be planned with: {error.errors()[0]['msg']}",
            hint="raise --context-length, or leave --trace out",
        ) from error
