"""What an encoder-decoder writes through its engine, against transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest

from skipstone.exporters.evaluation.corrections import measure_corrections, write

MakeTiny = Callable[[str], Path]
SOURCES = ["the river is teh same", "read the file", "self other day", "on a tent"]


@pytest.mark.engine
def test_a_bundle_writes_what_its_checkpoint_writes(tiny_t5: MakeTiny, tmp_path: Path) -> None:
    from skipstone.exporters.pipeline import export_checkpoint

    checkpoint = tiny_t5("flan-t5")
    export_checkpoint(checkpoint, tmp_path / "out", quantize="f32", exits=(1,))
    written = write(str(checkpoint), SOURCES)
    assert any(written)
    found = measure_corrections(tmp_path / "out", SOURCES, written)
    assert (found.sentences, found.accuracy, found.character_error_rate) == (len(SOURCES), 1.0, 0.0)
    assert measure_corrections(tmp_path / "out", SOURCES[:1], ["x" * 100]).accuracy == 0.0
