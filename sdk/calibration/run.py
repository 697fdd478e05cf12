"""Generating every sample with the whole model and with falling thresholds, until the loss can be bounded no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from skipstone.bundle import Calibration, Knob, Risk
from skipstone.calibration.samples import Sample, key_of
from skipstone.errors import SkipstoneError, UsageError
from skipstone.exporters.tune.correction import edit_distance
from skipstone.model import GenerationResult, Model
from skipstone.runtimes.adaptive import AdaptiveOptions
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.risk import RiskBound, Verdict, boldest, walk

Report = Callable[[str, int, int], None]

# Falling from where next to nothing stops early, denser where models are; fixed, as the tests' order must be.
_GRIDS: Mapping[Knob, tuple[float, ...]] = {
    "early-exit-margin": (0.99, 0.98, 0.97, *(step / 20 for step in range(19, -1, -1))),
    "encoder-saturation": (
        0.999, 0.998, 0.995, 0.99, 0.985, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.875, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5,
        0.4, 0.2, 0.0, -1.0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class CalibrationOptions:
    """What to calibrate.

    Attributes:
        knob: the threshold; the other one stays unset.
        risk: `text`: how far the output is from the whole model's; `quality`: how much farther it is from the
            reference than the whole model's. Both in edits per character, at most 1.
        bound: what is to be shown of it.
        max_new_tokens: each text is generated up to so many tokens.
        values: thresholds to try, the highest first; empty: a grid of ours.
    """

    knob: Knob = "early-exit-margin"
    risk: Risk = "text"
    bound: RiskBound = field(default_factory=RiskBound)
    max_new_tokens: int = 128
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for value in self.values:
            self.stopping_at(value)
        if any(first <= second for first, second in zip(self.values, self.values[1:], strict=False)):
            raise UsageError(f"values {self.values}: they must fall")

    @property
    def grid(self) -> tuple[float, ...]:
        """Thresholds in the order they are tried."""
        return self.values or _GRIDS[self.knob]

    def stopping_at(self, value: float) -> AdaptiveOptions:
        """The knob set to a value."""
        if self.knob == "early-exit-margin":
            return AdaptiveOptions(early_exit_margin=value)
        return AdaptiveOptions(encoder_saturation=value)


@dataclass(frozen=True)
class Trial:
    """One threshold.

    Attributes:
        value: of the knob.
        mean_loss, p_value, holds: see `skipstone.runtimes.risk.Verdict`.
        saved: share of the tokens that left the decoder early, or of the encoder's layers that were not run.
        seconds: for all samples.
    """

    value: float
    mean_loss: float
    p_value: float
    holds: bool
    saved: float
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """A finished calibration.

    Attributes:
        options: what was calibrated.
        samples: number of texts.
        value: the lowest threshold that holds; None where not even the first one does: never stop early then.
        trials: the thresholds that were tried, up to the first that does not hold.
        plain_seconds: for all samples with the whole model, decoded plainly.
    """

    options: CalibrationOptions
    samples: int
    value: float | None
    trials: tuple[Trial, ...]
    plain_seconds: float

    def record(self, prompts_sha256: str) -> Calibration:
        """What a bundle keeps of it (`skipstone.bundle.store_calibration`); the hash is that of the samples' file."""
        bound = self.options.bound
        return Calibration(
            knob=self.options.knob,
            value=self.value,
            risk=self.options.risk,
            max_loss=bound.max_loss,
            confidence=bound.confidence,
            mean_loss=next((t.mean_loss for t in self.trials if t.value == self.value), None),
            samples=self.samples,
            max_new_tokens=self.options.max_new_tokens,
            prompts_sha256=prompts_sha256,
        )


def calibrate(
    model: Model, samples: Sequence[Sample], options: CalibrationOptions, report: Report | None = None
) -> Outcome:
    """Find the lowest threshold whose expected loss on texts like the samples is bounded.

    Args:
        model: an opened bundle.
        samples: texts that neither the model was trained on nor anything was chosen by; independent draws of what it
            will be used for.
        options: what to calibrate.
        report: told what runs, texts done and texts at most.

    Raises:
        UsageError: too few samples to show the bound, a model that cannot stop early, or a text that does not fit it.
    """
    check_samples(samples, options.bound)
    _check_exits(model.engine, options.knob)
    runner = _Runner(model, samples, options, report or _silent)
    whole = runner.run(AdaptiveOptions(), "whole model")
    early: list[list[GenerationResult]] = []

    def losses_at(value: float) -> list[float]:
        early.append(runner.run(options.stopping_at(value), f"{options.knob} {value:g}"))
        triples = zip(early[-1], whole, samples, strict=True)
        return [loss(options.risk, ours.text, full.text, sample.reference) for ours, full, sample in triples]

    verdicts = list(walk(options.grid, losses_at, options.bound))
    trials = tuple(
        _trial(v, results, options.knob, model.engine) for v, results in zip(verdicts, early, strict=True)
    )
    return Outcome(options, len(samples), boldest(verdicts), trials, _seconds(whole))


