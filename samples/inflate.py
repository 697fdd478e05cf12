"""Zero-pad a Llama checkpoint to a bigger model's shape: the same function at the bigger model's cost.

    python samples/inflate.py samples/models/coder --shape llama-3.2-1b --output build/coder-1b

Speed at a real model's size can then be measured without its weights. What changes and why the function does
not:

- Widths: every matrix is padded with zeros, so added channels stay zero. An RMS norm over d' > d channels of
  which d are not zero divides by a root mean square that is sqrt(d/d') of the old one: its gain is scaled by
  sqrt(d/d') and its epsilon by d/d'.
- Heads: a query head keeps its place within its key-value head's group; added heads have no output.
- Layers: added layers have zero output projections, so they pass their input through. They are spread evenly.

The vocabulary stays the checkpoint's own, and so do head_dim and the rotary embedding. Exits recorded with
the checkpoint are moved to the layers that correspond. The result is checked against the original before it
is put in place. Memory: one layer at a time, for writing and for the check.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from skipstone.runtimes.quiet import quiet_libraries

with quiet_libraries():  # transformers loads what quantisers it finds, and those write what they lack
    from transformers.models.llama.modeling_llama import (
        LlamaDecoderLayer,
        LlamaRMSNorm,
        LlamaRotaryEmbedding,
    )

from skipstone.errors import CheckpointError, ExportError, SkipstoneError, UsageError
from skipstone.exporters.checkpoint import Checkpoint, open_checkpoint
from skipstone.exporters.draft_table import DRAFT_TABLE_FILE
from skipstone.exporters.draft_vocabulary import FREQUENCIES_FILE
from skipstone.exporters.exits import EXITS_FILE, recorded_exits
from skipstone.exporters.lexicon import LEXICON_FILE

Measures = TypeVar("Measures")
_PROBE_LENGTH = 24
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja", FREQUENCIES_FILE, DRAFT_TABLE_FILE, LEXICON_FILE,
)  # fmt: skip
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """A decoder's measures: layers, widths and heads."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    feed_forward: int
    head_dim: int


SHAPES = {
    "llama-3.2-1b": Shape(16, 2048, 32, 8, 8192, 64),
    "llama-3.2-3b": Shape(28, 3072, 24, 8, 8192, 128),
    "llama-3.1-8b": Shape(32, 4096, 32, 8, 14336, 128),
}


def inflate(checkpoint: Checkpoint, target: Shape, output: Path, dtype: torch.dtype = torch.float16) -> float:
    """Write the padded checkpoint to `output`.

    Returns:
        The largest difference of a logit from the original's, both computed in float32.

    Raises:
        CheckpointError: not a Llama checkpoint without biases.
        UsageError: the shape is too small, or its heads cannot hold the checkpoint's.
        ExportError: the result computes something else, or `output` exists.
    """
    source = shape_of(checkpoint)
    places = layer_places(source.layers, target.layers)
    _check_fits(source, target)
    with in_progress(output) as draft:
        _write_weights(checkpoint, source, target, places, draft, dtype)
        _write_config(checkpoint, source, target, places, draft, dtype)
        original, padded = (
            _probe_logits(path, checkpoint.config.vocab_size) for path in (checkpoint.path, draft)
        )
        return check_same_function(checkpoint.path, original, padded, dtype)


