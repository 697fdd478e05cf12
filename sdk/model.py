"""A model ready to generate: engine, session, tokenizer and strategies behind two calls.

    import skipstone

    model = skipstone.load("out/")
    result = model.generate("def quicksort(", max_new_tokens=64)
    print(result.text, result.stats.tokens_per_second)

    for chunk in model.stream("class Stack:", max_new_tokens=64):
        print(chunk.text, end="", flush=True)

Costs are measured when a speculating strategy is first used, so the first such call takes about two seconds more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from skipstone.bundle import Bundle, open_bundle
from skipstone.devices.cost import measure
from skipstone.errors import BundleError, UsageError
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters.base import Drafter
from skipstone.runtimes.drafters.draft_model import DraftModelDrafter, DraftModelMaker, check_vocabularies
from skipstone.runtimes.drafters.growth import GrowthOptions
from skipstone.runtimes.drafters.table import NGramTable
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.generate import GenerationLimits, Policy, Step, StopReason, generate
from skipstone.runtimes.prefix import common_prefix_length
from skipstone.runtimes.sampling import Sampler, SamplingConfig
from skipstone.runtimes.session import Session
from skipstone.runtimes.strategies import Materials, StrategyOptions, make_policy
from skipstone.runtimes.text import StopFinder, TextCodec

_COST_BUDGET_SECONDS = 2.0


@dataclass(frozen=True)
class GenerationStats:
    """Figures of one generation.

    Attributes:
        strategy: as asked for.
        prompt_tokens, new_tokens: counts.
        rounds: verification passes of the target after the first token.
        drafted, accepted: draft tokens verified, and of these accepted.
        time_to_first_token: seconds, prefill included.
        seconds: whole generation.
        rounds_by_drafter: rounds per drafter; "" stands for plain rounds.
    """

    strategy: str
    prompt_tokens: int
    new_tokens: int
    rounds: int
    drafted: int
    accepted: int
    time_to_first_token: float
    seconds: float
    rounds_by_drafter: dict[str, int]

    @property
    def tokens_per_second(self) -> float:
        """New tokens after the first, per second of decoding."""
        decoding = self.seconds - self.time_to_first_token
        return (self.new_tokens - 1) / decoding if decoding > 0 and self.new_tokens > 1 else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Accepted drafts plus the bonus token, per verification."""
        return (self.new_tokens - 1) / self.rounds if self.rounds else 1.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted share of the drafted tokens."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass(frozen=True)
class GenerationResult:
    """A finished generation: `text` and `tokens` are what was generated, the prompt left out."""

    text: str
    tokens: tuple[int, ...]
    stop_reason: StopReason
    stats: GenerationStats


@dataclass(frozen=True)
class Chunk:
    """A piece of streamed text.

    Attributes:
        text: new text; pieces joined give the result's text.
        tokens: the tokens of this round.
        accepted: how many of them, from the first on, were accepted drafts.
        rejected: text of the refused draft path, for display.
    """

    text: str
    tokens: tuple[int, ...]
    accepted: int
    rejected: str


