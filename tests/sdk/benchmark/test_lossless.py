"""Near-ties and other divergences, on logits made up by hand."""

from collections.abc import Sequence

import numpy as np
import pytest

from skipstone.benchmark.lossless import Agreement, Match, agreement, compare, first_difference
from skipstone.inputs import ModelInput

PROMPT, MARGIN = ModelInput((9, 9)), 0.01


def logits_after(given: ModelInput, generated: Sequence[int]) -> np.ndarray:
    """After the prompt and one token, 1 and 2 tie; elsewhere token 1 wins clearly, 3 comes second."""
    assert given is PROMPT
    if len(generated) == 1:
        return np.array([0.0, 5.0, 4.995, 4.9], np.float32)
    return np.array([0.0, 5.0, 1.0, 2.0], np.float32)


@pytest.mark.parametrize(
    ("plain", "other", "at"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [], None), ([1], [2], 0)],
)
def test_the_first_difference_is_found(plain: list[int], other: list[int], at: int | None) -> None:
    assert first_difference(plain, other) == at


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ([1, 1, 1], Match.IDENTICAL),
        ([1, 2, 0], Match.NEAR_TIE),  # what follows a near-tie does not count
        ([1, 3, 1], Match.OTHER),  # a tie there was, but this token was not part of it
        ([2, 1, 1], Match.OTHER),
        ([1, 1, 3], Match.OTHER),
        ([1, 1], Match.OTHER),  # ended early
        ([1, 1, 1, 1], Match.OTHER),
    ],
)
def test_only_a_tie_between_the_two_tokens_is_a_near_tie(other: list[int], match: Match) -> None:
    assert compare(PROMPT, [1, 1, 1], other, logits_after, MARGIN) is match


def test_a_tie_of_plain_decodings_runner_up_counts_too() -> None:
    assert compare(PROMPT, [1, 2], [1, 1], logits_after, MARGIN) is Match.NEAR_TIE
    assert compare(PROMPT, [1, 2], [1, 1], logits_after, 0.001) is Match.OTHER


def test_two_tokens_alike_but_far_below_the_best_are_no_near_tie() -> None:
    def two_alike(_given: ModelInput, _generated: Sequence[int]) -> np.ndarray:
        return np.array([1.0, 1.0, 5.0], np.float32)

    assert compare(PROMPT, [0], [1], two_alike, MARGIN) is Match.OTHER


def test_a_prompt_counts_as_the_worst_of_its_repeats() -> None:
    plain = [[1, 1], [1, 1], [1, 1]]
    first = [[1, 1], [1, 2], [1, 1]]
    second = [[1, 1], [1, 1], [2, 1]]
    found = agreement([PROMPT] * 3, plain, [first, second], logits_after, MARGIN)
    assert found == Agreement(identical=1, near_tie_divergences=1, other_divergences=1)
