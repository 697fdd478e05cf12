"""The draft head's token ids."""

from pathlib import Path

import numpy as np
import pytest

from skipstone.errors import BundleError
from skipstone.runtimes.engines.vocabulary import read_vocabulary


def written(folder: Path, ids: list[int]) -> Path:
    file = folder / "draft-vocabulary.i32"
    file.write_bytes(np.array(ids, "<i4").tobytes())
    return file


def test_ids_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_vocabulary(written(tmp_path, [0, 3, 299]), 300).tolist() == [0, 3, 299]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "outside the vocabulary"),
        ([0, 300], "outside the vocabulary"),
        ([-1, 3], "outside the vocabulary"),
        ([3, 3], "out of order"),
        ([4, 3], "out of order"),
    ],
)
def test_ids_that_cannot_be_the_heads_are_refused(tmp_path: Path, ids: list[int], words: str) -> None:
    with pytest.raises(BundleError, match=f"draft-vocabulary.i32: draft tokens {words}"):
        read_vocabulary(written(tmp_path, ids), 300)
