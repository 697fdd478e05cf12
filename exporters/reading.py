"""A checkpoint, read for a format that is made from its layers: what was asked for is checked before anything is made.

reading = read_checkpoint("samples/models/coder", options, scratch, Room(default=512, least=64))
reading.facts, reading.exits, reading.draft_tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from skipstone.bundle import EncoderFacts, ModelFacts
from skipstone.errors import UsageError
from skipstone.exporters.checkpoint import Checkpoint, open_checkpoint
from skipstone.exporters.draft_material import DraftMaterial, SideFiles, write_side_files
from skipstone.exporters.exits import choose_exits, recorded_exits
from skipstone.exporters.facts import (
    check_context,
    check_disk_space,
    checkpoint_facts,
    encoder_facts,
    factored_away,
    hash_checkpoint,
    load_tokenizer,
    num_weights,
    planned_context,
)
from skipstone.exporters.formats import ExportOptions

_LONGEST = 2048  # of an encoder-decoder's texts, which sets no limit of its own
_DEFAULT_TEXT = 512
_BITS = 64.0  # of a weight, in all files that stand beside each other at the worst moment


@dataclass(frozen=True)
class Room:
    """Positions that a format plans K/V for.

    Attributes:
        default: of a decoder alone, where the user names none.
        least: those of the widest batch.
    """

    default: int
    least: int


@dataclass(frozen=True)
class Reading:
    """What was read.

    Attributes:
        checkpoint: the source.
        tokenizer: its tokenizer.
        facts: of its model; `facts.context_length` positions are planned for.
        num_weights: of the layers that are carried: those of pairs in the place of their product.
        exits: inner exits, of an encoder-decoder the decoder's.
        material: what drafting can be given.
        draft_tokens: token ids of the draft head's rows; None without inner exits.
        sha256: of the checkpoint.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    facts: ModelFacts
    num_weights: int
    exits: tuple[int, ...]
    material: DraftMaterial
    draft_tokens: NDArray[np.int32] | None
    sha256: str

    def write_side_files(self, folder: Path) -> SideFiles:
        """Write what lies in a bundle's folder beside its artefacts; see `draft_material.write_side_files`."""
        return write_side_files(self.material, self.draft_tokens, self.facts, self.tokenizer, folder)


def read_checkpoint(source: str, options: ExportOptions, scratch: Path, room: Room) -> Reading:
    """Read an input.

    Args:
        source: checkpoint folder or hub name.
        options: the user's.
        scratch: folder for intermediate files.
        room: what is planned for.

    Raises:
        CheckpointError: an input that cannot be exported.
        UsageError: exits, lengths or texts that do not fit it.
        ExportError: not enough disk space.
    """
    checkpoint = open_checkpoint(source)
    tokenizer = load_tokenizer(checkpoint)
    weights = num_weights(checkpoint)
    check_disk_space(scratch, weights, _BITS)
    encoder = encoder_facts(checkpoint, options.encoder_exits, options.max_source_length)
    context = _context_length(checkpoint.config, options.context_length, encoder, room)
    facts = checkpoint_facts(checkpoint, tokenizer, context, weights, encoder)
    recorded = recorded_exits(checkpoint.path, checkpoint.config)
    exits = choose_exits(options.exits, recorded, facts.num_layers)
    material = DraftMaterial.find(checkpoint.path, options.draft_text, tokenizer)
    return Reading(
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        facts=facts,
        num_weights=weights - factored_away(checkpoint),
        exits=exits,
        material=material,
        draft_tokens=material.choose_tokens(facts, options.draft_vocab_size) if exits else None,
        sha256=hash_checkpoint(checkpoint),
    )


def refuse_gguf(source: str, format: str) -> None:
    """Refuse a .gguf file where a checkpoint's layers are needed.

    Raises:
        UsageError: it is one.
    """
    if source.endswith(".gguf"):
        raise UsageError(
            f"{source}: --format {format} starts from a checkpoint",
            hint="pass the Hugging Face folder, or use --format gguf",
        )


def _context_length(config: Any, wanted: int | None, encoder: EncoderFacts | None, room: Room) -> int:
    """Positions to plan K/V for.

    Raises:
        UsageError: the model does not take so many, or they are fewer than the widest batch; or longer sources than are
            planned for.
    """
    if encoder is None:
        return planned_context(config, wanted, room.default, room.least)
    if encoder.max_source_length > _LONGEST:
        raise UsageError(
            f"--max-source-length {encoder.max_source_length}: at most {_LONGEST} are planned for",
            hint="an encoder's memory grows with the square of it; split longer texts",
        )
    return check_context(_DEFAULT_TEXT if wanted is None else wanted, room.least, _LONGEST)
