"""A model ready to generate: engine, session, tokenizer and strategies behind two calls.

    import skipstone

    model = skipstone.load("out/")
    result = model.generate("def quicksort(", max_new_tokens=64)
    print(result.text, result.stats.tokens_per_second)

    for chunk in model.stream("class Stack:", max_new_tokens=64):
        print(chunk.text, end="", flush=True)

An encoder-decoder is given a source to read instead, `model.generate(source="Their is a eror here.")`, and a prompt only
where its output is to begin with given words.

Costs are measured when a bundle is first used, which takes about two seconds, and kept beside it for the next time
(`skipstone.devices.curves`). `auto` takes two seconds more to try every way to draft on built-in texts
(`skipstone.trials`); what it learns then and while it generates is kept too (`skipstone.devices.records`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from skipstone.bundle import Bundle, Knob, open_bundle
from skipstone.devices.cost import measure
from skipstone.devices.curves import MeasuredCurve, check_fits, curve_key, kept_or_measured, read_curve
from skipstone.devices.records import KeptRecord
from skipstone.errors import BundleError, UsageError
from skipstone.inputs import ModelInput, Text, encode_input
from skipstone.placing import Opened, Place, open_places
from skipstone.results import Chunk, Collector, GenerationResult, GenerationStats
from skipstone.runtimes.adaptive import AdaptiveOptions, calibrated_options, generate_adaptively
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters.base import Drafter
from skipstone.runtimes.drafters.draft_model import DraftModelDrafter, DraftModelMaker, check_vocabularies
from skipstone.runtimes.drafters.growth import GrowthOptions
from skipstone.runtimes.drafters.lexicon import Amendments, Lexicon
from skipstone.runtimes.drafters.table import NGramTable
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.engines.base import Engine, Settled
from skipstone.runtimes.generate import GenerationLimits, Policy, generate
from skipstone.runtimes.policies.arms import Record
from skipstone.runtimes.policies.auto import AutoPolicy
from skipstone.runtimes.prefix import common_prefix_length
from skipstone.runtimes.sampling import Sampler, SamplingConfig
from skipstone.runtimes.session import Session
from skipstone.runtimes.strategies import WITH_DRAFT_MODEL, Materials, StrategyOptions, make_policy
from skipstone.runtimes.text import TextCodec
from skipstone.trials import try_builtin_texts

__all__ = [
    "Chunk",
    "GenerationResult",
    "GenerationStats",
    "Model",
    "load_amendments",
    "load_curve",
    "load_draft_table",
    "load_model",
    "open_draft_bundle",
    "own_draft_model",
]

_COST_BUDGET_SECONDS = 2.0


class Model:
    """An opened bundle. Not for several threads at once; close it or use it as a context manager.

    Args:
        bundle: the checked bundle.
        options: engine options.
        context_length: positions to hold; None: the model's own, at most 2,048.
        curve: cost curve to plan with; None: the one kept for this machine, or a new one. With another device's costs
            `auto` neither begins with what it learned here nor keeps it.
        place: segments that run on other bundles' engines, see `skipstone.placing`.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: EngineOptions | None = None,
        context_length: int | None = None,
        curve: MeasuredCurve | None = None,
        place: Place | None = None,
    ) -> None:
        self.bundle = bundle
        self._options = options or EngineOptions()
        facts = bundle.manifest.model
        self.codec = TextCodec(
            bundle.file(bundle.manifest.tokenizer),
            facts.vocab_size,
            facts.bos_token_id if facts.add_bos else None,
        )
        self._table, self._amendments = load_draft_table(bundle), load_amendments(bundle, self.codec)
        self.opened = (
            open_places(bundle, self._options, place)
            if place
            else Opened(bundle, open_engine(bundle, self._options))
        )
        self.engine = self.opened.engine
        try:
            longest = min(facts.context_length, self.engine.max_context_length, 2048)
            length = longest if context_length is None else context_length
            self.session = Session(self.engine, length)
        except Exception:
            self.engine.close()
            raise
        self._costs = None if curve is None else CostModel(curve.curve, self.engine.exits)
        self._own_costs = curve is None
        self._kept_record: KeptRecord | None = None
        self._policies: dict[tuple[str, StrategyOptions, str | None, bool], Policy] = {}
        self._guide: tuple[int, ...] = ()
        self._drafters: list[Drafter] = []
        self.last_result: GenerationResult | None = None

    @property
    def costs(self) -> CostModel:
        """The engine's cost model; measured on first use (about two seconds), on this machine, unless it was kept."""
        if self._costs is None:
            self._costs = _costs_of(self.bundle, self.engine, self._options)
        return self._costs

    def generate(
        self,
        prompt: Text | None = None,
        *,
        source: Text | None = None,
        max_new_tokens: int = 128,
        strategy: str = "auto",
        sampling: SamplingConfig | None = None,
        stop: Sequence[str] = (),
        options: StrategyOptions | None = None,
        assistant_model: str | None = None,
        ignore_eos: bool = False,
        adaptive: AdaptiveOptions | None = None,
    ) -> GenerationResult:
        """Generate after a prompt, or from a source.

        Args:
            prompt: text, or token ids; what an encoder-decoder's output begins with, if anything.
            source: text, or token ids, that an encoder-decoder reads.
            max_new_tokens: at most so many.
            strategy: see `skipstone.runtimes.strategies.STRATEGIES`; `auto` measures and decides.
            sampling: how tokens are chosen; greedy by default.
            stop: strings that end the generation; they are not part of the text.
            options: what to fix of the strategy.
            assistant_model: folder of a draft model's bundle, for strategies `draft-model` and `auto`; None: the one in
                this bundle, if there is one.
            ignore_eos: go on after an end-of-text token.
            adaptive: where to stop early, at the price of an output that may differ; None: nowhere. See `calibrated`.

        Raises:
            UsageError, ContextFullError: the arguments cannot work; the model stays usable. For sources longer than
                the encoder takes see `skipstone.sentences`.
        """
        for _ in self.stream(
            prompt,
            source=source,
            max_new_tokens=max_new_tokens,
            strategy=strategy,
            sampling=sampling,
            stop=stop,
            options=options,
            assistant_model=assistant_model,
            ignore_eos=ignore_eos,
            adaptive=adaptive,
        ):
            pass
        if self.last_result is None:
            raise AssertionError("a finished stream leaves its result")
        return self.last_result

    def stream(
        self,
        prompt: Text | None = None,
        *,
        source: Text | None = None,
        max_new_tokens: int = 128,
        strategy: str = "auto",
        sampling: SamplingConfig | None = None,
        stop: Sequence[str] = (),
        options: StrategyOptions | None = None,
        assistant_model: str | None = None,
        ignore_eos: bool = False,
        adaptive: AdaptiveOptions | None = None,
    ) -> Iterator[Chunk]:
        """As `generate`, piece by piece; `last_result` holds the result afterwards.

        No piece ends inside a character. The part of the context that two prompts share is not computed again, and a
        source that comes again is not read again. An abandoned iterator leaves the model usable.
        """
        given = encode_input(self.codec, self.bundle.manifest.model, prompt, source)
        adaptive = adaptive or AdaptiveOptions()
        eos = () if ignore_eos else self.bundle.manifest.model.eos_token_ids
        limits = GenerationLimits(max_new_tokens, eos)
        sampler = Sampler(sampling or SamplingConfig())
        if adaptive.early_exit_margin is not None:
            _check_adaptive(strategy, sampler)
        policy = self.policy(strategy, options, assistant_model)
        costs = self.costs
        self.last_result = None
        began = time.perf_counter()
        rest = self._take_in(given, adaptive.settled)
        if adaptive.early_exit_margin is None:
            steps = generate(self.session, rest, policy, sampler, limits, costs)
        else:
            steps = generate_adaptively(
                self.session, rest, adaptive.early_exit_margin, limits, adaptive.horizon
            )
        collector = Collector(self.codec, stop, strategy, given, began)
        try:
            for step in steps:
                yield collector.push(step)
                if collector.stop_reason is not None:
                    break
        finally:
            steps.close()
            kept = len(given.prompt) + len(collector.tokens) - 1
            self.session.rewind(min(self.session.length, max(0, kept)))
            if self._kept_record is not None and isinstance(policy, AutoPolicy):
                self._kept_record.update(policy.record)
        tail, self.last_result = collector.finish(
            self.session.encoder_layers,
            lossy=adaptive.lossy,
            guarantee=adaptive.guarantee,
            placement=self.opened.described,
        )
        if tail:
            yield Chunk(tail, (), 0, "")

    def policy(
        self, strategy: str, options: StrategyOptions | None = None, assistant_model: str | None = None
    ) -> Policy:
        """The policy of a strategy; made once, so that what it learned serves the next generation too, with another
        guide if need be.
        """
        options = options or StrategyOptions()
        if assistant_model is None and strategy in WITH_DRAFT_MODEL:
            assistant_model = own_draft_model(self.bundle)
        self._guide = () if options.guide is None else tuple(self.codec.tokens(options.guide))
        guide = None if options.guide is None else lambda: self._guide
        key = (strategy, replace(options, guide=None), assistant_model, guide is not None)
        if key not in self._policies:
            maker = None if assistant_model is None else self._draft_model_maker(assistant_model)
            materials = Materials(
                self.engine,
                self.costs,
                options,
                self._table,
                maker,
                guide,
                lambda: self.codec.word_starts,
                self._amendments,
                self._record() if strategy == "auto" else None,
            )
            self._policies[key] = policy = make_policy(strategy, materials)
            if isinstance(policy, AutoPolicy) and not materials.record:
                try_builtin_texts(policy, self.session, self.codec, self.bundle.manifest.model, self.costs)
        return self._policies[key]

    def calibrated(self, knob: Knob = "early-exit-margin") -> AdaptiveOptions:
        """For `generate`: to stop early where `skipstone calibrate` has shown that it costs little.

        Raises:
            UsageError: the bundle holds no calibration of this flag.
        """
        return calibrated_options(self.bundle.path, self.bundle.manifest, knob)

    def close(self) -> None:
        """Keep what `auto` has learned; free weights and caches. Idempotent."""
        if self._kept_record is not None:
            self._kept_record.save()
        for drafter in self._drafters:
            drafter.close()
        self.session.close()
        self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def enter(self, prompt: Text | None = None, source: Text | None = None) -> Sequence[int]:
        """Ready the session for other ways to decode (`skipstone.beams`): the source is read, what can be kept is kept.

        Returns:
            The rest of the prompt's tokens, at least one, for `Session.prefill`.

        Raises:
            UsageError, ContextFullError: as `generate`.
        """
        return self._take_in(encode_input(self.codec, self.bundle.manifest.model, prompt, source))

    def _take_in(self, given: ModelInput, settled: Settled | None = None) -> Sequence[int]:
        """Read the source, unless it was the one before; keep the committed tokens that the prompt begins with.

        Returns:
            The rest of the prompt, at least one token.
        """
        encoder = self.engine.encoder
        whole = encoder is None or self.session.encoder_layers == encoder.num_layers
        if given.source != self.session.source or settled is not None or not whole:
            given.enter(self.session, settled)
        common = min(common_prefix_length(self.session.tokens, given.prompt), len(given.prompt) - 1)
        self.session.rewind(common)
        return given.prompt[common:]

    def _record(self) -> Mapping[str, Record]:
        """What `auto` begins with."""
        if self._kept_record is None and self._own_costs:
            self._kept_record = KeptRecord(self.bundle, curve_key(self.bundle, self.engine, self._options))
        return {} if self._kept_record is None else self._kept_record.record

    def _draft_model_maker(self, path: str) -> DraftModelMaker:
        """Opens the draft model's bundle and checks its vocabulary; returns what makes its drafter."""
        bundle = open_draft_bundle(path, self.bundle, self.codec)
        facts = bundle.manifest.model
        engine_options = EngineOptions(threads=getattr(self.engine, "threads", None))
        engine = open_engine(bundle, engine_options)
        session = Session(engine, min(facts.context_length, self.session.context_length))
        costs = _costs_of(bundle, engine, engine_options)

        def make(source: Drafter | None, shape: GrowthOptions) -> Drafter:
            drafter = DraftModelDrafter(session, costs, facts.name, source, shape)
            self._drafters.append(drafter)
            return drafter

        return make


