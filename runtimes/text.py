"""Text in and out: the bundle's tokenizer, streaming without partial characters, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from skipstone.errors import BundleError


class TextCodec:
    """A tokenizer.json.

    Args:
        path: the file.
        vocab_size: of the model; a tokenizer that can give larger ids is refused.
        bos_token_id: put in front of every prompt, or None.

    Raises:
        BundleError: the file is not a tokenizer or does not fit the model.
    """

    def __init__(self, path: Path, vocab_size: int, bos_token_id: int | None = None) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(f"{path}: not a tokenizer: {error}", hint="export the bundle again") from error
        if self._tokenizer.get_vocab_size() > vocab_size:
            raise BundleError(
                f"{path}: {self._tokenizer.get_vocab_size()} tokens, the model has {vocab_size}",
                hint="export the bundle again",
            )
        self._bos = bos_token_id

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt; special tokens in the text are recognised."""
        ids = self.tokens(text)
        return [self._bos, *ids] if self._bos is not None else ids

    def tokens(self, text: str) -> list[int]:
        """Token ids of the text alone; special tokens in it are recognised."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def source(self, text: str) -> list[int]:
        """Token ids of an encoder's source, with what the tokenizer itself puts around a text (T5: its end token)."""
        return list(self._tokenizer.encode(text, add_special_tokens=True).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special tokens left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def vocabulary(self) -> list[str]:
        """Token text by id ("" for ids without one)."""
        by_id = {index: token for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items()}
        return [by_id.get(index, "") for index in range(max(by_id) + 1)]

    @cached_property
    def word_starts(self) -> frozenset[int]:
        """Tokens that begin a word: a space in front, or no letter or digit to begin with."""
        spelt = self.vocabulary()
        texts = self._tokenizer.decode_batch(
            [[token] for token in range(len(spelt))], skip_special_tokens=False
        )
        pairs = enumerate(zip(spelt, texts, strict=True))
        return frozenset(token for token, (piece, text) in pairs if _begins_word(piece, text))

    def stream(self) -> TextStream:
        """A decoder for tokens as they come."""
        return TextStream(self._tokenizer)


def _begins_word(piece: str, text: str) -> bool:
    """Whether a token begins a word, by its spelling in the vocabulary (a space is Ġ or ▁) and by its text."""
    return piece[:1] in "Ġ▁" or not (text[:1].isalnum() or text[:1] in "'\ufffd")


class TextStream:
    """Turns tokens into text pieces that never end inside a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._length = 0

    def push(self, token: int) -> str:
        """The text that is certain now; "" while a character is incomplete."""
        self._tokens.append(token)
        piece = self._decoder.step(self._tokenizer, token) or ""
        self._length += len(piece)
        return piece

    def flush(self) -> str:
        """What is left at the end: an incomplete character becomes U+FFFD."""
        text = str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
        return text[self._length :]


class StopFinder:
    """Finds stop strings in streamed text and holds back what might become one.

    Args:
        stops: the strings; empty ones are ignored.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Text that can be shown, and whether a stop string was completed (its text is not shown)."""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Text held back, when generation ends without a stop string."""
        held, self._held = self._held, ""
        return held
