"""Available memory, against files as the kernel writes them."""

from pathlib import Path

import pytest

from skipstone.runtimes.host_memory import available_bytes

MEMINFO = "MemTotal:  8000 kB\nMemFree:  100 kB\nMemAvailable:  5000 kB\n"


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    (tmp_path / "meminfo").write_text(MEMINFO)
    return tmp_path / "meminfo"


def container(tmp_path: Path, limit: str, *, version: int = 2) -> Path:
    """200,000 bytes used, of them 50,000 by files that can be dropped."""
    folder = tmp_path if version == 2 else tmp_path / "memory"
    folder.mkdir(exist_ok=True)
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    for name, text in zip(names, (limit, "200000"), strict=True):
        (folder / name).write_text(text + "\n")
    (folder / "memory.stat").write_text("anon 150000\ninactive_file 40000\nactive_file 10000\n")
    return tmp_path


def test_a_machine_without_containers_has_what_the_kernel_says(meminfo: Path, tmp_path: Path) -> None:
    assert available_bytes(meminfo, tmp_path / "none") == 5_120_000


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts_where_it_is_lower(meminfo: Path, tmp_path: Path, version: int) -> None:
    assert available_bytes(meminfo, container(tmp_path, "1000000", version=version)) == 850_000
    assert available_bytes(meminfo, container(tmp_path, "9223372036854771712", version=version)) == 5_120_000


def test_a_container_that_is_full_has_nothing_left(meminfo: Path, tmp_path: Path) -> None:
    assert available_bytes(meminfo, container(tmp_path, "100000")) == 0


def test_a_container_without_a_limit_has_the_machines(meminfo: Path, tmp_path: Path) -> None:
    assert available_bytes(meminfo, container(tmp_path, "max")) == 5_120_000


def test_a_system_that_does_not_tell_is_not_guessed_at(tmp_path: Path) -> None:
    assert available_bytes(tmp_path / "none", tmp_path) is None
    (tmp_path / "odd").write_text("MemTotal: 8000 kB\n")
    assert available_bytes(tmp_path / "odd", tmp_path) is None


def test_this_machines_figure_is_plausible() -> None:
    found = available_bytes()
    assert found is None or 10_000_000 < found < 1 << 50
