"""One benchmark from a bundle's folder to a report."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from skipstone.benchmark.baselines import BASELINES, Baseline, BaselineOptions, check_whole_gguf
from skipstone.benchmark.lossless import agreement
from skipstone.benchmark.measure import Progress, Runner, Series, StrategyRunner, measure_interleaved
from skipstone.benchmark.memory import MemoryRequest, peak_rss_mb
from skipstone.benchmark.report import Report, bundle_facts, this_machine
from skipstone.benchmark.rows import Row, make_row
from skipstone.benchmark.subject import Subject, new_policy, open_draft, runnable_strategies
from skipstone.benchmark.trace import TracedRunner, Tracer, write_trace
from skipstone.builtin_texts import PROMPTS, SOURCES
from skipstone.bundle import Bundle, open_bundle
from skipstone.errors import ContextFullError, UsageError
from skipstone.inputs import ModelInput, encode_input
from skipstone.model import load_curve, own_draft_model
from skipstone.runtimes.engines import EngineOptions
from skipstone.runtimes.generate import GenerationLimits
from skipstone.runtimes.sampling import SamplingConfig
from skipstone.runtimes.strategies import WITH_DRAFT_MODEL, StrategyOptions

PLAIN = "plain"
CONTROL = "plain-again"  # the row of a second plain decoding
_WARM_UP_TOKENS = 8
_NO_IDS = ("create_completion",)


def _silent(_progress: Progress) -> None:
    return None


@dataclass(frozen=True)
class BenchOptions:
    """How a benchmark runs.

    Attributes:
        strategies: their names; empty: all that the bundle can run. `plain` always runs.
        prompts: texts that a decoder continues.
        sources: texts that an encoder-decoder reads.
        prompts_source: where they come from, for the report.
        max_new_tokens: per text, at least 2.
        repeats: passes over the texts.
        threads, context_length, kv_type: see `skipstone.model.load_model`.
        ignore_eos: have a decoder go on after an end-of-text token, so that every run has the same length. What an
            encoder-decoder says ends there in any case.
        sampling: greedy by default; a seed of None means 0 here.
        strategy_options: what to fix of the strategies.
        assistant_model: folder of a draft model's bundle, for strategies `draft-model` and `auto`; None: the one in the
            bundle, if there is one.
        control: run plain decoding a second time; what its row shows beside 1× is the machine's noise.
        baselines: also run what a user could run instead, on `whole_gguf`.
        whole_gguf: the uncut model.
        memory: measure every strategy's peak memory in a process of its own.
        curve: file with a cost curve to plan with instead of measuring one.
        follow_costs: sample the cost curve between the texts too, for the report and the trace: over many minutes a
            machine's speed drifts away from a curve measured at the start.
        trace: file to record the first pass in (`skipstone.devices.traces`); None: nothing is recorded.
        place: segments that run on other bundles' engines, see `skipstone.placing`.
        command: the command line, for the report.
    """

    strategies: tuple[str, ...] = ()
    prompts: tuple[str, ...] = PROMPTS
    sources: tuple[str, ...] = SOURCES
    prompts_source: str = "built in"
    max_new_tokens: int = 64
    repeats: int = 3
    threads: int | None = None
    context_length: int | None = None
    kv_type: str | None = None
    ignore_eos: bool = True
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    strategy_options: StrategyOptions = field(default_factory=StrategyOptions)
    assistant_model: str | None = None
    control: bool = False
    baselines: bool = False
    whole_gguf: Path | None = None
    memory: bool = True
    curve: Path | None = None
    follow_costs: bool = False
    trace: Path | None = None
    place: Mapping[int | str, str | os.PathLike[str]] | None = None
    command: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if self.max_new_tokens < 2:
            raise UsageError(
                f"--max-new-tokens {self.max_new_tokens}: expected at least 2, the first is not timed"
            )
        if self.repeats < 1:
            raise UsageError(f"--repeats {self.repeats}: expected at least 1")
        if self.baselines and not self.sampling.greedy:
            raise UsageError("--baselines: they decode greedily", hint="leave --temperature out")

    @property
    def engine(self) -> EngineOptions:
        """For opening the bundles."""
        return EngineOptions(threads=self.threads, kv_type=self.kv_type)


def run_bench(
    path: str | os.PathLike[str],
    options: BenchOptions | None = None,
    progress: Callable[[Progress], None] = _silent,
) -> Report:
    """Measure a bundle.

    Args:
        path: its folder.
        options: how.
        progress: told before every generation.

    Raises:
        BundleError, EngineError, UsageError, ContextFullError: nothing has been measured then.
    """
    options = options or BenchOptions()
    began, started = time.perf_counter(), datetime.datetime.now(datetime.UTC)
    with _Bench(open_bundle(path), options) as bench:
        rows = bench.rows(progress)
        if options.trace is not None:
            bench.write_trace(options.trace)
        return Report(
            rows=tuple(rows),
            bundle=replace(bundle_facts(bench.target.bundle), near_tie_margin=bench.near_tie_margin),
            machine=this_machine(),
            prompts=len(bench.inputs),
            prompts_source=options.prompts_source,
            repeats=options.repeats,
            max_new_tokens=options.max_new_tokens,
            ignore_eos=bench.ignores_eos,
            threads=bench.target.curve.threads,
            context_length=bench.target.session.context_length,
            kv_type=bench.kv_type,
            temperature=options.sampling.temperature,
            cost=bench.target.curve,
            cost_followed=bench.target.followed,
            command=options.command,
            started=started.isoformat(timespec="seconds"),
            seconds=time.perf_counter() - began,
            placement=bench.target.opened.described,
        )


class _Bench:
    """Everything opened that the rows need."""

    def __init__(self, bundle: Bundle, options: BenchOptions) -> None:
        if options.assistant_model is None:
            options = replace(options, assistant_model=own_draft_model(bundle))
        self._options, self._stack = options, ExitStack()
        _check_texts(bundle, options)
        gguf = _whole_gguf(bundle, options) if options.baselines else None
        try:
            curve = None if options.curve is None else load_curve(options.curve, bundle)
            self._tracer = None if options.trace is None else Tracer()
            watch = None if self._tracer is None else self._tracer.target
            self.target = self._stack.enter_context(
                Subject(bundle, options.engine, options.context_length, curve, watch, options.place)
            )
            self.kv_type = self.target.kv_type
            self._draft = self._open_draft()
            self.inputs = self._encoded()
            self.near_tie_margin = max(map(self.target.near_tie_margin, self.inputs))
            self.strategies = self._strategies()
            self.ignores_eos = options.ignore_eos and not self.inputs[0].source
            eos = () if self.ignores_eos else bundle.manifest.model.eos_token_ids
            self._limits = GenerationLimits(options.max_new_tokens, eos)
            for strategy in self.strategies:  # what cannot run is refused before anything is measured
                new_policy(strategy, self.target, self._draft, options.strategy_options)
            self._baselines = {} if gguf is None else self._open_baselines(gguf, eos)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def rows(self, progress: Callable[[Progress], None]) -> list[Row]:
        """Measure, compare, weigh."""
        options = self._options
        warm_up = GenerationLimits(_WARM_UP_TOKENS)
        self._runner(PLAIN, warm_up)(self.inputs[0])
        control = (CONTROL,) if options.control else ()
        every = (*self.strategies, *control, *self._baselines)
        follow = self._follow_costs if options.follow_costs else None
        found = measure_interleaved(self._runner, every, self.inputs, options.repeats, progress, follow)
        plain = found[0]
        return [self._row(series, plain) for series in found]

    def _row(self, series: Series, plain: Series) -> Row:
        compared = self._options.sampling.greedy and series.strategy not in _NO_IDS
        matches = None
        if compared:
            matches = agreement(
                self.inputs,
                [sample.tokens for sample in plain.samples[0]],
                [[sample.tokens for sample in passed] for passed in series.samples],
                self._logits_after,
                self.near_tie_margin,
            )
        memory = peak_rss_mb(self._memory_request(series.strategy)) if self._options.memory else None
        return make_row(series, plain, matches, self.target.costs.plain, memory)

    def _follow_costs(self) -> None:
        self.target.follow_costs()
        if self._draft is not None:
            self._draft.follow_costs()

    def _runner(self, strategy: str, limits: GenerationLimits | None = None) -> Runner:
        if strategy in self._baselines:
            return self._baselines[strategy]
        options = self._options
        subjects = (self.target,) if self._draft is None else (self.target, self._draft)
        name = PLAIN if strategy == CONTROL else strategy
        tracer = None
        if limits is None and strategy != CONTROL and self._tracer and self._tracer.first_pass(strategy):
            tracer = self._tracer
        recorder = None if tracer is None else tracer.recorder
        policy = new_policy(name, self.target, self._draft, options.strategy_options, recorder)
        runner = StrategyRunner(subjects, policy, limits or self._limits, _seeded(options.sampling), recorder)
        return runner if tracer is None else TracedRunner(runner, tracer, strategy)

    def write_trace(self, path: Path) -> None:
        """Write what was recorded.

        Raises:
            UsageError: it cannot be written.
        """
        if self._tracer is None:
            raise AssertionError("only a traced benchmark has a trace")
        options = self._options
        header = self._tracer.header(
            self.target,
            self._draft,
            greedy=options.sampling.greedy,
            tokens=options.max_new_tokens,
            prompts=len(self.inputs),
            source=options.prompts_source,
        )
        write_trace(path, header, self._tracer.runs, self.target.bundle)

    def _logits_after(self, given: ModelInput, generated: Sequence[int]) -> NDArray[np.float32]:
        self.target.restart()
        given.enter(self.target.session)
        return self.target.session.prefill([*given.prompt, *generated])

    def _open_draft(self) -> Subject | None:
        path = self._options.assistant_model
        if path is None:
            return None
        watch = None if self._tracer is None else self._tracer.draft
        return self._stack.enter_context(open_draft(path, self.target, self._options.engine, watch))

    def _open_baselines(self, gguf: Path, eos: Sequence[int]) -> dict[str, Baseline]:
        options = BaselineOptions(
            gguf, self.target.curve.threads, self.target.session.context_length, self.kv_type
        )
        limit = self._options.max_new_tokens
        return {
            name: self._stack.enter_context(closing(make(options, limit, eos)))
            for name, make in BASELINES.items()
        }

    def _encoded(self) -> list[ModelInput]:
        """The texts that this bundle takes, every one of which must fit."""
        options, codec, facts = self._options, self.target.codec, self.target.bundle.manifest.model
        if facts.encoder is None:
            encoded = [encode_input(codec, facts, prompt) for prompt in options.prompts]
        else:
            encoded = [encode_input(codec, facts, source=source) for source in options.sources]
        for index, given in enumerate(encoded, 1):
            self._check_length(index, given)
        return encoded

    def _check_length(self, index: int, given: ModelInput) -> None:
        """Refuse an input that does not fit.

        Raises:
            ContextFullError: naming it by its number.
        """
        room, encoder = self.target.session.context_length, self.target.engine.encoder
        if encoder is not None and len(given.source) > encoder.max_source_length:
            raise ContextFullError(
                f"source {index}: {len(given.source)} tokens, the encoder takes {encoder.max_source_length}",
                hint="shorten the source",
            )
        if len(given.prompt) + self._options.max_new_tokens > room:
            raise ContextFullError(
                f"prompt {index}: {len(given.prompt)} tokens and {self._options.max_new_tokens} new ones "
                f"do not fit into a context of {room}",
                hint="shorten the prompt, lower --max-new-tokens or raise --context-length",
            )

    def _strategies(self) -> tuple[str, ...]:
        """As asked, without repetition, `plain` in front."""
        wanted = self._options.strategies or runnable_strategies(self.target)
        more = ("draft-model",) if self._draft is not None and not self._options.strategies else ()
        return tuple(dict.fromkeys((PLAIN, *wanted, *more)))

    def _memory_request(self, strategy: str) -> MemoryRequest:
        options = self._options
        longest = max(self.inputs, key=lambda given: (len(given.source), len(given.prompt)))
        return MemoryRequest(
            bundle=str(self.target.bundle.path),
            strategy=PLAIN if strategy == CONTROL else strategy,
            prompt=longest.prompt,
            source=longest.source,
            max_new_tokens=options.max_new_tokens,
            threads=self.target.curve.threads,
            context_length=self.target.session.context_length,
            kv_type=self.kv_type,
            assistant_model=options.assistant_model if strategy in WITH_DRAFT_MODEL else None,
            assistant_early_exit=options.strategy_options.assistant_early_exit,
            whole_gguf=str(options.whole_gguf) if strategy in self._baselines else None,
            place={str(where): os.fspath(folder) for where, folder in (options.place or {}).items()},
        )


def _check_texts(bundle: Bundle, options: BenchOptions) -> None:
    """Refuse a benchmark without texts of the kind that the bundle takes."""
    kind, texts = "prompt", options.prompts
    if bundle.manifest.model.encoder is not None:
        kind, texts = "source", options.sources
    if not texts:
        raise UsageError(f"no {kind}s", hint=f'pass --prompts FILE.jsonl with {{"{kind}": …}} lines')


def _whole_gguf(bundle: Bundle, options: BenchOptions) -> Path:
    """The file for the baselines, checked."""
    facts = bundle.manifest.model
    if facts.encoder is not None:
        raise UsageError("--baselines: they run decoders only", hint="leave --baselines out")
    return check_whole_gguf(options.whole_gguf, facts.vocab_size)


def _seeded(sampling: SamplingConfig) -> SamplingConfig:
    """Sampling with a fixed seed, so that a benchmark can be repeated."""
    if sampling.greedy or sampling.seed is not None:
        return sampling
    return SamplingConfig(
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sampling.repetition_penalty,
        seed=0,
    )