class Model:
    """An opened bundle. Not for several threads at once; close it or use it as a context manager.

    Args:
        bundle: the checked bundle.
        options: engine options.
        context_length: positions to hold; None: the model's own, at most 2,048.
    """

    def __init__(
        self, bundle: Bundle, options: EngineOptions | None = None, context_length: int | None = None
    ) -> None:
        self.bundle = bundle
        facts = bundle.manifest.model
        self.codec = TextCodec(
            bundle.file(bundle.manifest.tokenizer),
            facts.vocab_size,
            facts.bos_token_id if facts.add_bos else None,
        )
        self._table = load_draft_table(bundle)
        self.engine = open_engine(bundle, options)
        try:
            length = min(facts.context_length, 2048) if context_length is None else context_length
            self.session = Session(self.engine, length)
        except Exception:
            self.engine.close()
            raise
        self._costs: CostModel | None = None
        self._policies: dict[tuple[str, StrategyOptions, str | None], Policy] = {}
        self._drafters: list[Drafter] = []
        self.last_result: GenerationResult | None = None

    @property
    def costs(self) -> CostModel:
        """The engine's cost model; measured on first use (about two seconds), on this machine."""
        if self._costs is None:
            curve = measure(self.engine, budget_seconds=_COST_BUDGET_SECONDS)
            self._costs = CostModel(curve, self.engine.exits)
        return self._costs

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        strategy: str = "auto",
        sampling: SamplingConfig | None = None,
        stop: Sequence[str] = (),
        options: StrategyOptions | None = None,
        assistant_model: str | None = None,
        ignore_eos: bool = False,
    ) -> GenerationResult:
        """Generate after a prompt.

        Args:
            prompt: text, or token ids.
            max_new_tokens: at most so many.
            strategy: see `skipstone.runtimes.strategies.STRATEGIES`; `auto` measures and decides.
            sampling: how tokens are chosen; greedy by default.
            stop: strings that end the generation; they are not part of the text.
            options: what to fix of the strategy.
            assistant_model: folder of a draft model's bundle, for strategy `draft-model`.
            ignore_eos: go on after an end-of-text token.

        Raises:
            UsageError, ContextFullError: the arguments cannot work; the model stays usable.
        """
        for _ in self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            strategy=strategy,
            sampling=sampling,
            stop=stop,
            options=options,
            assistant_model=assistant_model,
            ignore_eos=ignore_eos,
        ):
            pass
        if self.last_result is None:
            raise AssertionError("a finished stream leaves its result")
        return self.last_result

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        strategy: str = "auto",
        sampling: SamplingConfig | None = None,
        stop: Sequence[str] = (),
        options: StrategyOptions | None = None,
        assistant_model: str | None = None,
        ignore_eos: bool = False,
    ) -> Iterator[Chunk]:
        """As `generate`, piece by piece; `last_result` holds the result afterwards.

        No piece ends inside a character. The part of the context that two prompts share is not computed again.
        An abandoned iterator leaves the model usable.
        """
        tokens = self.codec.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not tokens:
            raise UsageError("the prompt is empty", hint="pass some text with --prompt")
        eos = () if ignore_eos else self.bundle.manifest.model.eos_token_ids
        limits = GenerationLimits(max_new_tokens, eos)
        sampler = Sampler(sampling or SamplingConfig())
        policy = self.policy(strategy, options, assistant_model)
        costs = self.costs
        self.last_result = None
        began = time.perf_counter()
        rest = self._reuse_prefix(tokens)
        steps = generate(self.session, rest, policy, sampler, limits, costs)
        collector = _Collector(self.codec, stop, strategy, len(tokens), began)
        try:
            for step in steps:
                yield collector.push(step)
                if collector.stop_reason is not None:
                    break
        finally:
            steps.close()
            kept = len(tokens) + len(collector.tokens) - 1
            self.session.rewind(min(self.session.length, max(0, kept)))
        tail, self.last_result = collector.finish()
        if tail:
            yield Chunk(tail, (), 0, "")

    def policy(
        self, strategy: str, options: StrategyOptions | None = None, assistant_model: str | None = None
    ) -> Policy:
        """The policy of a strategy; made once, so that what it learned serves the next generation too."""
        key = (strategy, options or StrategyOptions(), assistant_model)
        if key not in self._policies:
            maker = None if assistant_model is None else self._draft_model_maker(assistant_model)
            materials = Materials(self.engine, self.costs, key[1], self._table, maker)
            self._policies[key] = make_policy(strategy, materials)
        return self._policies[key]

    def close(self) -> None:
        """Free weights and caches. Idempotent."""
        for drafter in self._drafters:
            drafter.close()
        self.session.close()
        self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _reuse_prefix(self, tokens: Sequence[int]) -> Sequence[int]:
        """Keep the committed tokens a prompt begins with; returns the rest of the prompt (at least one token)."""
        common = min(common_prefix_length(self.session.tokens, tokens), len(tokens) - 1)
        self.session.rewind(common)
        return tokens[common:]

    def _draft_model_maker(self, path: str) -> DraftModelMaker:
        """Opens the draft model's bundle and checks its vocabulary; returns what makes its drafter."""
        bundle = open_bundle(path)
        facts = bundle.manifest.model
        codec = TextCodec(bundle.file(bundle.manifest.tokenizer), facts.vocab_size)
        check_vocabularies(
            self.codec.vocabulary(), codec.vocabulary(), str(self.bundle.path), str(bundle.path)
        )
        engine = open_engine(bundle, EngineOptions(threads=getattr(self.engine, "threads", None)))
        session = Session(engine, min(facts.context_length, self.session.context_length))
        costs = CostModel(measure(engine, budget_seconds=_COST_BUDGET_SECONDS), engine.exits)

        def make(source: Drafter | None, shape: GrowthOptions) -> Drafter:
            drafter = DraftModelDrafter(session, costs, facts.name, source, shape)
            self._drafters.append(drafter)
            return drafter

        return make


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


