"""Folders that take long to make, made once per run, whichever of pytest-xdist's workers wants them first.

    folder = once(tmp_path_factory, "coder/q8_0", lambda output: export_checkpoint(checkpoint, output, quantize="q8_0"))

Every worker gets a copy of its own, of links to the same files: what a test lays beside them (a measured curve, say) no
other worker sees. The files themselves are not to be changed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = "PYTEST_XDIST_WORKER"


def once(folders: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` wrote, here or in another worker.

    Args:
        folders: pytest's.
        name: of what is made, the same for the same; its last part is the folder's name.
        make: writes a folder that is not there yet.
    """
    base = folders.getbasetemp()
    mine = base / "once" / name
    if mine.exists():
        return mine
    mine.parent.mkdir(parents=True, exist_ok=True)
    if WORKER not in os.environ:
        _make(mine, make)
        return mine
    made = base.parent / "once" / name
    made.parent.mkdir(parents=True, exist_ok=True)
    with made.with_name(f"{made.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given up when the worker dies, too
        if not made.exists():
            _make(made, make)
    shutil.copytree(made, mine, copy_function=os.link)
    return mine


def _make(target: Path, make: Callable[[Path], object]) -> None:
    """Write beside the target, under the same last name, and rename."""
    beside = target.with_name(f"{target.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    make(beside / target.name)
    (beside / target.name).replace(target)
    beside.rmdir()
