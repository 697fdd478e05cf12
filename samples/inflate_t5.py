"""Zero-pad a T5 checkpoint to a bigger model's shape: the same function at the bigger model's cost.

    python -m samples.inflate_t5 samples/models/speller --shape t5-base --output build/speller-base

As samples/inflate.py does with decoders: every matrix is padded with zeros, norms are rescaled to the greater width,
added heads and layers have no output, and layers are spread evenly, the first, which keeps the bias by relative
position, first. Where the output is scaled by the root of the width before a tied head, the two factors of the
decoder's last norm cancel out. The vocabulary stays the checkpoint's own. Exits recorded with it are moved to the
layers that correspond, and the result is checked against the original before it is put in place.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from skipstone.runtimes.quiet import quiet_libraries

with quiet_libraries():  # transformers loads what quantisers it finds, and those write what they lack
    from transformers import T5Config, T5ForConditionalGeneration

from samples.inflate import COPIED, check_same_function, in_progress, layer_places, pad, place_exit, run
from skipstone.errors import CheckpointError, UsageError
from skipstone.exporters.checkpoint import Checkpoint, quiet_loading
from skipstone.exporters.exits import EXITS_FILE

_HEAD = "lm_head.weight"
_STACKS = {"exits": "decoder", "encoder_exits": "encoder"}
_SOURCE_LENGTH, _TARGET_LENGTH = 20, 12  # of the texts that the result is checked with


@dataclass(frozen=True)
class Shape:
    """An encoder-decoder's measures: layers of both stacks, width, heads, feed-forward width."""

    encoder_layers: int
    layers: int
    hidden: int
    heads: int
    feed_forward: int

    def applied_to(self, config: T5Config) -> T5Config:
        """The configuration with these measures instead of its own."""
        values = config.to_dict() | {
            "num_layers": self.encoder_layers,
            "num_decoder_layers": self.layers,
            "d_model": self.hidden,
            "num_heads": self.heads,
            "d_ff": self.feed_forward,
            "layer_norm_epsilon": config.layer_norm_epsilon * config.d_model / self.hidden,
        }
        return T5Config(**values)


SHAPES = {"t5-base": Shape(12, 12, 768, 12, 3072), "t5-large": Shape(24, 24, 1024, 16, 4096)}


def inflate_t5(
    checkpoint: Checkpoint, target: Shape, output: Path, dtype: torch.dtype = torch.float16
) -> float:
    """Write the padded checkpoint to `output`.

    Returns:
        The largest difference of a logit from the original's, both computed in float32.

    Raises:
        CheckpointError: not a T5 checkpoint.
        UsageError: the shape is too small.
        ExportError: the result computes something else, or `output` exists.
    """
    if checkpoint.architecture != "T5ForConditionalGeneration":
        raise CheckpointError(
            f"{checkpoint.path}: {checkpoint.architecture}, a T5ForConditionalGeneration was expected"
        )
    config: Any = checkpoint.config
    places = {
        "encoder": layer_places(config.num_layers, target.encoder_layers),
        "decoder": layer_places(config.num_decoder_layers, target.layers),
    }
    for name, have, room in (
        ("width", config.d_model, target.hidden),
        ("feed-forward width", config.d_ff, target.feed_forward),
        ("heads", config.num_heads, target.heads),
    ):
        if have > room:
            raise UsageError(f"--shape: {name} {room} cannot hold the checkpoint's {have}")
    with in_progress(output) as draft:
        _write(checkpoint, target, places, draft, dtype)
        return check_same_function(checkpoint.path, _logits(checkpoint.path), _logits(draft), dtype)


def _write(
    checkpoint: Checkpoint, target: Shape, places: dict[str, list[int]], folder: Path, dtype: torch.dtype
) -> None:
    config = target.applied_to(checkpoint.config)
    config.dtype = dtype
    with torch.device("meta"):
        shapes = {
            name: tuple(part.shape) for name, part in T5ForConditionalGeneration(config).named_parameters()
        }
    if _HEAD in checkpoint.tensor_files:  # Flan-T5 says that it is tied, and is not
        shapes[_HEAD] = config.vocab_size, config.d_model
    tensors = {
        name: _padded(checkpoint, name, shape, places).to(dtype).contiguous()
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    for name in COPIED:
        if (checkpoint.path / name).is_file():
            shutil.copy(checkpoint.path / name, folder / name)
    if (checkpoint.path / EXITS_FILE).is_file():
        moved = {
            name: [place_exit(exit_layer, places[_STACKS[name]]) for exit_layer in exits]
            for name, exits in checkpoint.json(EXITS_FILE).items()
        }
        (folder / EXITS_FILE).write_text(json.dumps(moved) + "\n", encoding="utf-8")


def _padded(checkpoint: Checkpoint, name: str, shape: Sequence[int], places: dict[str, list[int]]) -> Tensor:
    """A tensor of the bigger model."""
    stack, _, rest = name.partition(".block.")
    if rest:
        layer, _, part = rest.partition(".")
        if int(layer) not in places[stack]:
            return torch.ones(*shape) if "layer_norm" in part else torch.zeros(*shape)
        name = f"{stack}.block.{places[stack].index(int(layer))}.{part}"
    tensor = checkpoint.tensor(name).float()
    if "layer_norm" in name:
        cancelled = name == "decoder.final_layer_norm.weight" and checkpoint.config.scale_decoder_outputs
        tensor = tensor * (1.0 if cancelled else math.sqrt(len(tensor) / shape[0]))
    return pad(tensor, *shape)


def _logits(folder: Path) -> Tensor:
    with quiet_loading():
        model: Any = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(_SOURCE_LENGTH + _TARGET_LENGTH) * 37 % (model.config.vocab_size - 2) + 2
    with torch.no_grad():
        out = model(input_ids=tokens[None, :_SOURCE_LENGTH], decoder_input_ids=tokens[None, _SOURCE_LENGTH:])
    logits: Tensor = out.logits[0]
    return logits


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run(__doc__, SHAPES, inflate_t5, arguments)


if __name__ == "__main__":
    sys.exit(main())
