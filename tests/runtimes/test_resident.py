"""Resident memory of a process, against what it has just taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import skipstone.runtimes.resident as resident_module
from skipstone.runtimes.resident import Resident, own_peak_bytes, own_resident

MEGABYTES = 1 << 20


def grown(script: str, *arguments: str) -> Resident:
    """What a fresh process grows by while it runs a line."""
    code = (
        "import sys, mmap; from skipstone.runtimes.resident import own_resident\n"
        f"before = own_resident()\n{script}\nchange = own_resident() - before\n"
        "print(change.private, change.mapped)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return Resident(*map(int, done.stdout.split()))


def test_allocated_memory_is_private() -> None:
    found = grown("block = bytearray(b'x' * (64 << 20))")
    assert 60 * MEGABYTES < found.private < 80 * MEGABYTES
    assert found.mapped < 8 * MEGABYTES


def test_a_file_that_is_read_through_a_map_is_mapped(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x" * (64 * MEGABYTES))
    script = (
        "stream = open(sys.argv[1], 'rb'); view = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "total = sum(view[at] for at in range(0, len(view), 4096))"
    )
    found = grown(script, str(file))
    assert 60 * MEGABYTES < found.mapped < 80 * MEGABYTES
    assert found.private < 8 * MEGABYTES


def test_the_peak_is_no_less_than_what_is_resident_now() -> None:
    assert own_peak_bytes() >= 0.9 * own_resident().total


def test_changes_add_up() -> None:
    before, after = Resident(10, 3), Resident(15, 4)
    assert after - before == Resident(5, 1)
    assert before + (after - before) == after
    assert after.total == 19


def test_without_the_kernels_figures_the_peak_stands_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import resource

    monkeypatch.setattr(resident_module, "_STATUS", tmp_path / "none")
    unit = 1 if sys.platform == "darwin" else 1024
    expected = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    assert expected <= own_resident().private <= expected * 1.1
    assert own_resident().mapped == 0
