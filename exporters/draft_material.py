"""What drafting needs beside the model: the draft head's tokens and the n-gram table, from text or as recorded."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from skipstone.bundle import ModelFacts
from skipstone.errors import CheckpointError
from skipstone.exporters.draft_table import DRAFT_TABLE_FILE, count_table
from skipstone.exporters.draft_vocabulary import (
    FREQUENCIES_FILE,
    choose_tokens,
    count_tokens,
    read_frequencies,
)
from skipstone.exporters.facts import TOKENIZER_FILE, read_text
from skipstone.runtimes.drafters.table import NGramTable

VOCABULARY_FILE = "draft-vocabulary.i32"


@dataclass(frozen=True)
class DraftMaterial:
    """Where the draft head's tokens and the table come from.

    Attributes:
        text: token ids to count in, which goes before what is recorded; None: no text was given.
        frequencies: token id → count, as recorded with the checkpoint.
        table: recorded n-gram table.
    """

    text: list[int] | None = None
    frequencies: Mapping[int, int] | None = None
    table: Path | None = None

    @staticmethod
    def find(folder: Path | None, text: Path | None, tokenizer: Tokenizer) -> DraftMaterial:
        """What a checkpoint folder (None: there is none) has recorded, and the user's text (`--draft-text`)."""
        tokens = None
        if text is not None:
            tokens = list(tokenizer.encode(read_text(text, "--draft-text"), add_special_tokens=False).ids)
        if folder is None:
            return DraftMaterial(tokens)
        frequencies, table = folder / FREQUENCIES_FILE, folder / DRAFT_TABLE_FILE
        return DraftMaterial(
            text=tokens,
            frequencies=read_frequencies(frequencies) if frequencies.is_file() else None,
            table=table if table.is_file() else None,
        )

    def choose_tokens(self, facts: ModelFacts, size: int | None) -> NDArray[np.int32]:
        """Token ids of the draft head's rows, ascending; `size` as in `draft_vocabulary.choose_tokens`."""
        frequencies = self.frequencies if self.text is None else count_tokens(self.text)
        return choose_tokens(facts.vocab_size, size, frequencies, facts.eos_token_ids)

    def write_table(self, facts: ModelFacts, folder: Path) -> str | None:
        """Write the n-gram table into a bundle's folder; its name, or None where there is nothing to count in.

        Raises:
            CheckpointError: the recorded table belongs to another vocabulary.
        """
        if self.text is not None:
            count_table(np.array(self.text, np.int64), facts.vocab_size).save(folder / DRAFT_TABLE_FILE)
            return DRAFT_TABLE_FILE
        if self.table is None:
            return None
        recorded = NGramTable.load(self.table)
        if recorded.vocab_size != facts.vocab_size:
            raise CheckpointError(
                f"{self.table}: counted for {recorded.vocab_size} tokens, the model has {facts.vocab_size}",
                hint="remove the file or pass --draft-text",
            )
        shutil.copyfile(self.table, folder / DRAFT_TABLE_FILE)
        return DRAFT_TABLE_FILE


@dataclass(frozen=True)
class SideFiles:
    """Names of the files that lie in a bundle beside its artefacts.

    Attributes:
        vocabulary: token ids of the draft head's rows, little-endian int32; None: there is no draft head.
        draft_table: the n-gram table; None where there was nothing to count in.
    """

    vocabulary: str | None
    draft_table: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, the tokenizer's too."""
        found = (self.vocabulary, self.draft_table, TOKENIZER_FILE)
        return tuple(name for name in found if name is not None)


def write_side_files(
    material: DraftMaterial,
    draft_tokens: NDArray[np.int32] | None,
    facts: ModelFacts,
    tokenizer: Tokenizer,
    folder: Path,
) -> SideFiles:
    """Write the draft head's token ids, the n-gram table and the tokenizer into a bundle's folder.

    Args:
        material: what the table comes from.
        draft_tokens: token ids of the draft head's rows; None: there is no draft head.
        facts: of the model.
        tokenizer: its tokenizer.
        folder: the bundle's.

    Raises:
        CheckpointError: the recorded table belongs to another vocabulary.
    """
    table = material.write_table(facts, folder)
    tokenizer.save(str(folder / TOKENIZER_FILE))
    if draft_tokens is None:
        return SideFiles(None, table)
    (folder / VOCABULARY_FILE).write_bytes(draft_tokens.astype("<i4").tobytes())
    return SideFiles(VOCABULARY_FILE, table)
