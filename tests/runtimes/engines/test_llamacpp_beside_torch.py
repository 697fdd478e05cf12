"""llama.cpp and torch in one process, on the CPU's matrix unit both."""

import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import sys
from skipstone.bundle import open_bundle
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.session import Session

session = Session(open_engine(open_bundle(sys.argv[1]), EngineOptions(threads=1)), 128)
before = session.prefill(list(range(5, 25)))
import torch
torch.set_num_threads(1)
ones = torch.ones(256, 256, dtype=torch.bfloat16)
assert (ones @ ones).sum() > 0
session.rewind(0)
assert abs(session.prefill(list(range(5, 25))) - before).max() == 0
"""


@pytest.mark.engine
def test_a_bfloat16_product_of_torch_does_not_kill_a_quantised_session(coder_bundle_q8_0: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(coder_bundle_q8_0)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
