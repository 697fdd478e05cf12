"""Models as finished steps left them: a run that was cut off, or another recipe with the same beginning, starts there.

They lie in the user's cache folder under a hash of all that they came from; the oldest go beyond a few gigabytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from skipstone.bundle import hash_file
from skipstone.exporters.compress.recipe import options_of
from skipstone.exporters.compress.record import RECORD_FILE
from skipstone.exporters.compress.steps import Step
from skipstone.runtimes.user_cache import cache_folder

_CACHE_BYTES = 8 << 30
_LIBRARIES = ("torch", "torchao", "transformers")


def step_keys(steps: Sequence[Step], **ingredients: object) -> list[str]:
    """By step, a hash of everything that the model after it comes from, this package's own code included.

    Args:
        steps: of the recipe, in order.
        ingredients: what else goes in: hashes of source and texts, the target.
    """
    keys: list[str] = []
    key = _hash({**ingredients, "code": _code(), "versions": _versions()})
    for step in steps:
        read = [hash_file(file) for file in step.reads]
        key = _hash({"after": key, "step": options_of(step), "reads": read})
        keys.append(key)
    return keys


def fetch(key: str) -> Path | None:
    """The folder of a kept model, not to be changed; None where there is none."""
    folder = kept_models() / key
    if not (folder / RECORD_FILE).is_file():
        return None
    with contextlib.suppress(OSError):
        os.utime(folder)
    return folder


def keep(key: str, write: Callable[[Path], None]) -> None:
    """Keep a model for the next run; a disk that refuses is no error."""
    models = kept_models()
    with contextlib.suppress(OSError):
        models.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{key[:16]}.", dir=models))
        try:
            write(draft)
            draft.rename(models / key)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        _drop_oldest(models)


def kept_models() -> Path:
    """Where finished steps are kept."""
    return cache_folder() / "compress"


def _drop_oldest(models: Path) -> None:
    kept = [folder for folder in models.iterdir() if (folder / RECORD_FILE).is_file()]
    total = 0
    for folder in sorted(kept, key=lambda folder: folder.stat().st_mtime, reverse=True):
        total += sum(file.stat().st_size for file in folder.iterdir())
        if total > _CACHE_BYTES:
            shutil.rmtree(folder, ignore_errors=True)


@cache
def _code() -> str:
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


@cache
def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _hash(ingredients: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True, default=str).encode()).hexdigest()
