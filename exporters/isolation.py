"""Running a function in a process of its own: a crash of a C library becomes an ExportError.

    >>> run_isolated("skipstone.exporters.formats.gguf.library:save_logits", source="a.gguf", tokens=[1], …)

Arguments and results are JSON. Errors raised on purpose in the child are raised again, of the same class.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from skipstone import errors
from skipstone.errors import ExportError, SkipstoneError
from skipstone.runtimes.cores import num_cores

_SMALL = 200_000_000
_TAIL = 400


def run_isolated(function: str, /, **arguments: Any) -> Any:
    """Call `module:function` with keyword arguments in a fresh interpreter.

    Returns:
        What the function returned, through JSON.

    Raises:
        ExportError: the process died; says how and shows the last lines that it wrote.
        SkipstoneError: whatever the function raised of that kind.
    """
    with tempfile.TemporaryDirectory(prefix="skipstone-") as folder:
        answer = Path(folder) / "answer.json"
        request = json.dumps({"function": function, "arguments": arguments, "answer": str(answer)})
        # The crash handler of ggml would start a debugger and print its own call stack over the message.
        environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
        process = subprocess.run(
            [sys.executable, "-m", "skipstone.exporters.isolation"],
            input=request,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            check=False,
        )
        if process.returncode != 0 or not answer.is_file():
            name = function.rsplit(":", 1)[-1]
            raise ExportError(
                f"{name}: the process {_fate(process.returncode)}: {_tail(process.stderr)}",
                hint="the files may be damaged, or this build of the engine cannot run them",
            )
        return _read(json.loads(answer.read_text(encoding="utf-8")))


def num_threads(num_bytes: int) -> int:
    """One per core this process may use, but a single one for a small model: there, waiting for each other
    costs more.
    """
    if num_bytes < _SMALL:
        return 1
    return num_cores()


def _read(answer: dict[str, Any]) -> Any:
    if "error" not in answer:
        return answer["result"]
    kind = getattr(errors, answer["error"], SkipstoneError)
    raise kind(answer["message"], hint=answer["hint"])


def _fate(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def _tail(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines)[-_TAIL:] or "it wrote nothing"


def _serve() -> None:
    """The child: one request on standard input, one answer in a file."""
    request = json.load(sys.stdin)
    module, name = request["function"].split(":")
    try:
        result = getattr(importlib.import_module(module), name)(**request["arguments"])
        answer: dict[str, Any] = {"result": result}
    except SkipstoneError as error:
        answer = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    _serve()
