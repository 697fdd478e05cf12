from __future__ import annotations

import pytest

from skipstone.exporters.tune.data import Source
from skipstone.exporters.tune.prose import collect_sentences, prose_sentences, sentences

MODULE = '''\
# Copyright 2020 Nobody. This file is not licensed to you at all.
"""Short module. This is the second sentence of the module, and it stays.

A sentence that goes over the end
of its line is joined. It is not joined across paragraphs

>>> value = "This is code in a doctest."
This is the output of the doctest, so what.
"""

import os

# The first line of this comment goes on
# in the second line of it.

#: Attribute comments are read like any of the others.
URL = "# This is a string and not a comment at all."
count = 1  # This stands after code and is too terse for us.


class Thing:
    """Keep a number of things.

    Args:
        first (`int`, *optional*): The number of things that the class should keep.
        second: too short
        third: Whether to keep the things that are new, or not.

    - Items of a list are read without the bullets.

    Attributes:
        data = load(path, mode='r').
    """

    def run(self):
        if os:
            def inner():
                """Do what is said in the docstring of the inner function."""
        return """This is a string that is returned, so it is no docstring."""
'''


def source(text: str, name: str, *, held_out: bool) -> Source:
    return Source("package", name, text, f"{name:>08}", held_out)


def test_only_prose_of_docstrings_and_comments_is_left() -> None:
    assert set(sentences(MODULE)) == {
        "This is the second sentence of the module, and it stays.",
        "A sentence that goes over the end of its line is joined.",
        "The first line of this comment goes on in the second line of it.",
        "Attribute comments are read like any of the others.",
        "Keep a number of things.",
        "The number of things that the class should keep.",
        "Whether to keep the things that are new, or not.",
        "Items of a list are read without the bullets.",
        "Do what is said in the docstring of the inner function.",
    }


@pytest.mark.parametrize(
    "text",
    [
        "The value of the array is returned.",
        "If `x` is not given, the value of ``np.pi`` is used.",
        "Is this the right thing to do?",
        "The array (or a list of arrays) is sorted in place, e.g. by the key.",
        "A well-known trick, it's used in the code's inner loop.",
    ],
)
def test_prose_passes(text: str) -> None:
    assert list(prose_sentences([text])) == [text]


@pytest.mark.parametrize(
    "text",
    [
        "Too short.",
        "the sentence begins in the middle of things.",
        "The sentence has no end to it",
        "The value x = 3 is what is set in the code.",
        "The file_name of the thing is in the path.",
        "See https://example.org for the rest of it.",
        "The :class:`Thing` is what the rest of it needs.",
        "The readFile of the module is what is used.",
        "Licensed under the terms of the MIT licence of the authors.",
        "Die Werte der Liste werden vor der Ausgabe sortiert.",
        "The numbers 1, 2, 3, 4, 5, 6, 7, 8, 9 and 10 are in it.",
        "The word naïve is not plain ASCII in this sentence.",
        "A (bracket is open to the end of the sentence.",
        "It is " + "very " * 40 + "long.",
    ],
)
def test_what_is_doubtful_is_left_out(text: str) -> None:
    assert list(prose_sentences([text])) == []


def test_abbreviations_do_not_end_a_sentence() -> None:
    text = (
        "This is true of some, e.g. The Beatles, i.e. Paul and the others. The next one is another sentence."
    )
    assert list(prose_sentences([text])) == [
        "This is true of some, e.g. The Beatles, i.e. Paul and the others.",
        "The next one is another sentence.",
    ]


def test_sentences_in_quotes_and_brackets_keep_them() -> None:
    text = 'He said that "it is done." (This one is in brackets.) The last one is not.'
    assert list(prose_sentences([text])) == [
        'He said that "it is done."',
        "(This one is in brackets.)",
        "The last one is not.",
    ]


def test_source_that_is_not_python_has_no_sentences() -> None:
    assert list(sentences("def broken(:\n    # The comment of a file that cannot be parsed.\n")) == []
    assert list(sentences("x = '\0'")) == []


def test_no_sentence_comes_twice_and_none_is_both_trained_on_and_held_out() -> None:
    template = '"""{}"""\n'
    train = template.format("The size of the model is given here. The rest of it is for training.")
    other = template.format("The size of the model is given, here. The rest of it is, for training.")
    held = template.format("The size of the model is given here. This one is in no other file.")
    found = collect_sentences(
        [
            source(held, "a.py", held_out=True),
            source(train, "b.py", held_out=False),
            source(other, "c.py", held_out=False),
        ]
    )
    assert [(s.text, s.path, s.held_out) for s in found] == [
        ("The size of the model is given here.", "b.py", False),
        ("The rest of it is for training.", "b.py", False),
        ("This one is in no other file.", "a.py", True),
    ]


def test_other_text_is_taken_as_paragraphs() -> None:
    text = "The first paragraph is of one\nsentence only.\n\nThe second is another one."
    found = collect_sentences([source(text, "notes.txt", held_out=False)])
    assert [s.text for s in found] == [
        "The first paragraph is of one sentence only.",
        "The second is another one.",
    ]
