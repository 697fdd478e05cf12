"""The length of a common prefix."""

from hypothesis import given
from hypothesis import strategies as st

from skipstone.runtimes.prefix import common_prefix_length

tokens = st.lists(st.integers(0, 1), max_size=8)


@given(one=tokens, other=tokens)
def test_the_common_prefix_is_the_longest_beginning_that_both_have(one: list[int], other: list[int]) -> None:
    shorter = min(len(one), len(other))
    expected = max(count for count in range(shorter + 1) if one[:count] == other[:count])
    assert common_prefix_length(one, other) == expected


def test_tokens_that_agree_again_after_the_first_difference_do_not_count() -> None:
    assert common_prefix_length([5, 6, 7, 8], [5, 9, 7, 8]) == 1


def test_a_sequence_that_continues_the_other_shares_all_of_it() -> None:
    assert common_prefix_length([5, 6], (5, 6, 7)) == common_prefix_length((5, 6, 7), [5, 6]) == 2
