"""A cut T5 in eager torch against transformers' own forward pass: nothing is lowered."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from skipstone.errors import CheckpointError
from skipstone.exporters.encoder_decoder import (
    Cuts,
    EncoderDecoderParts,
    Limits,
    cut_encoder_decoder,
    load_encoder_decoder,
    write_for_delegates,
)
from skipstone.exporters.formats.executorch.source_modules import (
    SlotCompaction,
    SlotSegment,
    StaticCores,
    StaticProjection,
)
from skipstone.exporters.reference import EagerReference
from tests.exporters.conftest import MakeTiny
from tests.exporters.tiny import CASES as DECODERS
from tests.exporters.tiny import VOCAB_SIZE, make_checkpoint
from tests.exporters.tiny_t5 import EOS, PAD, T5_CASES

FloatArray = NDArray[np.float32]
SLOTS, LONGEST = 40, 48
_random = np.random.default_rng(5)
SOURCE = [*(int(token) for token in _random.integers(2, VOCAB_SIZE, 33)), EOS]
TEXT = [PAD, *(int(token) for token in _random.integers(2, VOCAB_SIZE, 27))]


@dataclass
class Machine:
    """A cut model and the length of the source it read."""

    parts: EncoderDecoderParts
    source: int = 0

    def encode(self, tokens: list[int], segments: int | None = None) -> None:
        """Read a source; with `segments`, the encoder stops after so many of its segments."""
        hidden = self.parts.embedding(torch.tensor([tokens]))
        for segment in self.parts.encoder[:segments]:
            hidden = segment(hidden)
        self.source = int(self.parts.source(hidden))
        assert self.source == len(tokens)

    def run(
        self, hidden: torch.Tensor, slots: list[int], distances: NDArray[np.int64], segments: slice
    ) -> torch.Tensor:
        places = torch.tensor([slots]), torch.from_numpy(distances), torch.arange(self.source)
        for segment in self.parts.decoder[segments]:
            hidden = segment(hidden, *places)
        return hidden

    def logits(self, tokens: list[int], slots: list[int], distances: NDArray[np.int64]) -> FloatArray:
        """Through all segments and the head: [n, vocab_size]."""
        hidden = self.run(self.parts.embedding(torch.tensor([tokens])), slots, distances, slice(None))
        return np.asarray(self.parts.head(hidden)[0].numpy())


def chain(start: int, count: int) -> NDArray[np.int64]:
    """Distances of rows that continue a context of `start` positions."""
    return np.maximum(np.arange(start, start + count)[:, None] - np.arange(start + count), -1)


def cut(folder: Path, exits: tuple[int, ...] = (1, 2), encoder_exits: tuple[int, ...] = (1,)) -> Machine:
    parts = cut_encoder_decoder(
        write_for_delegates(load_encoder_decoder(folder)),
        Cuts(exits, encoder_exits),
        Limits(LONGEST, SLOTS),
        np.arange(0, VOCAB_SIZE, 3, dtype=np.int32),
        StaticCores(SLOTS, LONGEST),
        decoder_segment=SlotSegment,
        projection=StaticProjection,
    )
    return Machine(parts)


@pytest.fixture(autouse=True)
def _without_gradients() -> object:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", list(T5_CASES))
def test_the_parts_in_order_give_transformers_logits(name: str, tiny_t5: MakeTiny) -> None:
    machine, expected = cut(tiny_t5(name)), EagerReference(tiny_t5(name)).logits(TEXT, SOURCE)
    machine.encode(SOURCE)
    found = [
        machine.logits(TEXT[start:stop], list(range(start, stop)), chain(start, stop - start))
        for start, stop in ((0, 1), (1, 2), (2, 12), (12, len(TEXT)))
    ]
    assert expected.std() > 0.3
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-4)


def test_rows_drafted_to_an_exit_continue_from_there(tiny_t5: MakeTiny) -> None:
    machine, expected = cut(tiny_t5("flan-t5")), EagerReference(tiny_t5("flan-t5")).logits(TEXT, SOURCE)
    machine.encode(SOURCE)
    drafted = [
        machine.run(machine.parts.embedding(torch.tensor([[token]])), [index], chain(index, 1), slice(0, 1))
        for index, token in enumerate(TEXT)
    ]
    slots, distances = list(range(len(TEXT))), chain(0, len(TEXT))
    hidden = machine.run(torch.cat(drafted, 1), slots, distances, slice(1, None))
    np.testing.assert_allclose(machine.parts.head(hidden)[0], expected, atol=1e-4)


def test_a_row_of_a_tree_sees_its_ancestors_alone_whatever_slots_they_lie_in(tiny_t5: MakeTiny) -> None:
    machine, reference = cut(tiny_t5("t5")), EagerReference(tiny_t5("t5"))
    machine.encode(SOURCE)
    context = TEXT[:5]
    machine.logits(context, list(range(5)), chain(0, 5))
    paths = [(7,), (9,), (9, 7), (9, 8), (7, 8), (9, 8, 8)]
    slots = [9, 5, 11, 6, 8, 13]  # 7, 10 and 12 stay empty
    distances = np.full((len(paths), 14), -1)
    for index, path in enumerate(paths):
        position = 4 + len(path)
        distances[index, :5] = position - np.arange(5)
        for length in range(1, len(path) + 1):
            distances[index, slots[paths.index(path[:length])]] = len(path) - length
    found = machine.logits([path[-1] for path in paths], slots, distances)
    for path, logits in zip(paths, found, strict=True):
        expected = reference.logits([*context, *path], SOURCE)[-1]
        np.testing.assert_allclose(logits, expected, atol=1e-4, err_msg=str(path))


def test_rows_moved_out_of_a_tree_are_context_as_any(tiny_t5: MakeTiny) -> None:
    """All sources are read before a target is written; the source's K and V stay."""
    machine, reference = cut(tiny_t5("t5")), EagerReference(tiny_t5("t5"))
    machine.encode(SOURCE)
    scattered = [2, 3, 0, 1, 6, 5]
    distances = np.full((6, 7), -1)
    for row in range(6):
        distances[row, scattered[: row + 1]] = np.arange(row, -1, -1)
    machine.logits(TEXT[:6], scattered, distances)
    compact = SlotCompaction(machine.parts.decoder)
    compact(torch.tensor(scattered), torch.arange(6)[None])
    found = machine.logits(TEXT[6:9], [6, 7, 8], chain(6, 3))
    np.testing.assert_allclose(found, reference.logits(TEXT[:9], SOURCE)[6:], atol=1e-4)


