"""An artificial device: every call takes what a cost curve says and every draft some of the host's time, exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

import skipstone.benchmark.tracing as tracing_module
import skipstone.runtimes.generate as generate_module
from skipstone.benchmark.ranks import exit_ranks
from skipstone.benchmark.tracing import Recorder, TracedEngine, TracedPolicy, witnessed
from skipstone.bundle import CostCurve
from skipstone.devices.curves import CurveKey, MeasuredCurve
from skipstone.devices.traces import DRAFT_MODEL, DraftModelFacts, Run, Trace, TraceHeader
from skipstone.inputs import ModelInput
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters.base import Drafter, DraftRequest
from skipstone.runtimes.drafters.draft_model import DraftModelDrafter
from skipstone.runtimes.drafters.early_exit import EarlyExitDrafter
from skipstone.runtimes.drafters.growth import GrowthOptions
from skipstone.runtimes.drafters.ngram import NGramDrafter
from skipstone.runtimes.generate import FixedPolicy, GenerationLimits, Policy, generate
from skipstone.runtimes.rows import RowTree
from skipstone.runtimes.sampling import Sampler, SamplingConfig
from skipstone.runtimes.session import Session
from skipstone.runtimes.shapes import TreeShape
from skipstone.runtimes.tree import TokenTree
from tests.runtimes.toy_engine import FloatArray, ToyCache, ToyEngine

TOKENS, PROMPT = 120, (1, 2, 3, 4)
WIDTHS = (1, 2, 4, 8, 16, 32)
HOST, HOST_PER_DRAFT = 2e-4, 3e-5  # seconds: of a round that drafts, and more for every draft


class Clock:
    """Stands where `time` stands."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def curve_of(first: float, last: float, slope: float, head: float = 1e-4, segments: int = 3) -> MeasuredCurve:
    """A device: seconds of one row in the first segment and in each other one; the share that each further row adds."""
    singles = (first, *(last,) * (segments - 1))
    curve = CostCurve(
        widths=WIDTHS,
        segments=tuple(tuple(s * (1 + slope * (width - 1)) for width in WIDTHS) for s in singles),
        draft_head=tuple(head * (1 + slope * (width - 1)) for width in WIDTHS),
        threads=1,
        machine=f"{first:g} {last:g} {slope:g}",
    )
    key = CurveKey(
        processor="none",
        cores=1,
        system="none",
        threads=1,
        threads_chosen=False,
        kv_type="f32",
        gpu_layers=0,
        format="toy",
        library="toy",
        artefacts="0" * 64,
    )
    exits = tuple(2 * (index + 1) for index in range(segments))
    return MeasuredCurve(key=key, exits=exits, curve=curve, budget_seconds=0.0, measured="2026-01-01")


class TimedEngine(ToyEngine):
    """A toy engine on which time passes as a curve says; with `widths`, batches are padded up to one of these."""

    def on(self, clock: Clock, device: MeasuredCurve, widths: Sequence[int] = ()) -> TimedEngine:
        self.clock, self.costs, self.widths = clock, CostModel(device.curve, self.exits), widths
        return self

    def open_cache(self, context_length: int, tree: RowTree) -> TimedCache:
        return TimedCache(self, tree, context_length)

    def padded(self, width: int) -> int:
        return min((wide for wide in self.widths if wide >= width), default=width)


class TimedCache(ToyCache):
    engine: TimedEngine

    def run(self, segment, rows, hidden, wanted) -> FloatArray:  # type: ignore[no-untyped-def]
        edges, engine = (0, *self.engine.exits), self.engine
        engine.clock.now += engine.costs.run(edges[segment], edges[segment + 1], engine.padded(len(rows)))
        return super().run(segment, rows, hidden, wanted)

    def draft_logits(self, hidden) -> FloatArray:  # type: ignore[no-untyped-def]
        engine = self.engine
        engine.clock.now += engine.costs.draft(2, 2, engine.padded(len(hidden)))
        return super().draft_logits(hidden)


class Busy:
    """A drafter that takes the host's time besides the engine's; with `rows`, it has so many verified at most."""

    def __init__(self, drafter: Drafter, clock: Clock, rows: int | None) -> None:
        self._drafter, self._clock, self._rows, self.name = drafter, clock, rows, drafter.name
        self.reset, self.observe, self.close = drafter.reset, drafter.observe, drafter.close

    def propose(self, request: DraftRequest) -> TokenTree:
        tree = self._drafter.propose(request)
        if self._rows is not None:
            tree = tree.best(self._rows - 1)
        self._clock.now += HOST + HOST_PER_DRAFT * len(tree)
        return tree


