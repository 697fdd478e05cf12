"""What every format's exporter takes from a checkpoint beside its weights: facts, tokenizer, hash, needed space."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from skipstone.bundle import EncoderFacts, ModelFacts, hash_file
from skipstone.errors import CheckpointError, ExportError, UsageError
from skipstone.exporters.checkpoint import FACTORS_FILE, Checkpoint
from skipstone.exporters.exits import check_exits, recorded_encoder_exits

TOKENIZER_FILE = "tokenizer.json"
# The names that T5 checkpoints give their one table of embeddings.
SHARED_TABLES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
DEFAULT_LENGTH = 512  # of sources and texts, where a model sets no limit


def checkpoint_facts(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    context_length: int,
    parameters: int,
    encoder: EncoderFacts | None = None,
) -> ModelFacts:
    """What a runtime must know of a checkpoint's model.

    Args:
        checkpoint: the source.
        tokenizer: its tokenizer.
        context_length: positions.
        parameters: number of stored weights.
        encoder: of an encoder-decoder, see `encoder_facts`; the rest then describes the decoder.

    Raises:
        CheckpointError: the tokenizer can give ids that the model has no embedding for. Fewer tokens than embeddings are
            fine: vocabularies are often padded.
    """
    config = checkpoint.config
    tokens = tokenizer.get_vocab_size()
    if tokens > config.vocab_size:
        raise CheckpointError(
            f"{checkpoint.path / TOKENIZER_FILE}: {tokens} tokens, the model has {config.vocab_size}",
            hint="use the tokenizer that the model was trained with",
        )
    generation = checkpoint.json("generation_config.json")
    eos = generation.get("eos_token_id", config.eos_token_id)
    # A decoder's text begins with what the encoder's facts say, whatever the tokenizer puts before a source.
    bos = generation.get("bos_token_id", config.bos_token_id) if encoder is None else None
    return ModelFacts(
        name=checkpoint.name,
        architecture=checkpoint.architecture,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers if encoder is None else config.num_decoder_layers,
        vocab_size=config.vocab_size,
        context_length=context_length,
        parameters=parameters,
        bos_token_id=bos,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        add_bos=adds_bos(tokenizer, bos),
        tied_embeddings=bool(config.tie_word_embeddings) if encoder is None else not has_own_head(checkpoint),
        chat_template=chat_template_of(checkpoint),
        encoder=encoder,
    )


def planned_context(config: Any, wanted: int | None, default: int, least: int) -> int:
    """Positions to plan a decoder's K/V for: within what it was trained for, and a sliding window that sees all of them.

    Args:
        config: transformers' configuration.
        wanted: what the user asked for; None: `default`, or what the model takes if that is less.
        default: see there.
        least: positions at least, those of the widest batch.

    Raises:
        UsageError: the model does not take so many, or they are too few.
    """
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    limit = int(min(config.max_position_embeddings, window or config.max_position_embeddings))
    return check_context(min(limit, default) if wanted is None else wanted, least, limit)


def check_context(context: int, least: int, limit: int) -> int:
    """The number of positions, if it lies within the bounds.

    Raises:
        UsageError: it does not.
    """
    if not least <= context <= limit:
        raise UsageError(f"--context-length {context}: this model takes {least} to {limit}")
    return context


def encoder_facts(
    checkpoint: Checkpoint, exits: Sequence[int] | None, max_source_length: int | None
) -> EncoderFacts | None:
    """What a runtime must know of a checkpoint's encoder, None for a decoder alone.

    Args:
        checkpoint: the source.
        exits: layer counts at which it can stop; None: those recorded with the checkpoint, or none.
        max_source_length: tokens of a source at most; None: 512.

    Raises:
        UsageError: exits that the encoder does not have, a length that cannot be, or either for a decoder alone.
        CheckpointError: no token is named that the decoder's text begins with.
    """
    if not checkpoint.is_encoder_decoder:
        _refuse_encoder_options(checkpoint, exits, max_source_length)
        return None
    config = checkpoint.config
    recorded = recorded_encoder_exits(checkpoint.path, config) or ()
    length = DEFAULT_LENGTH if max_source_length is None else max_source_length
    if length < 1:
        raise UsageError(f"--max-source-length {length}: at least 1 was expected")
    start = checkpoint.json("generation_config.json").get("decoder_start_token_id")
    start = config.decoder_start_token_id if start is None else start
    if not isinstance(start, int) or not 0 <= start < config.vocab_size:
        raise CheckpointError(
            f"{checkpoint.path}/config.json: decoder_start_token_id is {start}, a token id was expected",
            hint="T5's own is that of its padding token, 0",
        )
    return EncoderFacts(
        num_layers=config.num_hidden_layers,
        exits=check_exits(
            recorded if exits is None else exits, config.num_hidden_layers, option="--encoder-exits"
        ),
        max_source_length=length,
        start_token_id=start,
    )


def has_own_head(checkpoint: Checkpoint) -> bool:
    """Whether a T5's head differs from its embeddings; transformers goes by the stored weights too, since the
    configuration's `tie_word_embeddings` has come to mean whether the head's input is scaled.
    """
    head = "lm_head.weight"
    if head not in checkpoint.tensor_files:
        return False
    shared = next((name for name in SHARED_TABLES if name in checkpoint.tensor_files), None)
    return shared is None or not checkpoint.tensor(head).equal(checkpoint.tensor(shared))


def _refuse_encoder_options(
    checkpoint: Checkpoint, exits: Sequence[int] | None, max_source_length: int | None
) -> None:
    for option, value in (("--encoder-exits", exits), ("--max-source-length", max_source_length)):
        if value is not None:
            raise UsageError(f"{option}: {checkpoint.architecture} is a decoder alone", hint="leave it out")


def adds_bos(tokenizer: Tokenizer, bos_token_id: int | None) -> bool:
    """Whether encoding a text puts the beginning-of-sequence token in front."""
    return bos_token_id is not None and tokenizer.encode("a").ids[:1] == [bos_token_id]


def chat_template_of(checkpoint: Checkpoint) -> str | None:
    """The checkpoint's chat template: chat_template.jinja, or tokenizer_config.json's (its default one)."""
    file = checkpoint.path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = checkpoint.json("tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer.json.

    Raises:
        CheckpointError: it is missing or cannot be read.
    """
    file = checkpoint.path / TOKENIZER_FILE
    if not file.is_file():
        raise CheckpointError(f"{file}: not found", hint="save the tokenizer with save_pretrained(...)")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(
            f"{file}: not a readable tokenizer: {error}", hint="save the tokenizer again"
        ) from error


