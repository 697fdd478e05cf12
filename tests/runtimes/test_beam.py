"""Beam search: transformers' sequences and scores, the definition of diverse groups, little room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipstone.errors import ContextFullError, UsageError
from skipstone.runtimes.beam import BeamOptions, Hypothesis, beam_search
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.engines.eager_t5 import EagerT5Engine
from skipstone.runtimes.generate import GenerationLimits
from skipstone.runtimes.session import Session
from tests.runtimes.tiny_t5 import EOS, START, VOCAB, tiny_t5
from tests.runtimes.toy_engine import ToyCache, ToyEngine, ToyTranslator, plain_tokens

TOY = ToyTranslator(vocab_size=10, draft_tokens=None, sharpness=1.5)
SOURCE = [5, 9, 3, 2, 7]
ENDS = (EOS, 7, 20, 33, 50, 61, 77, 90)  # so many that texts of different lengths end


@pytest.fixture(scope="module")
def eager() -> EagerT5Engine:
    return EagerT5Engine(tiny_t5(tied=False, sharpness=1.0))


def search(
    engine: Engine,
    source: Sequence[int],
    options: BeamOptions,
    *,
    count: int = 8,
    context: int = 96,
    ends: tuple[int, ...] = (1,),
) -> list[Hypothesis]:
    with Session(engine, context) as session:
        session.encode(source)
        found = beam_search(session, [0], options, GenerationLimits(count, ends))
        assert (list(session.tokens), session.pending) == ([0], 0)
    return found


def assert_same(found: Sequence[Hypothesis], expected: Sequence[tuple[Sequence[int], float]]) -> None:
    assert [list(h.tokens) for h in found] == [list(tokens) for tokens, _ in expected]
    np.testing.assert_allclose([h.score for h in found], [score for _, score in expected], atol=2e-5)


@pytest.mark.parametrize("early_stopping", [False, True])
def test_texts_and_scores_are_those_of_transformers(eager: EagerT5Engine, early_stopping: bool) -> None:
    rng, ends = np.random.default_rng(3), Counter[int]()
    for num_beams, length_penalty in ((2, 1.0), (4, 0.6), (4, 2.0), (5, -1.0)):
        options = BeamOptions(num_beams, num_beams, length_penalty, 1.0 if early_stopping else None)
        for length in (4, 9, 16):
            source = [*map(int, rng.integers(2, VOCAB, length)), EOS]
            out = eager.model.generate(
                torch.tensor([source]),
                num_beams=num_beams,
                num_return_sequences=num_beams,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                max_new_tokens=12,
                eos_token_id=list(ENDS),
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
            )
            texts = [_ended(row.tolist()[1:]) for row in out.sequences]
            ends.update(len(text) for text in texts)
            expected = list(zip(texts, out.sequences_scores.tolist(), strict=True))
            assert_same(search(eager, source, options, count=12, ends=ENDS), expected)
    assert START == 0
    assert len(ends) > 3, "texts of one length show little"


def _ended(tokens: list[int]) -> list[int]:
    """Without the padding after an end token."""
    return next((tokens[: at + 1] for at, token in enumerate(tokens) if token in ENDS), tokens)


def log_probs(engine: ToyTranslator, source: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
    logits = engine.reference([0, *tokens], memory=engine.encoded(source)[0])[-1].astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def test_as_many_beams_as_there_are_texts_find_the_best_of_all() -> None:
    engine = ToyTranslator(vocab_size=4, draft_tokens=None, sharpness=0.4)
    every: dict[tuple[int, ...], float] = {}
    live = {(): 0.0}
    for step in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for tokens, score in live.items():
            for token, p in enumerate(log_probs(engine, [3, 2], tokens)):
                ended = token == 1 or step == 2
                (every if ended else longer)[(*tokens, token)] = score + float(p)
        live = longer
    ranked = sorted(((t, s / len(t)) for t, s in every.items()), key=lambda item: -item[1])
    assert_same(search(engine, [3, 2], BeamOptions(40, 5), count=3), ranked[:5])


@given(
    source=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    groups=st.sampled_from([(2, 2), (4, 2), (6, 3), (4, 4)]),
    penalty=st.sampled_from([0.0, 0.3, 2.0]),
)
@settings(max_examples=12)
def test_diverse_groups_are_algorithm_1_of_the_paper(
    source: list[int], groups: tuple[int, int], penalty: float
) -> None:
    """Without end tokens: every group keeps its best, a token taken by groups before is worth less."""
    num_beams, num_groups = groups
    size, count = num_beams // num_groups, 4
    beams: list[dict[tuple[int, ...], float]] = [{(): 0.0} for _ in range(num_groups)]
    for _ in range(count):
        taken: Counter[int] = Counter()
        for group in range(num_groups):
            scored = {
                (*tokens, token): score + float(p) - penalty * taken[token]
                for tokens, score in beams[group].items()
                for token, p in enumerate(log_probs(TOY, source, tokens))
            }
            beams[group] = dict(sorted(scored.items(), key=lambda item: -item[1])[:size])
            taken.update(tokens[-1] for tokens in beams[group])
    expected = sorted(
        ((t, s / count) for group in beams for t, s in group.items()), key=lambda item: -item[1]
    )
    options = BeamOptions(num_beams, num_beams, num_beam_groups=num_groups, diversity_penalty=penalty)
    with Session(TOY, 96) as session:
        session.encode(source)
        found = beam_search(session, [0], options, GenerationLimits(count))
    np.testing.assert_allclose([h.score for h in found], [score for _, score in expected], atol=1e-5)
    assert {h.tokens for h in found} == {tokens for tokens, _ in expected}


def test_diversity_makes_texts_differ() -> None:
    def firsts(penalty: float) -> set[int]:
        options = BeamOptions(4, 4, num_beam_groups=4, diversity_penalty=penalty)
        return {h.tokens[0] for h in search(TOY, SOURCE, options)}

    assert len(firsts(0.0)) == 1
    assert len(firsts(50.0)) == 4


def test_patience_decides_how_many_texts_must_end() -> None:
    """The more patience, the better the best text, and the more is computed for it."""
    scores, spent = [], []
    for patience in (0.25, 1.0, 3.0):
        with Session(TOY, 96) as session:
            session.encode(SOURCE)
            limits = GenerationLimits(12, (1, 2, 3))
            found = beam_search(session, [0], BeamOptions(4, patience=patience), limits)
            cache = session._cache
            assert isinstance(cache, ToyCache)
            scores.append(found[0].score)
            spent.append(cache.rows_run[0])
    assert scores == sorted(scores)
    assert spent == sorted(spent)
    assert spent[0] < spent[-1]


@pytest.mark.parametrize(("context", "branches"), [(60, 64), (90, 6), (90, 5)])
def test_little_room_changes_nothing(context: int, branches: int) -> None:
    """Rows of dropped hypotheses must go, and what the others do not share must be computed anew."""
    source = [5, 9, 13, 2, 7, 7, 20, 11, 3, 8, 15, 4]
    roomy, cramped = (
        ToyTranslator(3, copying=6.0, depth_scale=0.15, draft_tokens=None, max_branches=most)
        for most in (64, branches)
    )
    with Session(cramped, context) as session:
        session.encode(source)
        found = beam_search(session, [0], BeamOptions(4, 4), GenerationLimits(20, (1,)))
        cache = session._cache
        assert isinstance(cache, ToyCache)
        computed = cache.rows_run[0]
    expected = search(roomy, source, BeamOptions(4, 4), count=20, context=90)
    assert_same(found, [(h.tokens, h.score) for h in expected])
    assert computed > 1 + 4 * 19, "nothing was computed anew: there was room enough"


def test_where_the_context_ends_the_best_so_far_is_returned() -> None:
    with Session(TOY, 12) as session:
        session.encode(SOURCE)
        found = beam_search(session, [0], BeamOptions(3, 3), GenerationLimits(60))
    assert len(found) == 3
    assert 2 <= len(found[0].tokens) < 12


def test_decoders_are_searched_too_and_one_beam_is_greedy_decoding() -> None:
    engine = ToyEngine(sharpness=2.5)
    with Session(engine, 96) as session:
        session.prefill([3, 1])
        (found,) = beam_search(session, [4], BeamOptions(1), GenerationLimits(10))
        assert list(session.tokens) == [3, 1, 4]
    assert list(found.tokens) == plain_tokens(engine, [3, 1, 4], 10)


def test_a_prompt_that_cannot_be_is_refused_and_the_session_kept() -> None:
    with Session(TOY, 8) as session:
        session.encode(SOURCE)
        session.prefill([0, 4])
        for prompt, error in (([], UsageError), ([99], UsageError), ([1] * 7, ContextFullError)):
            with pytest.raises(error):
                beam_search(session, prompt, BeamOptions(), GenerationLimits(4))
        assert list(session.tokens) == [0, 4]


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ({"num_beams": 0}, "--num-beams 0"),
        ({"num_return_sequences": 5}, "--num-return-sequences 5"),
        ({"num_return_sequences": 0}, "--num-return-sequences 0"),
        ({"length_penalty": float("nan")}, "--length-penalty nan"),
        ({"patience": 0.0}, "--patience 0"),
        ({"num_beam_groups": 3}, "--num-beam-groups 3"),
        ({"diversity_penalty": -1.0}, "--diversity-penalty -1"),
    ],
)
def test_options_that_mean_nothing_are_refused(arguments: dict[str, float], flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        BeamOptions(**arguments)  # type: ignore[arg-type]
