"""A checkpoint as one GGUF file, in the float type of one's choice; quantising and cutting start from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from numpy.typing import NDArray

from skipstone.errors import CheckpointError
from skipstone.exporters.checkpoint import Checkpoint
from skipstone.exporters.facts import DEFAULT_LENGTH
from skipstone.exporters.formats.gguf.codes import put_codes
from skipstone.exporters.formats.gguf.layout import Layout, Source
from skipstone.exporters.formats.gguf.mapping import (
    Decoder,
    decoder_of,
    interleave_rows,
    mapping_of,
    rope_factors,
    tensor_sources,
)
from skipstone.exporters.formats.gguf.parts import (
    MetaValue,
    TensorPart,
    array_part,
    float32,
    string,
    uint32,
    write_parts,
)
from skipstone.exporters.formats.gguf.schemes import SCHEMES
from skipstone.exporters.formats.gguf.t5 import t5_layout

if TYPE_CHECKING:
    from skipstone.exporters.compress.work import FixedCodes

_FLOAT_TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}


def write_whole(
    checkpoint: Checkpoint,
    path: Path,
    float_type: str = "f32",
    *,
    tokenizer: dict[str, MetaValue] | None = None,
    max_source_length: int = DEFAULT_LENGTH,
    codes: FixedCodes | None = None,
) -> None:
    """Write a checkpoint as one GGUF.

    Args:
        checkpoint: the input.
        path: target.
        float_type: type of the matrices: f32, f16 or bf16; norms and biases are f32.
        tokenizer: `tokenizer.ggml.*` keys; None: the file says that it has no tokenizer.
        max_source_length: tokens of an encoder's source at most.
        codes: written as they are in place of the weights that have them, in one of this format's schemes.

    Raises:
        CheckpointError: a tensor is missing, has another shape than the configuration says, or is left over.
    """
    layout = layout_of(checkpoint, max_source_length)
    tensor_type, file_type = _FLOAT_TYPES[float_type]
    parts = _parts(checkpoint, layout, tensor_type)
    if codes is not None:
        parts, file_type = (
            put_codes(parts, layout, codes),
            gguf.LlamaFileType(SCHEMES[codes.scheme].file_type),
        )
    meta = {
        "general.type": string("model"),
        "general.name": string(checkpoint.name),
        **layout.keys,
        "general.file_type": uint32(int(file_type)),
        "general.quantization_version": uint32(gguf.GGML_QUANT_VERSION),
        **({"tokenizer.ggml.model": string("none")} if tokenizer is None else tokenizer),
    }
    write_parts(path, layout.arch, meta, parts)


def native_float_type(checkpoint: Checkpoint) -> str:
    """The smallest float type that loses nothing of the checkpoint's matrices: bf16, f16 or f32."""
    known = {"BF16": "bf16", "F16": "f16"}
    layout = layout_of(checkpoint)
    matrices = [source.name for name, source in layout.sources.items() if _is_matrix(name, layout)]
    types = {known.get(checkpoint.stored_type(name), "f32") for name in matrices}
    return types.pop() if len(types) == 1 else "f32"


def layout_of(checkpoint: Checkpoint, max_source_length: int = DEFAULT_LENGTH) -> Layout:
    """A checkpoint laid out as one GGUF.

    Raises:
        CheckpointError: the configuration asks for something that llama.cpp lacks.
    """
    if checkpoint.is_encoder_decoder:
        return t5_layout(checkpoint, max_source_length)
    decoder, arch = decoder_of(checkpoint), mapping_of(checkpoint).arch
    sources, factors, shapes = tensor_sources(checkpoint, decoder), rope_factors(decoder), _shapes(decoder)
    return Layout(
        arch=arch,
        keys=_decoder_keys(arch, decoder),
        sources=sources,
        shapes={name: shapes[name.split(".", 2)[2] if name.startswith("blk.") else name] for name in sources},
        made=() if factors is None else (array_part("rope_freqs.weight", factors),),
        ignored=frozenset({"lm_head.weight"}),
    )


def _is_matrix(name: str, layout: Layout) -> bool:
    """Whether a tensor is written in the chosen float type; a table of position biases, say, stays in f32."""
    return len(layout.shapes[name]) == 2 and "attn_rel_b" not in name


def _parts(
    checkpoint: Checkpoint, layout: Layout, tensor_type: gguf.GGMLQuantizationType
) -> list[TensorPart]:
    _refuse_left_overs(checkpoint, layout)
    parts = list(layout.made)
    for name, source in layout.sources.items():
        shape = layout.shapes[name]
        kind = tensor_type if _is_matrix(name, layout) else gguf.GGMLQuantizationType.F32
        parts.append(TensorPart(name, shape, kind, _reader(checkpoint, source, shape, kind)))
    return parts