def check_samples(samples: Sequence[Sample], bound: RiskBound) -> None:
    """Refuse what could not show the bound, whatever the model does.

    Raises:
        UsageError: too few samples.
    """
    if len(samples) < bound.least_samples:
        raise UsageError(
            f"--prompts: {len(samples)} texts; to show a loss of at most {bound.max_loss:g} with confidence "
            f"{bound.confidence:g}, {bound.least_samples} or more are needed even if not one of them differs",
            hint="give more texts, or a larger --max-loss or a smaller --confidence",
        )


def loss(risk: Risk, early: str, whole: str, reference: str) -> float:
    """Of one sample's texts, in [0, 1]: see `CalibrationOptions.risk`."""
    if risk == "text":
        return _error_rate(early, whole)
    return max(0.0, _error_rate(early, reference) - _error_rate(whole, reference))


def _error_rate(text: str, reference: str) -> float:
    """Edits per character of the reference, at most 1."""
    return min(1.0, edit_distance(text, reference) / max(1, len(reference)))


class _Runner:
    """Generates all samples, one after the other, and says how far it is."""

    def __init__(
        self, model: Model, samples: Sequence[Sample], options: CalibrationOptions, report: Report
    ) -> None:
        self._model, self._samples, self._report = model, samples, report
        self._max_new_tokens = options.max_new_tokens
        self._key = key_of(model.bundle.manifest)
        self._done, self._total = 0, len(samples) * (1 + len(options.grid))

    def run(self, adaptive: AdaptiveOptions, name: str) -> list[GenerationResult]:
        found = []
        for sample in self._samples:
            self._report(name, self._done, self._total)
            found.append(self._generate(sample, adaptive))
            self._done += 1
        return found

    def _generate(self, sample: Sample, adaptive: AdaptiveOptions) -> GenerationResult:
        prompt, source = (sample.text, None) if self._key == "prompt" else (None, sample.text)
        try:
            return self._model.generate(
                prompt,
                source=source,
                max_new_tokens=self._max_new_tokens,
                strategy="plain",
                adaptive=adaptive,
            )
        except SkipstoneError as error:
            where = f"{sample.where}: " if sample.where else ""
            raise UsageError(f"{where}{error.message}", hint=error.hint) from error


def _trial(verdict: Verdict, results: Sequence[GenerationResult], knob: Knob, engine: Engine) -> Trial:
    stats = [result.stats for result in results]
    if knob == "encoder-saturation" and engine.encoder is not None:
        saved = 1 - sum(s.encoder_layers for s in stats) / (engine.encoder.num_layers * len(stats))
    else:
        early = sum(s.rounds - s.rounds_by_drafter.get("", 0) for s in stats)
        saved = early / sum(s.new_tokens for s in stats)
    return Trial(verdict.value, verdict.mean_loss, verdict.p_value, verdict.holds, saved, _seconds(results))


def _seconds(results: Sequence[GenerationResult]) -> float:
    return sum(result.stats.seconds for result in results)


def _check_exits(engine: Engine, knob: Knob) -> None:
    """Refuse a model in which the knob does nothing.

    Raises:
        UsageError: saying why.
    """
    encoder = engine.encoder
    if knob == "encoder-saturation":
        if encoder is None:
            raise UsageError(
                f"--knob {knob}: this model is a decoder alone", hint="calibrate --knob early-exit-margin"
            )
        if not encoder.exits:
            raise UsageError(
                f"--knob {knob}: this bundle's encoder has no early exits",
                hint="export it with --encoder-exits",
            )
    elif len(engine.exits) == 1 or engine.draft_vocabulary is None:
        raise UsageError(f"--knob {knob}: this bundle has no early exits", hint="export it with --exits")


def _silent(_name: str, _done: int, _total: int) -> None:
    return None
