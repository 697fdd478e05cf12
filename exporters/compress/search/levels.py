"""What a search chooses from, on disk, so that any process, or machine of a cluster, can put a candidate together.

| file | holds |
|---|---|
| `bench.json` | `Bench`: the units and their levels |
| `model/` | the model that the search began with |
| `U-L.safetensors` | the weights of unit U at level L, as the paper's level database |
| `texts.safetensors` | the samples |
| `reference-S.npy` | the dense model's log-probabilities on sample S, [n, vocab_size] |
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from skipstone.bundle.record import Record
from skipstone.exporters.checkpoint import quiet_loading
from skipstone.exporters.compress.search.evolution import Candidate, Space
from skipstone.exporters.compress.work import Windows

BENCH_FILE, MODEL_FOLDER, TEXTS_FILE = "bench.json", "model", "texts.safetensors"


class Level(Record):
    """One version of a unit.

    Attributes:
        label: what the step that carries it out calls it, say `0.5`.
        cost: in what the budget counts.
        dropped: the unit is left out; no weights are kept for it.
    """

    label: str
    cost: float
    dropped: bool = False


class Unit(Record):
    """A part of the model with levels of its own.

    Attributes:
        name: of a block, as `skipstone.exporters.compress.activations.walk` names it, or of a weight.
        levels: rising in cost.
    """

    name: str
    levels: tuple[Level, ...]


class Bench(Record):
    """Everything there is to choose from.

    Attributes:
        units: in the model's order.
        samples: windows to judge by.
        fixed: what all that is no unit costs.
        before: what the whole model costs as the search finds it.
    """

    units: tuple[Unit, ...]
    samples: int
    fixed: float
    before: float

    @property
    def space(self) -> Space:
        """The same as costs alone."""
        return Space(tuple(tuple(level.cost for level in unit.levels) for unit in self.units))

    def chosen(self, candidate: Candidate) -> dict[str, Level]:
        """By unit, the level of a candidate."""
        return {unit.name: unit.levels[level] for unit, level in zip(self.units, candidate, strict=True)}


def level_file(folder: Path, unit: str, label: str) -> Path:
    """Where a unit's weights at a level lie."""
    return folder / f"{unit}-{label}.safetensors"


def keep_level(folder: Path, unit: str, label: str, weights: Mapping[str, Tensor]) -> None:
    """Keep a unit's weights at a level, by their names in the whole model."""
    save_file(
        {name: weight.detach().float().contiguous() for name, weight in weights.items()},
        level_file(folder, unit, label),
    )


@torch.no_grad()
def keep_bench(folder: Path, bench: Bench, model: Any, dense: Any, text: Windows) -> None:
    """Keep what candidates are made of and judged by, beside the levels.

    Args:
        folder: which has the levels already.
        bench: what to choose from.
        model: that the levels belong to.
        dense: whose predictions candidates are held against.
        text: the samples, a window each.
    """
    with quiet_loading():
        model.save_pretrained(folder / MODEL_FOLDER)
    texts = {f"window-{index}": window for index, window in enumerate(text.windows)}
    texts |= {f"source-{index}": source for index, source in enumerate(text.sources or ())}
    save_file(texts, folder / TEXTS_FILE)
    for index, inputs in enumerate(text.inputs()):
        logits = dense(**inputs).logits[0]
        np.save(folder / f"reference-{index}.npy", torch.log_softmax(logits.float(), -1).numpy())
    (folder / BENCH_FILE).write_text(bench.model_dump_json(), encoding="utf-8")