@pytest.mark.parametrize("layers", [1, 3])
def test_an_encoder_left_at_an_exit_is_one_of_so_many_layers(layers: int, tiny_t5: MakeTiny) -> None:
    machine = cut(tiny_t5("t5"), encoder_exits=(1, 3))
    reference = EagerReference(tiny_t5("t5"))
    machine.encode(SOURCE, segments={1: 1, 3: 2}[layers])
    found = machine.logits(TEXT, list(range(len(TEXT))), chain(0, len(TEXT)))
    np.testing.assert_allclose(found, reference.logits(TEXT, SOURCE, layers), atol=1e-4)
    assert np.abs(found - reference.logits(TEXT, SOURCE)).max() > 0.1


def test_a_second_source_replaces_the_first_whichever_is_longer(tiny_t5: MakeTiny) -> None:
    machine, reference = cut(tiny_t5("t5")), EagerReference(tiny_t5("t5"))
    for source in (SOURCE, SOURCE[7:9], SOURCE[:20]):
        machine.encode(source)
        found = machine.logits(TEXT[:4], [0, 1, 2, 3], chain(0, 4))
        np.testing.assert_allclose(found, reference.logits(TEXT[:4], source), atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "flan-t5"])
def test_the_draft_head_is_some_rows_of_the_head(name: str, tiny_t5: MakeTiny) -> None:
    parts = cut(tiny_t5(name)).parts
    assert parts.draft_head is not None
    hidden = torch.from_numpy(_random.standard_normal((1, 4, 64), np.float32))
    np.testing.assert_allclose(parts.draft_head(hidden), parts.head(hidden)[..., ::3], atol=1e-6)


def test_what_is_no_t5_is_refused(tiny_t5: MakeTiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        load_encoder_decoder(make_checkpoint(tmp_path / "llama", DECODERS["llama"]))
    broken = shutil.copytree(tiny_t5("t5"), tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        load_encoder_decoder(broken)
