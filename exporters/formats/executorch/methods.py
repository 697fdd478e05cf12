"""The methods of a program: module, example inputs and dynamic widths of each (`modules` says what they compute)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skipstone.exporters.formats.executorch.modules import Compaction
from skipstone.exporters.segments import Parts

_EXAMPLE_WIDTH = 5


@dataclass(frozen=True)
class Shape:
    """What a program can hold.

    Attributes:
        hidden_size: channels of a row.
        slots: positions of K/V.
        max_width: most rows of a batch.
    """

    hidden_size: int
    slots: int
    max_width: int


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: in the program.
        module: what is traced.
        inputs: examples.
        widths: by input, the axes that may differ, as torch.export takes them.
    """

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    widths: tuple[Any, ...]

    def trace(self) -> Any:
        """What torch.export makes of it."""
        with torch.no_grad():
            return torch.export.export(self.module, self.inputs, dynamic_shapes=self.widths, strict=False)


def methods_of(parts: Parts, shape: Shape) -> Iterator[Method]:
    """All methods of a cut model."""
    rows = torch.export.Dim("rows", min=1, max=shape.max_width)
    count = _EXAMPLE_WIDTH
    hidden = torch.zeros(1, count, shape.hidden_size)
    places = torch.arange(count)
    start, tree = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long)
    seen = torch.export.Dim("seen", min=1, max=shape.slots)
    mask = torch.zeros(count, count + 2)
    yield Method("embed", parts.embedding, (places[None],), ({1: rows},))
    for index, segment in enumerate(parts.segments):
        inputs = (hidden, places[None], places[None], start, mask, tree)
        widths = ({1: rows}, {1: rows}, {1: rows}, None, {0: rows, 1: seen}, None)
        yield Method(f"segment_{index}", segment, inputs, widths)
    yield Method("head", parts.head, (hidden,), ({1: rows},))
    if parts.draft_head is not None:
        yield Method("draft_head", parts.draft_head, (hidden,), ({1: rows},))
    yield Method("compact", Compaction(parts.segments), (places, places[None]), ({0: rows}, {1: rows}))
