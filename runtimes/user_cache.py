"""Where measurements and lowered programs are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$SKIPSTONE_CACHE`, or skipstone/ in the platform's user cache."""
    override = os.environ.get("SKIPSTONE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(override) if override else Path(base) / "skipstone"
