"""What ways to draft are worth on this machine before anything was generated: each is tried on built-in texts for a
moment.

    >>> policy = make_policy("auto", materials)
    >>> try_builtin_texts(policy, session, codec, facts, costs)

So `auto` begins with an opinion and need not find out on a user's first texts, of which it may lose nothing worth
speaking of. Later texts outweigh it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from skipstone.builtin_texts import PROMPTS, SOURCES
from skipstone.bundle import ModelFacts
from skipstone.inputs import ModelInput, encode_input
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.generate import GenerationLimits, generate
from skipstone.runtimes.policies.auto import AutoPolicy
from skipstone.runtimes.sampling import Sampler, SamplingConfig
from skipstone.runtimes.session import Session
from skipstone.runtimes.text import TextCodec

BUDGET_SECONDS = 2.0
_TOKENS = 64  # of a text: drafts from text find more once there is some


def texts_for(codec: TextCodec, facts: ModelFacts) -> list[ModelInput]:
    """The built-in texts as a model takes them."""
    if facts.encoder is None:
        return [encode_input(codec, facts, text) for text in PROMPTS]
    return [encode_input(codec, facts, source=text) for text in SOURCES]


def try_builtin_texts(
    policy: AutoPolicy, session: Session, codec: TextCodec, facts: ModelFacts, costs: CostModel
) -> None:
    """`try_out` on the built-in texts, as a model takes them and ends them."""
    try_out(policy, session, texts_for(codec, facts), costs, eos_token_ids=facts.eos_token_ids)


def try_out(
    policy: AutoPolicy,
    session: Session,
    texts: Sequence[ModelInput],
    costs: CostModel,
    budget_seconds: float = BUDGET_SECONDS,
    eos_token_ids: tuple[int, ...] = (),
) -> None:
    """Generate greedily with one way to draft after the other; the policy keeps what it learned of them.

    Args:
        policy: whose ways are tried.
        session: its content is lost.
        texts: every way is tried on all of them, or on as many as there is time for. Those that do not fit are left out.
        costs: of the engine.
        budget_seconds: how long it may take, but for the last round of each.
        eos_token_ids: that end an encoder-decoder's output, and say nothing after; a decoder's goes on to its length.
    """
    limits = GenerationLimits(_TOKENS, eos_token_ids if session.engine.encoder is not None else ())
    room = session.context_length - _TOKENS
    fitting = [given for given in texts if len(given.prompt) <= room and _readable(given, session)]
    ways = policy.ways
    for way in ways:
        policy.try_only(way)
        until = time.perf_counter() + budget_seconds / len(ways)
        for given in fitting:
            if time.perf_counter() < until:
                _generate(policy, session, given, costs, limits, until)
    policy.try_only(None)
    session.rewind(0)


def _generate(
    policy: AutoPolicy,
    session: Session,
    given: ModelInput,
    costs: CostModel,
    limits: GenerationLimits,
    until: float,
) -> None:
    session.rewind(0)
    given.enter(session)
    steps = generate(session, given.prompt, policy, Sampler(SamplingConfig()), limits, costs)
    for _ in steps:
        if time.perf_counter() >= until:
            break
    steps.close()


def _readable(given: ModelInput, session: Session) -> bool:
    encoder = session.engine.encoder
    return encoder is None or len(given.source) <= encoder.max_source_length
