"""Checkpoints whose layers are ternary already, as `skipstone tune` trains them: llama.cpp's blocks hold them exactly.

A block of tq2_0 or tq1_0 has 256 weights of a row, each -1, 0 or 1 times the block's scale, a float16. llama.cpp takes
the largest magnitude for the scale; that is right for ternary weights, and ruins any others.
"""

from __future__ import annotations

from skipstone.errors import UsageError
from skipstone.exporters.checkpoint import Checkpoint
from skipstone.exporters.formats.gguf.layout import Layout

_BLOCK = 256


def check_ternary(checkpoint: Checkpoint, layout: Layout, scheme: str) -> None:
    """Refuse a checkpoint that such blocks would not hold.

    Args:
        checkpoint: the input.
        layout: it as a GGUF.
        scheme: the name of the one asked for.

    Raises:
        UsageError: naming the first matrix of a layer that is not ternary, or has rows of no whole blocks.
    """
    for name, source in layout.sources.items():
        if "blk." not in name or len(layout.shapes[name]) != 2 or "attn_rel_b" in name:
            continue
        columns = layout.shapes[name][-1]
        if columns % _BLOCK:
            raise UsageError(
                f"--quantize {scheme}: {source.name} has rows of {columns} weights, expected a multiple of {_BLOCK}",
                hint="use q8_0",
            )
        weight = checkpoint.tensor(source.name).float().abs().reshape(-1, _BLOCK)
        largest = weight.amax(1, keepdim=True)
        if not bool(((weight == 0) | (weight == largest)).all()):
            raise UsageError(
                f"--quantize {scheme}: {source.name} is not ternary: its weights are not -1, 0 and 1 times a scale",
                hint="train it to be with a recipe's [ternary] (docs/tune.md), or use another scheme",
            )
