"""What a generation gives: chunks while it runs, a result with its figures at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from skipstone.inputs import ModelInput
from skipstone.runtimes.generate import Step, StopReason
from skipstone.runtimes.risk import Guarantee
from skipstone.runtimes.text import StopFinder, TextCodec


@dataclass(frozen=True)
class GenerationStats:
    """Figures of one generation.

    Attributes:
        strategy: as asked for.
        prompt_tokens, new_tokens: counts; an encoder-decoder's start token is one of the prompt's.
        rounds: verification passes of the target after the first token.
        drafted, accepted: draft tokens verified, and of these accepted.
        time_to_first_token: seconds, prefill included.
        seconds: whole generation.
        rounds_by_drafter: rounds per drafter; "" stands for plain rounds.
        source_tokens: what an encoder-decoder read; 0 of a decoder alone.
        encoder_layers: of an encoder-decoder, that were run over the source.
        lossy: the output may differ from plain decoding's, because `skipstone.runtimes.adaptive` was told to stop early.
        guarantee: what a calibration has shown of the difference; None: nothing.
        placement: what ran where, where segments ran on several bundles' engines.
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
    source_tokens: int = 0
    encoder_layers: int = 0
    lossy: bool = False
    guarantee: Guarantee | None = None
    placement: tuple[str, ...] = ()

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


class Collector:
    """Turns steps into chunks and, at the end, the result."""

    def __init__(
        self, codec: TextCodec, stop: Sequence[str], strategy: str, given: ModelInput, began: float
    ) -> None:
        self._codec, self._stream, self._stops = codec, codec.stream(), StopFinder(stop)
        self._strategy, self._given, self._began = strategy, given, began
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

    def finish(
        self,
        encoder_layers: int,
        *,
        lossy: bool,
        guarantee: Guarantee | None = None,
        placement: tuple[str, ...] = (),
    ) -> tuple[str, GenerationResult]:
        """Text held back so far, and the result."""
        tail = ""
        if self.stop_reason is None:
            tail = "".join(self._stops.push(self._stream.flush())[:1]) + self._stops.flush()
            self._text.append(tail)
        stats = GenerationStats(
            strategy=self._strategy,
            prompt_tokens=len(self._given.prompt),
            new_tokens=len(self.tokens),
            rounds=sum(self._rounds.values()),
            drafted=self._drafted,
            accepted=self._accepted,
            time_to_first_token=self._first,
            seconds=time.perf_counter() - self._began,
            rounds_by_drafter=dict(self._rounds),
            source_tokens=len(self._given.source),
            encoder_layers=encoder_layers,
            lossy=lossy,
            guarantee=guarantee,
            placement=placement,
        )
        reason = self.stop_reason or self._ended
        return tail, GenerationResult("".join(self._text), tuple(self.tokens), reason, stats)