def num_weights(checkpoint: Checkpoint) -> int:
    """Number of stored weights.

    Raises:
        CheckpointError: a weight file is missing.
    """
    from safetensors import safe_open

    total = 0
    for file in set(checkpoint.tensor_files.values()):
        if not file.is_file():
            raise CheckpointError(f"{file}: not found", hint="download the checkpoint again")
        with safe_open(file, framework="np") as stored:
            total += sum(int(np.prod(stored.get_slice(name).get_shape())) for name in stored.keys())  # noqa: SIM118
    return total


def factored_away(checkpoint: Checkpoint) -> int:
    """Weights that a checkpoint's factors save, where a format carries them in the place of their products.

    Raises:
        CheckpointError: the factors cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    file = checkpoint.path / FACTORS_FILE
    if not file.is_file():
        return 0
    try:
        with safe_open(file, framework="np") as stored:
            shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: not readable as safetensors: {error}", hint="compress the checkpoint again"
        ) from error
    whole = sum(
        shape[0] * shapes.get(f"{name.removesuffix(':up')}:down", (0, 0))[1]
        for name, shape in shapes.items()
        if name.endswith(":up")
    )
    return int(whole - sum(np.prod(shape) for shape in shapes.values()))


def check_disk_space(folder: Path, weights: int, bits: float) -> None:
    """Refuse an export that the disk cannot take.

    Args:
        folder: the unfinished bundle's scratch folder.
        weights: number of them.
        bits: per weight, of all files that stand beside each other at the worst moment.

    Raises:
        ExportError: too little is free.
    """
    needed, free = int(weights * bits / 8), shutil.disk_usage(folder).free
    if needed > free:
        raise ExportError(
            f"{folder.parent.parent}: {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB are needed",
            hint="free space or choose another --output folder",
        )


def hash_checkpoint(checkpoint: Checkpoint) -> str:
    """One hash over the configuration, the weights and their factors, file by file in order of name."""
    beside = (checkpoint.path / name for name in ("config.json", TOKENIZER_FILE))
    factors = checkpoint.path / FACTORS_FILE
    files = sorted({*checkpoint.tensor_files.values(), *beside, *((factors,) if factors.is_file() else ())})
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {hash_file(file)}\n".encode())
    return digest.hexdigest()


def read_text(file: Path, flag: str) -> str:
    """A text file the user named with `flag`.

    Raises:
        UsageError: it cannot be read as UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{flag} {file}: cannot be read as text: {error}", hint="pass a UTF-8 text file"
        ) from error
