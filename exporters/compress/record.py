"""What was done to a checkpoint, in files beside its weights, and whether codes are fixed. Without torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from skipstone.bundle import Compression
from skipstone.errors import CheckpointError

RECORD_FILE, QUANTIZATION_FILE = "compression.json", "quantization.json"


def has_codes(folder: Path) -> bool:
    """Whether the codes of a checkpoint's weights are fixed (`skipstone.exporters.compress.folder.read_codes`)."""
    return (folder / QUANTIZATION_FILE).is_file()


def write_record(record: Compression, folder: Path) -> None:
    """Write compression.json."""
    (folder / RECORD_FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path) -> Compression | None:
    """What was done to the checkpoint in a folder; None where it has no record.

    Raises:
        CheckpointError: compression.json is something else.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        return None
    try:
        return Compression.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"{file}: not a record of compression: {error}", hint="remove the file, or compress again"
        ) from error