def _costs_of(bundle: Bundle, engine: Engine, options: EngineOptions) -> CostModel:
    """An opened engine's cost model, from the curve that was kept for it or is measured now."""
    curve = kept_or_measured(
        bundle,
        engine,
        options,
        lambda: measure(engine, budget_seconds=_COST_BUDGET_SECONDS),
        budget_seconds=_COST_BUDGET_SECONDS,
    )
    return CostModel(curve, engine.exits)


def _check_adaptive(strategy: str, sampler: Sampler) -> None:
    """Refuse what does not go with leaving the decoder early.

    Raises:
        UsageError: naming the flag.
    """
    if strategy not in ("auto", "plain"):
        raise UsageError(f"--early-exit-margin: does not go with --strategy {strategy}", hint="leave one out")
    if not sampler.greedy or sampler.uses_history:
        raise UsageError(
            "--early-exit-margin: decodes greedily", hint="leave --temperature and --repetition-penalty out"
        )


def own_draft_model(bundle: Bundle) -> str | None:
    """Folder of the draft model's bundle in this one; None where there is none."""
    name = bundle.manifest.draft_model
    return None if name is None else str(bundle.path / name)


def open_draft_bundle(path: str, target: Bundle, codec: TextCodec) -> Bundle:
    """The bundle of a draft model for `target`.

    Args:
        path: its folder.
        target: the target's bundle.
        codec: the target's tokenizer.

    Raises:
        VocabularyMismatchError: its tokens are not the target's.
        UsageError: it is an encoder-decoder, and the target has no source that it could read.
    """
    bundle = open_bundle(path)
    facts = bundle.manifest.model
    if facts.encoder is not None and target.manifest.model.encoder is None:
        raise UsageError(
            f"--assistant-model {path}: an encoder-decoder cannot draft for a decoder alone",
            hint="pass a decoder's bundle",
        )
    drafts = TextCodec(bundle.file(bundle.manifest.tokenizer), facts.vocab_size)
    check_vocabularies(codec.vocabulary(), drafts.vocabulary(), str(target.path), str(bundle.path))
    return bundle


