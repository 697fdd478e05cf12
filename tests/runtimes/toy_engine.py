"""A small real transformer in numpy, as an engine: the independent oracle of the runtime's unit tests.

Three segments of one layer each, one attention head, learned positions, ReLU feed-forward, a shared head.
Rows are computed one by one in float64, so a row's numbers do not depend on the batch it rides in, and K/V
are kept for rows, not for sequences, so that nothing of llama.cpp's bookkeeping is repeated here.

`ToyTranslator` is the same with an encoder of three layers before it and cross-attention in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import CostCurve, EncoderFacts
from skipstone.errors import ContextFullError
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.engines.base import Settled
from skipstone.runtimes.rows import ROOT, RowTree

FloatArray = NDArray[np.float32]
Doubles = NDArray[np.float64]
Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


class ToyEngine:
    """See `skipstone.runtimes.engines.base.Engine`.

    Args:
        vocab_size: tokens.
        draft_tokens: size of the draft head's vocabulary; None: there is no draft head.
        depth_scale: how much each later segment changes the hidden state; small means exits that agree.
        sharpness: scale of the logits.
        max_width, max_branches: limits the caches report.
        remember: keep every layer's results, for tests that run the same few texts thousands of times.
    """

    encoder: EncoderFacts | None = None

    def __init__(
        self,
        seed: int = 0,
        vocab_size: int = 24,
        *,
        draft_tokens: int | None = 18,
        depth_scale: float = 0.5,
        sharpness: float = 2.0,
        context_length: int = 96,
        max_width: int = 64,
        max_branches: int = 64,
        num_segments: int = 3,
        remember: bool = False,
    ) -> None:
        rng = np.random.default_rng(seed)
        size = 8
        self.hidden_size, self.vocab_size, self.max_context_length = size, vocab_size, context_length
        self.exits = tuple(2 * (k + 1) for k in range(num_segments))
        self.max_width, self.max_branches = max_width, max_branches
        chosen = rng.permutation(vocab_size)[: draft_tokens or 0]
        self.draft_vocabulary = np.sort(chosen).astype(np.int32) if draft_tokens else None
        self.table = rng.standard_normal((vocab_size, size))
        self.places = 0.4 * rng.standard_normal((context_length, size))
        self.layers = [rng.standard_normal((6, size, size)) / np.sqrt(size) for _ in range(num_segments)]
        self.scales = [1.0] + [depth_scale] * (num_segments - 1)
        self.head = sharpness * rng.standard_normal((size, vocab_size)) / np.sqrt(size)
        self.closed = False
        self.memo: dict[object, tuple[NDArray[np.float64], Pair, Sequence[Pair]]] | None = (
            {} if remember else None
        )

    def open_cache(self, context_length: int, tree: RowTree) -> ToyCache:
        return ToyCache(self, tree, context_length)

    def close(self) -> None:
        self.closed = True

    def layer(
        self, segment: int, x: Doubles, before: Sequence[Pair], memory: Doubles | None = None
    ) -> tuple[Doubles, Pair]:
        """One row through one layer, after the K/V of the positions before it; its output and its own K/V."""
        if memory is not None:
            x = x + self.attend(segment, x, len(before), memory)
        if self.memo is None:
            return self._layer(segment, x, before)
        key = (segment, x.tobytes(), *map(id, before))
        if key not in self.memo:
            self.memo[key] = (
                *self._layer(segment, x, before),
                before,
            )  # `before` kept alive: its ids stay unique
        return self.memo[key][:2]

    def _layer(
        self, segment: int, x: NDArray[np.float64], before: Sequence[Pair]
    ) -> tuple[NDArray[np.float64], Pair]:
        wq, wk, wv, wo, w1, w2 = self.layers[segment]
        scale = self.scales[segment]
        pair = (x @ wk, x @ wv)
        keys = np.stack([k for k, _ in before] + [pair[0]])
        values = np.stack([v for _, v in before] + [pair[1]])
        scores = keys @ (x @ wq) / np.sqrt(len(x))
        weights = np.exp(scores - scores.max())
        x = x + scale * (weights @ values / weights.sum()) @ wo
        return x + scale * np.maximum(x @ w1, 0.0) @ w2 / 2, pair

    def attend(self, segment: int, x: Doubles, position: int, memory: Doubles) -> Doubles:
        """Cross-attention of one row; a decoder alone has none."""
        raise NotImplementedError

    def final(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Norm and head."""
        return x / np.sqrt((x**2).mean() + 1e-6) @ self.head

    def reference(
        self, tokens: Sequence[int], exit: int | None = None, memory: Doubles | None = None
    ) -> FloatArray:
        """Logits after every token, without any cache or rows; draft head rows at inner exits."""
        stop = self.exits.index(self.exits[-1] if exit is None else exit) + 1
        states = [
            self.table[token].astype(np.float32) + self.places[place] for place, token in enumerate(tokens)
        ]
        for segment in range(stop):
            pairs: list[Pair] = []
            after = []
            for x in states:
                x, pair = self.layer(segment, np.asarray(x, np.float32).astype(np.float64), pairs, memory)
                pairs.append(pair)
                after.append(x)
            states = after
        out = np.stack([self.final(np.asarray(x, np.float32).astype(np.float64)) for x in states])
        if stop < len(self.exits):
            assert self.draft_vocabulary is not None
            out = out[:, self.draft_vocabulary]
        return out.astype(np.float32)


