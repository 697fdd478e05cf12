"""Targets: the delegates that a program can be lowered to.

What a delegate does not take stays on the CPU: attention and the K/V buffers always do, for their operators are
ExecuTorch's own. A new target is one function that makes its partitioners, one line in `TARGETS`, and its delegate's
name in `skipstone.runtimes.engines.executorch.backends`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from skipstone.errors import UsageError
from skipstone.exporters.formats.executorch.schemes import SCHEMES, Mix


@dataclass(frozen=True)
class Target:
    """A delegate.

    Attributes:
        name: what device profiles call it.
        schemes: names of the quantisation schemes it computes with.
        partitioners: makes the delegate's partitioners, given how the model was quantised.
        passes: makes what is done to the graphs before they are partitioned.
    """

    name: str
    schemes: tuple[str, ...]
    partitioners: Callable[[Mix], list[Any]]
    passes: Callable[[], list[Any]] = list


def target_of(name: str, mix: Mix) -> Target:
    """The target of that name.

    Raises:
        UsageError: no such target, or one that cannot compute with what the model was quantised to; lists what can.
    """
    target = TARGETS.get(name)
    if target is None:
        raise UsageError(f"target {name}: expected one of {', '.join(TARGETS)}")
    refused = sorted({scheme.name for scheme in mix.schemes} - set(target.schemes))
    if refused:
        raise UsageError(
            f"--quantize {', '.join(refused)}: the target {name} takes {', '.join(target.schemes)}",
            hint="choose one of these, or another --device",
        )
    return target


def _xnnpack(_mix: Mix) -> list[Any]:
    """One partitioner for all: the one for dynamic rounding would make every matrix a delegate of its own."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return [XnnpackPartitioner()]


def _vulkan(_mix: Mix) -> list[Any]:
    from skipstone.exporters.formats.executorch.vulkan import make_partitioner

    return [make_partitioner()]


def _coreml(mix: Mix) -> list[Any]:
    from skipstone.exporters.formats.executorch.coreml import make_partitioner

    return [make_partitioner(half=SCHEMES["none"] not in mix.schemes)]


def _coreml_passes() -> list[Any]:
    from skipstone.exporters.formats.executorch.coreml import infer_rows

    return [infer_rows]


TARGETS = {
    target.name: target
    for target in (
        Target("xnnpack", ("none", "fp16", "8da4w", "8da8w", "int8"), _xnnpack),
        Target("vulkan", ("none", "fp16", "8da4w", "8da8w", "4w", "8w"), _vulkan),
        Target("coreml", ("none", "fp16", "4w", "8w"), _coreml, _coreml_passes),
    )
}
