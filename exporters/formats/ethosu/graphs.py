"""Modules → graphs of integers: one for every part and width, all on the scales that one text drove the widest to.

Inputs and outputs are those of an ONNX bundle's graphs (`skipstone.exporters.formats.onnx.modules`), at one width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skipstone.errors import ExportError
from skipstone.exporters.formats.ethosu.schemes import Scheme
from skipstone.exporters.formats.ethosu.walk import Array, GraphWalk, chain_mask
from skipstone.exporters.formats.onnx.modules import GraphSegment
from skipstone.exporters.segments import HeadShape, Parts
from skipstone.runtimes.quiet import quiet_libraries


@dataclass(frozen=True)
class Shapes:
    """What graphs are made for.

    Attributes:
        hidden: channels.
        heads: of K and V of every layer, by segment.
        slots: positions of K/V.
    """

    hidden: int
    heads: tuple[tuple[HeadShape, ...], ...]
    slots: int


class _Flat(nn.Module):
    """A segment whose K and V are arguments, one after the other."""

    def __init__(self, segment: GraphSegment) -> None:
        super().__init__()
        self.segment = segment

    def forward(self, hidden: Tensor, positions: Tensor, mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.segment(hidden, positions, mask, past)
        return outputs


class _One(nn.Module):
    """A head, whose output is a tuple like a segment's."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return (self.head(hidden),)


class MultipliedNorm(nn.Module):
    """An RMS norm that multiplies a value by itself; a power would be a table of 513 values, coarse beside large ones.

    Args:
        norm: transformers' module.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, float(norm.variance_epsilon)

    def forward(self, hidden: Tensor) -> Tensor:
        variance = (hidden * hidden).mean(-1, keepdim=True)
        scaled: Tensor = self.weight * (hidden * torch.rsqrt(variance + self.epsilon))
        return scaled


def use_multiplied_norms(module: nn.Module) -> None:
    """Put a `MultipliedNorm` in the place of every RMS norm, in place."""
    for name, child in module.named_children():
        if hasattr(child, "variance_epsilon"):
            setattr(module, name, MultipliedNorm(child))
        else:
            use_multiplied_norms(child)


def shapes_of(parts: Parts, slots: int) -> Shapes:
    """The measures of a cut model."""
    heads = tuple(segment.shapes for segment in parts.segments if isinstance(segment, GraphSegment))
    return Shapes(next(parts.embedding.table.parameters()).shape[1], heads, slots)


def modules_of(parts: Parts) -> dict[str, nn.Module]:
    """By part, what takes tensors and gives a tuple of them."""
    found: dict[str, nn.Module] = {
        f"segment_{index}": _Flat(segment)
        for index, segment in enumerate(parts.segments)
        if isinstance(segment, GraphSegment)
    }
    found["head"] = _One(parts.head)
    if parts.draft_head is not None:
        found["draft_head"] = _One(parts.draft_head)
    return found


def examples(part: str, width: int, shapes: Shapes) -> tuple[Tensor, ...]:
    """Inputs of a part's graph, zeros."""
    hidden = torch.zeros(1, width, shapes.hidden)
    if not part.startswith("segment_"):
        return (hidden,)
    positions = torch.arange(width, dtype=torch.int32)[None]
    mask = torch.from_numpy(chain_mask(width, 0, width, shapes.slots))
    heads = shapes.heads[int(part.removeprefix("segment_"))]
    past = [torch.zeros(1, each.heads, shapes.slots, each.size) for each in heads for _ in range(2)]
    return hidden, positions, mask, *past


def quantized_graphs(
    parts: Parts,
    shapes: Shapes,
    scheme: Scheme,
    widths: Sequence[int],
    table: Array,
    tokens: Sequence[int],
    quantizer: Any,
) -> Iterator[tuple[str, int, nn.Module]]:
    """Part, width and graph that rounds, of every part and width.

    Args:
        parts: the model, cut for graphs.
        shapes: its measures.
        scheme: of quantisation.
        widths: numbers of rows.
        table: embeddings.
        tokens: of the calibration text; every context of `slots` of them begins anew.
        quantizer: ExecuTorch's for the NPU.

    Raises:
        ExportError: graphs of two widths have different values.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    quantizer.set_global(scheme.configuration())
    modules, widest = modules_of(parts), widths[-1]
    with quiet_libraries(), torch.no_grad():
        wide = {part: _prepared(part, module, widest, shapes, quantizer) for part, module in modules.items()}
        _observe(wide, shapes, table, widest, tokens)
        for part, module in modules.items():
            for width in widths[:-1]:
                narrow = _prepared(part, module, width, shapes, quantizer)
                _take_over(part, wide[part], narrow)
                yield part, width, convert_pt2e(narrow)
            yield part, widest, convert_pt2e(wide[part])


def _prepared(part: str, module: nn.Module, width: int, shapes: Shapes, quantizer: Any) -> nn.Module:
    """A graph with observers; weights are observed already, which calling it does."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    inputs = examples(part, width, shapes)
    graph = torch.export.export(module.eval(), inputs, strict=False).module(check_guards=False)
    prepared: nn.Module = prepare_pt2e(graph, quantizer)
    return prepared


def _observe(
    graphs: Mapping[str, nn.Module], shapes: Shapes, table: Array, width: int, tokens: Sequence[int]
) -> None:
    def call(part: str, inputs: Sequence[Array]) -> list[Any]:
        found = graphs[part](*(torch.from_numpy(np.ascontiguousarray(each)) for each in inputs))
        return [each.numpy() for each in found]

    walk = GraphWalk(call, shapes.heads, table, width, shapes.slots)
    draft = "draft_head" if "draft_head" in graphs else "head"  # each rounds well what it was shown
    for first in range(0, len(tokens), shapes.slots):
        walk.begin()
        context = tokens[first : first + shapes.slots]
        for start in range(0, len(context), width):
            walk.logits(context[start : start + width], draft=draft)


def _take_over(part: str, observed: nn.Module, narrow: nn.Module) -> None:
    """Give a graph the observers of a wider one, so that both round alike."""

    def observers(graph: nn.Module) -> dict[str, nn.Module]:
        named = graph.named_modules(remove_duplicate=False)  # one may watch several values
        return {name: each for name, each in named if name.startswith("activation_post_process")}

    wide = observers(observed)
    if wide.keys() != observers(narrow).keys():
        raise ExportError(
            f"{part}: its graphs of two widths do not have the same values",
            hint="give one of --widths at a time",
        )
    for name, each in wide.items():
        setattr(narrow, name, each)