def load_amendments(bundle: Bundle, codec: TextCodec) -> Amendments | None:
    """How the bundle's lexicon reads sources, if it ships one."""
    name = bundle.manifest.lexicon
    return None if name is None else Amendments(Lexicon.load(bundle.file(name)), codec)


def load_draft_table(bundle: Bundle) -> NGramTable | None:
    """The bundle's n-gram table, if it ships one."""
    name, facts = bundle.manifest.draft_table, bundle.manifest.model
    if name is None:
        return None
    table = NGramTable.load(bundle.file(name))
    if table.vocab_size != facts.vocab_size:
        raise BundleError(
            f"{bundle.file(name)}: counted for {table.vocab_size} tokens, the model has {facts.vocab_size}",
            hint="export the bundle again",
        )
    return table


def load_model(
    path: str | os.PathLike[str],
    *,
    context_length: int | None = None,
    threads: int | None = None,
    kv_type: str | None = None,
    gpu_layers: int = 0,
    curve: str | os.PathLike[str] | None = None,
    place: Place | None = None,
) -> Model:
    """Open a bundle and load its weights.

    Args:
        path: folder written by `skipstone export`.
        context_length: positions to hold; None: the model's own, at most 2,048.
        threads: CPU threads; None: one per core.
        kv_type: of K and V on llama.cpp, see `skipstone.runtimes.engines.llamacpp.kv_types`; None: f32 for f32
            bundles, f16 otherwise.
        gpu_layers: layers to place on a GPU, from the last one on; -1: all.
        curve: file with the cost curve to plan with, from `skipstone bench --curve-only`; None: the one that was kept
            for this machine, else it is measured at first use.
        place: segments that run on the engines of other bundles of the same checkpoint, `{0: "other/"}`; see
            `skipstone.placing`.

    Raises:
        BundleError, EngineError, UsageError: naming the file or argument and what to do.
    """
    options = EngineOptions(threads=threads, kv_type=kv_type, gpu_layers=gpu_layers)
    bundle = open_bundle(path)
    measured = None if curve is None else load_curve(curve, bundle)
    return Model(bundle, options, context_length, measured, place)


def load_curve(path: str | os.PathLike[str], bundle: Bundle) -> MeasuredCurve:
    """A cost curve measured elsewhere, for planning.

    Raises:
        UsageError: it cannot be read, or is another bundle's.
    """
    file = Path(path)
    measured = read_curve(file)
    check_fits(measured, bundle, file)
    return measured
