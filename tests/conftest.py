"""The shipped model's bundles, exported once per run."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is no fault of what is tested.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

ROOT = Path(__file__).resolve().parent.parent
Export = Callable[[str], Path]


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
    made: dict[str, Path] = {}

    def get(scheme: str) -> Path:
        if scheme not in made:
            from skipstone.exporters.pipeline import export_checkpoint

            output = tmp_path_factory.mktemp("coder") / scheme
            export_checkpoint(coder_checkpoint, output, quantize=scheme)
            made[scheme] = output
        return made[scheme]

    return get


@pytest.fixture(scope="session")
def coder_bundle_executorch(coder_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the reference model's ExecuTorch bundle in f32."""
    return _export_executorch(coder_checkpoint, tmp_path_factory, "none")


@pytest.fixture(scope="session")
def coder_bundle_executorch_8da4w(coder_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the reference model's ExecuTorch bundle in 8da4w."""
    return _export_executorch(coder_checkpoint, tmp_path_factory, "8da4w")


def _export_executorch(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, scheme: str) -> Path:
    from skipstone.exporters.pipeline import export_checkpoint

    output = tmp_path_factory.mktemp("executorch") / scheme
    export_checkpoint(checkpoint, output, format="executorch", quantize=scheme)
    return output


@pytest.fixture(scope="session")
def export_coder_onnx(coder_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """From a scheme to the folder of the reference model's ONNX bundle in it; not to be changed."""
    made: dict[str, Path] = {}

    def get(scheme: str) -> Path:
        if scheme not in made:
            from skipstone.exporters.pipeline import export_checkpoint

            made[scheme] = tmp_path_factory.mktemp("onnx") / scheme
            export_checkpoint(coder_checkpoint, made[scheme], format="onnx", quantize=scheme)
        return made[scheme]

    return get


@pytest.fixture(scope="session")
def export_speller(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """From a scheme, of ExecuTorch if it says so ("executorch 8da4w"), to the shipped corrector in it."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            from skipstone.exporters.pipeline import export_checkpoint

            *format, scheme = name.split()
            made[name] = tmp_path_factory.mktemp("speller") / scheme
            export_checkpoint(
                ROOT / "samples" / "models" / "speller",
                made[name],
                format=format[0] if format else "gguf",
                quantize=scheme,
                context_length=192,
                max_source_length=128,
            )
        return made[name]

    return get


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
