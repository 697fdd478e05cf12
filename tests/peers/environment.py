"""A virtual environment of a peer's own, for systems whose dependencies do not go together with ours."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.peers.common import ROOT

_STAMP = "installed.txt"


def make_environment(name: str, steps: Sequence[Sequence[str]]) -> Path:
    """Make build/peers/NAME, unless it is there with just these packages.

    Args:
        name: of its folder.
        steps: requirements, one pip call each. torch goes first and alone, with the arguments that the
            Makefile knows as TORCH_ARGS, so that nothing else brings in another build of it.

    Returns:
        The folder of its programs.
    """
    folder = ROOT / "build" / "peers" / name
    stamp, wanted = folder / _STAMP, "\n".join(" ".join(step) for step in steps)
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        _say(f"making {folder.relative_to(ROOT)} (a few minutes, once)")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for index, step in enumerate(steps):
            more = shlex.split(os.environ.get("TORCH_ARGS", "")) if index == 0 else []
            pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
            subprocess.run([*pip, *more, *step], check=True, stdout=sys.stderr)
        stamp.write_text(wanted, encoding="utf-8")
    return folder / "bin"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