class _Collector:
    """Turns steps into chunks and, at the end, the result."""

    def __init__(
        self, codec: TextCodec, stop: Sequence[str], strategy: str, prompt_tokens: int, began: float
    ) -> None:
        self._codec, self._stream, self._stops = codec, codec.stream(), StopFinder(stop)
        self._strategy, self._prompt_tokens, self._began = strategy, prompt_tokens, began
        self._text: list[str] = []
        self._rounds: dict[str, int] = {}
        self._drafted = self._accepted = 0
        self._first = 0.0
        self.tokens: list[int] = []
        self.stop_reason: Literal["stop"] | None = None
        self._ended: StopReason = "length"

    def push(self, step: Step) -> Chunk:
        """Chunk of one step; sets `stop_reason` when a stop string is complete."""
        now = time.perf_counter()
        if not self.tokens:
            self._first = now - self._began
        else:
            self._rounds[step.drafter] = self._rounds.get(step.drafter, 0) + 1
        self._drafted += step.drafted
        self._accepted += step.accepted
        self._ended = step.stop or self._ended
        pieces, used = [], 0
        for token in step.tokens:
            used += 1
            piece, stopped = self._stops.push(self._stream.push(token))
            pieces.append(piece)
            if stopped:
                self.stop_reason = "stop"
                break
        self.tokens += step.tokens[:used]
        self._text += pieces
        rejected = self._codec.decode(step.rejected) if step.rejected else ""
        return Chunk("".join(pieces), step.tokens[:used], min(step.accepted, used), rejected)

    def finish(self) -> tuple[str, GenerationResult]:
        """Text held back so far, and the result."""
        tail = ""
        if self.stop_reason is None:
            tail = "".join(self._stops.push(self._stream.flush())[:1]) + self._stops.flush()
            self._text.append(tail)
        stats = GenerationStats(
            strategy=self._strategy,
            prompt_tokens=self._prompt_tokens,
            new_tokens=len(self.tokens),
            rounds=sum(self._rounds.values()),
            drafted=self._drafted,
            accepted=self._accepted,
            time_to_first_token=self._first,
            seconds=time.perf_counter() - self._began,
            rounds_by_drafter=dict(self._rounds),
        )
        reason = self.stop_reason or self._ended
        return tail, GenerationResult("".join(self._text), tuple(self.tokens), reason, stats)


def load_model(
    path: str | os.PathLike[str],
    *,
    context_length: int | None = None,
    threads: int | None = None,
    kv_type: str | None = None,
    gpu_layers: int = 0,
) -> Model:
    """Open a bundle and load its weights.

    Args:
        path: folder written by `skipstone export`.
        context_length: positions to hold; None: the model's own, at most 2,048.
        threads: CPU threads; None: one per core.
        kv_type: `f16` or `f32`; None: f32 for f32 bundles, f16 otherwise.
        gpu_layers: layers to place on a GPU.

    Raises:
        BundleError, EngineError, UsageError: naming the file or argument and what to do.
    """
    options = EngineOptions(threads=threads, kv_type=kv_type, gpu_layers=gpu_layers)
    return Model(open_bundle(path), options, context_length)
