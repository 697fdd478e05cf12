"""What every format's exporter takes from a checkpoint beside its weights: facts, tokenizer, hash, needed space."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from skipstone.bundle import ModelFacts, hash_file
from skipstone.errors import CheckpointError, ExportError, UsageError
from skipstone.exporters.checkpoint import Checkpoint

TOKENIZER_FILE = "tokenizer.json"


def checkpoint_facts(
    checkpoint: Checkpoint, tokenizer: Tokenizer, context_length: int, parameters: int
) -> ModelFacts:
    """What a runtime must know of a checkpoint's model.

    Args:
        checkpoint: the source.
        tokenizer: its tokenizer.
        context_length: positions.
        parameters: number of stored weights.

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
    bos = generation.get("bos_token_id", config.bos_token_id)
    return ModelFacts(
        name=checkpoint.name,
        architecture=checkpoint.architecture,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        context_length=context_length,
        parameters=parameters,
        bos_token_id=bos,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        add_bos=adds_bos(tokenizer, bos),
        tied_embeddings=bool(config.tie_word_embeddings),
        chat_template=chat_template_of(checkpoint),
    )


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
    """One hash over the configuration and the weights, file by file in order of name."""
    files = sorted(
        {*checkpoint.tensor_files.values(), checkpoint.path / "config.json", checkpoint.path / TOKENIZER_FILE}
    )
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
