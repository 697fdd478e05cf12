"""Programs that were lowered before.

Lowering takes from seconds to minutes, so finished programs are kept in the user's cache folder under a hash of all
that went in; the oldest are dropped beyond a few gigabytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from skipstone.runtimes.user_cache import cache_folder

_CACHE_BYTES = 8 << 30
# what a program depends on, of this package
_MADE_BY = (
    "calibration",
    "codes",
    "coreml",
    "lowering",
    "methods",
    "modules",
    "schemes",
    "targets",
    "vulkan",
)


def cache_key(**ingredients: object) -> str:
    """Hash of everything a program is made from, this package's own lowering included."""
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True, default=str).encode())
    for name in _MADE_BY:
        digest.update((Path(__file__).with_name(f"{name}.py")).read_bytes())
    digest.update((Path(__file__).parents[2] / "segments.py").read_bytes())
    return digest.hexdigest()


def fetch(key: str, output: Path) -> dict[str, float] | None:
    """A kept program, copied to `output`, and what `lower` returned for it; None where there is none."""
    stored = _folder() / f"{key}.pte"
    try:
        delegated: dict[str, float] = json.loads(stored.with_suffix(".json").read_text(encoding="utf-8"))
        shutil.copyfile(stored, output)
        os.utime(stored)
    except (OSError, ValueError):
        return None
    return delegated


def keep(key: str, program: Path, delegated: dict[str, float]) -> None:
    """Keep a program for the next export of the same; a disk that refuses is no error."""
    folder = _folder()
    stored = folder / f"{key}.pte"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        draft = stored.with_suffix(f".{os.getpid()}.part")
        shutil.copyfile(program, draft)
        draft.replace(stored)
        stored.with_suffix(".json").write_text(json.dumps(delegated), encoding="utf-8")
        _drop_oldest(folder)


def _drop_oldest(folder: Path) -> None:
    programs = sorted(folder.glob("*.pte"), key=lambda file: file.stat().st_mtime, reverse=True)
    total = 0
    for file in programs:
        total += file.stat().st_size
        if total > _CACHE_BYTES:
            file.unlink(missing_ok=True)
            file.with_suffix(".json").unlink(missing_ok=True)


def _folder() -> Path:
    return cache_folder() / "executorch"
