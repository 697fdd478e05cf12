"""What layers cost: bytes, and their share of the time that a token takes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from skipstone.devices.curves import MeasuredCurve, read_curve
from skipstone.errors import UsageError
from skipstone.exporters.compress.activations import stacks_of
from skipstone.exporters.compress.folder import measure_size
from skipstone.exporters.compress.work import Work


def block_bytes(model: Any, work: Work) -> tuple[dict[str, float], float]:
    """By layer, the bytes of its weights in the type that they are stored in, and those of all the rest."""
    size = measure_size(model, work)
    width = size.num_bytes / size.parameters
    found = {name: width * _weights(block) for name, block in _blocks(model)}
    return found, size.num_bytes - sum(found.values())


def block_times(model: Any, curve: Path | None) -> tuple[dict[str, float], float]:
    """By layer of the decoder, the time that one token spends in it, and in the LM head.

    Without a curve the unit is a weight read: decoding token by token takes as long as reading the weights. With one it
    is a second, of one row at a time, each segment's spread evenly over its layers; the last segment's, over its layers
    and the head, by weights.

    Args:
        model: a decoder or a T5.
        curve: a cost curve file, of a bundle of this model.

    Raises:
        UsageError: a curve that cannot be read, or of a model with another number of layers.
    """
    stack = stacks_of(model)[-1]
    weights = [float(_weights(block)) for block in stack.blocks]
    head = float(model.lm_head.weight.numel())
    if curve is not None:
        weights, head = _seconds(read_curve(curve, "search: curve"), weights, head, curve)
    return {f"{stack.name}.{index}": time for index, time in enumerate(weights)}, head


def _seconds(
    measured: MeasuredCurve, weights: list[float], head: float, curve: Path
) -> tuple[list[float], float]:
    """Seconds by layer, and of the head, from a curve."""
    if measured.exits[-1] != len(weights):
        raise UsageError(
            f"search: curve {curve}: measured for {measured.exits[-1]} layers, the model has {len(weights)}",
            hint="measure an export of the model that the search begins with",
        )
    seconds: list[float] = []
    for (first, last), row in zip(pairwise((0, *measured.exits)), measured.curve.segments, strict=True):
        share = sum(weights[first:last])
        whole = share + (head if last == len(weights) else 0.0)
        seconds += [row[0] * weight / whole for weight in weights[first:last]]
    return seconds, measured.curve.segments[-1][0] * head / whole


def _blocks(model: Any) -> list[tuple[str, nn.Module]]:
    return [
        (f"{stack.name}.{index}", block)
        for stack in stacks_of(model)
        for index, block in enumerate(stack.blocks)
    ]


def _weights(block: nn.Module) -> int:
    return sum(weight.numel() for weight in block.parameters())
