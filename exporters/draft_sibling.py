"""A smaller sibling of the exported model, put into the same bundle to draft for it.

The sibling is a checkpoint with the model's own vocabulary, say what `skipstone compress` made of it. It becomes a
bundle of its own in a folder of the model's, whole and without early exits: what it says is a draft, which the model
verifies.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from skipstone.bundle import MANIFEST_NAME, FileEntry, describe_file, open_bundle
from skipstone.errors import UsageError
from skipstone.exporters.checkpoint import Checkpoint, open_checkpoint
from skipstone.exporters.facts import load_tokenizer
from skipstone.runtimes.drafters.draft_model import check_vocabularies

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FOLDER = "draft"


def check_sibling(source: str | os.PathLike[str], sibling: str | os.PathLike[str]) -> None:
    """Refuse a sibling that cannot draft for a model, before anything is exported.

    Args:
        source: the model's checkpoint.
        sibling: its own.

    Raises:
        UsageError: a .gguf file on either side, or one of the two is an encoder-decoder and the other is not.
        VocabularyMismatchError: their tokens differ.
        CheckpointError: one cannot be read.
    """
    for path in (source, sibling):
        if os.fspath(path).endswith(".gguf"):
            raise UsageError(
                f"--draft {sibling}: {path} is a .gguf file, a checkpoint was expected",
                hint="export both, and pass the draft model's bundle to generate --assistant-model",
            )
    ours, theirs = open_checkpoint(source), open_checkpoint(sibling)
    if ours.is_encoder_decoder != theirs.is_encoder_decoder:
        kinds = [
            "an encoder-decoder" if one.is_encoder_decoder else "a decoder alone" for one in (theirs, ours)
        ]
        raise UsageError(
            f"--draft {sibling}: {kinds[0]}, and the model is {kinds[1]}",
            hint="pass a sibling of the model's kind",
        )
    check_vocabularies(_vocabulary(ours), _vocabulary(theirs), str(source), str(sibling))


def list_sibling(folder: Path) -> tuple[FileEntry, ...]:
    """The files of the draft model's bundle in a bundle's folder, as that one's manifest lists them."""
    inner = open_bundle(folder / FOLDER, verify_hashes=False)
    names = (MANIFEST_NAME, *(entry.path for entry in inner.manifest.files))
    return tuple(describe_file(folder, f"{FOLDER}/{name}") for name in names)


def _vocabulary(checkpoint: Checkpoint) -> Sequence[str]:
    """Token text by id, '' where the tokenizer has none."""
    tokenizer: Tokenizer = load_tokenizer(checkpoint)
    texts = {index: text for text, index in tokenizer.get_vocab(with_added_tokens=True).items()}
    return [texts.get(index, "") for index in range(checkpoint.config.vocab_size)]
