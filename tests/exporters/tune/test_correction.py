"""The figures of correction, against examples worked by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipstone.exporters.tune.correction import Edit, edit_distance, edits, score

WORDS = st.lists(st.sampled_from(["a", "b", "ab", "the", "cat"]), max_size=8)


def applied(source: list[str], changes: list[Edit]) -> list[str]:
    text = list(source)
    for edit in reversed(changes):
        text[edit.begin : edit.end] = edit.words
    return text


@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        ("the cat sat", "the cat sat", []),
        ("teh cat sta", "the cat sat", [Edit(0, 1, ("the",)), Edit(2, 3, ("sat",))]),
        ("teh cta sat", "the cat sat", [Edit(0, 1, ("the",)), Edit(1, 2, ("cat",))]),
        ("we go in to it", "we go into it", [Edit(2, 4, ("into",))]),
        ("we go inthe house", "we go in the house", [Edit(2, 3, ("in", "the"))]),
        ("the the cat", "the cat", [Edit(0, 1, ())]),
        ("the sat", "the cat sat", [Edit(1, 1, ("cat",))]),
        ("", "cat", [Edit(0, 0, ("cat",))]),
    ],
)
def test_edits_are_those_one_would_mark_by_hand(source: str, text: str, expected: list[Edit]) -> None:
    assert edits(source.split(), text.split()) == expected


@given(WORDS, WORDS)
def test_the_edits_turn_the_source_into_the_text(source: list[str], text: list[str]) -> None:
    found = edits(source, text)
    assert applied(source, found) == text
    assert all(source[edit.begin : edit.end] != list(edit.words) for edit in found)
    assert all(one.end <= other.begin for one, other in pairwise(found))


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("saturday", "sunday", 3), ("same", "same", 0)],
)
def test_the_edit_distance_is_levenshteins(one: str, other: str, distance: int) -> None:
    assert edit_distance(one, other) == edit_distance(other, one) == distance


def test_figures_of_a_worked_example() -> None:
    sources = ["teh cat sta on mat", "it is fine", "he go home"]
    references = ["the cat sat on mat", "it is fine", "he goes home"]
    # One of the first sentence's two errors corrected, one made in the second, the third corrected.
    corrected = ["the cat sta on mat", "it was fine", "he goes home"]
    figures = score(sources, corrected, references)
    assert figures.sentences == 3
    assert figures.accuracy == pytest.approx(1 / 3)
    assert figures.precision == pytest.approx(2 / 3)  # of three edits made, "the" and "goes" are right
    assert figures.recall == pytest.approx(2 / 3)  # of three edits wanted, "sat" is missing
    assert figures.f05 == pytest.approx(2 / 3)
    # sta → sat takes 2, was → is takes 2; the references have 18 + 10 + 12 characters.
    assert figures.character_error_rate == pytest.approx(4 / 40)


def test_precision_weighs_more_than_recall() -> None:
    sources, references = ["a b c d"], ["w x y z"]
    careful = score(sources, ["w b c d"], references)
    assert (careful.precision, careful.recall) == (1.0, 0.25)
    assert careful.f05 == pytest.approx(1.25 * 0.25 / (0.25 + 0.25))


def test_leaving_text_alone_makes_no_wrong_edit_and_no_right_one() -> None:
    figures = score(["teh cat"], ["teh cat"], ["the cat"])
    assert (figures.precision, figures.recall, figures.f05, figures.accuracy) == (1.0, 0.0, 0.0, 0.0)


def test_a_perfect_corrector_has_perfect_figures() -> None:
    references = ["the cat sat", "it is fine"]
    figures = score(["teh cat sat", "it is fine"], references, references)
    assert (figures.accuracy, figures.f05, figures.character_error_rate) == (1.0, 1.0, 0.0)
