"""Cutting text: nothing is lost, sentences stay whole where they fit."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipstone.sentences import split_sentences, split_to_fit

PROSE = st.text(alphabet="ab Z.!?\n\t\"')。।é🙂\u2028", max_size=80)


def count_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


@given(text=st.text(max_size=200) | PROSE)
def test_the_sentences_of_a_text_joined_are_the_text(text: str) -> None:
    pieces = split_sentences(text)
    assert "".join(pieces) == text
    assert all(pieces)


@given(text=st.text(max_size=200) | PROSE, limit=st.integers(1, 40))
def test_the_pieces_of_a_text_joined_are_the_text_and_all_of_them_fit(text: str, limit: int) -> None:
    pieces = list(split_to_fit(text, count_bytes, limit))
    assert "".join(pieces) == text
    assert all(count_bytes(piece) <= limit or len(piece) == 1 for piece in pieces)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("One went. Two did not! Three?", ["One went. ", "Two did not! ", "Three?"]),
        ('He said "No." Then he left.', ['He said "No." ', "Then he left."]),
        ("A title\n\nA line\nanother", ["A title\n\n", "A line\n", "another"]),
        ("See e.g. this one, i.e. that.", ["See e.g. this one, i.e. that."]),
        ("Version 3.11 of it. ok", ["Version 3.11 of it. ok"]),
        ("これは文です。次の文です。", ["これは文です。", "次の文です。"]),
        ("Wait... What?!  Yes.", ["Wait... ", "What?!  ", "Yes."]),
        ("", []),
        ("   ", ["   "]),
    ],
)
def test_sentences_end_where_readers_see_their_end(text: str, pieces: list[str]) -> None:
    assert split_sentences(text) == pieces


def test_sentences_that_fit_stay_whole_and_longer_ones_are_cut_at_white_space() -> None:
    text = "Short one. Then " + "word " * 30 + "end. Last."
    pieces = list(split_to_fit(text, count_bytes, 60))
    assert pieces[0] == "Short one. "
    assert pieces[-1] == "Last."
    assert all(piece.endswith(" ") for piece in pieces[:-1])


@pytest.mark.parametrize("character", ["x", " ", ".", "\n", '."', ". a", "\x00", "🙂"])
def test_a_million_characters_are_cut_in_reasonable_time(character: str) -> None:
    text = character * (1_000_000 // len(character))
    began = time.perf_counter()
    assert "".join(split_to_fit(text, count_bytes, 300)) == text
    assert time.perf_counter() - began < 60
