"""What a benchmark runs: an opened bundle whose engine is metered, and the strategies' policies on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from skipstone.benchmark.meter import MeteredEngine, placed_bytes
from skipstone.benchmark.tracing import Recorder, TracedPolicy, witnessed
from skipstone.bundle import Bundle, CostCurve
from skipstone.devices.cost import CurveSampler, measure
from skipstone.devices.curves import MeasuredCurve, new_curve
from skipstone.inputs import ModelInput
from skipstone.model import load_amendments, load_draft_table, open_draft_bundle
from skipstone.placing import Opened, Place, open_places
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters.base import Drafter
from skipstone.runtimes.drafters.draft_model import DraftModelDrafter, DraftModelMaker
from skipstone.runtimes.drafters.growth import GrowthOptions
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.engines.llamacpp.kv_types import KV_TYPES
from skipstone.runtimes.generate import Policy
from skipstone.runtimes.jitter import gap_jitter
from skipstone.runtimes.policies.arms import Record
from skipstone.runtimes.policies.auto import AutoPolicy
from skipstone.runtimes.session import Session
from skipstone.runtimes.strategies import Materials, StrategyOptions, make_policy
from skipstone.runtimes.text import TextCodec
from skipstone.trials import try_builtin_texts

COST_SECONDS = 4.0  # budget for the cost curve


class Subject:
    """One bundle under test: weights, cost curve, codec and a metered session. Use it as a context manager.

    Args:
        bundle: the checked bundle.
        options: engine options.
        context_length: positions; None: the model's own, at most 2,048.
        curve: cost curve to plan with, measured elsewhere; None: it is measured now.
        trace: wraps the engine, to record what is run; None: nothing is recorded.
        place: segments that run on other bundles' engines, see `skipstone.placing`.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: EngineOptions,
        context_length: int | None = None,
        curve: MeasuredCurve | None = None,
        trace: Callable[[Engine], Engine] | None = None,
        place: Place | None = None,
    ) -> None:
        facts = bundle.manifest.model
        self.bundle, self._options, self._planned = bundle, options, curve
        self._sampler: CurveSampler | None = None
        self._first_records: dict[Subject | None, Mapping[str, Record]] = {}
        bos = facts.bos_token_id if facts.add_bos else None
        self.codec = TextCodec(bundle.file(bundle.manifest.tokenizer), facts.vocab_size, bos)
        self.table, self.amendments = load_draft_table(bundle), load_amendments(bundle, self.codec)
        self.opened = (
            open_places(bundle, options, place) if place else Opened(bundle, open_engine(bundle, options))
        )
        self._raw = self.opened.engine
        try:
            self.kv_type = str(getattr(self._raw, "kv_type", "f32"))
            self.curve: CostCurve = (
                measure(self._raw, budget_seconds=COST_SECONDS) if curve is None else curve.curve
            )
            self.costs = CostModel(self.curve, self._raw.exits)
            engine = self._raw if trace is None else trace(self._raw)
            self.engine = MeteredEngine(engine, self.costs, placed_bytes(*self.opened.part_owners))
            longest = min(facts.context_length, self.engine.max_context_length, 2048)
            length = longest if context_length is None else context_length
            self.session = Session(self.engine, length)
        except Exception:
            self._raw.close()
            raise

    def near_tie_margin(self, given: ModelInput) -> float:
        """The bundle's margin, or what this type of K and V makes of the last bits of an input, if that is more: the
        bundle was tested with K and V in full precision.
        """
        margin, kind = self.opened.near_tie_margin, KV_TYPES.get(self.kv_type)
        if kind is None or not kind.is_quantized:
            return margin
        return max(margin, gap_jitter(self._raw, given.prompt, given.source))

    def follow_costs(self) -> None:
        """Take one more sample of the curve; the session's content is lost."""
        if self._sampler is None:
            self._sampler = CurveSampler(self.session)
        self._sampler.sweep(timed=False)
        self._sampler.sweep()

    @property
    def followed(self) -> CostCurve | None:
        """The curve over the samples of `follow_costs`; None without any."""
        return None if self._sampler is None else self._sampler.curve()

    def own_curve(self) -> MeasuredCurve:
        """The curve on this machine: as followed, else as measured at the start, or now if another one was given.

        Raises:
            ValidationError: the engine takes single rows only, say.
        """
        curve = self.followed or (
            self.curve if self._planned is None else measure(self._raw, budget_seconds=COST_SECONDS)
        )
        return new_curve(self.bundle, self._raw, self._options, curve, COST_SECONDS)

    def first_record(self, draft: Subject | None = None) -> Mapping[str, Record]:
        """What `auto` finds when a bundle is first used, with a draft model or without; what sessions hold is lost."""
        if draft not in self._first_records:
            policy = new_policy("auto", self, draft, StrategyOptions(), record={})
            if not isinstance(policy, AutoPolicy):
                raise AssertionError("auto is an AutoPolicy")
            try_builtin_texts(policy, self.session, self.codec, self.bundle.manifest.model, self.costs)
            self._first_records[draft] = policy.record
        return self._first_records[draft]

    def restart(self) -> None:
        """Forget the sequence and what was metered."""
        self.session.rewind(0)
        self.engine.meter.reset()

    def close(self) -> None:
        """Free weights and caches. Idempotent."""
        self.session.close()
        self._raw.close()

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def open_draft(
    path: str,
    target: Subject,
    options: EngineOptions,
    trace: Callable[[Engine], Engine] | None = None,
) -> Subject:
    """A draft model for `target`; see `Subject` for `trace`.

    Raises:
        VocabularyMismatchError, UsageError: it does not fit the target.
    """
    bundle = open_draft_bundle(path, target.bundle, target.codec)
    length = min(bundle.manifest.model.context_length, target.session.context_length)
    return Subject(bundle, options, length, trace=trace)


