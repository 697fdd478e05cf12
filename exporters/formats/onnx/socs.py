"""Qualcomm's SoCs, as the compiler knows them."""

from __future__ import annotations

from dataclasses import dataclass

TARGET = "qnn"


@dataclass(frozen=True)
class Soc:
    """A SoC as Qualcomm's compiler knows it.

    Attributes:
        name: its own.
        id: the compiler's number for it.
        arch: number of its Hexagon architecture.
    """

    name: str
    id: int
    arch: int

    @property
    def target(self) -> str:
        """What device profiles call it."""
        return f"{TARGET}-{self.name.lower()}"


# Each was compiled for, and is named so in the binaries that came out.
SOCS = {
    soc.target: soc
    for soc in (
        Soc("SM8550", 43, 73),
        Soc("SM8650", 57, 75),
        Soc("SM8750", 69, 79),
        Soc("SM8850", 87, 81),
        Soc("QCS8550", 66, 73),
        Soc("QCS9100", 77, 73),
    )
}
