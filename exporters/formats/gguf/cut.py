"""Cutting a whole GGUF at the exits: segment files fed by hidden states, and a draft head over part of the
vocabulary.

Tensors are copied raw, so a segment computes exactly what the whole model does there. An inner segment never
reads token ids nor gives logits; llama.cpp wants a vocabulary all the same, so it gets 32 rows of zeros,
whose logits cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from numpy.typing import NDArray

from skipstone.errors import CheckpointError
from skipstone.exporters.formats.gguf.mapping import MAPPINGS, deinterleave_rows
from skipstone.exporters.formats.gguf.parts import (
    GgufModel,
    MetaValue,
    TensorPart,
    array,
    array_part,
    float32,
    renamed,
    string,
    uint32,
    with_rows,
    write_parts,
    zero_part,
)

DUMMY_VOCABULARY = 32
Output = Literal["nextn", "callback", "logits"]

# Wide enough never to hide a position; the graph used for "nextn" segments insists on a window.
_NO_WINDOW = 1 << 20
NO_TOKENIZER = {"tokenizer.ggml.model": string("none")}
_HEAD_WIDTH = 32


@dataclass(frozen=True)
class Cut:
    """One segment to write: layers `first` to `stop` (excluded)."""

    first: int
    stop: int
    output: Output


def check_can_be_cut(model: GgufModel) -> None:
    """Refuse what would be cut into something else than the whole computes.

    Raises:
        CheckpointError: an architecture whose layers are not known to be self-contained, or missing tensors.
    """
    supported = sorted({mapping.arch for mapping in MAPPINGS.values()})
    if model.arch == "t5":
        raise CheckpointError(
            f"{model.path}: an encoder-decoder as GGUF, which may lack the scale of the head's input",
            hint="export the Hugging Face checkpoint that it was made from",
        )
    if model.arch not in supported:
        raise CheckpointError(
            f"{model.path}: architecture {model.arch!r} cannot be cut, only {', '.join(supported)}"
        )
    experts = next((name for name in model.parts if "_exps" in name or "_shexp" in name), None)
    if experts is not None:
        raise CheckpointError(f"{model.path}: {experts}: mixtures of experts are not supported")
    for name in ("token_embd.weight", "output_norm.weight", f"blk.{model.num_layers - 1}.attn_norm.weight"):
        if name not in model.parts:
            raise CheckpointError(f"{model.path}: tensor {name} not found", hint="the file is incomplete")


def cut_period(arch: str) -> int:
    """Cuts must be multiples of this many layers: 1, or 4 where every fourth layer differs."""
    return max((mapping.nope_period for mapping in MAPPINGS.values() if mapping.arch == arch), default=0) or 1


def plan_cuts(model: GgufModel, exits: tuple[int, ...], num_layers: int) -> tuple[Cut, ...]:
    """Segments between the exits; inner ones leave without a callback wherever the architecture allows."""
    inner: Output = "nextn" if _fits_nextn(model) else "callback"
    edges = (0, *exits, num_layers)
    return tuple(
        Cut(first, stop, "logits" if stop == num_layers else inner) for first, stop in pairwise(edges)
    )


def write_segment(model: GgufModel, cut: Cut, path: Path) -> None:
    """Write one segment of a whole GGUF."""
    blocks = _blocks(model, cut)
    if cut.output == "nextn":
        write_parts(
            path,
            "mimo2",
            _nextn_meta(model, cut),
            [*_nextn_blocks(model, blocks), *_dummies(model, ["output"])],
        )
        return
    meta = _own_meta(model, cut)
    shared = [model.parts[name] for name in ("rope_freqs.weight",) if name in model.parts]
    ends = _real_ends(model) if cut.output == "logits" else _dummies(model, [])
    write_parts(path, model.arch, meta, [*shared, *blocks, *ends])


def write_draft_head(model: GgufModel, token_ids: NDArray[np.int32], path: Path) -> None:
    """Write the final norm and the head's rows of some tokens as a model of its own.

    A model without layers does not load, so there is one, with zeroed projections: it passes its input
    through.
    """
    head = _head(model)
    hidden = head.shape[1]
    rows = with_rows(head, lambda data: np.ascontiguousarray(data[token_ids]), len(token_ids))
    counts = {
        "context_length": 512,
        "embedding_length": hidden,
        "block_count": 1,
        "feed_forward_length": _HEAD_WIDTH,
        "attention.head_count": 1,
        "attention.head_count_kv": 1,
        "attention.key_length": _HEAD_WIDTH,
        "attention.value_length": _HEAD_WIDTH,
        "rope.dimension_count": _HEAD_WIDTH,
        "vocab_size": len(token_ids),
    }
    meta = {f"llama.{key}": uint32(value) for key, value in counts.items()}
    meta["llama.attention.layer_norm_rms_epsilon"] = float32(model.fact("attention.layer_norm_rms_epsilon"))
    inward = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
    layer = [
        *(zero_part(f"blk.0.{name}.weight", _HEAD_WIDTH, hidden) for name in inward),
        *(zero_part(f"blk.0.{name}.weight", hidden, _HEAD_WIDTH) for name in ("attn_output", "ffn_down")),
        *(
            array_part(f"blk.0.{name}.weight", np.ones(hidden, np.float32))
            for name in ("attn_norm", "ffn_norm")
        ),
    ]
    norm = renamed(final_norm(model), "output_norm.weight")
    parts = [renamed(rows, "token_embd.weight"), *layer, norm]
    write_parts(path, "llama", meta | NO_TOKENIZER, parts)


def final_norm(model: GgufModel) -> TensorPart:
    """The gain of the norm before the head; of an encoder-decoder, the decoder's."""
    name = "output_norm.weight"
    return model.parts[name] if name in model.parts else model.parts[f"dec.{name}"]


