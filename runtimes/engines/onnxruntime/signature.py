"""What graphs take and give by the manifest; docs/onnx.md says what they compute."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from skipstone.bundle import OnnxManifest, past_names, present_names
from skipstone.runtimes.engines.onnxruntime.graph import ANY, Array, Signature

_OF_SOURCES = ("encoder_", "cross")


def signature(manifest: OnnxManifest, part: str, width: int | None, draft_rows: int) -> Signature:
    """What a part's graph takes and gives.

    Args:
        manifest: of the bundle.
        part: its name.
        width: rows; None: any number.
        draft_rows: tokens in the draft vocabulary.
    """
    model, rows = manifest.model, ANY if width is None else width
    hidden = Array("float32", (1, rows, model.hidden_size))
    if part.startswith("segment_"):
        return _segment(manifest, layers_of(manifest, int(part.removeprefix("segment_"))), width)
    if part.startswith("encoder_"):
        return Signature({"hidden": hidden}, {"hidden_out": hidden})
    if part == "cross":
        names = present_names(range(model.num_layers), "encoder")
        return Signature({"hidden": hidden}, _key_values(manifest, names, rows))
    size = draft_rows if part == "draft_head" else model.vocab_size
    return Signature({"hidden": hidden}, {"logits": Array("float32", (1, rows, size))})


def longest(manifest: OnnxManifest, part: str) -> int:
    """Most rows that a part takes: of a source's, or of a batch."""
    encoder = manifest.model.encoder
    if encoder is not None and part.startswith(_OF_SOURCES):
        return encoder.max_source_length
    return manifest.graphs.max_width


def layers_of(manifest: OnnxManifest, segment: int) -> range:
    """Numbers of a segment's layers in the whole model."""
    edges = tuple(pairwise((0, *manifest.exits, manifest.model.num_layers)))
    return range(*edges[segment])


def _segment(manifest: OnnxManifest, layers: range, width: int | None) -> Signature:
    slots = manifest.graphs.slots
    rows, slots, seen = (ANY,) * 3 if width is None else (width, slots, slots + width)
    hidden = Array("float32", (1, rows, manifest.model.hidden_size))
    if manifest.model.encoder is None:
        stack, source = "", {}
        places = {"positions": Array("int32", (1, rows)), "mask": Array("float32", (1, 1, rows, seen))}
    else:
        stack, source = "decoder", _key_values(manifest, past_names(layers, "encoder"), ANY)
        places = {"distances": Array("int32", (rows, seen))}
    past = _key_values(manifest, past_names(layers, stack), slots)
    present = _key_values(manifest, present_names(layers, stack), rows)
    return Signature({"hidden": hidden, **places, **past, **source}, {"hidden_out": hidden, **present})


def _key_values(manifest: OnnxManifest, names: Iterable[str], count: int) -> dict[str, Array]:
    entry = manifest.graphs
    array = Array("float32", (1, entry.key_value_heads, count, entry.head_size))
    return dict.fromkeys(names, array)
