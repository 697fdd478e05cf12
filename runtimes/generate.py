"""The generation loop: propose, verify, commit, learn.

    for step in generate(session, prompt, policy, sampler, GenerationLimits(max_new_tokens=64), costs):
        print(step.tokens)

One round pushes the pending token and a drafter's tree, advances them to the last exit in one batch, accepts a path
losslessly (`skipstone.runtimes.verify`) and commits it. Without a drafter a round is plain decoding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from skipstone.errors import UsageError
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters.base import Drafter, DraftRequest, Observation
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.sampling import Sampler
from skipstone.runtimes.session import Session
from skipstone.runtimes.tree import TokenTree
from skipstone.runtimes.verify import Verdict, accept_greedy, accept_sampled

StopReason = Literal["length", "eos", "context", "stop"]
_NO_TREE = TokenTree()


@dataclass(frozen=True)
class GenerationLimits:
    """When to stop.

    Attributes:
        max_new_tokens: at least 1.
        eos_token_ids: generation ends after one of these; it is not part of the text.
    """

    max_new_tokens: int = 128
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse an empty generation."""
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens {self.max_new_tokens}: expected at least 1")


@dataclass(frozen=True, slots=True)
class Step:
    """One round's outcome.

    Attributes:
        tokens: new tokens, in order.
        accepted: how many of them were drafts.
        drafted: nodes that were verified.
        rejected: the drafts of the likeliest refused path, for display.
        drafter: name of the drafter, "" for a plain round.
        draft_seconds, verify_seconds: time of the two phases.
        stop: why generation ends with this step, or None.
    """

    tokens: tuple[int, ...]
    accepted: int
    drafted: int
    rejected: tuple[int, ...]
    drafter: str
    draft_seconds: float
    verify_seconds: float
    stop: StopReason | None


@dataclass(slots=True)
class Outcome:
    """What a policy learns from a round."""

    drafter: Drafter | None
    drafted: int
    accepted: int
    seconds: float
    observation: Observation


@dataclass(frozen=True, slots=True)
class Choice:
    """How the next round drafts.

    Attributes:
        drafter: None for a plain round.
        allowance: seconds that the round may take beyond a plain one.
    """

    drafter: Drafter | None = None
    allowance: float = math.inf


class Policy(Protocol):
    """Chooses how each round drafts."""

    def begin(self, prompt: Sequence[int], session: Session) -> None:
        """A new sequence begins with these tokens, which the session holds."""

    def next(self, remaining: int) -> Choice:
        """How the next round drafts; at most `remaining` tokens, two or more, are still to come."""

    def learn(self, outcome: Outcome) -> None:
        """A round is over."""


@dataclass
class FixedPolicy:
    """Every round drafts with the same drafter (or with none)."""

    drafter: Drafter | None = None

    def begin(self, prompt: Sequence[int], session: Session) -> None:
        if self.drafter is not None:
            self.drafter.reset(prompt, session.source)

    def next(self, remaining: int) -> Choice:
        return Choice(self.drafter)

    def learn(self, outcome: Outcome) -> None:
        if self.drafter is not None:
            self.drafter.observe(outcome.observation)


def generate(
    session: Session,
    prompt: Sequence[int],
    policy: Policy,
    sampler: Sampler,
    limits: GenerationLimits,
    costs: CostModel,
) -> Generator[Step]:
    """Generate after a prompt; the session's earlier content is the context before it.

    Args:
        session: holds the context; the prompt is appended to it.
        prompt: token ids, at least one.
        policy: how rounds draft.
        sampler: how tokens are chosen.
        limits: when to stop.
        costs: the engine's cost model.

    Yields:
        One step per round, the first after the prompt. When the iterator ends or is abandoned the session holds the
        context, the prompt and every token yielded but the last.

    Raises:
        UsageError, ContextFullError: an empty or over-long prompt; the session is as before.
    """
    start = session.length
    logits = session.prefill(prompt)
    policy.begin([*session.tokens], session)
    run = _Run(session, policy, sampler, limits, costs, [*session.tokens])
    try:
        step = run.first(logits)
        yield step
        while step.stop is None:
            step = run.round()
            yield step
    finally:
        session.discard()
        session.rewind(min(session.length, start + len(prompt) + max(0, run.emitted - 1)))


