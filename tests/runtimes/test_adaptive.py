"""Lossy modes: what they may change, what they must not, and that they save what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipstone.errors import ContextFullError, UsageError
from skipstone.runtimes.adaptive import AdaptiveOptions, Saturation, generate_adaptively
from skipstone.runtimes.generate import GenerationLimits, Step
from skipstone.runtimes.session import Session
from tests.runtimes.toy_engine import ToyCache, ToyEngine, ToyTranslator, plain_tokens

ENGINE = ToyTranslator(3, copying=6.0, depth_scale=0.3, draft_tokens=24)
SOURCE = [5, 9, 13, 2, 7, 7, 20, 11]


def run(
    margin: float, source: list[int], count: int = 20, eos: tuple[int, ...] = ()
) -> tuple[list[Step], ToyCache]:
    with Session(ENGINE, 40) as session:
        session.encode(source)
        steps = list(generate_adaptively(session, [0], margin, GenerationLimits(count, eos)))
        assert list(session.tokens) == [0, *(step.tokens[0] for step in steps[:-1])]
        assert session.pending == 0
        cache = session._cache
    assert isinstance(cache, ToyCache)
    return steps, cache


@given(
    source=st.lists(st.integers(0, 23), min_size=1, max_size=12), eos=st.lists(st.integers(0, 23), max_size=2)
)
@settings(max_examples=10)
def test_a_margin_of_one_is_plain_decoding(source: list[int], eos: list[int]) -> None:
    steps, _ = run(1.0, source, eos=tuple(eos))
    assert [step.tokens[0] for step in steps] == plain_tokens(ENGINE, [0], 20, eos, source=source)
    assert {step.drafter for step in steps} == {""}


@given(
    source=st.lists(st.integers(0, 23), min_size=1, max_size=12), margin=st.sampled_from([0.0, 0.2, 0.5, 0.9])
)
@settings(max_examples=10)
def test_every_token_is_the_best_of_the_first_exit_that_is_sure(source: list[int], margin: float) -> None:
    """Straight computation: no K/V is missing or wrong for the rows that left early."""
    steps, _ = run(margin, source, count=12)
    memory, text = ENGINE.encoded(source)[0], [0]
    for number, step in enumerate(steps):
        expected, name = None, ""
        threshold = margin + 0.1 * (1.0 - margin) * np.exp(-4.0 * number / 12)
        for exit_layer in ENGINE.exits[:-1] if number else ():
            logits = ENGINE.reference(text, exit_layer, memory)[-1].astype(np.float64)
            p = np.sort(np.exp(logits - logits.max()))
            if (p[-1] - p[-2]) / p.sum() > threshold:
                expected, name = int(logits.argmax()), f"exit {exit_layer}"
                break
        if expected is None:
            expected = int(ENGINE.reference(text, memory=memory)[-1].argmax())
        assert (step.tokens, step.drafter) == ((expected,), name)
        text.append(expected)


def test_a_low_margin_leaves_the_deep_layers_out() -> None:
    steps, cache = run(0.0, SOURCE)
    assert cache.rows_run[0] == 20
    assert cache.rows_run[-1] < 10
    assert sum(step.drafter == "exit 2" for step in steps) > 10


def test_a_model_without_exits_cannot_leave_early_and_the_session_is_kept() -> None:
    for engine in (ToyEngine(num_segments=1), ToyEngine(draft_tokens=None)):
        with Session(engine, 8) as session:
            session.prefill([1, 2])
            with pytest.raises(UsageError, match="no early exits"):
                next(generate_adaptively(session, [3], 0.5, GenerationLimits(3)))
            assert list(session.tokens) == [1, 2]


def test_a_full_context_ends_the_text() -> None:
    with Session(ENGINE, 6) as session:
        session.encode(SOURCE)
        steps = list(generate_adaptively(session, [0], 0.3, GenerationLimits(30)))
        assert (len(steps), steps[-1].stop) == (6, "context")
        with pytest.raises(ContextFullError):
            next(generate_adaptively(session, [0] * 4, 0.3, GenerationLimits(30)))


def test_an_abandoned_generation_leaves_a_consistent_session() -> None:
    with Session(ENGINE, 40) as session:
        session.encode(SOURCE)
        steps = generate_adaptively(session, [0], 0.0, GenerationLimits(30))
        text = [0, *(next(steps).tokens[0] for _ in range(5))]
        steps.close()
        assert list(session.tokens) == text[:-1]
        found = session.prefill(text[-1:])
        expected = ENGINE.reference(text, memory=ENGINE.encoded(SOURCE)[0])[-1]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_saturation_is_the_mean_cosine_over_the_tokens() -> None:
    before = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
    after = np.array([[3.0, 0.0], [2.0, 2.0]], np.float32)
    cosine = (1.0 + np.sqrt(0.5)) / 2
    assert Saturation(cosine - 1e-4)(1, before, after)
    assert not Saturation(cosine + 1e-4)(1, before, after)
    assert Saturation(-0.1)(1, np.zeros((2, 2), np.float32), after)


def test_an_encoder_stops_where_it_has_settled() -> None:
    with Session(ENGINE, 40) as session:
        assert session.encode(SOURCE, AdaptiveOptions(encoder_saturation=-1.0).settled) == 1
        assert session.encode(SOURCE, AdaptiveOptions(encoder_saturation=1.0).settled) == 3
        assert session.encode(SOURCE, AdaptiveOptions().settled) == 3


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ({"early_exit_margin": 1.1}, "--early-exit-margin 1.1"),
        ({"early_exit_margin": float("nan")}, "--early-exit-margin nan"),
        ({"encoder_saturation": -2.0}, "--encoder-saturation -2"),
    ],
)
def test_options_that_mean_nothing_are_refused(arguments: dict[str, float], flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        AdaptiveOptions(**arguments)
