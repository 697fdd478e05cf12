"""What libraries write while they are loaded stays off the terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "skipstone.exporters.tune.run",
        "skipstone.exporters.encoder_decoder",
        "samples.inflate",
        "samples.inflate_t5",
        "samples.random_weights",
    ],
)
def test_what_imports_transformers_says_nothing(module: str) -> None:
    """Its quantisers do, where they find no GPU: `torchao` must have been loaded, for this to show anything."""
    script = f"import sys, {module}\nprint('torchao' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
