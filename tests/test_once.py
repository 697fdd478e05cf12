"""What takes long to make is made once, and no worker sees what another lays beside it."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from tests.once import WORKER, once


class Folders:
    """As pytest's, of one worker."""

    def __init__(self, root: Path, worker: str) -> None:
        self._base = root / f"popen-{worker}"
        self._base.mkdir(exist_ok=True)

    def getbasetemp(self) -> Path:
        return self._base


def make(folder: Path) -> None:
    folder.mkdir()
    time.sleep(0.1)
    (folder / "maker").write_text(str(os.getpid()))


def want(root: Path, worker: str) -> None:
    os.environ[WORKER] = worker
    folder = once(Folders(root, worker), "coder/q8_0", make)  # type: ignore[arg-type]
    (folder / "curve").write_text(worker)


def test_workers_that_want_the_same_at_once_get_what_one_of_them_made(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=want, args=(tmp_path, name)) for name in ("gw0", "gw1", "gw2")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    folders = [tmp_path / f"popen-{name}" / "once" / "coder" / "q8_0" for name in ("gw0", "gw1", "gw2")]
    assert len({(folder / "maker").read_text() for folder in folders}) == 1
    assert [(folder / "curve").read_text() for folder in folders] == ["gw0", "gw1", "gw2"]
    assert not (tmp_path / "once" / "coder" / "q8_0" / "curve").exists()


@pytest.mark.parametrize("worker", [None, "gw0"])
def test_what_failed_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: str | None
) -> None:
    if worker is None:
        monkeypatch.delenv(WORKER, raising=False)
    else:
        monkeypatch.setenv(WORKER, worker)
    folders = Folders(tmp_path, "gw0")

    def fail(folder: Path) -> None:
        folder.mkdir()
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        once(folders, "kind/name", fail)  # type: ignore[arg-type]
    found = once(folders, "kind/name", make)  # type: ignore[arg-type]
    assert [file.name for file in found.iterdir()] == ["maker"]
    assert once(folders, "kind/name", fail) == found  # type: ignore[arg-type]