def _head(model: GgufModel) -> TensorPart:
    return model.parts.get("output.weight", model.parts["token_embd.weight"])


def _fits_nextn(model: GgufModel) -> bool:
    """Whether the callback-free graph computes the model's layers.

    That graph is llama.cpp's "mimo2": rotary embedding in halves without factors, no biases, no norms on Q
    and K.
    """
    if model.arch != "llama":
        return False
    kinds = {name.split(".", 2)[2] for name in model.parts if name.startswith("blk.")}
    plain = {f"{name}.weight" for name in ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")}
    plain |= {f"{name}.weight" for name in ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")}
    scaled = model.fact("rope.scaling.type", "none") != "none" or "rope_freqs.weight" in model.parts
    per_layer = (model.fact("attention.head_count"), _num_kv_heads(model), model.fact("feed_forward_length"))
    uniform = not any(isinstance(count, list) for count in per_layer)
    full_rope = uniform and model.fact("rope.dimension_count", 0) in (0, _head_dim(model))
    odd = any(
        model.get(f"{model.arch}.{key}") for key in ("attention.scale", "logit_scale", "embedding_scale")
    )
    return kinds == plain and full_rope and uniform and not scaled and not odd


def _num_kv_heads(model: GgufModel) -> Any:
    return model.fact("attention.head_count_kv", model.fact("attention.head_count"))


def _head_dim(model: GgufModel) -> int:
    per_head = model.fact("embedding_length") // model.fact("attention.head_count")
    return int(model.fact("attention.key_length", per_head))


def _blocks(model: GgufModel, cut: Cut) -> list[TensorPart]:
    """The segment's blocks, numbered from 0."""
    blocks = []
    for name, part in model.parts.items():
        if name.startswith("blk."):
            _, layer, rest = name.split(".", 2)
            if cut.first <= int(layer) < cut.stop:
                blocks.append(renamed(part, f"blk.{int(layer) - cut.first}.{rest}"))
    return blocks


def _nextn_blocks(model: GgufModel, blocks: list[TensorPart]) -> list[TensorPart]:
    heads = {"attn_q.weight": model.fact("attention.head_count"), "attn_k.weight": _num_kv_heads(model)}
    moved = []
    for part in blocks:
        count = heads.get(part.name.split(".", 2)[2])
        moved.append(part if count is None else with_rows(part, partial(deinterleave_rows, num_heads=count)))
    return moved


def _dummies(model: GgufModel, heads: list[str]) -> list[TensorPart]:
    hidden = model.fact("embedding_length")
    tables = [zero_part(f"{name}.weight", DUMMY_VOCABULARY, hidden) for name in ("token_embd", *heads)]
    return [model.parts["output_norm.weight"], *tables]


def _real_ends(model: GgufModel) -> list[TensorPart]:
    names = ("output_norm.weight", "token_embd.weight", "output.weight")
    return [model.parts[name] for name in names if name in model.parts]


def _own_meta(model: GgufModel, cut: Cut) -> dict[str, MetaValue]:
    """The model's own keys with the counts of a segment; per-layer arrays are cut with the layers."""
    vocab = model.parts["token_embd.weight"].shape[0] if cut.output == "logits" else DUMMY_VOCABULARY
    meta = {key: value for key, value in model.meta.items() if key.startswith(f"{model.arch}.")}
    for key, value in meta.items():
        if isinstance(value.value, list) and len(value.value) == model.num_layers:
            meta[key] = MetaValue(value.value[cut.first : cut.stop], value.type, value.element_type)
    meta[f"{model.arch}.block_count"] = uint32(cut.stop - cut.first)
    meta[f"{model.arch}.vocab_size"] = uint32(vocab)
    return meta | NO_TOKENIZER


def _nextn_meta(model: GgufModel, cut: Cut) -> dict[str, MetaValue]:
    layers, head_dim, theta = (
        cut.stop - cut.first,
        _head_dim(model),
        float(model.fact("rope.freq_base", 10000.0)),
    )
    counts = {
        "context_length": model.fact("context_length"),
        "embedding_length": model.fact("embedding_length"),
        "block_count": layers,
        "feed_forward_length": model.fact("feed_forward_length"),
        "attention.head_count": model.fact("attention.head_count"),
        "attention.head_count_kv": _num_kv_heads(model),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "attention.sliding_window": _NO_WINDOW,
        "expert_feed_forward_length": 0,
        "vocab_size": DUMMY_VOCABULARY,
    }
    meta = {f"mimo2.{key}": uint32(value) for key, value in counts.items()}
    # At least one layer must be marked as windowed, or the cache has none to put windowed layers into.
    pattern = [True] + [False] * (layers - 1)
    meta["mimo2.attention.sliding_window_pattern"] = array(pattern, gguf.GGUFValueType.BOOL)
    meta["mimo2.attention.layer_norm_rms_epsilon"] = float32(model.fact("attention.layer_norm_rms_epsilon"))
    meta["mimo2.rope.freq_base"] = float32(theta)
    meta["mimo2.rope.freq_base_swa"] = float32(theta)
    return meta | NO_TOKENIZER
