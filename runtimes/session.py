"""The session: rows with progress on one engine, from which layer-skip and speculation follow.

    push(tokens, parents)      add rows; computes nothing
    advance(rows, exit)        bring rows (and lagging ancestors) to an exit, batched per segment; logits there
    commit(row)                the path to the row becomes context, all other rows vanish
    rewind(length)             drop committed tokens past a length

Plain decoding pushes one row, advances it to the last exit and commits it. LayerSkip self-speculation advances drafts
to an early exit first and to the last one afterwards: the rows continue where they stand, so no layer runs twice
(LayerSkip, arXiv 2404.16710, section 4.3: shared weights, activations and K/V).

    >>> session = Session(engine, context_length=512)
    >>> logits = session.prefill([5, 7, 11])
    >>> (row,) = session.push([int(logits.argmax())])
    >>> early, = session.advance([row], exit=2)        # draft head at exit 2
    >>> final, = session.advance([row], exit=12)       # continues from layer 2
    >>> session.commit(row)

An encoder-decoder's rows are the decoder's. Before the first of them it is given a source:

    >>> session.encode(source)                         # the encoder, once; the rows attend to what it gives
    >>> logits = session.prefill([start_token])
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import numpy as np
from numpy.typing import NDArray

from skipstone.errors import ContextFullError, UsageError
from skipstone.runtimes.engines.base import Engine, Settled, SourceCache
from skipstone.runtimes.rows import ROOT, RowTree

FloatArray = NDArray[np.float32]


class Session:
    """One sequence on one engine. Not for several threads at once.

    Args:
        engine: the weights.
        context_length: positions to hold, drafts included; at most what the model was trained for.

    Raises:
        UsageError: a context length outside 1 … `engine.max_context_length`.
    """

    def __init__(self, engine: Engine, context_length: int | None = None) -> None:
        length = engine.max_context_length if context_length is None else context_length
        if not 1 <= length <= engine.max_context_length:
            raise UsageError(
                f"context length {length}: the model holds 1 to {engine.max_context_length} positions",
                hint="pass a smaller --context-length",
            )
        self.engine = engine
        self.exits = engine.exits
        self._segments = {exit_layer: index + 1 for index, exit_layer in enumerate(engine.exits)}
        self._rows = RowTree()
        self._tokens: list[int] = []
        self._logits: dict[tuple[int, int], FloatArray] = {}
        self._source: tuple[int, ...] = ()
        self._encoder_layers = 0
        self._cache = engine.open_cache(length, self._rows)

    @property
    def tokens(self) -> Sequence[int]:
        """The committed tokens. Read-only view."""
        return self._tokens

    @property
    def source(self) -> tuple[int, ...]:
        """What an encoder-decoder's rows attend to; empty before `encode`, and always of a decoder alone."""
        return self._source

    @property
    def encoder_layers(self) -> int:
        """How many layers of the encoder were run over the source."""
        return self._encoder_layers

    @property
    def length(self) -> int:
        """Number of committed tokens."""
        return len(self._tokens)

    @property
    def context_length(self) -> int:
        """Positions this session can hold."""
        return self._cache.context_length

    @property
    def room(self) -> int:
        """Rows that can still be pushed and computed."""
        return self._cache.context_length - self._rows.base - len(self._rows)

    @property
    def pending(self) -> int:
        """Number of uncommitted rows."""
        return len(self._rows) - self._rows.num_committed

    @property
    def max_width(self) -> int:
        """Most rows the engine takes in one batch."""
        return self._cache.max_width

    @property
    def max_branches(self) -> int:
        """Most leaves an uncommitted tree may have."""
        return self._cache.max_branches

    def encode(self, source: Sequence[int], settled: Settled | None = None) -> int:
        """Give an encoder-decoder its source: the encoder runs once, and a new sequence begins.

        Args:
            source: token ids.
            settled: asked at every inner exit of the encoder whether to stop there; None: never.

        Returns:
            How many layers of the encoder were run.

        Raises:
            UsageError: a decoder alone, an empty source, or a token outside the vocabulary; nothing has changed.
            ContextFullError: a source longer than the encoder takes; nothing has changed.
        """
        self._check_source(source)
        self.rewind(0)
        self._source, self._encoder_layers = (), 0  # a cache that refuses has lost what it held
        self._encoder_layers = cast(SourceCache, self._cache).encode(source, settled)
        self._source = tuple(source)
        return self._encoder_layers

    def push(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> list[int]:
        """Add rows; nothing is computed.

        Args:
            tokens: token ids, n of them.
            parents: for each row the id of its parent, `ROOT` (-1) for the committed tip; None: a chain from
                the tip.

        Returns:
            The rows' ids. A row equal to an existing one (same parent, same token) is that row.

        Raises:
            UsageError: a token outside the vocabulary, a parent that is neither the tip nor uncommitted, or an
                encoder-decoder without a source.
        """
        if self.engine.encoder is not None and not self._source:
            raise UsageError(
                "this model is an encoder-decoder and has no source yet", hint="encode one first"
            )
        self._check_tokens(tokens)
        rows: list[int] = []
        parent = tip = self._rows.tip
        for index, token in enumerate(tokens):
            if parents is not None:
                parent = parents[index]
                parent = tip if parent == ROOT else parent
            if not tip <= parent < len(self._rows):
                raise UsageError(f"parent {parent}: rows {tip + 1} to {len(self._rows) - 1} are uncommitted")
            parent = self._rows.add(token, parent)
            rows.append(parent)
        return rows

    def advance(self, rows: Sequence[int], exit: int) -> list[FloatArray]:
        """Bring rows, and ancestors that lag behind, to an exit, one batch per segment.

        Args:
            rows: row ids.
            exit: number of layers, one of `exits`.

        Returns:
            For each row its logits at that exit: [vocab_size] at the last exit, [draft vocabulary] at inner ones
            (token ids in `engine.draft_vocabulary`). Rows advanced before give the same logits again at no cost.

        Raises:
            UsageError: an unknown exit, or a row that has left the exit behind without its logits having been asked.
            ContextFullError: no room for the rows; nothing has changed.
        """
        target = self._target(rows, exit)
        fresh = [row for row in rows if (row, target) not in self._logits]
        if fresh:
            self._compute(fresh, target)
        return [self._logits[row, target] for row in rows]

    def run(self, rows: Sequence[int], exit: int) -> None:
        """As `advance`, without asking for logits."""
        self._run_segments(rows, self._target(rows, exit), ())

    def commit(self, row: int) -> None:
        """Make the path from the committed tip to `row` the context; every other row vanishes.

        A path whose rows stopped at an early exit is committed as it is: the rows lag and are caught up in one batch
        when a later row needs the deeper segments.

        Raises:
            UsageError: not the tip or an uncommitted row.
        """
        if not self._rows.tip <= row < len(self._rows):
            raise UsageError(f"row {row}: rows {self._rows.tip + 1} to {len(self._rows) - 1} are uncommitted")
        path = self._rows.path(row)
        added = [self._rows.tokens[r] for r in path[self._rows.num_committed :]]
        self._cache.commit(path)
        self._rows.keep(path, len(self.exits))
        self._tokens.extend(added)
        self._logits.clear()

    def discard(self) -> None:
        """Drop every uncommitted row."""
        if len(self._rows) > self._rows.num_committed:
            self._cache.commit(list(range(self._rows.num_committed)))
            self._rows.truncate(self.length)
        self._logits.clear()

    def rewind(self, length: int) -> None:
        """Drop committed tokens at and past `length`, and every uncommitted row.

        Raises:
            UsageError: a length outside 0 … the committed length.
        """
        if not 0 <= length <= self.length:
            raise UsageError(f"rewind to {length}: {self.length} tokens are committed")
        self.discard()
        self._cache.rewind(length)
        self._rows.truncate(length)
        del self._tokens[length:]

    def prefill(self, tokens: Sequence[int]) -> FloatArray:
        """Commit a prompt, in blocks of the engine's width.

        Returns:
            Logits [vocab_size] after its last token.

        Raises:
            UsageError: an empty prompt, a token outside the vocabulary, or an encoder-decoder without a source.
            ContextFullError: a prompt that does not fit; nothing has changed.
        """
        if not tokens:
            raise UsageError("the prompt is empty", hint="pass at least one token")
        if len(tokens) > self.room:
            raise ContextFullError(
                f"prompt of {len(tokens)} tokens: the session has room for {self.room} of {self.context_length}",
                hint="shorten the prompt or raise --context-length",
            )
        self._check_tokens(tokens)
        self.discard()
        starts = [*range(0, len(tokens), self.max_width), len(tokens)]
        for start, stop in pairwise(starts):
            rows = self.push(tokens[start:stop])
            if stop == len(tokens):
                (logits,) = self.advance(rows[-1:], self.exits[-1])
            else:
                self.run(rows[-1:], self.exits[-1])
            self.commit(rows[-1])
        return logits

    def close(self) -> None:
        """Free the cache. Idempotent."""
        self._cache.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _target(self, rows: Sequence[int], exit: int) -> int:
        """Number of segments up to an exit, after checking the arguments."""
        target = self._segments.get(exit)
        if target is None:
            raise UsageError(f"exit {exit}: this model can stop at {', '.join(map(str, self.exits))}")
        if rows and not 0 <= min(rows) <= max(rows) < len(self._rows):
            raise UsageError(f"rows {min(rows)} to {max(rows)}: there are {len(self._rows)} rows")
        return target

    def _check_source(self, source: Sequence[int]) -> None:
        encoder = self.engine.encoder
        if encoder is None:
            raise UsageError(
                "this model is a decoder alone: it takes no source", hint="pass a prompt instead"
            )
        if not source:
            raise UsageError("the source is empty", hint="pass at least one token")
        if len(source) > encoder.max_source_length:
            raise ContextFullError(
                f"source of {len(source)} tokens: the encoder takes {encoder.max_source_length}",
                hint="split the text, at its sentences say",
            )
        self._check_tokens(source)

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.engine.vocab_size:
            wrong = next(token for token in tokens if not 0 <= token < self.engine.vocab_size)
            raise UsageError(f"token {wrong}: the vocabulary has {self.engine.vocab_size} tokens")

    def _compute(self, rows: Sequence[int], target: int) -> None:
        """Logits of `rows` after `target` segments, into the store."""
        last, width = target == len(self.exits), self._cache.max_width
        for row in rows:
            done = self._rows.progress[row]
            if done > target or (last and done == target):
                raise UsageError(
                    f"row {row} has run {done} segments, its logits after {target} were never asked for"
                )
        self._run_segments(rows, target, rows if last else ())
        for start in range(0, 0 if last else len(rows), width):
            block = rows[start : start + width]
            states = [h for h in (self._rows.hidden[row] for row in block) if h is not None]
            for row, logits in zip(block, self._cache.draft_logits(states), strict=True):
                self._logits[row, target] = logits

    def _run_segments(self, rows: Sequence[int], target: int, wanted: Sequence[int]) -> None:
        """Run `rows` and lagging ancestors up to `target` segments; store the last exit's logits of `wanted`."""
        todo, width = self._rows.lagging(rows, target), self._cache.max_width
        for start in range(0, len(todo), width):
            self._run_block(todo[start : start + width], target, wanted)

    def _run_block(self, todo: Sequence[int], target: int, wanted: Sequence[int]) -> None:
        tree, cache = self._rows, self._cache
        progress, hidden = tree.progress, tree.hidden
        for segment in range(min(progress[r] for r in todo), target):
            batch = [r for r in todo if progress[r] == segment]
            if segment == 0:
                states = list(cache.embed([tree.tokens[r] for r in batch]))
            else:
                states = [h for h in (hidden[r] for r in batch) if h is not None]
            last = segment == len(self.exits) - 1
            flags = [r in wanted for r in batch] if last else ()
            out = cache.run(segment, batch, states, flags)
            for index, row in enumerate(batch):
                progress[row] = segment + 1
                hidden[row] = None if last else out[index]
            if last:
                for row, logits in zip((r for r in batch if r in wanted), out, strict=True):
                    self._logits[row, target] = logits
