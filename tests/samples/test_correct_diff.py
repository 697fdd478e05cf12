"""Word diffs: complete, in words, safe to print; cursors that follow them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samples.corrector.diff import diff_words, follow, show, split_words

texts = st.text(max_size=40) | st.text(alphabet="ab. \n\té🙂中ा\u0301\x1b", max_size=40)


@given(before=texts, after=texts)
def test_a_diff_holds_both_texts_whole(before: str, after: str) -> None:
    spans = diff_words(before, after)
    assert "".join(span.text for span in spans if span.kind != "added") == before
    assert "".join(span.text for span in spans if span.kind != "removed") == after
    assert (before == after) == all(span.kind == "kept" for span in spans)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("It's  here.\n", ["It", "'", "s", "  ", "here", ".", "\n"]),
        ("snake_case 3.5", ["snake_case", " ", "3", ".", "5"]),
        ("नमस्ते cafe\u0301", ["नमस्ते", " ", "cafe\u0301"]),
        ("中文abc。", ["中", "文", "abc", "。"]),
        ("👩‍👩", ["👩‍", "👩"]),
    ],
)
def test_text_is_split_where_its_script_has_words(text: str, words: list[str]) -> None:
    assert split_words(text) == words


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        ("  teh end\n", "  the end\n", "[-teh-]{+the+} end"),
        ("eachother", "each other", "[-eachother-]{+each other+}"),
        ("in to", "into", "[-in to-]{+into+}"),
        ("Yes", "Yes.", "Yes{+.+}"),
        ("a  b", "a b", "a[-  -]{+ +}b"),
        ("dont", "don't", "[-dont-]{+don't+}"),
        ("a\n", "a\nb\n", "a⏎{+b⏎+}"),
        ("\x1b[31mred\x7f", "\x1b[31mrot\x7f", "␛[[-31mred-]{+31mrot+}�"),
    ],
)
def test_a_diff_is_shown_as_git_marks_words(before: str, after: str, shown: str) -> None:
    assert "".join(text for _, text in show(diff_words(before, after), marked=True)) == shown


def test_without_marks_the_text_alone_is_shown() -> None:
    spans = diff_words("teh end", "the end")
    assert list(show(spans, marked=False)) == [("removed", "teh"), ("added", "the"), ("kept", " end")]


@given(before=texts, after=texts)
def test_nothing_that_steers_a_terminal_is_shown(before: str, after: str) -> None:
    shown = "".join(text for _, text in show(diff_words(before, after), marked=True))
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown if c != "\t")


@pytest.mark.parametrize(
    ("position", "expected"),
    [(0, 3), (1, 3), (3, 3), (4, 4), (6, 6), (7, 15), (9, 15), (11, 15), (12, 16), (13, 17)],
)
def test_a_cursor_stays_at_its_word_or_behind_its_correction(position: int, expected: int) -> None:
    assert follow(diff_words("teh is eror .", "the is an error ."), position) == expected


@given(before=texts, after=texts)
def test_a_cursor_never_leaves_the_text_or_goes_backwards(before: str, after: str) -> None:
    places = [follow(diff_words(before, after), position) for position in range(len(before) + 1)]
    assert places == sorted(places)
    assert places[0] >= 0
    assert places[-1] == len(after)
