"""Running the command line in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Done = subprocess.CompletedProcess[str]


def skipstone(*arguments: str | Path, limit: Callable[[], None] | None = None, **environment: str) -> Done:
    """Run `skipstone ARGUMENTS`; `limit` runs in the child before it starts."""
    return subprocess.run(
        [sys.executable, "-c", "from skipstone.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=limit,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1"} | environment,
        check=False,
    )


def assert_refused(done: Done, *words: str) -> None:
    """Exit code 2 and one line on standard error that has the words, and nothing else anywhere."""
    assert done.returncode == 2, f"exit code {done.returncode}: {done.stderr}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert done.stdout == ""
