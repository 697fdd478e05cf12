"""The text that fixes the scales of activations, where a scheme rounds them so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from skipstone.bundle import hash_file
from skipstone.errors import UsageError
from skipstone.exporters.facts import read_text
from skipstone.exporters.formats.executorch.schemes import Scheme

MAX_TOKENS = 2048
_LEAST = 64


@dataclass(frozen=True)
class CalibrationText:
    """Token ids int64 [n], and the hash of the file they are from."""

    tokens: NDArray[np.int64]
    sha256: str

    def save(self, folder: Path) -> Path:
        """Write the token ids for another process."""
        file = folder / "calibration.npy"
        np.save(file, self.tokens)
        return file


def read_calibration(scheme: Scheme, file: Path | None, tokenizer: Tokenizer) -> CalibrationText | None:
    """The user's text (`--calibration`); None where the scheme needs none.

    Raises:
        UsageError: it is missing, not needed, cannot be read, or is too short.
    """
    if scheme.activations != "static":
        if file is not None:
            raise UsageError(
                f"--calibration {file}: --quantize {scheme.name} needs none",
                hint="leave it out, or use --quantize int8",
            )
        return None
    if file is None:
        raise UsageError(
            f"--quantize {scheme.name}: needs a calibration text", hint="pass --calibration TEXT-FILE"
        )
    tokens = tokenizer.encode(read_text(file, "--calibration"), add_special_tokens=False).ids
    if len(tokens) < _LEAST:
        raise UsageError(f"--calibration {file}: {len(tokens)} tokens, at least {_LEAST} are needed")
    return CalibrationText(np.array(tokens[:MAX_TOKENS], np.int64), hash_file(file))
