"""What a draft head says, handed from the engine's process to the exporter's."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from skipstone.exporters.drafted import Drafted, head_error, load_drafts, save_drafts

HEAD = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
IDS = np.array([1, 4, 6], np.int32)


class Uncut:
    """Its head is a matrix."""

    def draft_logits(self, hidden: NDArray[np.float32], token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        return hidden @ HEAD[token_ids].T


def drafted(seed: int, rows: NDArray[np.int32] = IDS) -> Drafted:
    hidden = np.random.default_rng(seed).standard_normal((5, 3)).astype(np.float32)
    return Drafted(hidden, IDS, hidden @ HEAD[rows].T)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_was_saved_is_read_again(count: int, tmp_path: Path) -> None:
    made = [drafted(seed) for seed in range(count)]
    save_drafts(tmp_path / "drafts.npz", made)
    found = load_drafts(tmp_path / "drafts.npz")
    assert len(found) == count
    for one, other in zip(found, made, strict=True):
        for name in ("hidden", "token_ids", "logits"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_rows_of_other_tokens_at_any_exit_are_an_error() -> None:
    assert head_error([], Uncut()) == 0.0  # type: ignore[arg-type]
    assert head_error([drafted(0), drafted(1)], Uncut()) == 0.0  # type: ignore[arg-type]
    for wrong in (0, 1):
        found = [drafted(seed, np.roll(IDS, 1) if seed == wrong else IDS) for seed in range(2)]
        assert head_error(found, Uncut()) > 0.5  # type: ignore[arg-type]