@dataclass(frozen=True)
class _TracedMaterials(Materials):
    """Materials whose text drafters are watched, if there is a recorder."""

    recorder: Recorder | None = None

    def text_source(self) -> Drafter:
        source = super().text_source()
        return source if self.recorder is None else witnessed(source, self.recorder)


def new_policy(
    strategy: str,
    target: Subject,
    draft: Subject | None,
    options: StrategyOptions,
    recorder: Recorder | None = None,
    record: Mapping[str, Record] | None = None,
) -> Policy:
    """A policy that has learned nothing yet; what it drafts is told to the recorder. `auto` begins with a record, by
    default what it finds when a bundle is first used.

    Raises:
        UsageError: an unknown strategy, or one this bundle cannot run.
    """
    maker = None if draft is None else _maker(draft)
    tokens = None if options.guide is None else target.codec.tokens(options.guide)
    guide = None if tokens is None else lambda: tokens
    materials = _TracedMaterials(
        target.engine,
        target.costs,
        options,
        target.table,
        maker,
        guide,
        lambda: target.codec.word_starts,
        target.amendments,
        target.first_record(draft) if record is None and strategy == "auto" else record,
        recorder=recorder,
    )
    policy = make_policy(strategy, materials)
    return policy if recorder is None else TracedPolicy(policy, recorder)


def runnable_strategies(target: Subject) -> tuple[str, ...]:
    """The strategies this bundle can run without anything else, the default of a benchmark."""
    guided = ("aggressive",) if target.engine.encoder is not None else ()
    text = (*guided, "text", "prompt-lookup", "katz", "recycling")
    inner = (
        ("layerskip", "staged")
        if target.engine.draft_vocabulary is not None and len(target.engine.exits) > 1
        else ()
    )
    return ("plain", *text, *inner, "auto")


def _maker(draft: Subject) -> DraftModelMaker:
    name = draft.bundle.manifest.model.name

    def make(source: Drafter | None, shape: GrowthOptions) -> Drafter:
        return DraftModelDrafter(draft.session, draft.costs, name, source, shape)

    return make