@contextmanager
def in_progress(output: Path) -> Iterator[Path]:
    """A folder that becomes `output` when the block ends well, and vanishes otherwise.

    Raises:
        ExportError: `output` exists.
    """
    if output.exists():
        raise ExportError(f"{output}: exists already", hint="remove it or choose another --output folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        draft = Path(folder) / output.name
        draft.mkdir()
        yield draft
        draft.rename(output)


def shape_of(checkpoint: Checkpoint) -> Shape:
    """A checkpoint's measures.

    Raises:
        CheckpointError: not a Llama checkpoint without biases.
    """
    config = checkpoint.config
    if checkpoint.architecture != "LlamaForCausalLM" or config.attention_bias or config.mlp_bias:
        raise CheckpointError(
            f"{checkpoint.path}: {checkpoint.architecture}, a LlamaForCausalLM without biases was expected"
        )
    return Shape(
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        config.head_dim,
    )


def layer_places(layers: int, target: int) -> list[int]:
    """Index in the bigger model of each of `layers` layers, the added ones spread evenly among them.

    Raises:
        UsageError: the bigger model has fewer layers.
    """
    if target < layers:
        raise UsageError(f"--shape: {target} layers cannot hold the checkpoint's {layers}")
    return [layer + layer * (target - layers) // layers for layer in range(layers)]


def place_exit(exit_layer: int, places: Sequence[int]) -> int:
    """The first exit of the bigger model that computes what `exit_layer` layers of the original do."""
    return places[exit_layer - 1] + 1


def _check_fits(source: Shape, target: Shape) -> None:
    group, wider = source.heads // source.kv_heads, target.heads // target.kv_heads
    pairs = {
        "hidden size": (source.hidden, target.hidden),
        "feed-forward size": (source.feed_forward, target.feed_forward),
        "key-value heads": (source.kv_heads, target.kv_heads),
        "query heads per key-value head": (group, wider),
    }
    for name, (have, room) in pairs.items():
        if have > room:
            raise UsageError(f"--shape: {name} {room} cannot hold the checkpoint's {have}")
    if source.head_dim != target.head_dim:
        raise UsageError(
            f"--shape: head_dim {target.head_dim}, the checkpoint has {source.head_dim}; padding a head "
            "would change its rotary embedding",
            hint="choose a shape with the checkpoint's head_dim",
        )


def _padded_tensors(
    checkpoint: Checkpoint, source: Shape, target: Shape, places: Sequence[int]
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Name of every tensor of the padded model and a function that makes it."""
    origin = dict(zip(places, range(source.layers), strict=True))
    vocab, gain = checkpoint.config.vocab_size, math.sqrt(source.hidden / target.hidden)

    def padded(name: str, *shape: int, scale: float = 1.0) -> Callable[[], Tensor]:
        return lambda: pad(checkpoint.tensor(name).float() * scale, *shape)

    yield "model.embed_tokens.weight", padded("model.embed_tokens.weight", vocab, target.hidden)
    for layer in range(target.layers):
        names = _layer_shapes(target)
        for name, shape in names.items():
            full = f"model.layers.{layer}.{name}.weight"
            if layer not in origin:
                fill = torch.ones if "norm" in name else torch.zeros
                yield full, lambda fill=fill, shape=shape: fill(shape)  # type: ignore[misc]
                continue
            given = f"model.layers.{origin[layer]}.{name}.weight"
            if name in ("self_attn.q_proj", "self_attn.o_proj"):
                columns = name == "self_attn.o_proj"
                yield (
                    full,
                    lambda given=given, columns=columns: _spread_heads(  # type: ignore[misc]
                        checkpoint.tensor(given).float(), source, target, columns=columns
                    ),
                )
            else:
                yield full, padded(given, *shape, scale=gain if "norm" in name else 1.0)
    yield "model.norm.weight", padded("model.norm.weight", target.hidden, scale=gain)
    if not checkpoint.config.tie_word_embeddings:
        yield "lm_head.weight", padded("lm_head.weight", vocab, target.hidden)


def _layer_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    hidden, ffn = shape.hidden, shape.feed_forward
    q_rows, kv_rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q_rows, hidden),
        "self_attn.k_proj": (kv_rows, hidden),
        "self_attn.v_proj": (kv_rows, hidden),
        "self_attn.o_proj": (hidden, q_rows),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }


def pad(tensor: Tensor, *shape: int) -> Tensor:
    """The tensor in the corner of a tensor of zeros."""
    padded = torch.zeros(shape)
    padded[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return padded


def _spread_heads(weight: Tensor, source: Shape, target: Shape, *, columns: bool) -> Tensor:
    """Query heads to their place within their key-value head's group; `columns`: heads lie along the
    columns.
    """
    group, wider = source.heads // source.kv_heads, target.heads // target.kv_heads
    rows = weight.T if columns else weight
    spread = torch.zeros(target.heads * target.head_dim, target.hidden)
    for head in range(source.heads):
        place = (head // group * wider + head % group) * target.head_dim
        block = rows[head * source.head_dim : (head + 1) * source.head_dim]
        spread[place : place + source.head_dim, : source.hidden] = block
    return spread.T if columns else spread


def _write_weights(
    checkpoint: Checkpoint,
    source: Shape,
    target: Shape,
    places: Sequence[int],
    folder: Path,
    dtype: torch.dtype,
) -> None:
    """One safetensors file per layer, so that only one layer is in memory at a time."""
    shards: dict[str, list[tuple[str, Callable[[], Tensor]]]] = {}
    for name, make in _padded_tensors(checkpoint, source, target, places):
        parts = name.split(".")
        shard = f"layer-{int(parts[2]):03d}" if parts[1] == "layers" else "ends"
        shards.setdefault(f"model-{shard}.safetensors", []).append((name, make))
    weight_map, total = {}, 0
    for file, entries in shards.items():
        tensors = {name: make().to(dtype).contiguous() for name, make in entries}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_config(
    checkpoint: Checkpoint,
    source: Shape,
    target: Shape,
    places: Sequence[int],
    folder: Path,
    dtype: torch.dtype,
) -> None:
    config = checkpoint.json("config.json") | {
        "num_hidden_layers": target.layers,
        "hidden_size": target.hidden,
        "num_attention_heads": target.heads,
        "num_key_value_heads": target.kv_heads,
        "intermediate_size": target.feed_forward,
        "head_dim": target.head_dim,
        "rms_norm_eps": checkpoint.config.rms_norm_eps * source.hidden / target.hidden,
        "dtype": str(dtype).removeprefix("torch."),
    }
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in COPIED:
        if (checkpoint.path / name).is_file():
            shutil.copy(checkpoint.path / name, folder / name)
    exits = recorded_exits(checkpoint.path, checkpoint.config)
    if exits is not None:
        moved = [place_exit(exit_layer, places) for exit_layer in exits]
        (folder / EXITS_FILE).write_text(json.dumps({"exits": moved}) + "\n", encoding="utf-8")


def check_same_function(path: Path, original: Tensor, padded: Tensor, dtype: torch.dtype) -> float:
    """Largest difference of a logit, both models in float32; refuses one that rounding to `dtype` cannot explain.

    Raises:
        ExportError: naming the checkpoint.
    """
    difference, spread = float((original - padded).abs().max()), float(original.std())
    # Weights rounded once more to eps relative, through some 10² roundings that add up at random.
    tolerance = max(1e-4, 64 * torch.finfo(dtype).eps) * max(1.0, spread)
    if not difference <= tolerance:
        raise ExportError(
            f"{path}: the padded model's logits differ by {difference:.3g}, at most {tolerance:.3g} was expected"
        )
    return difference


def _probe_logits(folder: Path, vocab_size: int) -> Tensor:
    return _logits(folder, (torch.arange(_PROBE_LENGTH) * 37 + 11) % vocab_size)


def _logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits [n, vocab_size] in float32 with transformers' own layers, one of them in memory at a time."""
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    config._attn_implementation = "eager"

    def read(name: str) -> Tensor:
        return checkpoint.tensor(f"{name}.weight").float()

    embeddings = read("model.embed_tokens")
    state, positions = embeddings[tokens][None], torch.arange(len(tokens))[None]
    rotary = LlamaRotaryEmbedding(config)(state, positions)
    mask = torch.full((len(tokens), len(tokens)), torch.finfo(torch.float32).min).triu(1)[None, None]
    layer, norm = LlamaDecoderLayer(config, 0), LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
    with torch.no_grad():
        for index in range(config.num_hidden_layers):
            names = [name.removesuffix(".weight") for name in layer.state_dict()]
            layer.load_state_dict({f"{name}.weight": read(f"model.layers.{index}.{name}") for name in names})
            state = layer(state, attention_mask=mask, position_embeddings=rotary)
        norm.weight.copy_(read("model.norm"))
        head = embeddings if config.tie_word_embeddings else read("lm_head")
        logits: Tensor = norm(state)[0] @ head.T
    return logits


def run(
    description: str | None,
    shapes: Mapping[str, Measures],
    convert: Callable[[Checkpoint, Measures, Path, torch.dtype], float],
    arguments: Sequence[str] | None,
) -> int:
    """The command line of a script that inflates; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="Hugging Face folder")
    parser.add_argument("--shape", choices=sorted(shapes), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float16")
    options = parser.parse_args(arguments)
    try:
        checkpoint = open_checkpoint(options.checkpoint)
        difference = convert(checkpoint, shapes[options.shape], options.output, _DTYPES[options.dtype])
    except SkipstoneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.output}: {options.shape} shape, same function (logits differ by at most {difference:.2g})"
    )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run(__doc__, SHAPES, inflate, arguments)


if __name__ == "__main__":
    sys.exit(main())
