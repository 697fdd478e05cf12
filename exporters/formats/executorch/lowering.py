"""Modules → one .pte: exported with dynamic widths, delegated to a target, state shared between the methods.

Lowering takes from seconds to minutes, so finished programs are kept in the user's cache folder under a hash of all
that went in; the oldest are dropped beyond a few gigabytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipstone.errors import ExportError, UsageError
from skipstone.exporters.formats.executorch.modules import Compaction
from skipstone.exporters.segments import Parts
from skipstone.runtimes.quiet import quiet_libraries
from skipstone.runtimes.user_cache import cache_folder

_EXAMPLE_WIDTH = 5
_CACHE_BYTES = 8 << 30


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
class Target:
    """A delegate: where a program runs, and how it was seen to.

    Attributes:
        name: what `--device` profiles name.
        status: `runs` or `compiled`.
        partitioners: makes the delegate's partitioners, given whether weights are quantised.
    """

    name: str
    status: str
    partitioners: Callable[[bool], list[Any]]


def _xnnpack(quantized: bool) -> list[Any]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )

    dynamic = [XnnpackDynamicallyQuantizedPartitioner()] if quantized else []
    return [*dynamic, XnnpackPartitioner()]


TARGETS = {target.name: target for target in (Target("xnnpack", "runs", _xnnpack),)}


def lower(
    parts: Parts, shape: Shape, target: str, quantized: bool, output: Path, step: Callable[[str], None]
) -> dict[str, float]:
    """Write the program.

    Args:
        parts: the cut and quantised model.
        shape: what the program can hold.
        target: one of `TARGETS`.
        quantized: whether weights are quantised.
        output: the .pte to write.
        step: told of the steps `trace`, `lower` and `save`.

    Returns:
        By method, the share of its nodes that the delegate runs.

    Raises:
        UsageError: an unknown target.
        ExportError: ExecuTorch cannot lower the model.
    """
    delegate = TARGETS.get(target)
    if delegate is None:
        raise UsageError(f"target {target}: expected one of {', '.join(TARGETS)}")
    try:
        with quiet_libraries():
            from executorch.exir import (
                EdgeCompileConfig,
                ExecutorchBackendConfig,
                to_edge_transform_and_lower,
            )
            from executorch.exir.passes import MemoryPlanningPass

            step("trace")
            traced = {
                name: _trace(module, inputs, widths)
                for name, module, inputs, widths in _methods(parts, shape)
            }
            step("lower")
            edge = to_edge_transform_and_lower(
                traced,
                partitioner=delegate.partitioners(quantized),
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            delegated = {name: _delegated(edge, name) for name in traced}
            step("save")
            program = edge.to_executorch(
                ExecutorchBackendConfig(
                    memory_planning_pass=MemoryPlanningPass(share_mutable_buffers=True),
                    emit_mutable_buffer_names=True,
                    do_quant_fusion_and_const_prop=quantized,
                )
            )
    except (RuntimeError, ValueError, NotImplementedError, KeyError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExportError(
            f"ExecuTorch cannot lower this model for {target}: {first}",
            hint="try --quantize none, or --format gguf",
        ) from error
    with output.open("wb") as stream:
        program.write_to_file(stream)
    return delegated


def _methods(
    parts: Parts, shape: Shape
) -> Iterator[tuple[str, nn.Module, tuple[Tensor, ...], tuple[Any, ...]]]:
    """Name, module, example inputs and dynamic axes of every method."""
    rows = torch.export.Dim("rows", min=1, max=shape.max_width)
    count = _EXAMPLE_WIDTH
    hidden = torch.zeros(1, count, shape.hidden_size)
    places = torch.arange(count)
    start, tree = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long)
    mask = torch.zeros(count, shape.slots)
    yield "embed", parts.embedding, (places[None],), ({1: rows},)
    for index, segment in enumerate(parts.segments):
        inputs = (hidden, places[None], places[None], start, mask, tree)
        yield f"segment_{index}", segment, inputs, ({1: rows}, {1: rows}, {1: rows}, None, {0: rows}, None)
    yield "head", parts.head, (hidden,), ({1: rows},)
    if parts.draft_head is not None:
        yield "draft_head", parts.draft_head, (hidden,), ({1: rows},)
    yield "compact", Compaction(parts.segments), (places, places[None]), ({0: rows}, {1: rows})


def _trace(module: nn.Module, inputs: tuple[Tensor, ...], widths: tuple[Any, ...]) -> Any:
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=widths, strict=False)


def _delegated(edge: Any, name: str) -> float:
    """Share of a method's nodes that the delegate runs."""
    from executorch.devtools.backend_debug import get_delegation_info

    info = get_delegation_info(edge.exported_program(name).graph_module)
    nodes = info.num_delegated_nodes + info.num_non_delegated_nodes
    return info.num_delegated_nodes / nodes if nodes else 0.0


def cache_key(**ingredients: object) -> str:
    """Hash of everything a program is made from, this package's own lowering included."""
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True, default=str).encode())
    for name in ("lowering.py", "modules.py", "schemes.py"):
        digest.update((Path(__file__).with_name(name)).read_bytes())
    digest.update((Path(__file__).parents[2] / "segments.py").read_bytes())
    return digest.hexdigest()


def fetch(key: str, output: Path) -> dict[str, float] | None:
    """A kept program, copied to `output`, and what `lower` returned for it; None where there is none."""
    stored = _folder() / f"{key}.pte"
    try:
        delegated: dict[str, float] = json.loads(stored.with_suffix(".json").read_text(encoding="utf-8"))
        shutil.copyfile(stored, output)
        os.utime(stored)
    except (OSError, ValueError):
        return None
    return delegated


def keep(key: str, program: Path, delegated: dict[str, float]) -> None:
    """Keep a program for the next export of the same; a disk that refuses is no error."""
    folder = _folder()
    stored = folder / f"{key}.pte"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        draft = stored.with_suffix(f".{os.getpid()}.part")
        shutil.copyfile(program, draft)
        draft.replace(stored)
        stored.with_suffix(".json").write_text(json.dumps(delegated), encoding="utf-8")
        _drop_oldest(folder)


def _drop_oldest(folder: Path) -> None:
    programs = sorted(folder.glob("*.pte"), key=lambda file: file.stat().st_mtime, reverse=True)
    total = 0
    for file in programs:
        total += file.stat().st_size
        if total > _CACHE_BYTES:
            file.unlink(missing_ok=True)
            file.with_suffix(".json").unlink(missing_ok=True)


def _folder() -> Path:
    return cache_folder() / "executorch"
