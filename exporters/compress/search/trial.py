"""Judging one candidate: its weights put into the model, and how far its predictions are from the dense model's.

`divergence` is a function of files and numbers alone, so that it gives the same wherever it runs; what it has opened
stays open for the next candidate in the same process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from skipstone.exporters.checkpoint import load_eager
from skipstone.exporters.compress.activations import stacks_of
from skipstone.exporters.compress.layers import without
from skipstone.exporters.compress.search.evolution import Candidate
from skipstone.exporters.compress.search.levels import (
    BENCH_FILE,
    MODEL_FOLDER,
    TEXTS_FILE,
    Bench,
    level_file,
)
from skipstone.exporters.compress.work import Windows
from skipstone.runtimes.quiet import quiet_libraries


def divergence(folder: str, candidate: Candidate, samples: Sequence[int]) -> float:
    """Mean KL divergence per token of a candidate's predictions from the dense model's, in nats.

    One thread computes it, whatever the process has: sums over several differ in their last bits by how many they are.

    Args:
        folder: from `skipstone.exporters.compress.search.levels.keep_bench`.
        candidate: a level for each unit.
        samples: numbers of the windows to judge by.

    Returns:
        Infinity where no layer of a stack is left.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _opened(folder).divergence(candidate, samples)
    finally:
        torch.set_num_threads(threads)


def warm_up() -> None:
    """Nothing but what it takes to call `divergence` in a new process: imports, which take seconds."""


def close() -> None:
    """Forget what `divergence` opened in this process."""
    _opened.cache_clear()


@lru_cache(maxsize=1)
def _opened(folder: str) -> _Trial:
    return _Trial(Path(folder))


class _Trial:
    """A model whose units can be set to any level."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bench = Bench.model_validate_json((folder / BENCH_FILE).read_bytes())
        with (
            quiet_libraries()
        ):  # in a new process transformers loads what quantisers it finds, and those write
            self._model = load_eager(folder / MODEL_FOLDER)
        texts = load_file(folder / TEXTS_FILE)
        sources = tuple(
            texts[f"source-{index}"] for index in range(self._bench.samples) if "source-0" in texts
        )
        windows = tuple(texts[f"window-{index}"] for index in range(self._bench.samples))
        self._inputs = tuple(Windows(windows, sources or None, "").inputs())
        self._set: dict[str, str] = {}  # by unit, the label of the weights it has now

    @torch.no_grad()
    def divergence(self, candidate: Candidate, samples: Sequence[int]) -> float:
        total, tokens = 0.0, 0
        with self._as(candidate) as whole:
            if not whole:
                return math.inf
            for sample in samples:
                kept = np.load(self._folder / f"reference-{sample}.npy", mmap_mode="c")
                expected = torch.from_numpy(kept)
                found = torch.log_softmax(self._model(**self._inputs[sample]).logits[0].float(), -1)
                total += float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
                tokens += len(expected)
        return total / tokens

    @contextmanager
    def _as(self, candidate: Candidate) -> Iterator[bool]:
        """The model as the candidate has it; false where a stack has no layer left."""
        dropped = set()
        for name, level in self._bench.chosen(candidate).items():
            if level.dropped:
                dropped.add(name)
            elif self._set.get(name) != level.label:
                self._load(name, level.label)
        with ExitStack() as stacks:
            whole = True
            for stack in stacks_of(self._model):
                gone = [index for index in range(len(stack.blocks)) if f"{stack.name}.{index}" in dropped]
                if len(gone) == len(stack.blocks):
                    whole = False
                elif gone:
                    stacks.enter_context(without(stack, gone))
            yield whole

    def _load(self, name: str, label: str) -> None:
        file = level_file(self._folder, name, label)
        weights: dict[str, Any] = load_file(file) if file.is_file() else {}
        for key, weight in weights.items():
            self._model.get_parameter(key).copy_(weight)
        self._set[name] = label
