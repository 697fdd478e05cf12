"""What a manifest says of context binaries for Qualcomm's NPUs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from skipstone.bundle.record import Record


class SharedEntry(Record):
    """A part's graph for batches of `width` rows, over a `binary` that its other widths share with their weights."""

    part: str
    width: Annotated[int, Field(gt=0)]
    file: str
    binary: str


class QnnEntry(Record):
    """Context binaries: the SoC and the Hexagon architecture (75 is v75) that they state, and the compiler's release.

    A part has a binary of its own for every width, each with all weights: the emulator runs these, the self-test ran
    them, and a device takes them too. `shared`, where the user asked for it, holds the same graphs once more for apps on
    the device, one binary for all widths of a part: the emulator cannot load those, and they were not run.
    """

    soc: str
    soc_id: Annotated[int, Field(gt=0)]
    arch: Annotated[int, Field(gt=0)]
    compiler: str
    shared: tuple[SharedEntry, ...] = ()
