"""A table of the likeliest tokens after one to three others, counted once from text and shipped in the bundle.

It is the back-off n-gram model that staged speculation puts in front of everything (arXiv 2308.04623, section 3.2:
a Katz back-off trigram), cut down to the few ten thousand contexts that matter: the successors of the longest context
found are taken with their relative frequencies. Where prompt lookup and token recycling must first see a phrase, the
table knows it from the start.

    >>> table = NGramTable.load("draft-table.npz")
    >>> table.successors((262, 311))
    [(540, 0.61), (733, 0.12)]
"""

from __future__ import annotations

import zipfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from skipstone.errors import BundleError
from skipstone.runtimes.drafters.base import DraftRequest, Observation
from skipstone.runtimes.drafters.best_first import most_probable_paths
from skipstone.runtimes.tree import TokenTree

TABLE_SUFFIX = ".npz"
ORDERS = (1, 2, 3)
_SURE = 0.98
_LEARNING = 0.05
_SCALE = 255
_REMEMBERED = 20_000  # contexts looked up before


def context_key(tokens: Sequence[int], vocab_size: int) -> int:
    """The context as one number: its tokens as digits to base vocab_size (below 2^63 for vocabularies up to 2^21)."""
    key = 0
    for token in tokens:
        key = key * vocab_size + token
    return key


@dataclass(frozen=True, slots=True)
class _Order:
    """Contexts of one length: ascending keys, and for each k successors (likeliest first) with frequencies in 1/255."""

    keys: memoryview
    tokens: NDArray[np.uint32]
    frequencies: NDArray[np.uint8]


class NGramTable:
    """Successors by context.

    Args:
        vocab_size: of the tokenizer the text was counted with.
        orders: by context length, (keys int64 [n], tokens uint32 [n, k], frequencies uint8 [n, k]).
    """

    def __init__(
        self,
        vocab_size: int,
        orders: dict[int, tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint8]]],
    ) -> None:
        self.vocab_size = vocab_size
        self._arrays = orders
        self._orders = {
            n: _Order(memoryview(keys.data), tokens, f) for n, (keys, tokens, f) in sorted(orders.items())
        }
        self._found: dict[tuple[int, ...], tuple[int, list[tuple[int, float]]]] = {}

    def __len__(self) -> int:
        return sum(len(order.keys) for order in self._orders.values())

    def successors(self, history: Sequence[int]) -> tuple[int, list[tuple[int, float]]]:
        """The length of the longest suffix of `history` found (0: none), and its successors, likeliest first."""
        suffix = tuple(history[-max(ORDERS) :])
        found = self._found.get(suffix)
        if found is None:
            if len(self._found) >= _REMEMBERED:
                self._found.clear()
            found = self._found[suffix] = self._look_up(suffix)
        return found

    def _look_up(self, suffix: tuple[int, ...]) -> tuple[int, list[tuple[int, float]]]:
        for length in range(len(suffix), 0, -1):
            order = self._orders.get(length)
            if order is None:
                continue
            key = context_key(suffix[len(suffix) - length :], self.vocab_size)
            at = bisect_left(order.keys, key)
            if at < len(order.keys) and order.keys[at] == key:
                pairs = zip(order.tokens[at].tolist(), order.frequencies[at].tolist(), strict=True)
                return length, [(token, frequency / _SCALE) for token, frequency in pairs if frequency]
        return 0, []

    def save(self, path: Path) -> None:
        """Write the table as .npz (no pickle)."""
        arrays: dict[str, NDArray[np.generic]] = {"vocab_size": np.array(self.vocab_size, np.int64)}
        for length, (keys, tokens, frequencies) in self._arrays.items():
            arrays |= {f"keys{length}": keys, f"tokens{length}": tokens, f"frequencies{length}": frequencies}
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]

    @staticmethod
    def load(path: str | Path) -> NGramTable:
        """Read a table.

        Raises:
            BundleError: the file is not a table, or its parts do not fit each other.
        """
        try:
            with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as data:
                vocab_size = int(data["vocab_size"])
                present = [n for n in ORDERS if f"keys{n}" in data.files]
                orders = {n: (data[f"keys{n}"], data[f"tokens{n}"], data[f"frequencies{n}"]) for n in present}
        except (OSError, EOFError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
            raise BundleError(
                f"{path}: not a draft table: {error}", hint="export the bundle again"
            ) from error
        for length, (keys, tokens, frequencies) in orders.items():
            shapes_fit = (
                keys.ndim == 1
                and tokens.ndim == 2
                and tokens.shape == frequencies.shape == (len(keys), tokens.shape[1])
            )
            types_fit = (keys.dtype, tokens.dtype, frequencies.dtype) == (np.int64, np.uint32, np.uint8)
            if not (shapes_fit and types_fit and (tokens.size == 0 or int(tokens.max()) < vocab_size)):
                raise BundleError(f"{path}: order {length} is malformed", hint="export the bundle again")
        return NGramTable(vocab_size, orders)


class TableDrafter:
    """See `skipstone.runtimes.drafters.base.Drafter`. The tree of the table's most probable paths, best first.

    Args:
        table: the counted text.
    """

    name = "table"

    def __init__(self, table: NGramTable) -> None:
        self._table = table
        self._trust = dict.fromkeys((0, *ORDERS), 1.0)

    def reset(self, prompt: Sequence[int], source: Sequence[int] = ()) -> None:
        return None

    def propose(self, request: DraftRequest) -> TokenTree:
        return most_probable_paths(
            tuple(request.context[-max(ORDERS) :]),
            self._successors,
            lambda history, token: (*history[1 - max(ORDERS) :], token),
            limit=request.limit,
            floor=request.floor,
        )

    def observe(self, observation: Observation) -> None:
        """Learn how far the table's frequencies hold for this text, by context length."""
        text = observation.context[-observation.fresh - max(ORDERS) :]
        for at in range(max(1, len(text) - observation.fresh), len(text)):
            length, successors = self._table.successors(text[:at])
            if not successors:
                continue
            token, frequency = successors[0]
            wanted = ((token == text[at]) - self._trust[length] * frequency) * frequency
            self._trust[length] = min(1.2, max(0.2, self._trust[length] + _LEARNING * wanted))

    def close(self) -> None:
        return None

    def _successors(self, history: tuple[int, ...]) -> Iterator[tuple[int, float]]:
        length, successors = self._table.successors(history)
        trust = self._trust[length]
        return ((token, min(trust * frequency, _SURE)) for token, frequency in successors)
