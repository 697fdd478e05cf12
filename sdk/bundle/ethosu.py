"""What a manifest says of programs for an Ethos-U."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from skipstone.bundle.fixed import FixedShapes, PieceEntry

NPU_INTERFACE = 1  # what the programs take and compute


class NpuProgramEntry(PieceEntry):
    """A program, its `file`, which the NPU runs in about `cycles`, as its compiler estimates, in `operators` of its own,
    with `working_bytes` of SRAM for what a call makes.
    """

    file: str
    cycles: Annotated[int, Field(gt=0)]
    operators: Annotated[int, Field(gt=0)]
    working_bytes: Annotated[int, Field(ge=0)]


class NpuEntry(FixedShapes):
    """Programs for the NPU `target` (docs/ethos.md says what they compute), compiled by `compiler` for a `system` and
    `memory` that it knows by these names, at `clock` cycles a second. `status` says that their time was `estimated`;
    none was run. `interface` numbers what the programs mean.
    """

    interface: Annotated[int, Field(gt=0)] = NPU_INTERFACE
    target: str
    status: Literal["estimated"] = "estimated"
    compiler: str
    system: str
    memory: str
    clock: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    programs: tuple[NpuProgramEntry, ...]

    def seconds(self, part: str, width: int) -> float:
        """A call's estimated time.

        Raises:
            KeyError: there is no such program.
        """
        cycles = {(each.part, each.width): each.cycles for each in self.programs}
        return cycles[part, width] / self.clock
