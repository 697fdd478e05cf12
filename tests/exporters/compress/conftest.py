"""Texts to learn from, and a cache of the test's own."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

TEXT = (
    "def read(path, limit):\n    return open(path).read()[: limit - 1]\n\nA river is never the same.\n" * 12
)
_PAIRS = [
    {"source": "Their is a eror in teh text.", "target": "There is an error in the text."},
    {"source": "A river are never quite same.", "target": "A river is never quite the same."},
    {"source": "He go to school", "target": "He goes to school."},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder that finished steps are kept in."""
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compress"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A calibration text for a decoder."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A calibration text for an encoder-decoder."""
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, _PAIRS)), encoding="utf-8")
    return tmp_path / "pairs.jsonl"
