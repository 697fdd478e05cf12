"""Hugging Face architectures → GGUF: which tensor goes where and which facts llama.cpp must be told.

One `Mapping` per architecture; a new one is one entry in `MAPPINGS`. The names of GGUF tensors and keys are
those of the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping as MappingType
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from skipstone.errors import CheckpointError
from skipstone.exporters.checkpoint import Checkpoint
from skipstone.exporters.formats.gguf.layout import Source

if TYPE_CHECKING:
    import torch

_LAYER_TENSORS = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_ATTENTION_BIASES = {
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
}
_OUTPUT_BIAS = {"self_attn.o_proj.bias": "attn_output.bias"}
_MLP_BIASES = {
    "mlp.gate_proj.bias": "ffn_gate.bias",
    "mlp.up_proj.bias": "ffn_up.bias",
    "mlp.down_proj.bias": "ffn_down.bias",
}
_QK_NORMS = {
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
}


@dataclass(frozen=True)
class Mapping:
    """How one architecture is written.

    Attributes:
        arch: llama.cpp's architecture name.
        permute_qk: rows of Q and K are interleaved (llama.cpp's "NORM" rotary order) rather than in halves
            ("NEOX").
        attention_biases: "always", "never", or the configuration key that says so; likewise `mlp_biases`.
        output_bias: whether attention biases include the output projection's.
        qk_norm: Q and K pass an RMS norm per head.
        nope_period: every n-th layer has no rotary embedding; cuts must be multiples of it. 0: all layers
            have it.
    """

    arch: str
    permute_qk: bool
    attention_biases: str = "never"
    mlp_biases: str = "never"
    output_bias: bool = False
    qk_norm: bool = False
    nope_period: int = 0


MAPPINGS: MappingType[str, Mapping] = {
    "LlamaForCausalLM": Mapping(
        "llama", permute_qk=True, attention_biases="attention_bias", mlp_biases="mlp_bias", output_bias=True
    ),
    "MistralForCausalLM": Mapping("llama", permute_qk=True),
    "Qwen2ForCausalLM": Mapping("qwen2", permute_qk=False, attention_biases="always"),
    "Qwen3ForCausalLM": Mapping("qwen3", permute_qk=False, qk_norm=True),
    "SmolLM3ForCausalLM": Mapping("smollm3", permute_qk=True, nope_period=4),
}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: `kind` is default, linear, yarn or llama3; the rest as in transformers'
    rope_parameters.
    """

    theta: float
    kind: str
    parameters: MappingType[str, Any]


@dataclass(frozen=True)
class Decoder:
    """A decoder's measures; counts are of layers, heads, units, tokens."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    feed_forward: int
    vocab_size: int
    context_length: int
    norm_eps: float
    tied: bool
    rope: Rope


def mapping_of(checkpoint: Checkpoint) -> Mapping:
    """The mapping of a checkpoint's architecture.

    Raises:
        CheckpointError: there is none; names the supported ones.
    """
    mapping = MAPPINGS.get(checkpoint.architecture)
    if mapping is None:
        raise CheckpointError(
            f"{checkpoint.path}/config.json: architecture {checkpoint.architecture} is not supported, "
            f"only {', '.join(sorted(MAPPINGS))}",
            hint="if it is built like these, convert it with llama.cpp's converter and pass the .gguf",
        )
    return mapping


def decoder_of(checkpoint: Checkpoint) -> Decoder:
    """A checkpoint's measures.

    A sliding window shorter than the context caps the context: up to that many positions the two are the
    same.

    Raises:
        CheckpointError: the configuration asks for something that llama.cpp's architecture lacks.
    """
    config, mapping = checkpoint.config, mapping_of(checkpoint)
    _refuse_what_is_missing(checkpoint, mapping)
    heads = config.num_attention_heads
    return Decoder(
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        feed_forward=config.intermediate_size,
        vocab_size=config.vocab_size,
        context_length=min(
            config.max_position_embeddings, _sliding_window(config) or config.max_position_embeddings
        ),
        norm_eps=config.rms_norm_eps,
        tied=bool(config.tie_word_embeddings),
        rope=_rope_of(checkpoint),
    )


def tensor_sources(checkpoint: Checkpoint, decoder: Decoder) -> dict[str, Source]:
    """GGUF tensor name → its source, in file order. `rope_freqs.weight` is computed, see `rope_factors`."""
    mapping = mapping_of(checkpoint)
    layer_tensors = dict(_LAYER_TENSORS)
    if _has(checkpoint, mapping.attention_biases):
        layer_tensors |= _ATTENTION_BIASES | (_OUTPUT_BIAS if mapping.output_bias else {})
    if _has(checkpoint, mapping.mlp_biases):
        layer_tensors |= _MLP_BIASES
    if mapping.qk_norm:
        layer_tensors |= _QK_NORMS
    heads = {"attn_q": decoder.num_heads, "attn_k": decoder.num_kv_heads} if mapping.permute_qk else {}
    sources = {"token_embd.weight": Source("model.embed_tokens.weight")}
    for layer in range(decoder.num_layers):
        for name, target in layer_tensors.items():
            sources[f"blk.{layer}.{target}"] = Source(
                f"model.layers.{layer}.{name}", heads.get(target.split(".")[0], 0)
            )
    sources["output_norm.weight"] = Source("model.norm.weight")
    if not decoder.tied:
        sources["output.weight"] = Source("lm_head.weight")
    return sources


def interleave_rows(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of each head from halves (x1…, y1…) to pairs (x1, y1, …), as llama.cpp's "NORM" rotary embedding
    wants.
    """
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def deinterleave_rows(rows: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """The inverse of `interleave_rows`; quantised rows can be moved too, since blocks never cross a row."""
    half = rows.shape[0] // num_heads // 2
    halves = rows.reshape(num_heads, half, 2, *rows.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(halves.reshape(rows.shape))


def rope_factors(decoder: Decoder) -> NDArray[np.float32] | None:
    """Divisors of the rotary frequencies, [head_dim / 2], for Llama 3 scaling; None for every other kind.

    Wavelengths under context / high_freq_factor stay, those over context / low_freq_factor are stretched by
    `factor`, and those between are blended (Llama 3.1 model code, `apply_scaling`).
    """
    if decoder.rope.kind != "llama3":
        return None
    import torch

    given = decoder.rope.parameters
    factor, low, high = (
        float(given["factor"]),
        float(given["low_freq_factor"]),
        float(given["high_freq_factor"]),
    )
    context = float(given["original_max_position_embeddings"])
    exponents = torch.arange(0, decoder.head_dim, 2, dtype=torch.float32) / decoder.head_dim
    wavelengths = 2 * math.pi / (1.0 / decoder.rope.theta**exponents)
    blend = (context / wavelengths - low) / (high - low)
    factors = 1 / ((1 - blend) / factor + blend)
    factors[wavelengths < context / high] = 1.0
    factors[wavelengths > context / low] = factor
    return np.asarray(factors.numpy(), np.float32)


def _has(checkpoint: Checkpoint, rule: str) -> bool:
    return rule == "always" or (rule != "never" and bool(getattr(checkpoint.config, rule, False)))


def _sliding_window(config: Any) -> int | None:
    if getattr(config, "use_sliding_window", True) is False:
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def _refuse_what_is_missing(checkpoint: Checkpoint, mapping: Mapping) -> None:
    config, file = checkpoint.config, checkpoint.path / "config.json"
    if config.hidden_act != "silu":
        raise CheckpointError(f"{file}: hidden_act is {config.hidden_act!r}, only 'silu' is supported")
    for key in ("attention_bias", "mlp_bias"):
        known = key in (mapping.attention_biases, mapping.mlp_biases)
        if getattr(config, key, False) and not known:
            raise CheckpointError(
                f"{file}: {key} is set, which {checkpoint.architecture} cannot have in GGUF"
            )
    if mapping.nope_period:
        wanted = [int((layer + 1) % mapping.nope_period != 0) for layer in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != wanted:
            raise CheckpointError(
                f"{file}: no_rope_layers is {config.no_rope_layers}, it must leave out every "
                f"{mapping.nope_period}th layer"
            )
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"{file}: the weights are quantised already (quantization_config)",
            hint="pass the unquantised checkpoint",
        )


def _rope_of(checkpoint: Checkpoint) -> Rope:
    given = dict(checkpoint.config.rope_parameters or {})
    kind = str(given.get("rope_type", "default"))
    supported = ("default", "linear", "yarn", "llama3")
    if kind not in supported:
        raise CheckpointError(
            f"{checkpoint.path}/config.json: rope_type {kind!r} is not supported, only {', '.join(supported)}"
        )
    if kind == "yarn" and (
        given.get("mscale") or given.get("mscale_all_dim") or given.get("truncate") is False
    ):
        raise CheckpointError(
            f"{checkpoint.path}/config.json: yarn with mscale or truncate=false is not supported"
        )
    if float(given.get("partial_rotary_factor", 1.0)) != 1.0:
        raise CheckpointError(f"{checkpoint.path}/config.json: partial_rotary_factor is not supported")
    return Rope(theta=float(given.get("rope_theta", 10000.0)), kind=kind, parameters=given)
