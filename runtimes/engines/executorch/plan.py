"""What a program will need in memory, read from its header: nothing is loaded.

A .pte begins with a flatbuffer that says for every method how large its arenas are and which tensors lie in them;
weights and constants follow in segments (executorch/exir/_serialize/program.fbs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipstone.runtimes.engines.executorch.program import check_header
from skipstone.runtimes.quiet import quiet_libraries


@dataclass(frozen=True)
class MethodPlan:
    """One method.

    Attributes:
        name: of the method.
        key_value_bytes: of the K/V it reads and writes.
        activation_bytes: of everything else in its arenas, for its widest batch.
    """

    name: str
    key_value_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class ProgramPlan:
    """A program; bytes throughout.

    Attributes:
        methods: in the file's order.
        key_value_bytes: the arena of K/V, one for all methods.
        activation_bytes: the arena of activations, one for all methods, as large as the largest of them asks for.
        packed_bytes: weights in the file that a delegate packs into a form of its own when a method is loaded.
        constant_bytes: other constants, embedding tables above all, used where they lie in the file.
    """

    methods: tuple[MethodPlan, ...]
    key_value_bytes: int
    activation_bytes: int
    packed_bytes: int
    constant_bytes: int


def read_plan(path: Path) -> ProgramPlan:
    """A program's plan.

    Raises:
        BundleError: not a whole program.
    """
    length = check_header(path)
    with quiet_libraries():
        from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
    with path.open("rb") as stream:
        program: Any = _flatbuffer_to_program(stream.read(length))
    named = {plan.name: list(_named_buffers(plan)) for plan in program.execution_plan}
    shared = {arena for buffers in named.values() for arena, _ in buffers}
    methods, key_values = [], 0
    for plan in program.execution_plan:
        sizes = dict(enumerate(plan.non_const_buffer_sizes))
        key_values = max(key_values, sum(sizes[arena] for arena in shared))
        activations = sum(size for arena, size in sizes.items() if arena not in shared)
        methods.append(MethodPlan(plan.name, sum(size for _, size in named[plan.name]), activations))
    weights = {entry.segment_index for entry in program.named_data or ()}
    constants = program.constant_segment.segment_index if program.constant_segment.offsets else None
    return ProgramPlan(
        methods=tuple(methods),
        key_value_bytes=key_values,
        activation_bytes=max(method.activation_bytes for method in methods),
        packed_bytes=sum(program.segments[index].size for index in weights),
        constant_bytes=0 if constants is None else program.segments[constants].size,
    )


def _named_buffers(plan: Any) -> list[tuple[int, int]]:
    """Arena and bytes of every buffer that has a name and a place: the state that methods share."""
    from executorch.exir.tensor import get_scalar_type

    found = []
    for value in plan.values:
        tensor = value.val
        extra, place = getattr(tensor, "extra_tensor_info", None), getattr(tensor, "allocation_info", None)
        if extra is not None and extra.fully_qualified_name and place is not None:
            item = get_scalar_type(tensor.scalar_type).itemsize
            found.append((place.memory_id, item * math.prod(tensor.sizes)))
    return found
