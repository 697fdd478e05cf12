"""Programs kept for the next export."""

from pathlib import Path

import pytest

from skipstone.exporters.formats.executorch import program_cache


def test_the_oldest_programs_go_when_the_cache_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path))
    monkeypatch.setattr(program_cache, "_CACHE_BYTES", 25)
    program = tmp_path / "model.pte"
    program.write_bytes(b"0123456789")
    for key in ("a", "b", "c"):
        program_cache.keep(key, program, {"head": 0.5})
    kept = sorted(file.name for file in (tmp_path / "executorch").iterdir())
    assert len([name for name in kept if name.endswith(".pte")]) == 2
    assert program_cache.fetch("missing", tmp_path / "out.pte") is None
    found = [key for key in "abc" if program_cache.fetch(key, tmp_path / "out.pte") == {"head": 0.5}]
    assert len(found) == 2
