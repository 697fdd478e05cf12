"""Recording acceptance traces while a benchmark runs (`skipstone.devices.traces` says what is in them).

Three things are watched: the engine's calls (`TracedEngine`), what the policy's drafters propose (`TracedPolicy`), and
what the text drafters had proposed before a model judged it (`Witness`). While a round runs, only references are put
down; records are made of them when the generation is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray

from skipstone.devices.traces import HEAD, TARGET, Call, Round, Run
from skipstone.runtimes.drafters.base import Drafter, DraftRequest, Observation
from skipstone.runtimes.engines.base import Cache, Engine, Settled, SourceCache
from skipstone.runtimes.generate import Choice, Outcome, Policy, Step
from skipstone.runtimes.rows import ROOT, RowTree
from skipstone.runtimes.session import Session
from skipstone.runtimes.tree import TokenTree

FloatArray = NDArray[np.float32]
_DIGITS, _CLOCK_DIGITS = 4, 7  # of scores, of seconds


@dataclass
class _Snapshot:
    """The target's rows when verification begins; row ids are indices."""

    parents: list[int]
    tokens: list[int]
    progress: list[int]
    tip: int
    pending: int  # the token that the root stands for


@dataclass
class _Notes:
    """What was seen of one round."""

    calls: list[Call] = field(default_factory=list)
    engine_seconds: float = 0.0
    drafting: int = 0  # of the calls, those before verification
    tree: TokenTree = field(default_factory=TokenTree)
    text: TokenTree | None = None
    rows: _Snapshot | None = None
    drafter: str = ""
    accepted: Sequence[int] = ()
    fresh: int = 0
    seconds: float = 0.0


class Recorder:
    """Watches one generation at a time."""

    def __init__(self) -> None:
        self.active = False
        self.notes = _Notes()
        self.target: RowTree | None = None
        self._rounds: list[_Notes] = []
        self._mark = 0.0

    def begin(self) -> None:
        """A generation begins."""
        self.active, self._rounds, self.notes = True, [], _Notes()
        self._mark = time.perf_counter()

    def step(self, step: Step) -> None:
        """A round is over; the first one, which belongs to the prompt, leaves no record."""
        notes = self.notes
        notes.seconds = time.perf_counter() - self._mark
        notes.fresh, notes.drafter = len(step.tokens), step.drafter
        self._rounds.append(notes)
        self.notes = _Notes()
        self._mark = time.perf_counter()

    def finish(self, strategy: str, prompt: int, tokens: Sequence[int]) -> Run:
        """The record of the generation, which is over."""
        self.active = False
        rounds = tuple(_round(notes) for notes in self._rounds[1:])
        return Run(strategy=strategy, prompt=prompt, tokens=tuple(tokens), rounds=rounds)

    def drafted(self, tree: TokenTree, request: DraftRequest) -> None:
        """Drafting is over, verification follows."""
        notes, rows = self.notes, self.target
        notes.tree, notes.drafting = tree, len(notes.calls)
        if rows is not None:
            notes.rows = _Snapshot(
                list(rows.parents), list(rows.tokens), list(rows.progress), rows.tip, request.context[-1]
            )


class TracedEngine:
    """See `skipstone.runtimes.engines.base.Engine`; passes everything on and tells the recorder of it.

    Args:
        engine: the real one; not closed with this.
        recorder: told of every call.
        model: TARGET or DRAFT_MODEL.
    """

    def __init__(self, engine: Engine, recorder: Recorder, model: int = TARGET) -> None:
        self._engine, self._recorder, self._model = engine, recorder, model
        self.encoder = engine.encoder
        self.hidden_size, self.vocab_size, self.exits = engine.hidden_size, engine.vocab_size, engine.exits
        self.draft_vocabulary, self.max_context_length = engine.draft_vocabulary, engine.max_context_length

    def open_cache(self, context_length: int, tree: RowTree) -> Cache:
        if self._model == TARGET:
            self._recorder.target = tree
        return _TracedCache(self._engine.open_cache(context_length, tree), tree, self._recorder, self._model)

    def close(self) -> None:
        return None


