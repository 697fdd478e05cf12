"""Calls of single methods with inputs like a session's, for measuring them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np

from skipstone.bundle import ExecuTorchManifest
from skipstone.runtimes.engines.executorch.caches import open_cache
from skipstone.runtimes.engines.executorch.program import Program
from skipstone.runtimes.engines.executorch.source_cache import ExecuTorchSourceCache
from skipstone.runtimes.rows import ROOT, RowTree

Layout = Literal["chain", "tree"]
_CONTEXT = 64


class MethodCalls:
    """Prepares calls on a program that nothing else uses meanwhile.

    Args:
        program: loaded.
        manifest: of its bundle.
    """

    def __init__(self, program: Program, manifest: ExecuTorchManifest) -> None:
        self._program, self._manifest = program, manifest
        self._entry, self._model = manifest.program, manifest.model
        self._random = np.random.default_rng(0)

    def prepare(self, method: str, width: int, layout: Layout = "chain") -> Callable[[], object]:
        """A call to make as often as wanted.

        Args:
            method: its name.
            width: rows, of a source for the methods of an encoder; fewer than the reference width are filled up, as
                while generating.
            layout: of a segment's rows, behind a context of up to 64 positions (and a source of as many tokens): each
                after the one before, or a binary tree beside another row, which takes a decoder's masked kernel.
        """
        program, kind = self._program, method.partition("_")[0]
        if kind == "segment":
            return self._segment(int(method.removeprefix("segment_")), width, layout)
        if kind == "compact":
            shift = min(1, self._entry.slots - width)
            return partial(program.compact, range(shift, shift + width), range(width))
        if kind in ("encoder", "cross"):
            return partial(program.call, method, width, self._hidden(width)[None])
        filled = max(width, self._entry.reference_width)
        if kind == "embed":
            tokens = self._random.integers(self._model.vocab_size, size=(1, filled))
            return partial(program.call, method, filled, tokens)
        return partial(program.call, method, filled, self._hidden(filled)[None])

    def _segment(self, index: int, width: int, layout: Layout) -> Callable[[], object]:
        aside = 1 if layout == "tree" else 0
        tree = RowTree()
        room = self._entry.slots - (self._entry.reference_width - 1)
        tree.base = max(0, min(_CONTEXT, room - width - aside))
        for number in range(aside + width):
            row = number - aside
            parent = row - 1 if layout == "chain" else aside + (row - 1) // 2
            tree.add(number, parent if row > 0 else ROOT)
        cache = open_cache(self._program, self._manifest, tree, room, lambda _program: None)
        if isinstance(cache, ExecuTorchSourceCache):
            cache.encode(self._source())
        rows, hidden = range(aside, aside + width), list(self._hidden(width))
        return partial(cache.run, index, rows, hidden, [False] * width)

    def _source(self) -> list[int]:
        """As many tokens as there are positions in the context."""
        encoder = self._model.encoder
        count = _CONTEXT if encoder is None else min(_CONTEXT, encoder.max_source_length)
        return [int(token) for token in self._random.integers(self._model.vocab_size, size=count)]

    def _hidden(self, width: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        return self._random.standard_normal((width, self._model.hidden_size), np.float32)
