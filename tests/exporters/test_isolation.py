"""Functions in a process of their own: results, errors and crashes."""

import ctypes
import os
import signal

import pytest

from skipstone.errors import EngineError, ExportError
from skipstone.exporters.isolation import run_isolated


def add(left: int, right: int) -> dict[str, int]:
    return {"sum": left + right, "process": os.getpid()}


def refuse() -> None:
    raise EngineError("no such graph", hint="try another")


def crash() -> None:
    ctypes.string_at(0)


def abort() -> None:
    os.write(2, b"GGML_ASSERT(n > 0) failed\n")
    os.kill(os.getpid(), signal.SIGABRT)


def leave() -> None:
    os._exit(7)


def call(name: str, **arguments: object) -> object:
    return run_isolated(f"tests.exporters.test_isolation:{name}", **arguments)


def test_the_result_comes_from_another_process() -> None:
    answer = call("add", left=2, right=3)
    assert isinstance(answer, dict)
    assert answer["sum"] == 5
    assert answer["process"] != os.getpid()


def test_an_error_raised_on_purpose_is_raised_again() -> None:
    with pytest.raises(EngineError, match=r"no such graph \(try another\)"):
        call("refuse")


def test_a_segmentation_fault_is_an_error_that_names_the_signal() -> None:
    with pytest.raises(ExportError, match="crash: the process was killed by SIGSEGV"):
        call("crash")


def test_an_abort_shows_what_the_library_wrote() -> None:
    with pytest.raises(ExportError, match=r"SIGABRT: .*GGML_ASSERT\(n > 0\) failed"):
        call("abort")


def test_an_exit_without_an_answer_is_an_error_with_its_status() -> None:
    with pytest.raises(ExportError, match="exit status 7"):
        call("leave")