class _TracedCache:
    """See `skipstone.runtimes.engines.base.SourceCache`."""

    def __init__(self, cache: Cache, tree: RowTree, recorder: Recorder, model: int) -> None:
        self._cache, self._tree, self._recorder, self._model = cache, tree, recorder, model
        self.context_length, self.max_width, self.max_branches = (
            cache.context_length,
            cache.max_width,
            cache.max_branches,
        )
        self.rewind, self.close = cache.rewind, cache.close
        self._last: tuple[int, ...] = ()

    def encode(self, source: Sequence[int], settled: Settled | None = None) -> int:
        return cast(SourceCache, self._cache).encode(source, settled)

    def embed(self, tokens: Sequence[int]) -> FloatArray:
        began = time.perf_counter()
        out = self._cache.embed(tokens)
        self._recorder.notes.engine_seconds += time.perf_counter() - began
        return out

    def run(
        self, segment: int, rows: Sequence[int], hidden: Sequence[FloatArray], wanted: Sequence[bool]
    ) -> FloatArray:
        began = time.perf_counter()
        out = self._cache.run(segment, rows, hidden, wanted)
        notes = self._recorder.notes
        notes.engine_seconds += time.perf_counter() - began
        if self._recorder.active:
            committed, depths = self._tree.num_committed, self._tree.depths
            self._last = tuple(depths[row] - committed for row in rows)
            notes.calls.append(Call(self._model, segment, self._last))
        return out

    def draft_logits(self, hidden: Sequence[FloatArray]) -> FloatArray:
        began = time.perf_counter()
        out = self._cache.draft_logits(hidden)
        notes = self._recorder.notes
        notes.engine_seconds += time.perf_counter() - began
        if self._recorder.active:  # the rows that were run last, or the last of these
            depths = self._last[-len(hidden) :]
            notes.calls.append(Call(self._model, HEAD, depths + (0,) * (len(hidden) - len(depths))))
        return out

    def commit(self, path: Sequence[int]) -> None:
        began = time.perf_counter()
        self._cache.commit(path)
        self._recorder.notes.engine_seconds += time.perf_counter() - began


class TracedPolicy:
    """See `skipstone.runtimes.generate.Policy`; tells the recorder what is proposed and what becomes of it."""

    def __init__(self, policy: Policy, recorder: Recorder) -> None:
        self._policy, self._recorder = policy, recorder

    def begin(self, prompt: Sequence[int], session: Session) -> None:
        self._policy.begin(prompt, session)

    def next(self, remaining: int) -> Choice:
        choice = self._policy.next(remaining)
        if choice.drafter is None:
            return choice
        return Choice(_Traced(choice.drafter, self._recorder.drafted), choice.allowance)

    def learn(self, outcome: Outcome) -> None:
        self._recorder.notes.accepted = outcome.observation.accepted
        self._policy.learn(outcome)


class _Traced:
    """See `skipstone.runtimes.drafters.base.Drafter`; tells of every tree before it is handed on."""

    def __init__(self, drafter: Drafter, tell: Callable[[TokenTree, DraftRequest], None]) -> None:
        self._drafter, self._tell = drafter, tell
        self.name = drafter.name

    def reset(self, prompt: Sequence[int], source: Sequence[int] = ()) -> None:
        self._drafter.reset(prompt, source)

    def propose(self, request: DraftRequest) -> TokenTree:
        tree = self._drafter.propose(request)
        self._tell(tree, request)
        return tree

    def observe(self, observation: Observation) -> None:
        self._drafter.observe(observation)

    def close(self) -> None:
        self._drafter.close()


def witnessed(text: Drafter, recorder: Recorder) -> Drafter:
    """The text drafters, whose proposals the recorder gets to know before a model adds to them."""

    def tell(tree: TokenTree, _request: DraftRequest) -> None:
        recorder.notes.text = tree

    return _Traced(text, tell)


def _round(notes: _Notes) -> Round:
    tree = notes.tree
    ran, root_ran = _progress(notes.rows, tree)
    return Round(
        drafter=notes.drafter,
        parents=tuple(tree.parents),
        tokens=tuple(map(int, tree.tokens)),
        stages=_stages(notes),
        scores=tuple(round(float(score), _DIGITS) for score in tree.scores),
        ran=ran,
        root_ran=root_ran,
        accepted=tuple(notes.accepted),
        fresh=notes.fresh,
        drafting=tuple(notes.calls[: notes.drafting]),
        verifying=tuple(notes.calls[notes.drafting :]),
        seconds=round(notes.seconds, _CLOCK_DIGITS),
        engine_seconds=round(notes.engine_seconds, _CLOCK_DIGITS),
    )


def _progress(rows: _Snapshot | None, tree: TokenTree) -> tuple[tuple[int, ...], int]:
    """Segments that each node and the root had been run through when verification began."""
    if rows is None:
        return (0,) * len(tree), 0
    index = {pair: row for row, pair in enumerate(zip(rows.parents, rows.tokens, strict=True))}
    root = index.get((rows.tip, rows.pending))
    found: list[int | None] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        above = root if parent == ROOT else found[parent]
        found.append(None if above is None else index.get((above, token)))
    ran = tuple(0 if row is None else rows.progress[row] for row in found)
    return ran, 0 if root is None else rows.progress[root]


def _stages(notes: _Notes) -> tuple[int, ...]:
    """0 for what the text drafters proposed, the last stage's index for what a model added."""
    last = notes.drafter.count(" → ")
    if not last or notes.text is None:
        return (last,) * len(notes.tree)
    proposed = set(_paths(notes.text))
    return tuple(0 if path in proposed else last for path in _paths(notes.tree))


def _paths(tree: TokenTree) -> list[tuple[int, ...]]:
    """Every node's path of tokens."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*(paths[parent] if parent != ROOT else ()), int(token)))
    return paths
