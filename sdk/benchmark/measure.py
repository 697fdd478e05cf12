"""Timed generations, every strategy in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from skipstone.benchmark.subject import Subject
from skipstone.benchmark.tracing import Recorder
from skipstone.inputs import ModelInput
from skipstone.runtimes.generate import GenerationLimits, Policy, generate
from skipstone.runtimes.sampling import Sampler, SamplingConfig


@dataclass(frozen=True)
class Sample:
    """One generation.

    Attributes:
        tokens: what was generated.
        first_seconds: until the first token; prefill is part of it, and an encoder-decoder's reading of its source.
        decode_seconds: from the first token to the last.
        rounds: verification passes after the first token.
        drafted, accepted: draft tokens verified, and of these accepted.
        predicted_seconds: what the cost curve says for everything run after the first token; None: not known.
        bytes_read: of weights, after the first token; None: not known.
    """

    tokens: tuple[int, ...]
    first_seconds: float
    decode_seconds: float
    rounds: int
    drafted: int = 0
    accepted: int = 0
    predicted_seconds: float | None = None
    bytes_read: int | None = None

    @property
    def seconds_per_token(self) -> float | None:
        """Of decoding; None when there was nothing to time."""
        return self.decode_seconds / (len(self.tokens) - 1) if len(self.tokens) > 1 else None


class Runner(Protocol):
    """Runs one input; what it learned from the inputs before may help."""

    def __call__(self, given: ModelInput) -> Sample: ...


@dataclass(frozen=True)
class StrategyRunner:
    """A strategy on a subject.

    Attributes:
        subjects: the target, then the draft model if there is one.
        policy: of the strategy; what it learns stays for the next prompt, as in an application.
        limits: when to stop.
        sampling: how tokens are chosen; every prompt starts from the same seed.
        recorder: told of every generation and round; None: nobody is.
    """

    subjects: tuple[Subject, ...]
    policy: Policy
    limits: GenerationLimits
    sampling: SamplingConfig
    recorder: Recorder | None = None

    def __call__(self, given: ModelInput) -> Sample:
        """Generate from an input, nothing of it computed before."""
        for subject in self.subjects:
            subject.restart()
        target, meters = self.subjects[0], [subject.engine.meter for subject in self.subjects]
        tokens: list[int] = []
        rounds = drafted = accepted = 0
        if self.recorder is not None:
            self.recorder.begin()
        began = first = time.perf_counter()
        given.enter(target.session)
        steps = generate(
            target.session, given.prompt, self.policy, Sampler(self.sampling), self.limits, target.costs
        )
        for step in steps:
            if self.recorder is not None:
                self.recorder.step(step)
            if tokens:
                rounds += 1
            else:
                first = time.perf_counter()
                for meter in meters:
                    meter.reset()
            tokens += step.tokens
            drafted += step.drafted
            accepted += step.accepted
        ended = time.perf_counter()
        return Sample(
            tokens=tuple(tokens),
            first_seconds=first - began,
            decode_seconds=ended - first,
            rounds=rounds,
            drafted=drafted,
            accepted=accepted,
            predicted_seconds=sum(meter.predicted_seconds for meter in meters),
            bytes_read=sum(meter.bytes_read for meter in meters),
        )


@dataclass(frozen=True)
class Progress:
    """How far a benchmark is: `done` of `total` generations, and what runs next."""

    done: int
    total: int
    strategy: str


@dataclass(frozen=True)
class Series:
    """All samples of one strategy: samples[repeat][prompt]."""

    strategy: str
    samples: tuple[tuple[Sample, ...], ...]


def measure_interleaved(
    make_runner: Callable[[str], Runner],
    strategies: Sequence[str],
    inputs: Sequence[ModelInput],
    repeats: int,
    progress: Callable[[Progress], None],
    between: Callable[[], None] | None = None,
) -> list[Series]:
    """Run every strategy on every input, taking turns, so that a slow spell of the machine hits all of them.

    Args:
        make_runner: a fresh runner of a strategy. Every repeat gets its own: what a strategy learns
            carries over from input to input, but never from a text to the same text.
        strategies: their order rotates from input to input.
        inputs: token ids.
        repeats: passes over the inputs.
        progress: told before every generation.
        between: called when every strategy has had its turn on an input; None: nothing is done then.
    """
    found: dict[str, list[tuple[Sample, ...]]] = {strategy: [] for strategy in strategies}
    total, done = repeats * len(inputs) * len(strategies), 0
    for repeat in range(repeats):
        runners = {strategy: make_runner(strategy) for strategy in strategies}
        taken: dict[str, list[Sample]] = {strategy: [] for strategy in strategies}
        for index, given in enumerate(inputs):
            shift = (index + repeat) % len(strategies)
            for strategy in [*strategies[shift:], *strategies[:shift]]:
                progress(Progress(done, total, strategy))
                taken[strategy].append(runners[strategy](given))
                done += 1
            if between is not None:
                between()
        for strategy in strategies:
            found[strategy].append(tuple(taken[strategy]))
    return [Series(strategy, tuple(passes)) for strategy, passes in found.items()]
