"""What a bundle's draft head says, against its definition; part of the self-test."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


class UncutModel(Protocol):
    """See `skipstone.exporters.formats.Oracle`."""

    def logits(self, tokens: Sequence[int], source: Sequence[int] = ()) -> FloatArray: ...

    def draft_logits(self, hidden: FloatArray, token_ids: NDArray[np.int32]) -> FloatArray: ...


@dataclass(frozen=True)
class Drafted:
    """What the draft head says of the rows at one inner exit.

    Attributes:
        hidden: the rows' states, [n, hidden_size].
        token_ids: some of the head's.
        logits: of these, [n, len(token_ids)].
    """

    hidden: FloatArray
    token_ids: NDArray[np.int32]
    logits: FloatArray


def head_error(drafted: Iterable[Drafted], uncut: UncutModel) -> float:
    """Largest relative error of the draft head over the inner exits, against its definition."""
    worst = 0.0
    for draft in drafted:
        expected = uncut.draft_logits(draft.hidden, draft.token_ids)
        worst = max(worst, float(np.linalg.norm(draft.logits - expected) / np.linalg.norm(expected)))
    return worst


def save_drafts(file: Path, drafted: Iterable[Drafted]) -> None:
    """Write a .npz, for another process to read."""
    arrays = {f"{at}.{name}": array for at, one in enumerate(drafted) for name, array in vars(one).items()}
    np.savez(file, **arrays)


def load_drafts(file: Path) -> list[Drafted]:
    """What `save_drafts` wrote."""
    names = [field.name for field in fields(Drafted)]
    with np.load(file) as held:
        return [
            Drafted(**{name: held[f"{at}.{name}"] for name in names}) for at in range(len(held) // len(names))
        ]