def _reader(
    checkpoint: Checkpoint, source: Source, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType
) -> Callable[[], NDArray[Any]]:
    def read() -> NDArray[Any]:
        weight = checkpoint.tensor(source.name)
        if tuple(weight.shape) != shape:
            raise CheckpointError(
                f"{checkpoint.path}: {source.name} has shape {list(weight.shape)}, "
                f"the configuration says {list(shape)}"
            )
        if source.interleave_heads:
            weight = interleave_rows(weight, source.interleave_heads)
        array: NDArray[np.float32] = (weight.float() * source.scale).contiguous().numpy()
        return np.asarray(gguf.quants.quantize(array, kind))

    return read


def _refuse_left_overs(checkpoint: Checkpoint, layout: Layout) -> None:
    """A tensor that nobody reads would change the function silently (a bias, say)."""
    known = {source.name for source in layout.sources.values()} | layout.ignored
    left = sorted(
        n for n in checkpoint.tensor_files if n not in known and not n.endswith("rotary_emb.inv_freq")
    )
    if left:
        raise CheckpointError(
            f"{checkpoint.path}: {len(left)} tensors have no place in GGUF, the first is {left[0]}",
            hint=f"the checkpoint differs from a plain {checkpoint.architecture}",
        )


def _shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    hidden, ffn = decoder.hidden_size, decoder.feed_forward
    q_rows, kv_rows = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    vocabulary = (decoder.vocab_size, hidden)
    return {
        "token_embd.weight": vocabulary,
        "output.weight": vocabulary,
        "output_norm.weight": (hidden,),
        "attn_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
        "attn_q.weight": (q_rows, hidden),
        "attn_k.weight": (kv_rows, hidden),
        "attn_v.weight": (kv_rows, hidden),
        "attn_q.bias": (q_rows,),
        "attn_k.bias": (kv_rows,),
        "attn_v.bias": (kv_rows,),
        "attn_q_norm.weight": (decoder.head_dim,),
        "attn_k_norm.weight": (decoder.head_dim,),
        "attn_output.weight": (hidden, q_rows),
        "attn_output.bias": (hidden,),
        "ffn_gate.weight": (ffn, hidden),
        "ffn_up.weight": (ffn, hidden),
        "ffn_down.weight": (hidden, ffn),
        "ffn_gate.bias": (ffn,),
        "ffn_up.bias": (ffn,),
        "ffn_down.bias": (hidden,),
    }


def _decoder_keys(arch: str, decoder: Decoder) -> dict[str, MetaValue]:
    keys = {
        "block_count": uint32(decoder.num_layers),
        "context_length": uint32(decoder.context_length),
        "embedding_length": uint32(decoder.hidden_size),
        "feed_forward_length": uint32(decoder.feed_forward),
        "attention.head_count": uint32(decoder.num_heads),
        "attention.head_count_kv": uint32(decoder.num_kv_heads),
        **_rope_keys(decoder),
        "attention.layer_norm_rms_epsilon": float32(decoder.norm_eps),
        "attention.key_length": uint32(decoder.head_dim),
        "attention.value_length": uint32(decoder.head_dim),
        "vocab_size": uint32(decoder.vocab_size),
        "rope.dimension_count": uint32(decoder.head_dim),
    }
    return {f"{arch}.{key}": value for key, value in keys.items()}


def _rope_keys(decoder: Decoder) -> dict[str, MetaValue]:
    rope, keys = decoder.rope, {}
    if rope.kind in ("linear", "yarn"):
        keys["rope.scaling.type"] = string(rope.kind)
        keys["rope.scaling.factor"] = float32(float(rope.parameters["factor"]))
    if rope.kind == "yarn":
        original = rope.parameters["original_max_position_embeddings"]
        keys["rope.scaling.original_context_length"] = uint32(int(original))
        for name in ("beta_fast", "beta_slow"):
            if rope.parameters.get(name) is not None:
                keys[f"rope.scaling.yarn_{name}"] = float32(float(rope.parameters[name]))
        if rope.parameters.get("attention_factor") is not None:
            # transformers means the whole factor, llama.cpp multiplies by YaRN's own 1 + 0.1 ln(factor)
            # (paper, eq. 22).
            usual = 1.0 + 0.1 * math.log(float(rope.parameters["factor"]))
            keys["rope.scaling.yarn_attn_factor"] = float32(
                float(rope.parameters["attention_factor"]) / usual
            )
    return keys | {"rope.freq_base": float32(rope.theta)}
