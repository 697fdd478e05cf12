"""Checkpoints whose codes are fixed: exported as they are, into what they are for, or not at all."""

from pathlib import Path
from typing import Any

import pytest

from skipstone.errors import CheckpointError, UsageError
from skipstone.exporters.compress.folder import CODES_FILE, read_codes
from skipstone.exporters.compress.quantize.step import Quantize
from skipstone.exporters.compress.record import QUANTIZATION_FILE
from skipstone.exporters.pipeline import export_checkpoint
from tests.exporters.compress.carried import quantized
from tests.exporters.conftest import MakeTiny


@pytest.fixture(scope="module")
def in_q4_0(tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tiny("gentle"), tmp_path_factory.mktemp("codes") / "small", Quantize(scheme="q4_0"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"quantize": "q8_0"},
            "fixed for --format gguf --quantize q4_0, not for --format gguf --quantize q8_0",
        ),
        ({"format": "executorch"}, "not for --format executorch"),
        ({"format": "onnx", "quantize": "8da4w"}, "not for --format onnx --quantize 8da4w"),
        ({"device": "qualcomm-sm8650"}, "not for --format onnx"),
        ({"device": "apple-coreml"}, "fixed for --format gguf --quantize q4_0"),
        ({"imatrix": "text.txt"}, "--imatrix text.txt: the checkpoint's codes are fixed already"),
    ],
)
def test_codes_are_carried_into_their_own_scheme_alone(
    in_q4_0: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        export_checkpoint(in_q4_0, tmp_path / "out", **options)
    assert "--requantize" in str(caught.value.hint) or options.get("imatrix")
    assert not (tmp_path / "out").exists()


def test_the_weights_are_rounded_anew_when_that_is_asked_for(in_q4_0: Path, tmp_path: Path) -> None:
    carried = export_checkpoint(in_q4_0, tmp_path / "carried", quantize="Q4_0", exits=(2,)).manifest
    anew = export_checkpoint(
        in_q4_0, tmp_path / "anew", quantize="q4_1", exits=(2,), requantize=True
    ).manifest
    assert (carried.quantization.scheme, anew.quantization.scheme) == ("q4_0", "q4_1")
    assert carried.quantization.codes_sha256 is not None
    assert anew.quantization.codes_sha256 is None


def test_codes_that_lie_in_the_folder_damaged_are_refused(tiny: MakeTiny, tmp_path: Path) -> None:
    folder = quantized(tiny("gentle"), tmp_path / "small", Quantize(scheme="q4_0"))
    (folder / CODES_FILE).write_bytes((folder / CODES_FILE).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="do not fit together"):
        export_checkpoint(folder, tmp_path / "out")
    (folder / CODES_FILE).unlink()
    with pytest.raises(CheckpointError, match="do not fit together"):
        export_checkpoint(folder, tmp_path / "out")


def test_codes_that_differ_have_another_hash(tiny: MakeTiny, tmp_path: Path) -> None:
    folder = quantized(tiny("gentle"), tmp_path / "small", Quantize(scheme="q4_0"))
    before = read_codes(folder)
    assert before is not None
    listed = folder / QUANTIZATION_FILE
    listed.write_text(listed.read_text(encoding="utf-8").replace('"q4_0"', '"q5_0"', 1), encoding="utf-8")
    after = read_codes(folder)
    assert after is not None
    assert after.sha256 != before.sha256
