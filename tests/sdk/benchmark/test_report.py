"""Writing a report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from skipstone.benchmark.report import check_writable, this_machine, write_json
from skipstone.errors import UsageError

FULL_DISK = """
import resource, sys
from pathlib import Path
from skipstone.benchmark.report import write_json
from skipstone.errors import UsageError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_json(Path(sys.argv[1]), {"text": "x" * 100_000})
except UsageError as error:
    print(error)
"""


def test_a_report_is_written_as_json(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", {"rows": [1, "é"]})
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == {"rows": [1, "é"]}
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_full_disk_leaves_the_old_report_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "r.json"
    target.write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(target)], capture_output=True, text=True, check=True
    )
    assert "r.json: cannot be written" in done.stdout
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_place_that_cannot_be_written_is_refused_beforehand(tmp_path: Path) -> None:
    check_writable(tmp_path / "r.json")
    for wrong in (tmp_path, tmp_path / "no" / "r.json"):
        with pytest.raises(UsageError, match="cannot be written"):
            check_writable(wrong)


def test_the_machine_is_described() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.processor
    assert machine.engine.startswith("llama-cpp-python 0.")
