"""Reading a checkpoint for the formats that are made from its layers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from skipstone.errors import UsageError
from skipstone.exporters.formats import ExportOptions
from skipstone.exporters.reading import Reading, Room, read_checkpoint, refuse_gguf
from tests.exporters.conftest import MakeTiny

ROOM = Room(default=100, least=64)
Read = Callable[..., Reading]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def run(checkpoint: Path, **options: Any) -> Reading:
        scratch = tmp_path / "bundle" / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        return read_checkpoint(str(checkpoint), ExportOptions(**options), scratch, ROOM)

    return run


def test_exits_asked_for_go_before_recorded_ones_and_these_before_the_default(
    tiny: MakeTiny, tmp_path: Path, read: Read
) -> None:
    recorded = shutil.copytree(tiny("llama"), tmp_path / "recorded")
    (recorded / "exits.json").write_text('{"exits": [3]}', encoding="utf-8")
    assert read(recorded, exits=(1, 2)).exits == (1, 2)
    assert read(recorded, exits=()).exits == ()
    assert read(recorded).exits == (3,)
    assert read(tiny("llama")).exits == (1,)


def test_positions_are_planned_for_what_the_format_wants_or_the_user_names(
    tiny: MakeTiny, tiny_t5: MakeTiny, read: Read
) -> None:
    """A text of an encoder-decoder sets no limit of its own."""
    assert read(tiny("llama")).facts.context_length == 100
    assert read(tiny("llama"), context_length=80).facts.context_length == 80
    found = read(tiny_t5("t5")).facts
    assert found.encoder is not None
    assert (found.context_length, found.encoder.max_source_length) == (512, 512)
    assert read(tiny_t5("t5"), context_length=2048).facts.context_length == 2048


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"context_length": 63}, "--context-length 63: this model takes 64 to 256"),
        ("llama", {"max_source_length": 9}, "--max-source-length: LlamaForCausalLM is a decoder alone"),
        ("t5", {"context_length": 2049}, "--context-length 2049: this model takes 64 to 2048"),
        ("t5", {"max_source_length": 2049}, "--max-source-length 2049: at most 2048 are planned for"),
        ("t5", {"encoder_exits": (4,)}, "--encoder-exits 4: exit 4 is out of range for 4 layers"),
    ],
)
def test_lengths_and_exits_that_do_not_fit_are_refused(
    tiny: MakeTiny, tiny_t5: MakeTiny, read: Read, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        read((tiny_t5 if name == "t5" else tiny)(name), **options)


@pytest.mark.parametrize("format", ["executorch", "onnx"])
def test_a_gguf_is_refused_where_layers_are_needed(format: str) -> None:
    with pytest.raises(
        UsageError, match=f"model.gguf: --format {format} starts from a checkpoint"
    ) as refused:
        refuse_gguf("model.gguf", format)
    assert "--format gguf" in str(refused.value.hint)
    refuse_gguf("folder.gguf/model", format)


def test_what_lies_beside_the_artefacts_is_written_and_named(
    tiny: MakeTiny, tmp_path: Path, read: Read
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def the self in the other " * 9, encoding="utf-8")
    for exits, text_given in (((1,), text), ((), None)):
        reading = read(tiny("llama"), exits=exits, draft_text=text_given, draft_vocab_size=16)
        folder = tmp_path / f"out-{len(exits)}"
        folder.mkdir()
        beside = reading.write_side_files(folder)
        assert set(beside.names) == {path.name for path in folder.iterdir()}
        assert len(beside.names) == (3 if exits else 1)
        assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() > 100
        if beside.vocabulary is not None:
            assert reading.draft_tokens is not None
            stored = np.fromfile(folder / beside.vocabulary, "<i4")
            np.testing.assert_array_equal(stored, reading.draft_tokens)
            assert len(stored) == 16
