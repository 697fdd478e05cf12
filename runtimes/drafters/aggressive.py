"""Input-guided aggressive decoding (arXiv 2205.10350, section 3.1): the text to be rewritten is the draft.

Where output resembles input (correction, simplification, templates, retrieved passages) the guide is copied from the
point the output has come to. The paper copies until a token is refused, decodes plainly, and goes on copying once the
last tokens occur at exactly one place of the input. Here the place is a belief, a few weighted pointers into the guide:

    a token that pointers foretold     keeps these pointers, one further on; the others are dropped
    any other token is a correction    it may have replaced 0 to 3 tokens of the guide, or what was left of one or two
                                       words, or stem from another place: the longer the text's suffix occurs there
                                       and the nearer, the likelier

A misspelt word has more tokens than the right one, so where the next word begins says more than any number of tokens.

Where a lexicon would read the source in another way, both ways are drafted, by two drafters that doubt their own at that
place (`skipstone.runtimes.drafters.lexicon`).

Every pointer drafts its chain, so right after a correction the draft is a small tree of alignments; with none likely
enough there is no draft. What a pointer is worth, by how long it has been right, is learned from what is generated.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import NamedTuple

from skipstone.runtimes.drafters.base import DraftRequest, Observation
from skipstone.runtimes.drafters.lexicon import Followed
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.tree import TokenTree

Guide = Callable[[], Sequence[int]]
Follow = Callable[[Sequence[int]], Followed]

# Probability that a pointer is right: after so many copied tokens (3 means or more), or corrections (-2 likewise).
_PRIOR = {-2: 0.2, -1: 0.4, 0: 0.65, 1: 0.85, 2: 0.92, 3: 0.96}
_FEWEST, _MOST = min(_PRIOR), max(_PRIOR)
_DOUBTFUL = _MOST + 1  # where that of a doubtful place is kept, whatever the run
# Probability that a correction replaced 0, 1, 2 or 3 tokens of the guide, or one or two words.
_MOVES = (0.15, 0.1, 0.05, 0.1, 0.45, 0.15)
_EVIDENCE = 4.0  # for each token that a suffix occurs with elsewhere, against a replacement
_POINTERS = 6
_LEARNING = 0.04
_SURE = 0.99


class Pointer(NamedTuple):
    """A guess where the guide goes on.

    Attributes:
        position: index of the guide's next token; its length: the guide is used up.
        run: tokens copied up to here; 0 or less: corrections in a row, one less.
        weight: probability among the pointers.
        moves: those of `_MOVES` that led here at the correction before, if it was the last token.
    """

    position: int
    run: int
    weight: float
    moves: tuple[int, ...] = ()


class AggressiveDrafter:
    """See `skipstone.runtimes.drafters.base.Drafter`.

    Args:
        follow: asked at every new sequence, given the encoder-decoder's source, for what the output may resemble; None:
            the source is it, its end token included.
        name: for statistics.
        begins: tokens that begin a word; None: every token is one.
        doubt: probability, before anything is learned, that what is followed is right at one of its doubtful places.
    """

    def __init__(
        self,
        follow: Follow | None = None,
        name: str = "aggressive",
        begins: Container[int] | None = None,
        doubt: float = 0.5,
    ) -> None:
        self.name = name
        self._follow, self._begins = follow, begins
        self._trust = {**_PRIOR, _DOUBTFUL: doubt}
        self._moves = list(_MOVES)
        self.reset(())

    def reset(self, prompt: Sequence[int], source: Sequence[int] = ()) -> None:
        """Take up the guide; what has been learned stays.

        An encoder-decoder's text begins after its start token, a decoder's answer after the prompt.
        """
        followed = Followed(tuple(source)) if self._follow is None else self._follow(source)
        self._guide, self._doubtful = followed
        self._places: dict[int, list[int]] = {}
        for place, token in enumerate(self._guide):
            self._places.setdefault(token, []).append(place)
        self._next_word = _next_words([self._begins is None or t in self._begins for t in self._guide])
        self._pointers: tuple[Pointer, ...] = (Pointer(0, _MOST, 1.0),)
        self._read = 1 if source else len(prompt)
        self._read_up_to(prompt)

    def propose(self, request: DraftRequest) -> TokenTree:
        tree = TokenTree()
        nodes: dict[tuple[int, int], int] = {}
        for pointer in self._ahead(request.context):
            score, parent, run = pointer.weight, ROOT, pointer.run
            first = pointer.position
            for place, token in enumerate(self._guide[first : first + request.limit], first):
                score *= self._trusted(place, run)
                if score < request.floor:
                    break
                node = nodes.get((parent, token))
                if node is None:
                    node = nodes[parent, token] = tree.add(token, parent, score)
                else:
                    tree.scores[node] += score
                parent, run = node, _copied(run)
        return tree.best(request.limit)

    def observe(self, observation: Observation) -> None:
        self._read_up_to(observation.context)

    def close(self) -> None:
        return None

    def _ahead(self, context: Sequence[int]) -> tuple[Pointer, ...]:
        """The pointers after a context that may run ahead of what is certain, which is not learned from."""
        pointers = self._pointers
        for end in range(self._read, len(context)):
            pointers = self._after(pointers, context, end)
        return pointers

    def _read_up_to(self, context: Sequence[int]) -> None:
        for end in range(self._read, len(context)):
            self._learn(context[end])
            self._pointers = self._after(self._pointers, context, end)
        self._read = max(self._read, len(context))

    def _after(self, pointers: tuple[Pointer, ...], text: Sequence[int], at: int) -> tuple[Pointer, ...]:
        """The pointers once text[at] has followed."""
        kept = [
            Pointer(p.position + 1, _copied(p.run), p.weight * self._trusted(p.position, p.run))
            for p in pointers
            if self._foretells(p, text[at])
        ]
        return _normalised(kept or self._realigned(pointers, text, at))

    def _realigned(self, pointers: tuple[Pointer, ...], text: Sequence[int], at: int) -> list[Pointer]:
        """Where the guide may go on after the correction text[at]."""
        found: list[Pointer] = []
        places, end = self._places.get(text[at], ()), len(self._guide)
        for p in pointers:
            run = max(_FEWEST, min(p.run, 1) - 1)
            word = self._next_word[p.position]
            after = (*range(p.position, p.position + 4), word, self._next_word[word])
            for move, (share, position) in enumerate(zip(self._moves, after, strict=True)):
                found.append(Pointer(min(position, end), run, p.weight * share, (move,)))
            for place in places:
                matched = self._matched(place, text, at)
                weight = _EVIDENCE**matched / (len(places) * (1 + abs(place - p.position)))
                found.append(Pointer(place + 1, matched, p.weight * weight))
        return found

    def _matched(self, place: int, text: Sequence[int], at: int) -> int:
        """How many tokens up to text[at] the guide has up to `place`, as far as runs are told apart."""
        length = 1
        while length < min(_MOST, place + 1, at + 1) and self._guide[place - length] == text[at - length]:
            length += 1
        return length

    def _trusted(self, place: int, run: int) -> float:
        """Probability that the guide goes on right at a place."""
        return self._trust[_DOUBTFUL if place in self._doubtful else run]

    def _foretells(self, pointer: Pointer, token: int) -> bool:
        return pointer.position < len(self._guide) and self._guide[pointer.position] == token

    def _learn(self, token: int) -> None:
        """One token of the text has become certain."""
        right: set[int] = set()
        for p in self._pointers:
            hit = self._foretells(p, token)
            kind = _DOUBTFUL if p.position in self._doubtful else p.run
            trust = self._trust[kind] + _LEARNING * p.weight * (hit - self._trust[kind])
            self._trust[kind] = min(trust, _SURE)
            if hit:
                right.update(p.moves)
        total = sum(self._moves[move] for move in right)
        for move, share in enumerate(self._moves if right else ()):
            self._moves[move] += _LEARNING * ((share / total if move in right else 0.0) - share)


def _copied(run: int) -> int:
    return min(max(run, 0) + 1, _MOST)


def _next_words(begins: Sequence[bool]) -> list[int]:
    """For every place, and the one past the end, where the next word begins."""
    found = [len(begins)] * (len(begins) + 1)
    for place in range(len(begins) - 2, -1, -1):
        found[place] = place + 1 if begins[place + 1] else found[place + 1]
    return found


def _normalised(pointers: Sequence[Pointer]) -> tuple[Pointer, ...]:
    """The likeliest places, one pointer for each, their weights adding up to 1."""
    if len(pointers) == 1:
        return (pointers[0]._replace(weight=1.0),)
    merged: dict[int, Pointer] = {}
    for p in sorted(pointers, key=lambda p: -p.weight):
        same = merged.get(p.position)
        merged[p.position] = (
            p if same is None else same._replace(weight=same.weight + p.weight, moves=same.moves + p.moves)
        )
    kept = sorted(merged.values(), key=lambda p: -p.weight)[:_POINTERS]
    total = sum(p.weight for p in kept)
    return tuple(p._replace(weight=p.weight / total) for p in kept)
