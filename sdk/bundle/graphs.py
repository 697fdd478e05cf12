"""The records of ONNX graphs in a manifest."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from skipstone.bundle.qnn import QnnEntry
from skipstone.bundle.record import Record

# what the graphs take and compute: a decoder's, an encoder-decoder's
GRAPH_INTERFACE, SOURCE_GRAPH_INTERFACE = 1, 2


def past_names(layers: Iterable[int], stack: str = "") -> list[str]:
    """Names of the inputs with layers' K and V, in a graph's order and as Optimum has them: `past_key_values.3.key`, ….

    Args:
        layers: their numbers in the whole model.
        stack: of an encoder-decoder, `decoder` for the text's and `encoder` for the source's.
    """
    return _names("past_key_values", layers, stack)


def present_names(layers: Iterable[int], stack: str = "") -> list[str]:
    """Names of the outputs with layers' K and V, in a graph's order; see `past_names`."""
    return _names("present", layers, stack)


def _names(kind: str, layers: Iterable[int], stack: str) -> list[str]:
    middle = f".{stack}" if stack else ""
    return [f"{kind}.{layer}{middle}.{half}" for layer in layers for half in ("key", "value")]


class GraphEntry(Record):
    """One ONNX graph: a `part` of the model (`segment_0`, …, `head`, `draft_head`; of an encoder-decoder `encoder_0`, …,
    `cross` too) for batches of `width` rows, None: of any number. Its weights, `weight_bytes` of them, lie in the file
    itself or in `weights`, which several may share.
    """

    part: str
    width: Annotated[int, Field(gt=0)] | None = None
    file: str
    weights: str | None = None
    weight_bytes: Annotated[int, Field(ge=0)]


class TableEntry(Record):
    """A table of embeddings in a file of its own: `rows` x `columns` little-endian numbers, row after row."""

    file: str
    rows: Annotated[int, Field(gt=0)]
    columns: Annotated[int, Field(gt=0)]
    type: Literal["float32", "float16"]


class GraphsEntry(Record):
    """ONNX graphs for one target (docs/onnx.md says what each computes).

    Batches of 1 to `max_width` rows; where a target takes fixed shapes alone, `widths` are those that graphs were made
    for, ascending, and narrower batches are filled up; empty: one graph of a part takes all. `slots` positions of K/V,
    drafts included, which every layer keeps in `key_value_heads` heads of `head_size` channels. What a row may not see
    has `masked` added to its score. `draft_vocabulary` is a little-endian int32 file: the token id of every row of the
    draft head. `status` says whether the graphs ran where they were exported, and so went through the self-test, in an
    emulator of the target perhaps, or were only `compiled` there. `interface` numbers what the graphs mean: 1 for a
    decoder's, 2 for an encoder-decoder's. `qnn` describes the context binaries of Qualcomm's NPUs, which lie in the
    graphs' `weights`.
    """

    interface: Annotated[int, Field(gt=0)] = GRAPH_INTERFACE
    target: str
    status: Literal["runs", "emulated", "compiled"] = "runs"
    opset: Annotated[int, Field(gt=0)]
    slots: Annotated[int, Field(gt=0)]
    widths: tuple[int, ...] = ()
    max_width: Annotated[int, Field(gt=0)]
    masked: Annotated[float, Field(lt=0, allow_inf_nan=False)]
    key_value_heads: Annotated[int, Field(gt=0)]
    head_size: Annotated[int, Field(gt=0)]
    embedding: TableEntry
    draft_vocabulary: str | None = None
    graphs: tuple[GraphEntry, ...]
    qnn: QnnEntry | None = None

    @model_validator(mode="after")
    def _widths_fit(self) -> Self:
        rising = all(first < second for first, second in pairwise((0, *self.widths)))
        if not rising or (self.widths and self.widths[-1] != self.max_width) or self.max_width > self.slots:
            raise ValueError(
                f"widths {self.widths} that rise to max_width {self.max_width} ≤ slots {self.slots} were expected"
            )
        return self

    def of(self, part: str) -> tuple[GraphEntry, ...]:
        """A part's graphs, narrowest first."""
        return tuple(sorted((g for g in self.graphs if g.part == part), key=lambda graph: graph.width or 0))

    def weight_bytes(self, part: str) -> int:
        """Bytes of weights that a call of the part reads; 0 for one that is not there."""
        return max((graph.weight_bytes for graph in self.graphs if graph.part == part), default=0)
