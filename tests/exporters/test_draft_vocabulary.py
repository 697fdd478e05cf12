"""Which tokens the draft head knows."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipstone.errors import CheckpointError, UsageError
from skipstone.exporters.draft_vocabulary import choose_tokens, count_tokens, default_size, read_frequencies
from tests.exporters.tiny import make_tokenizer


@pytest.mark.parametrize(
    ("vocab_size", "expected"), [(320, 320), (1024, 1024), (4096, 1024), (32_000, 8_000), (128_256, 32_064)]
)
def test_the_default_is_a_quarter_but_not_few_and_in_whole_groups(vocab_size: int, expected: int) -> None:
    assert default_size(vocab_size) == expected


@given(
    st.integers(1, 60),
    st.dictionaries(st.integers(0, 59), st.integers(0, 9)),
    st.lists(st.integers(0, 59), max_size=3),
)
def test_no_token_left_out_is_more_frequent_than_one_kept(
    size: int, frequencies: dict[int, int], always: list[int]
) -> None:
    chosen = choose_tokens(60, size, frequencies, always)
    assert chosen.dtype == np.int32
    assert list(chosen) == sorted(set(chosen.tolist()))
    assert len(chosen) == size
    kept = set(chosen.tolist())
    forced = set(always[:size])
    assert len(kept & set(always)) == min(size, len(set(always)))
    free = [frequencies.get(token, 0) for token in kept - set(always) - forced]
    left = [frequencies.get(token, 0) for token in set(range(60)) - kept - set(always)]
    assert not free or not left or min(free) >= max(left)


def test_without_counts_the_first_ids_are_taken_and_the_end_of_text_stays() -> None:
    assert choose_tokens(100, 4, None, [99]).tolist() == [0, 1, 2, 99]


def test_zero_means_all() -> None:
    assert choose_tokens(10, 0, None, []).tolist() == list(range(10))


@pytest.mark.parametrize("size", [-1, 11])
def test_a_size_past_the_vocabulary_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match="--draft-vocab-size"):
        choose_tokens(10, size, None, [])


def test_tokens_are_counted_as_the_tokenizer_cuts_them() -> None:
    tokenizer = make_tokenizer("gpt-2")
    counts = count_tokens(tokenizer.encode("the the the").ids)
    assert counts == Counter({tokenizer.token_to_id("the"): 3, tokenizer.token_to_id("Ġ"): 2})


@pytest.mark.parametrize("content", ['{"3": 5, "1": 2}', "[0, 2, 0, 5]"])
def test_counts_are_read_from_both_forms(content: str, tmp_path: Path) -> None:
    (tmp_path / "counts.json").write_text(content, encoding="utf-8")
    counts = read_frequencies(tmp_path / "counts.json")
    assert (counts[3], counts[1]) == (5, 2)


@pytest.mark.parametrize("content", ["3", '{"a": 1}', "nonsense", "[[1]]"])
def test_unreadable_counts_are_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "counts.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"counts\.json"):
        read_frequencies(tmp_path / "counts.json")