class ToyCache:
    """See `skipstone.runtimes.engines.base.Cache`; `rows_run` counts the rows every segment was given."""

    def __init__(self, engine: ToyEngine, tree: RowTree, context_length: int) -> None:
        self.engine, self.tree, self.context_length = engine, tree, context_length
        self.max_width, self.max_branches = engine.max_width, engine.max_branches
        self.context: list[list[Pair]] = [[] for _ in engine.exits]
        self.drafts: list[dict[int, Pair]] = [{} for _ in engine.exits]
        self.rows_run = [0] * len(engine.exits)
        self.batches: list[tuple[int, int]] = []
        self.memory: Doubles | None = None
        self.heads_run = 0
        self.closed = False

    def embed(self, tokens: Sequence[int]) -> FloatArray:
        return self.engine.table[list(tokens)].astype(np.float32)

    def run(
        self, segment: int, rows: Sequence[int], hidden: Sequence[FloatArray], wanted: Sequence[bool]
    ) -> FloatArray:
        tree, engine = self.tree, self.engine
        if tree.base + len(tree) > self.context_length:
            raise ContextFullError("no room")
        if self._leaves() > self.max_branches:
            raise ContextFullError("too many leaves")
        assert 0 < len(rows) <= self.max_width
        assert len(rows) == len(hidden)
        assert len(set(rows)) == len(rows)
        self.rows_run[segment] += len(rows)
        self.batches.append((segment, len(rows)))
        out = []
        for row, state in zip(rows, hidden, strict=True):
            x = np.asarray(state, np.float64)
            if segment == 0:
                x = (x + engine.places[tree.position(row)]).astype(np.float32).astype(np.float64)
            x, pair = engine.layer(segment, x, self._before(segment, row), self.memory)
            assert row not in self.drafts[segment], "computed twice"
            self.drafts[segment][row] = pair
            out.append(x.astype(np.float32))
        if segment < len(engine.exits) - 1:
            return np.stack(out)
        picked = [engine.final(x.astype(np.float64)) for x, want in zip(out, wanted, strict=True) if want]
        return np.stack(picked).astype(np.float32) if picked else np.empty((0, engine.vocab_size), np.float32)

    def draft_logits(self, hidden: Sequence[FloatArray]) -> FloatArray:
        ids = self.engine.draft_vocabulary
        assert ids is not None
        assert 0 < len(hidden) <= self.max_width
        self.heads_run += len(hidden)
        return np.stack([self.engine.final(x.astype(np.float64))[ids] for x in hidden]).astype(np.float32)

    def commit(self, path: Sequence[int]) -> None:
        for segment, (context, drafts) in enumerate(zip(self.context, self.drafts, strict=True)):
            if not self.rows_run[segment]:
                continue  # it runs on another engine
            ran = [row for row in path if self.tree.progress[row] > segment]
            before = context[: self.tree.base]
            context[:] = before + [self._pair(segment, row) for row in ran]
            drafts.clear()

    def rewind(self, length: int) -> None:
        for context, drafts in zip(self.context, self.drafts, strict=True):
            assert not drafts or self.tree.num_committed
            del context[length:]

    def close(self) -> None:
        self.closed = True

    def _pair(self, segment: int, row: int) -> Pair:
        """K/V of a row that ran: among the drafts, or in the context if it was committed while lagging."""
        if row in self.drafts[segment]:
            return self.drafts[segment][row]
        assert row < self.tree.num_committed
        return self.context[segment][self.tree.position(row)]

    def _before(self, segment: int, row: int) -> list[Pair]:
        path = self.tree.path(row)[:-1]
        return self.context[segment][: self.tree.base] + [self._pair(segment, r) for r in path]

    def _leaves(self) -> int:
        parents = set(self.tree.parents)
        return sum(1 for row in range(len(self.tree)) if row not in parents)


