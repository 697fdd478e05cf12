"""A model with some of its layers: for good, or for a moment."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from skipstone.exporters.compress.activations import Stack
from skipstone.exporters.compress.work import Work
from skipstone.exporters.encoder_decoder_modules import self_attention

_BY_LAYER = ("layer_types", "no_rope_layers")  # configuration keys with one entry per layer
_BIAS = "relative_attention_bias"


def side_of(stack: Stack) -> str:
    """`encoder` or `decoder`."""
    return "encoder" if stack.name.startswith("encoder") else "decoder"


def keep_layers(model: Any, stack: Stack, kept: Sequence[int], work: Work) -> None:
    """Take all other layers out of a stack, renumber those that stay, and what counts by layers with them.

    Args:
        model: changed in place, its configuration included.
        stack: one of its stacks.
        kept: ascending numbers of layers.
        work: whose exits, kept layers and codes are renumbered.
    """
    every, side = list(stack.blocks), side_of(stack)
    _put(stack, [every[index] for index in kept], every[0])
    for number, index in enumerate(kept):
        part: Any
        for part in every[index].modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = number
    _adapt_config(model, stack, kept)
    before = work.kept.get(side, tuple(range(len(every))))
    work.kept[side] = tuple(before[index] for index in kept)
    if side == "encoder":
        work.encoder_exits = renumbered(work.encoder_exits, kept)
    else:
        work.exits = renumbered(work.exits, kept)
    work.codes = _renamed(work.codes, stack.name, kept)


def renumbered(exits: Sequence[int] | None, kept: Sequence[int]) -> tuple[int, ...] | None:
    """Exits after as many layers as stay of those before them; an exit before or behind all that stay is none.

    >>> renumbered((2, 4, 8), kept=(0, 2, 3, 8, 9))
    (1, 3)
    """
    if exits is None:
        return None
    moved = {sum(index < exit_layer for index in kept) for exit_layer in exits}
    return tuple(sorted(moved - {0, len(kept)}))


@contextmanager
def without(stack: Stack, dropped: Sequence[int]) -> Iterator[None]:
    """The stack without these layers, as it was again afterwards."""
    every = stack.blocks
    _put(stack, [block for index, block in enumerate(every) if index not in dropped], every[0])
    try:
        yield
    finally:
        _take_back(stack, every)


def _put(stack: Stack, blocks: list[nn.Module], first: nn.Module) -> None:
    """Give a stack these blocks. T5 keeps the biases of relative positions in its first block, for all: they move."""
    if stack.name.endswith(".block") and blocks[0] is not first:
        _move_bias(first, blocks[0])
    setattr(stack.module, stack.name.rsplit(".", 1)[-1], nn.ModuleList(blocks))


def _take_back(stack: Stack, every: nn.ModuleList) -> None:
    if stack.name.endswith(".block") and stack.blocks[0] is not every[0]:
        _move_bias(stack.blocks[0], every[0])
    setattr(stack.module, stack.name.rsplit(".", 1)[-1], every)


def _move_bias(giver: nn.Module, taker: nn.Module) -> None:
    giving: Any = self_attention(giver)
    taking: Any = self_attention(taker)
    taking.relative_attention_bias = giving.relative_attention_bias
    taking.has_relative_attention_bias = True
    delattr(giving, _BIAS)
    giving.has_relative_attention_bias = False


def _adapt_config(model: Any, stack: Stack, kept: Sequence[int]) -> None:
    config = model.config
    if not config.is_encoder_decoder:
        config.num_hidden_layers = len(kept)
        for key in _BY_LAYER:
            values = getattr(config, key, None)
            if values is not None:
                setattr(config, key, [values[index] for index in kept])
        return
    key = "num_layers" if side_of(stack) == "encoder" else "num_decoder_layers"
    setattr(config, key, len(kept))
    stack.module.config.num_layers = len(kept)


def _renamed(codes: dict[str, Any], name: str, kept: Sequence[int]) -> dict[str, Any]:
    """Codes under the names that weights have now, without those of layers that went."""
    numbers = {index: number for number, index in enumerate(kept)}
    pattern = re.compile(re.escape(name) + r"\.(\d+)\.(.*)")
    found: dict[str, Any] = {}
    for key, value in codes.items():
        match = pattern.fullmatch(key)
        if match is None:
            found[key] = value
        elif int(match[1]) in numbers:
            found[f"{name}.{numbers[int(match[1])]}.{match[2]}"] = value
    return found
