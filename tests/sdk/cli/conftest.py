"""A small model's bundle for ExecuTorch, exported once per run."""

from pathlib import Path

import pytest

from tests.exporters.tiny import CASES, make_checkpoint
from tests.once import once


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama: 4 layers, 320 tokens."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "llama", CASES["llama-untied"])


@pytest.fixture(scope="session")
def tiny_program(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of its ExecuTorch bundle: f32, cut after layer 1, 64 slots; not to be changed."""

    def export(output: Path) -> None:
        from skipstone.exporters.pipeline import export_checkpoint

        export_checkpoint(
            tiny_checkpoint, output, format="executorch", quantize="none", exits=(1,), context_length=64
        )

    return once(tmp_path_factory, "tiny-program/bundle", export)
