"""The shipped models' bundles, exported once per run."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from tests.once import WORKER, once

# Two workers whose libraries take a thread per core each would wait for one another.
if WORKER in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is no fault of what is tested.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

ROOT = Path(__file__).resolve().parent.parent
Export = Callable[[str], Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Among workers, let files with slow tests go first: one of them at the end would leave the others idle."""
    if WORKER in os.environ:
        slow_files_first(items)


def slow_files_first(items: list[pytest.Item]) -> None:
    """Order tests by file: those with slow ones, then the others, the more tests the earlier."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (0, 0) if item.path in slow else (1, -count[item.path]))


@pytest.fixture(scope="session")
def coder_checkpoint() -> Path:
    """Folder of the reference model; SKIPSTONE_TEST_CHECKPOINT names another one to test with."""
    named = os.environ.get("SKIPSTONE_TEST_CHECKPOINT")
    folder = Path(named) if named else ROOT / "samples" / "models" / "coder"
    assert (folder / "config.json").is_file(), f"{folder}: no checkpoint there; set SKIPSTONE_TEST_CHECKPOINT"
    return folder


@pytest.fixture(scope="session")
def export_coder(coder_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """From a quantisation scheme to the folder of the reference model's bundle; not to be changed."""
    return lambda scheme: _exported(tmp_path_factory, coder_checkpoint, "gguf", scheme)


@pytest.fixture(scope="session")
def coder_bundle_executorch(coder_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the reference model's ExecuTorch bundle in f32."""
    return _exported(tmp_path_factory, coder_checkpoint, "executorch", "none")


@pytest.fixture(scope="session")
def coder_bundle_executorch_8da4w(coder_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the reference model's ExecuTorch bundle in 8da4w."""
    return _exported(tmp_path_factory, coder_checkpoint, "executorch", "8da4w")


@pytest.fixture(scope="session")
def export_coder_onnx(coder_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """From a scheme to the folder of the reference model's ONNX bundle in it; not to be changed."""
    return lambda scheme: _exported(tmp_path_factory, coder_checkpoint, "onnx", scheme)


@pytest.fixture(scope="session")
def export_speller(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """From a scheme, of ExecuTorch if it says so ("executorch 8da4w"), to the shipped corrector in it."""
    checkpoint = ROOT / "samples" / "models" / "speller"

    def get(name: str) -> Path:
        *format, scheme = name.split()
        return _exported(
            tmp_path_factory,
            checkpoint,
            format[0] if format else "gguf",
            scheme,
            context_length=192,
            max_source_length=128,
        )

    return get


def _exported(
    folders: pytest.TempPathFactory, checkpoint: Path, format: str, scheme: str, **options: int
) -> Path:
    """A shipped model's bundle, made once per run."""

    def export(output: Path) -> None:
        from skipstone.exporters.pipeline import export_checkpoint

        export_checkpoint(checkpoint, output, format=format, quantize=scheme, **options)

    return once(folders, f"{checkpoint.name}/{format}/{scheme}", export)


@pytest.fixture(scope="session")
def coder_bundle_f32(export_coder: Export) -> Path:
    """Folder of the reference model's bundle in f32."""
    return export_coder("f32")


@pytest.fixture(scope="session")
def coder_bundle_q8_0(export_coder: Export) -> Path:
    """Folder of the reference model's bundle in q8_0."""
    return export_coder("q8_0")


@pytest.fixture(scope="session")
def coder_bundle_q4_0(export_coder: Export) -> Path:
    """Folder of the reference model's bundle in q4_0."""
    return export_coder("q4_0")