@dataclass
class Bench:
    """Toy models that repeat themselves and whose exits mostly agree, timed by a clock that nothing disturbs."""

    clock: Clock
    memos: dict[bool, Any] = field(default_factory=lambda: {False: {}, True: {}})
    known: dict[object, tuple[Run, float]] = field(default_factory=dict)

    def engine(
        self, device: MeasuredCurve, widths: Sequence[int] = (), *, draft: bool = False
    ) -> TimedEngine:
        engine = TimedEngine(
            seed=4,
            depth_scale=0.5,
            sharpness=6.0,
            context_length=TOKENS + 8,
            num_segments=len(device.exits),
            draft_tokens=None if draft else 18,
            remember=True,
        )
        engine.memo = self.memos[draft]
        return engine.on(self.clock, device, widths)

    def run(self, strategy: str, device: MeasuredCurve, **options: Any) -> tuple[Run, float]:
        """The record of one long generation, and its tokens per second after the first; made once."""
        key = (strategy, device.model_dump_json(), repr(options))
        if key not in self.known:
            self.known[key] = self._run(strategy, device, **options)
        return self.known[key]

    def _run(
        self,
        strategy: str,
        device: MeasuredCurve,
        *,
        believed: MeasuredCurve | None = None,
        widths: Sequence[int] = (),
        length: int | None = None,
        rows: int | None = None,
        sampled: bool = False,
        exit: int = 2,
        shape: TreeShape | None = None,
    ) -> tuple[Run, float]:
        recorder, engine = Recorder(), self.engine(device, widths)
        costs = CostModel((believed or device).curve, engine.exits)
        growth = GrowthOptions(length=length, shape=shape)
        drafter = self._drafter(strategy, recorder, widths, exit, growth)
        policy: Policy = FixedPolicy(None if drafter is None else Busy(drafter, self.clock, rows))
        session = Session(TracedEngine(engine, recorder), engine.max_context_length)
        sampler = Sampler(SamplingConfig(temperature=1.0, seed=0) if sampled else SamplingConfig())
        recorder.begin()
        steps = generate(
            session, PROMPT, TracedPolicy(policy, recorder), sampler, GenerationLimits(TOKENS + 1), costs
        )
        tokens: list[int] = []
        began = 0.0
        for step in steps:
            recorder.step(step)
            began = began if tokens else self.clock.now
            tokens += step.tokens
        rate = (len(tokens) - 1) / (self.clock.now - began)
        found = recorder.finish(strategy, 0, tokens)
        if strategy == "plain":
            ranks = exit_ranks(session, ModelInput(PROMPT), tokens)
            found = found.model_copy(update={"ranks": ranks})
        return found, rate

    def _drafter(
        self,
        strategy: str,
        recorder: Recorder,
        widths: Sequence[int],
        exit: int,
        shape: GrowthOptions,
    ) -> Drafter | None:
        text = witnessed(NGramDrafter(length=10), recorder)
        if strategy == "prompt-lookup":
            return NGramDrafter(length=shape.length or 10)
        if strategy == "layerskip":
            return EarlyExitDrafter(exit, None, replace(shape, guesses=0, branching=1))
        if strategy == "staged":
            return EarlyExitDrafter(exit, text, shape)
        if strategy == "two-exits":
            first = EarlyExitDrafter(exit, None, replace(shape, guesses=0, branching=1))
            return EarlyExitDrafter(4, first, shape)
        if strategy == "draft-model":
            model = self.engine(DRAFT_DEVICE, widths, draft=True)
            session = Session(TracedEngine(model, recorder, DRAFT_MODEL), model.max_context_length)
            return DraftModelDrafter(
                session, CostModel(DRAFT_DEVICE.curve, model.exits), "small", text, shape
            )
        return None


# a smaller model than any of the devices below: half the seconds
DRAFT_DEVICE = curve_of(5e-4, 5e-4, 0.05, segments=2)


def trace_of(device: MeasuredCurve, *runs: Run, greedy: bool = True) -> Trace:
    """A trace with these runs."""
    header = TraceHeader(
        model="toy",
        quantization="f64",
        curve=device,
        draft_model=DraftModelFacts(model="small", curve=DRAFT_DEVICE),
        greedy=greedy,
        max_new_tokens=TOKENS + 1,
        prompts=1,
        prompts_source="made up",
        tool="test",
        started="2026-01-01",
    )
    return Trace(header, runs)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    """Runs whose time is the clock's."""
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        for module in (generate_module, tracing_module):
            patch.setattr(module, "time", clock)
        yield Bench(clock)