class _Run:
    """State of one generation."""

    def __init__(
        self,
        session: Session,
        policy: Policy,
        sampler: Sampler,
        limits: GenerationLimits,
        costs: CostModel,
        context: list[int],
    ) -> None:
        self.emitted = 0
        self._session, self._policy, self._sampler = session, policy, sampler
        self._limits, self._costs, self._context = limits, costs, context

    def first(self, logits: NDArray[np.float32]) -> Step:
        """The token after the prompt."""
        verdict = self._accept(_NO_TREE, [logits])
        return self._emit((verdict.token,), 0, _NO_TREE, (), None, 0.0, 0.0)

    def round(self) -> Step:
        """Propose, verify, commit, learn."""
        session, began = self._session, time.perf_counter()
        # drafters may compute rows that are not verified in the end: half the room is theirs
        room = min((session.room - 1) // 2, session.max_branches - 1)
        measured = self._costs.widest - 1
        remaining = self._limits.max_new_tokens - self.emitted
        limit = min(remaining - 1, room, measured)
        choice = self._policy.next(remaining) if limit > 0 else Choice()
        drafter, tree = choice.drafter, _NO_TREE
        if drafter is not None:
            request = DraftRequest(
                self._context, session, self._sampler, limit, self._costs, allowance=choice.allowance
            )
            tree = drafter.propose(request)
        drafted = time.perf_counter()
        (root,) = session.push(self._context[-1:])
        rows = [root]
        for token, parent in zip(tree.tokens, tree.parents, strict=True):
            rows += session.push((token,), (rows[parent + 1],))
        logits = session.advance(rows, session.exits[-1])
        verdict = self._accept(tree, logits)
        accepted = verdict.accepted
        session.commit(rows[accepted[-1] + 1] if accepted else root)
        tokens = (*(tree.tokens[node] for node in accepted), verdict.token)
        verified = time.perf_counter()
        step = self._emit(tokens, len(accepted), tree, accepted, drafter, drafted - began, verified - drafted)
        self._learn(drafter, tree, verdict, step, logits)
        return step

    def _accept(self, tree: TokenTree, logits: Sequence[NDArray[np.float32]]) -> Verdict:
        """Verify with the target's logits; logits[0] is the root's, logits[i + 1] node i's."""
        sampler = self._sampler

        def history(node: int) -> Sequence[int]:
            return [*self._context, *tree.path_tokens(node)] if sampler.uses_history else ()

        if sampler.greedy:
            return accept_greedy(tree, lambda node: sampler.best(logits[node + 1], history(node)))
        return accept_sampled(
            tree, lambda node: sampler.distribution(logits[node + 1], history(node)), sampler.rng
        )

    def _emit(
        self,
        tokens: tuple[int, ...],
        accepted: int,
        tree: TokenTree,
        path: Sequence[int],
        drafter: Drafter | None,
        draft_seconds: float,
        verify_seconds: float,
    ) -> Step:
        stop: StopReason | None = None
        for index, token in enumerate(tokens):
            if token in self._limits.eos_token_ids:
                tokens, stop = tokens[: index + 1], "eos"
                break
        self._context += tokens
        self.emitted += len(tokens)
        if stop is None and self.emitted >= self._limits.max_new_tokens:
            stop = "length"
        if stop is None and self._session.room < 1:
            stop = "context"
        return Step(
            tokens=tokens,
            accepted=min(accepted, len(tokens)),
            drafted=len(tree),
            rejected=_refused(tree, path),
            drafter=drafter.name if drafter is not None else "",
            draft_seconds=draft_seconds,
            verify_seconds=verify_seconds,
            stop=stop,
        )

    def _learn(
        self,
        drafter: Drafter | None,
        tree: TokenTree,
        verdict: Verdict,
        step: Step,
        logits: Sequence[NDArray[np.float32]],
    ) -> None:
        fresh, accepted = len(step.tokens), verdict.accepted[: step.accepted]
        scored = [self._context[-fresh - 1], *tree.tokens]
        observation = Observation(self._context, fresh, tree, accepted, scored, logits)
        seconds = step.draft_seconds + step.verify_seconds
        self._policy.learn(Outcome(drafter, len(tree), len(accepted), seconds, observation))


def _refused(tree: TokenTree, path: Sequence[int]) -> tuple[int, ...]:
    """The first refused draft after the accepted path and its first descendants."""
    parent, refused = (path[-1] if path else ROOT), []
    for node in range(len(tree)):
        if tree.parents[node] == parent and node not in path:
            refused.append(tree.tokens[node])
            parent = node
    return tuple(refused)
