"""What a list of words makes of slips, and how both readings of a source are drafted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipstone.errors import BundleError
from skipstone.runtimes.drafters.aggressive import AggressiveDrafter
from skipstone.runtimes.drafters.lexicon import Amendments, Followed, Lexicon
from skipstone.runtimes.drafters.mixed import MixedDrafter
from skipstone.runtimes.tree import TokenTree
from tests.runtimes.drafters.test_aggressive import EOS, START, paths, request, tell

WORDS = {
    "the": 900,
    "then": 90,
    "list": 80,
    "is": 700,
    "empty": 40,
    "an": 300,
    "error": 50,
    "house": 5,
    "horse": 9,
}
LEXICON = Lexicon(WORDS)


class Letters:
    """A tokenizer whose tokens are characters, the end token behind a source."""

    def source(self, text: str) -> list[int]:
        return [*map(ord, text), EOS]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(chr(token) for token in tokens if token != EOS)


@pytest.mark.parametrize(
    ("what", "wrong", "right"),
    [
        ("letters swapped", "Teh list", "The list"),
        ("a letter missing", "The lst", "The list"),
        ("a letter too many", "The liist", "The list"),
        ("a wrong letter", "The lost", "The list"),
        ("no space", "Thelist", "The list"),
        ("a space too many", "The em pty list", "The empty list"),
        ("a word twice", "The the list", "The list"),
        ("of two words the one seen more often", "The hoxse", "The horse"),
        ("a small letter at the beginning", "the list", "The list"),
        ("a word that is known", "Then the house", "Then the house"),
        ("a word that nothing is near to", "The qwxyz", "The qwxyz"),
        ("a name", "The LiST", "The LiST"),
        ("what is no word", "The l1st (`teh_lst`), 42!", "The l1st (`the_list`), 42!"),
    ],
)
def test_what_becomes_of(what: str, wrong: str, right: str) -> None:
    assert LEXICON.amend(wrong) == right, what


@given(st.text(max_size=60))
def test_any_text_can_be_read_and_known_words_stay(text: str) -> None:
    amended = LEXICON.amend(text)
    assert isinstance(amended, str)
    assert not text or amended
    known = " ".join(word for word in text.split() if word in LEXICON)
    assert LEXICON.amend(known).lower().split() == [
        word for at, word in enumerate(known.lower().split()) if known.lower().split()[at - 1 : at] != [word]
    ]


def test_a_lexicon_is_read_as_it_was_written(tmp_path: Path) -> None:
    LEXICON.save(tmp_path / "words.json")
    read = Lexicon.load(tmp_path / "words.json")
    assert len(read) == len(WORDS)
    assert (
        read.amend("Teh hoxse is em pty.") == LEXICON.amend("Teh hoxse is em pty.") == "The horse is empty."
    )


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"words": {"a": 0}}', '{"words": {"a": "b"}}', "\x80"])
def test_anything_else_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "words.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(BundleError, match=r"words\.json"):
        Lexicon.load(path)


def test_each_reading_is_in_doubt_where_the_other_begins() -> None:
    amendments = Amendments(LEXICON, Letters())
    source = Letters().source("The lst is")
    as_it_is, amended = amendments.source(source), amendments.amended(source)
    assert as_it_is == Followed(tuple(source), frozenset({5}))
    assert amended == Followed(tuple(Letters().source("The list is")), frozenset({5}))


def test_a_source_whose_tokens_the_tokenizer_would_not_give_is_left_alone() -> None:
    source = [ord("T"), 3, EOS, EOS]
    assert Amendments(LEXICON, Letters()).amended(source) == Followed(tuple(source))


def test_both_readings_are_drafted_the_amended_one_first_and_doubt_is_learned() -> None:
    amendments, letters = Amendments(LEXICON, Letters()), Letters()
    own, other = (
        AggressiveDrafter(amendments.source, doubt=0.25),
        AggressiveDrafter(amendments.amended, doubt=0.6),
    )
    both = MixedDrafter([own, other])
    source, right = letters.source("The lst is"), letters.source("The list is")
    both.reset([START], source)
    tree = both.propose(request([START], limit=60, floor=0.01))
    assert sorted(paths(tree)) == sorted([source, right])
    assert score_of(tree, right) > score_of(tree, source)
    for _ in range(30):
        both.reset([START], source)
        for drafter in (own, other):
            tell(drafter, [START, *source], len(source))
    both.reset([START], source)
    learned = both.propose(request([START], limit=60, floor=0.01))
    assert score_of(learned, source) > score_of(learned, right)
    # 5 characters in, the readings part: what is learned there is of that place, not of copying
    for drafter, path, doubted in ((own, source, (0.6, 1.0)), (other, right, (0.0, 0.4))):
        alone = drafter.propose(request([START], limit=60, floor=1e-6))
        steps = [score_of(alone, path[: at + 1]) / score_of(alone, path[:at]) for at in (4, 5)]
        assert steps[0] > 0.9
        assert doubted[0] < steps[1] < doubted[1]


def score_of(tree: TokenTree, path: Sequence[int]) -> float:
    """Of the last node of a path."""
    return next(score for node, score in enumerate(tree.scores) if tree.path_tokens(node) == list(path))


def test_what_is_saved_is_plain_json(tmp_path: Path) -> None:
    LEXICON.save(tmp_path / "words.json")
    words = json.loads((tmp_path / "words.json").read_text(encoding="utf-8"))["words"]
    assert words == WORDS
    assert list(words.values()) == sorted(words.values(), reverse=True)
