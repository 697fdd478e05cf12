"""A state machine that drives a session at random and compares it with straight computation.

`make_machine(engine, reference, ...)` gives a hypothesis state machine. Its model is a tree of nodes, each
with the number of segments it must have been run through; from it follow the logits every row must have,
the number of rows every segment may have been given, and which calls must be refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from skipstone.errors import ContextFullError, UsageError
from skipstone.runtimes.engines.base import Cache, Engine
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.session import Session

Reference = Callable[[tuple[int, ...], int], NDArray[np.float32]]


@dataclass(eq=False)
class Node:
    """A token position: its whole text, its parent and how far it has come."""

    text: tuple[int, ...]
    parent: Node | None
    row: int = -1
    done: int = 0
    asked: set[int] = field(default_factory=set)


class SpyCache:
    """Counts the rows every segment runs; everything else is the cache's own."""

    def __init__(self, cache: Cache, num_segments: int) -> None:
        self.cache = cache
        self.rows_run = [0] * num_segments

    def __getattr__(self, name: str) -> object:
        return getattr(self.cache, name)

    def run(self, segment, rows, hidden, wanted):  # type: ignore[no-untyped-def]
        out = self.cache.run(segment, rows, hidden, wanted)
        self.rows_run[segment] += len(rows)
        return out


