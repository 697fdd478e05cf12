"""What the methods of a .pte compute: segments over a static K/V buffer, and moving accepted rows into place.

A row's K and V lie in a slot of the buffer; positions say where it stands in the text. The committed context fills the
slots from 0 on in order, uncommitted rows lie behind it in any order, and `compact` moves the accepted ones to their
places afterwards: no row is computed again.

Inputs of a segment's method (n rows, 1 ≤ n ≤ max_width; S slots; m of them in sight, 1 ≤ m ≤ S):

    hidden     float32 [1, n, hidden_size]
    positions  int64 [1, n]        places in the text, for the rotary embedding
    slots      int64 [1, n]        where the rows' K and V go
    start      int64 [1]           slots before the first row, where the rows continue the context as a chain; else 0
    mask       float32 [n, m]      0 where a row may look, -inf elsewhere; slots from m on are out of sight, and cost
                                   nothing; not read for a chain
    tree       int64 [1]           0: a chain in the slots start, start + 1, …, which takes the faster kernel; else 1
                                   (not a bool: ExecuTorch's library for Android cannot make one)
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from skipstone.exporters.segments import HeadShape, KeyValues, Segment
from skipstone.runtimes.quiet import quiet_libraries

with (
    quiet_libraries()
):  # importing them registers operators, torch.ops.llama and the quantised embedding among them
    importlib.import_module("executorch.extension.llm.custom_ops.custom_ops")
    importlib.import_module("executorch.kernels.quantized")


@dataclass(frozen=True)
class RowPlaces:
    """Where a batch's rows stand; see the module. Here `tree` is a bool, compared once for all layers."""

    slots: Tensor
    start: Tensor
    mask: Tensor
    tree: Tensor


class StaticKeyValues(KeyValues):
    """K and V in buffers [1, slots, heads, size], written in place."""

    def __init__(self, shape: HeadShape, num_slots: int) -> None:
        super().__init__()
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, num_slots, shape.heads, shape.size))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, rows: RowPlaces) -> Tensor:
        keys, values = cast("Tensor", self.keys), cast("Tensor", self.values)
        dtype = query.dtype
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if dtype != keys.dtype:
            query, key, value = (x.to(keys.dtype) for x in (query, key, value))
        torch.ops.llama.update_cache_with_indices(key, keys, 0, rows.slots)
        torch.ops.llama.update_cache_with_indices(value, values, 0, rows.slots)

        def as_tree(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, _start: Tensor) -> Tensor:
            seen = mask.shape[1]
            return _sdpa(query, keys.narrow(1, 0, seen), values.narrow(1, 0, seen), 0, mask, False, scaling)

        def as_chain(query: Tensor, keys: Tensor, values: Tensor, _mask: Tensor, start: Tensor) -> Tensor:
            first = cast("int", start[0].item())
            torch._check_is_size(first)  # type: ignore[no-untyped-call]
            return _sdpa(query, keys, values, first, None, True, scaling)

        operands = (query, keys, values, rows.mask, rows.start)
        out = cast("Tensor", torch.cond(rows.tree, as_tree, as_chain, operands))
        return out if dtype == keys.dtype else out.to(dtype)


def _sdpa(
    query: Tensor, keys: Tensor, values: Tensor, start: int, mask: Tensor | None, causal: bool, scaling: float
) -> Tensor:
    out = torch.ops.llama.custom_sdpa(query, keys, values, start, mask, 0.0, causal, scaling)
    return cast("Tensor", out)


class RowSegment(Segment):
    """A segment whose rows have slots."""

    def forward(
        self, hidden: Tensor, positions: Tensor, slots: Tensor, start: Tensor, mask: Tensor, tree: Tensor
    ) -> Tensor:
        return self.run(hidden, positions, RowPlaces(slots, start, mask, tree != 0))


class Compaction(nn.Module):
    """Moves rows' K and V in every layer: from slots `sources` [n] to slots `targets` [1, n], all read before written.

    Args:
        segments: whose layers it moves.
    """

    def __init__(self, segments: tuple[Segment, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {name: layer for segment in segments for name, layer in segment.layers.items()}
        )

    def forward(self, sources: Tensor, targets: Tensor) -> Tensor:
        for layer in self.layers.values():
            attention = cast("nn.Module", layer.self_attn)
            key_values = cast("StaticKeyValues", attention.key_values)
            for buffer in (key_values.keys, key_values.values):
                moved = cast("Tensor", buffer).index_select(1, sources)
                torch.ops.llama.update_cache_with_indices(moved, buffer, 0, targets)
        return sources
