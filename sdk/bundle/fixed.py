"""What the records of formats share whose artefacts take fixed numbers of rows: a piece for every part and width."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Self

from pydantic import Field, model_validator

from skipstone.bundle.graphs import TableEntry
from skipstone.bundle.record import Record


class PieceEntry(Record):
    """A `part` of the model (`segment_0`, …, `head`, `draft_head`) for batches of `width` rows, which reads
    `weight_bytes` of weights a call.
    """

    part: str
    width: Annotated[int, Field(gt=0)]
    weight_bytes: Annotated[int, Field(ge=0)]


class FixedShapes(Record):
    """Batches of the numbers of rows in `widths`, ascending; narrower ones are filled up. `slots` positions of K/V,
    drafts included, which every layer keeps in `key_value_heads` heads of `head_size` channels. What a row may not see
    has `masked` added to its score. `draft_vocabulary` is a little-endian int32 file: the token id of every row of the
    draft head. `agreement` is the share of positions of a short text at which the best token is the checkpoint's, as the
    exporting machine computed the artefacts without their device.
    """

    slots: Annotated[int, Field(gt=0)]
    widths: Annotated[tuple[int, ...], Field(min_length=1)]
    masked: Annotated[float, Field(lt=0, allow_inf_nan=False)]
    key_value_heads: Annotated[int, Field(gt=0)]
    head_size: Annotated[int, Field(gt=0)]
    embedding: TableEntry
    draft_vocabulary: str | None = None
    agreement: Annotated[float, Field(ge=0, le=1)]

    @model_validator(mode="after")
    def _widths_fit(self) -> Self:
        if any(first >= second for first, second in pairwise((0, *self.widths, self.slots + 1))):
            raise ValueError(f"widths {self.widths} that rise to at most {self.slots} slots were expected")
        return self

    @property
    def max_width(self) -> int:
        """Rows of the widest batch."""
        return self.widths[-1]

    def check_pieces(self, exits: Sequence[int], pieces: Sequence[PieceEntry]) -> None:
        """Whether there is a piece for every part that the exits make, at every width.

        Raises:
            ValueError: naming what was expected and what was found.
        """
        parts = part_names(len(exits), self.draft_vocabulary is not None)
        expected = sorted(f"{part} {width}" for part in parts for width in self.widths)
        found = sorted(f"{piece.part} {piece.width}" for piece in pieces)
        if found != expected:
            raise ValueError(f"exits {tuple(exits)} need {', '.join(expected)}; found {', '.join(found)}")


def part_names(num_exits: int, drafts: bool) -> tuple[str, ...]:
    """Names of the parts of a decoder that is cut at so many inner exits; `drafts`: the draft head is one."""
    segments = tuple(f"segment_{index}" for index in range(num_exits + 1))
    return (*segments, "head", *(("draft_head",) if drafts else ()))
