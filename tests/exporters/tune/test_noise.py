from __future__ import annotations

import dataclasses
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipstone.exporters.tune.correction import edit_distance, edits
from skipstone.exporters.tune.noise import SLIPS, corrupt, kind_weights, slipped
from skipstone.exporters.tune.recipe import Noise

SENTENCES = (
    "The values of this array are sorted before the function returns a list of them.",
    "It has an argument which is passed to their constructor, if there is one.",
    "Whether the parent's handler receives the event doesn't affect its children.",
    "Use `numpy.array` (or NumPy's own) when 32 elements or more are needed.",
)
WORDS = st.sampled_from(sorted({word for sentence in SENTENCES for word in sentence.split()}))
LETTERS = ("neighbour", "insert", "swap", "drop", "double", "vowel", "misspelling")
ALL_WRONG = Noise(clean=0.0, rate=1.0, max_rate=1.0)


def only(kind: str, **changes: float) -> Noise:
    """Noise of one kind alone."""
    weights = dict.fromkeys(kind_weights(Noise()), 0.0) | {kind: 1.0}
    return dataclasses.replace(ALL_WRONG, **weights, **changes)


@given(st.sampled_from(SENTENCES), st.integers(0, 1000))
def test_the_same_seed_makes_the_same_errors(sentence: str, seed: int) -> None:
    assert corrupt(sentence, Random(seed), Noise()) == corrupt(sentence, Random(seed), Noise())


@given(st.text(st.characters(categories=["L", "N", "P"]), min_size=1), st.integers(0, 100))
def test_no_text_vanishes(text: str, seed: int) -> None:
    sentence = " ".join(text.split()) or "."
    assert corrupt(sentence, Random(seed), ALL_WRONG).strip()


def test_the_clean_share_stays_clean_and_the_rest_does_not() -> None:
    noise = Noise(clean=0.3)
    clean = sum(corrupt(SENTENCES[0], Random(seed), noise) == SENTENCES[0] for seed in range(2000))
    assert clean / 2000 == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 2000) ** 0.5)


def test_the_number_of_errors_goes_from_one_to_many() -> None:
    words = SENTENCES[0].split()
    counts = Counter(
        len(edits(words, corrupt(SENTENCES[0], Random(seed), Noise(clean=0.0)).split()))
        for seed in range(1000)
    )
    assert counts[0] == 0
    assert counts[1] > counts[2] > counts[4] > 0
    assert max(counts) >= 6


def test_a_higher_rate_makes_more_errors() -> None:
    def errors(rate: float) -> int:
        noise = Noise(clean=0.0, rate=rate)
        return sum(
            edit_distance(sentence, corrupt(sentence, Random(seed), noise))
            for seed in range(100)
            for sentence in SENTENCES
        )

    assert errors(0.02) < errors(0.1) < errors(0.4)


@pytest.mark.parametrize("kind", sorted(kind_weights(Noise())))
def test_every_kind_of_slip_occurs_and_only_it_where_it_is_the_only_one(kind: str) -> None:
    changed = {corrupt(sentence, Random(seed), only(kind)) for sentence in SENTENCES for seed in range(20)}
    assert changed - set(SENTENCES)


@pytest.mark.parametrize("kind", LETTERS)
@given(word=WORDS, seed=st.integers(0, 100))
def test_a_slip_of_letters_is_local(kind: str, word: str, seed: int) -> None:
    changed = slipped(word, kind, Random(seed))
    if changed is None:
        return
    assert changed != word
    assert " " not in changed
    assert edit_distance(changed, word) <= 4  # a misspelling may replace an ending
    assert abs(len(changed) - len(word)) <= (2 if kind == "misspelling" else 1)
    if kind == "swap":
        assert sorted(changed) == sorted(word)
    if kind in ("neighbour", "vowel"):
        assert sum(one != other for one, other in zip(changed, word, strict=True)) == 1


def test_a_neighbour_is_a_key_beside_the_right_one() -> None:
    seen = {slipped("gggg", "neighbour", Random(seed)) for seed in range(200)}
    assert {letter for word in seen for letter in word} - {"g"} == set("ftyhvb")


@given(st.sampled_from(SENTENCES), st.integers(0, 200), st.sampled_from(("join", "split")))
def test_joined_and_split_words_keep_their_letters(sentence: str, seed: int, kind: str) -> None:
    assert corrupt(sentence, Random(seed), only(kind)).replace(" ", "") == sentence.replace(" ", "")


@given(
    st.sampled_from(SENTENCES), st.integers(0, 200), st.sampled_from(("agreement", "article", "confusion"))
)
def test_a_wrong_word_leaves_the_number_of_words(sentence: str, seed: int, kind: str) -> None:
    assert len(corrupt(sentence, Random(seed), only(kind)).split()) == len(sentence.split())


@pytest.mark.parametrize(
    ("word", "kind", "wrong"),
    [
        ("is", "agreement", {"are"}),
        ("has", "agreement", {"have"}),
        ("an", "article", {"a"}),
        ("its", "confusion", {"it's"}),
        ("their", "confusion", {"there", "they're"}),
        ("than,", "confusion", {"then,"}),
        ("returns", "number", {"return"}),
        ("list", "number", {"lists"}),
        ("the", "repeat", {"the the"}),
        ("(receive)", "misspelling", {"(recieve)"}),
    ],
)
def test_slips_of_whole_words_are_those_that_people_make(word: str, kind: str, wrong: set[str]) -> None:
    assert {slipped(word, kind, Random(seed)) for seed in range(50)} == wrong


def test_the_first_word_keeps_its_capital_but_where_that_is_the_slip() -> None:
    assert {slipped("Their", "confusion", Random(seed), first=True) for seed in range(50)} == {
        "There",
        "They're",
    }
    assert slipped("There", "case", Random(0), first=True) == "there"
    assert slipped("there", "case", Random(0), first=True) is None


@pytest.mark.parametrize("word", ["NumPy", "HTTP", "x86", "`dtype`", "3.14", "Euler", "a.b", "—", "naïve"])
@pytest.mark.parametrize("kind", sorted(SLIPS))
def test_names_numbers_and_code_are_left_alone(word: str, kind: str) -> None:
    assert all(slipped(word, kind, Random(seed)) is None for seed in range(20))


@pytest.mark.parametrize("word", ["this", "class", "always", "status", "running", "sorted"])
def test_words_without_a_number_get_none(word: str) -> None:
    assert slipped(word, "number", Random(0)) is None