class ToyTranslator(ToyEngine):
    """An encoder-decoder: row t of the decoder looks at the source, most of all about position t.

    Args:
        copying: how sharply it looks at position t; large values copy the source, most of the time.
        max_source_length: of the encoder.
        arguments: of the decoder, see `ToyEngine`.
    """

    def __init__(
        self, seed: int = 0, *, copying: float = 0.3, max_source_length: int = 40, **arguments: Any
    ) -> None:
        super().__init__(seed, **arguments)
        rng, size = np.random.default_rng(seed + 1000), self.hidden_size
        self.copying = copying
        self.encoder = EncoderFacts(
            num_layers=3, exits=(1, 2), max_source_length=max_source_length, start_token_id=0
        )
        self.encoder_layers = [rng.standard_normal((5, size, size)) / np.sqrt(size) for _ in range(3)]
        self.crosses = [rng.standard_normal((2, size, size)) / np.sqrt(size) for _ in self.exits]
        self.table *= np.sqrt(size) / np.linalg.norm(self.table, axis=1, keepdims=True)
        self.head = self.head / (1.0 + copying) + 1.5 * self.table.T
        self.scales[0] /= 1.0 + copying

    def open_cache(self, context_length: int, tree: RowTree) -> ToySourceCache:
        return ToySourceCache(self, tree, context_length)

    def encoded(self, source: Sequence[int], settled: Settled | None = None) -> tuple[Doubles, int]:
        """What the decoder attends to, [n, hidden_size], and how many layers were run."""
        assert self.encoder is not None
        x = self.table[list(source)] + self.places[np.arange(len(source)) % len(self.places)]
        for number, (wq, wk, wv, w1, w2) in enumerate(self.encoder_layers, 1):
            before = x
            weights = np.exp(x @ wq @ (x @ wk).T / np.sqrt(x.shape[1]) / 4)
            x = x + 0.1 * (weights / weights.sum(axis=1, keepdims=True)) @ x @ wv
            x = x + 0.1 * np.maximum(x @ w1, 0.0) @ w2
            inner = number in self.encoder.exits
            if inner and settled and settled(number, before.astype(np.float32), x.astype(np.float32)):
                break
        return x, number

    def attend(self, segment: int, x: Doubles, position: int, memory: Doubles) -> Doubles:
        wq, wk = self.crosses[segment]
        distances = np.abs(np.arange(len(memory)) - min(position, len(memory) - 1))
        scores = memory @ wk @ (x @ wq) / 8 - self.copying * distances
        weights = np.exp(scores - scores.max())
        return (1.0 + self.copying) * weights @ memory / weights.sum()


class ToySourceCache(ToyCache):
    """See `skipstone.runtimes.engines.base.SourceCache`; `encoded` counts the runs of the encoder."""

    engine: ToyTranslator
    encoded = 0

    def encode(self, source: Sequence[int], settled: Settled | None = None) -> int:
        assert not any(self.context)
        assert not any(self.drafts)
        self.encoded += 1
        self.memory, layers = self.engine.encoded(source, settled)
        return layers


def toy_costs(engine: ToyEngine, *, slope: float = 0.1, head: float = 0.1) -> CostModel:
    """Costs of a segment: 1 ms for one row and `slope` ms more for each further one."""
    widths = (1, 2, 4, 8, 16, 32)
    seconds = tuple((1.0 + slope * (width - 1)) * 1e-3 for width in widths)
    curve = CostCurve(
        widths=widths,
        segments=(seconds,) * len(engine.exits),
        draft_head=tuple(head * s for s in seconds),
        threads=1,
        machine="toy",
    )
    return CostModel(curve, engine.exits)


def plain_tokens(
    engine: ToyEngine,
    prompt: Sequence[int],
    count: int,
    eos: Sequence[int] = (),
    context_length: int = 96,
    source: Sequence[int] = (),
) -> list[int]:
    """Greedy decoding by the definition: recompute everything for every token."""
    text = list(prompt)
    memory = engine.encoded(source)[0] if isinstance(engine, ToyTranslator) else None
    while len(text) - len(prompt) < count and len(text) <= context_length:
        text.append(int(engine.reference(text, memory=memory)[-1].argmax()))
        if text[-1] in eos:
            break
    return text[len(prompt) :]


__all__ = ["ROOT", "ToyCache", "ToyEngine", "ToySourceCache", "ToyTranslator", "plain_tokens", "toy_costs"]
