"""Where what was measured of a bundle is kept: beside it, in `DIR/.skipstone`, or in the user's cache folder where DIR
cannot be written. None of it is among the bundle's hashed files.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from skipstone.bundle import Bundle
from skipstone.runtimes.user_cache import cache_folder

_FOLDER = ".skipstone"
_Content = TypeVar("_Content", bound=BaseModel)


def artefacts_hash(bundle: Bundle) -> str:
    """sha256, in hex, over the exits and the names and hashes of a bundle's files."""
    manifest = bundle.manifest
    files = sorted((entry.path, entry.sha256) for entry in manifest.files)
    return hashlib.sha256(json.dumps([list(manifest.exits), files]).encode()).hexdigest()


def folders(bundle: Bundle) -> tuple[Path, Path]:
    """Where to look, in this order; they need not be there."""
    return bundle.path / _FOLDER, cache_folder() / "costs" / artefacts_hash(bundle)[:16]


def kept_contents(bundle: Bundle, name: str, kind: type[_Content]) -> Iterator[tuple[Path, _Content]]:
    """Files of a name that hold what is expected, in the folders' order; damaged and newer ones count as none."""
    for folder in folders(bundle):
        try:
            yield folder / name, kind.model_validate_json((folder / name).read_bytes())
        except (OSError, ValidationError):
            continue


def keep_text(bundle: Bundle, name: str, text: str) -> Path | None:
    """Keep a file in the first folder that takes it.

    Returns:
        Its path; None where neither can be written.
    """
    for folder in folders(bundle):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return _write(folder / name, text)
        except OSError:
            continue
    return None


def _write(path: Path, text: str) -> Path:
    """Write a file as a whole or not at all.

    Raises:
        OSError: nothing is left behind.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    draft = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        draft.chmod(0o644)
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    return path
