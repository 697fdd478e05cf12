"""A program's first opening in a process of its own: one that dies is told of, one that lives is remembered."""

from __future__ import annotations

from pathlib import Path

import pytest

from skipstone.bundle import Bundle
from skipstone.errors import BundleError
from skipstone.runtimes.engines.executorch import rehearsal

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the marks of an empty cache lie."""
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trust"


def test_a_sound_program_is_rehearsed_once(
    tiny_executorch_bundle: Bundle, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsal.rehearse(tiny_executorch_bundle)
    assert len(list(marks.iterdir())) == 1
    monkeypatch.setattr(rehearsal, "_CHILD", "import os; os.abort()")
    rehearsal.rehearse(tiny_executorch_bundle)


def test_a_program_that_kills_its_process_is_refused_and_not_remembered(
    tiny_executorch_bundle: Bundle, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "_CHILD", "import os; os.abort()")
    for _ in range(2):
        with pytest.raises(BundleError, match=r"model\.pte: ExecuTorch dies of it \(SIGABRT\)"):
            rehearsal.rehearse(tiny_executorch_bundle)
    assert not marks.exists()


def test_what_the_rehearsal_refuses_is_left_to_the_caller(
    tiny_executorch_bundle: Bundle, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller meets the same error, with its reason; a process that could not start is no fault of the program's."""
    for status in (3, 1):
        monkeypatch.setattr(rehearsal, "_CHILD", f"import sys; sys.exit({status})")
        rehearsal.rehearse(tiny_executorch_bundle)
    assert not marks.exists()


def test_a_cache_that_cannot_be_written_is_no_error(
    tiny_executorch_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(rehearsal, "_CHILD", "")
    rehearsal.rehearse(tiny_executorch_bundle)
