"""A checkpoint laid out as one GGUF: keys, and for every tensor its shape and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from skipstone.exporters.formats.gguf.parts import MetaValue, TensorPart


@dataclass(frozen=True)
class Source:
    """Where a GGUF tensor comes from.

    Attributes:
        name: the checkpoint's tensor.
        interleave_heads: heads to interleave its rows by; 0: none.
        scale: factor of all values.
    """

    name: str
    interleave_heads: int = 0
    scale: float = 1.0


@dataclass(frozen=True)
class Layout:
    """What a whole GGUF holds, but for its names and its tokenizer.

    Attributes:
        arch: llama.cpp's architecture name.
        keys: the architecture's keys, prefixed.
        sources: GGUF tensor name → its source, in file order.
        shapes: logical shapes by GGUF name, rows first.
        made: tensors that no checkpoint holds.
        ignored: the checkpoint's tensors that are left out on purpose.
    """

    arch: str
    keys: dict[str, MetaValue]
    sources: dict[str, Source]
    shapes: dict[str, tuple[int, ...]]
    made: tuple[TensorPart, ...] = ()
    ignored: frozenset[str] = frozenset()