def make_machine(
    engine: Engine,
    reference: Reference,
    *,
    context_length: int,
    tolerance: float,
    tokens: int,
    source: Sequence[int] = (),
) -> type[RuleBasedStateMachine]:
    """A state machine over one engine.

    Args:
        engine: shared by all runs.
        reference: from a text and an exit to the logits after its last token.
        context_length: of the session; small, so that runs meet its end.
        tolerance: largest difference of a logit.
        tokens: how many different tokens are used; few, so that equal drafts occur.
        source: for an encoder-decoder, what `reference` knows of.
    """

    def opened() -> Session:
        session = Session(engine, context_length)
        if source:
            session.encode(source)
        return session

    token = st.integers(0, tokens - 1)

    class SessionMachine(RuleBasedStateMachine):
        @initialize(prompt=st.lists(token, max_size=context_length // 2))
        def open(self, prompt: list[int]) -> None:
            self.session = opened()
            self.spy = SpyCache(self.session._cache, len(engine.exits))
            self.session._cache = self.spy  # type: ignore[assignment]
            self.committed: list[Node] = []
            self.drafts: list[Node] = []
            self.expected_rows = [0] * len(engine.exits)
            for value in prompt:
                parent = self.tip
                text = (*(parent.text if parent else ()), value)
                self.committed.append(Node(text, parent))
            if prompt:
                found = self.session.prefill(prompt)
                np.testing.assert_allclose(
                    found, reference(tuple(prompt), engine.exits[-1]), atol=tolerance, rtol=0
                )
                self._mark(self.committed, len(engine.exits))

        @property
        def tip(self) -> Node | None:
            return self.committed[-1] if self.committed else None

        @rule(
            drawn=st.lists(st.tuples(token, st.integers(0, 50)), min_size=1, max_size=6),
            picked=st.lists(st.integers(0, 50), min_size=1, max_size=4),
            which=st.integers(0, 10),
        )
        def draft(self, drawn: list[tuple[int, int]], picked: list[int], which: int) -> None:
            self.push(drawn)
            self.advance(picked, which)

        @rule(drawn=st.lists(st.tuples(token, st.integers(0, 50)), min_size=1, max_size=4))
        def push(self, drawn: list[tuple[int, int]]) -> None:
            for value, where in drawn:
                choices: list[Node | None] = [None, *self.drafts]
                under = choices[where % len(choices)]
                parent = self.tip if under is None else under
                (row,) = self.session.push([value], [ROOT if under is None else under.row])
                text = (*(parent.text if parent else ()), value)
                same = [node for node in self.drafts if node.text == text]
                if same:
                    assert row == same[0].row, "an equal draft must be the row that stands there already"
                else:
                    assert row not in {node.row for node in self.drafts}
                    self.drafts.append(Node(text, parent, row))

        @precondition(lambda self: self.drafts)
        @rule(picked=st.lists(st.integers(0, 50), min_size=1, max_size=4), which=st.integers(0, 10))
        def advance(self, picked: list[int], which: int) -> None:
            target = which % len(engine.exits) + 1
            nodes = [self.drafts[index % len(self.drafts)] for index in picked]
            rows, exit_layer = [node.row for node in nodes], engine.exits[target - 1]
            last = target == len(engine.exits)
            fresh = [node for node in nodes if target not in node.asked]
            if any(node.done > target or (last and node.done == target) for node in fresh):
                with pytest.raises(UsageError):
                    self.session.advance(rows, exit_layer)
                return
            lagging = self._lagging(fresh, target)
            if lagging and len(self.committed) + len(self.drafts) > context_length:
                with pytest.raises(ContextFullError):
                    self.session.advance(rows, exit_layer)
                return
            logits = self.session.advance(rows, exit_layer)
            self._mark(lagging, target)
            for node, found in zip(nodes, logits, strict=True):
                node.asked.add(target)
                np.testing.assert_allclose(found, reference(node.text, exit_layer), atol=tolerance, rtol=0)

        @precondition(lambda self: self.drafts)
        @rule(picked=st.integers(0, 50))
        def commit(self, picked: int) -> None:
            node: Node | None = self.drafts[picked % len(self.drafts)]
            assert node is not None
            self.session.commit(node.row)
            path: list[Node] = []
            while node is not None and node in self.drafts:
                path.append(node)
                node = node.parent
            self.committed += reversed(path)
            self._forget()

        @precondition(lambda self: len(self.drafts) > 2)
        @rule()
        def discard(self) -> None:
            self.session.discard()
            self._forget()

        @precondition(lambda self: len(self.committed) > 3)
        @rule(dropped=st.integers(0, 5))
        def rewind(self, dropped: int) -> None:
            length = max(0, len(self.committed) - dropped)
            self.session.rewind(length)
            del self.committed[length:]
            self._forget()

        @invariant()
        def holds_the_committed_text(self) -> None:
            if hasattr(self, "session"):
                text = self.tip.text if self.tip else ()
                assert tuple(self.session.tokens) == text
                assert self.session.length == len(text)
                assert self.session.room == context_length - len(text) - len(self.drafts)

        @invariant()
        def computes_nothing_twice(self) -> None:
            if hasattr(self, "session"):
                assert self.spy.rows_run == self.expected_rows

        def teardown(self) -> None:
            if hasattr(self, "session"):
                self._compare_with_a_fresh_session()
                self.session.close()

        def _compare_with_a_fresh_session(self) -> None:
            """What the session would say next is what one prefilled with the same tokens says."""
            self.session.discard()
            text = [*self.session.tokens, 1]
            if len(text) > context_length:
                return
            (row,) = self.session.push([1])
            (found,) = self.session.advance([row], engine.exits[-1])
            with opened() as fresh:
                np.testing.assert_allclose(found, fresh.prefill(text), atol=tolerance, rtol=0)

        def _lagging(self, nodes: list[Node], target: int) -> list[Node]:
            """The nodes and their ancestors, context included, that have not come to `target`."""
            found: dict[int, Node] = {}
            for start in nodes:
                node: Node | None = start
                while node is not None:
                    if node.done < target:
                        found[id(node)] = node
                    node = node.parent
            return list(found.values())

        def _mark(self, nodes: list[Node], target: int) -> None:
            for node in nodes:
                for segment in range(node.done, target):
                    self.expected_rows[segment] += 1
                node.done = target

        def _forget(self) -> None:
            self.drafts = []

    return SessionMachine
