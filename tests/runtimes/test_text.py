"""Streaming text: pieces join to the whole, no half characters, stop strings found wherever they fall."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from skipstone.errors import BundleError
from skipstone.runtimes.text import StopFinder, TextCodec
from tests.runtimes.conftest import VOCAB, write_tokenizer

REPLACEMENT = "\ufffd"
TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)
MULTIBYTE = st.text(alphabet="aé€😀中\u0301 \n👩🏽‍💻", max_size=20)


@pytest.fixture(scope="session")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return TextCodec(folder / "tokenizer.json", VOCAB)


def stream_of(codec: TextCodec, tokens: list[int]) -> list[str]:
    stream = codec.stream()
    return [*(stream.push(token) for token in tokens), stream.flush()]


@given(text=TEXTS | MULTIBYTE)
def test_pieces_join_to_the_text(codec: TextCodec, text: str) -> None:
    tokens = codec.encode(text)
    pieces = stream_of(codec, tokens)
    assert "".join(pieces) == text == codec.decode(tokens)


@given(text=MULTIBYTE)
def test_no_piece_ends_inside_a_character(codec: TextCodec, text: str) -> None:
    tokens = codec.encode(text)
    stream, shown = codec.stream(), ""
    for count, token in enumerate(tokens, 1):
        shown += stream.push(token)
        assert REPLACEMENT not in shown
        assert text.startswith(shown)
        whole = codec.decode(tokens[:count])
        if REPLACEMENT not in whole:  # nothing incomplete: nothing may be held back
            assert shown == whole


@given(tokens=st.lists(st.integers(0, VOCAB - 1), max_size=25))
def test_any_tokens_at_all_join_to_their_decoding(codec: TextCodec, tokens: list[int]) -> None:
    assert "".join(stream_of(codec, tokens)) == codec.decode(tokens)


def test_a_character_cut_off_at_the_end_is_replaced_in_the_flush_only(codec: TextCodec) -> None:
    tokens = codec.encode("ok 😀")[:-1]
    *pieces, last = stream_of(codec, tokens)
    assert "".join(pieces) == "ok "
    assert last == codec.decode(tokens)[3:]
    assert REPLACEMENT in last


def test_a_token_begins_a_word_where_it_has_a_space_or_no_letter_in_front(codec: TextCodec) -> None:
    text = "for line in\n(lines)[1]: don't"
    pieces = [(token, codec.decode([token])) for token in codec.tokens(text)]
    assert "".join(piece for _, piece in pieces) == text
    for at, (token, piece) in enumerate(pieces):
        begins = not (piece[0].isalnum() or piece[0] == "'")
        assert (token in codec.word_starts) == begins, f"{at}: {piece!r}"


def test_words_begin_as_sentencepiece_spells_it(tmp_path: Path) -> None:
    vocabulary = ["▁the", "re", "▁", ".", "'s", "é", "</s>"]
    tokenizer = Tokenizer(
        models.WordLevel({token: at for at, token in enumerate(vocabulary)}, unk_token="re")
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    starts = TextCodec(tmp_path / "tokenizer.json", len(vocabulary)).word_starts
    assert [vocabulary[token] for token in sorted(starts)] == ["▁the", "▁", ".", "</s>"]


def test_special_tokens_are_recognised_and_not_shown(codec: TextCodec) -> None:
    tokens = codec.encode("a<|endoftext|>b")
    assert 0 in tokens
    assert codec.decode(tokens) == "ab" == "".join(stream_of(codec, tokens))


def test_a_prompt_begins_with_the_bos_token_where_the_model_wants_one(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with_bos = TextCodec(tmp_path / "tokenizer.json", VOCAB, bos_token_id=0)
    assert with_bos.encode("x") == [0, *TextCodec(tmp_path / "tokenizer.json", VOCAB).encode("x")]


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer.json"):
        TextCodec(tmp_path / "tokenizer.json", VOCAB)
    with pytest.raises(BundleError, match=r"missing.json"):
        TextCodec(tmp_path / "missing.json", VOCAB)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(BundleError, match="the model has 100"):
        TextCodec(tmp_path / "tokenizer.json", 100)


PIECES = st.lists(st.text(alphabet="abc", max_size=3), max_size=12)
STOPS = st.lists(st.text(alphabet="abc", max_size=4), max_size=3)


def by_brute_force(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    """The text before the first stop string, looked for in all of the text after every piece."""
    text = ""
    for piece in pieces:
        text += piece
        found = [text.find(stop) for stop in stops if stop and stop in text]
        if found:
            return text[: min(found)], True
    return text, False


@given(pieces=PIECES, stops=STOPS)
def test_stop_strings_are_found_as_by_brute_force(pieces: list[str], stops: list[str]) -> None:
    finder, shown, stopped = StopFinder(stops), "", False
    for piece in pieces:
        text, stopped = finder.push(piece)
        shown += text
        if stopped:
            break
    if not stopped:
        shown += finder.flush()
    assert (shown, stopped) == by_brute_force(pieces, stops)


@given(pieces=PIECES, stops=STOPS)
def test_no_more_is_held_back_than_might_become_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    finder, shown, text = StopFinder(stops), "", ""
    for piece in pieces:
        visible, stopped = finder.push(piece)
        if stopped:
            return
        shown, text = shown + visible, text + piece
        held = text[len(shown) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_a_flush_gives_the_held_text_once() -> None:
    finder = StopFinder(["END"])
    assert finder.push("xE") == ("x", False)
    assert finder.flush() == "E"
    assert finder.flush() == ""
