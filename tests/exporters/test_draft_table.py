"""The n-gram table: counted as a plain Python count would, looked up by the longest known context."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipstone.errors import BundleError
from skipstone.exporters.draft_table import SUCCESSORS, count_table
from skipstone.runtimes.drafters.table import ORDERS, NGramTable, context_key

_VOCAB = 7
_texts = st.lists(st.integers(1, _VOCAB - 1), min_size=2, max_size=120)


def counted_plainly(text: list[int], length: int) -> dict[tuple[int, ...], Counter[int]]:
    found: dict[tuple[int, ...], Counter[int]] = {}
    for at in range(len(text) - length):
        found.setdefault(tuple(text[at : at + length]), Counter())[text[at + length]] += 1
    return found


@settings(max_examples=60, deadline=None)
@given(_texts, _texts)
def test_successors_are_the_most_frequent_followers_of_the_longest_known_context(
    text: list[int], history: list[int]
) -> None:
    table = count_table(np.array(text), _VOCAB)
    length, successors = table.successors(history)
    for order in sorted(ORDERS, reverse=True):
        followers = (
            counted_plainly(text, order).get(tuple(history[-order:])) if len(history) >= order else None
        )
        if (
            not followers
            or followers.total() < 2
            or (followers.most_common(1)[0][1] - 0.5) / followers.total() < 0.1
        ):
            continue
        assert length == order
        shares = sorted(((count - 0.5) / followers.total() for count in followers.values()), reverse=True)
        assert [round(share, 2) for _, share in successors] == pytest.approx(shares[:SUCCESSORS], abs=0.011)
        for token, share in successors:
            assert (followers[token] - 0.5) / followers.total() == pytest.approx(share, abs=0.003)
        return
    assert (length, successors) == (0, [])


def test_ngrams_across_documents_are_not_counted() -> None:
    text = np.array([1, 2, 0, 3, 1, 2, 0, 3])
    assert count_table(text, _VOCAB).successors([0])[1] != []
    assert count_table(text, _VOCAB, document_end=0).successors([0]) == (0, [])


def test_only_the_most_frequent_contexts_are_kept() -> None:
    text = np.array([1, 2] * 50 + [3, 4] * 3)
    table = count_table(text, _VOCAB, max_contexts=1)
    assert table.successors([1])[0] == 1
    assert table.successors([3]) == (0, [])


def test_a_saved_table_is_the_same_after_loading(tmp_path: Path) -> None:
    text = np.random.default_rng(0).integers(1, _VOCAB, 500)
    table = count_table(text, _VOCAB)
    table.save(tmp_path / "table.npz")
    loaded = NGramTable.load(tmp_path / "table.npz")
    assert len(loaded) == len(table) > 0
    for at in range(3, 60):
        assert loaded.successors(text[:at].tolist()) == table.successors(text[:at].tolist())


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut short"])
def test_a_broken_table_is_named_in_the_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "table.npz").write_bytes(content)
    with pytest.raises(BundleError, match=r"table\.npz: not a draft table"):
        NGramTable.load(tmp_path / "table.npz")


def test_a_table_with_tokens_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    keys = np.array([context_key([1], _VOCAB)], np.int64)
    table = NGramTable(_VOCAB, {1: (keys, np.array([[99]], np.uint32), np.array([[200]], np.uint8))})
    table.save(tmp_path / "table.npz")
    with pytest.raises(BundleError, match="order 1 is malformed"):
        NGramTable.load(tmp_path / "table.npz")


def test_keys_of_large_vocabularies_do_not_collide() -> None:
    size = 1 << 21
    assert len({context_key(c, size) for c in ([1, 2, 3], [1, 3, 2], [size - 1] * 3)}) == 3
    assert context_key([size - 1] * 3, size) < 1 << 63
