"""At first use `auto` tries every way to draft on built-in texts, and begins with what it found."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from skipstone.inputs import ModelInput
from skipstone.model import Model
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters.ngram import NGramDrafter
from skipstone.runtimes.policies.auto import AutoPolicy
from skipstone.runtimes.session import Session
from skipstone.trials import try_builtin_texts, try_out
from tests.sdk.scripted import (
    CHEAP_DRAFTS,
    ENCODER,
    EOS,
    ScriptedEngine,
    ScriptedTranslator,
    write_bundle,
)

TEXT = [*range(1, 9)] * 30  # what any drafter gets right
NEW = list(range(1, 240))  # what no text drafter can foresee
PROMPT = ModelInput(tuple(TEXT[:16]))


class Tried:
    """A policy on an engine that writes a text."""

    def __init__(
        self, misses: Sequence[int] = (), context_length: int = 200, text: Sequence[int] = TEXT
    ) -> None:
        engine = ScriptedEngine(text, misses)
        self.costs = CostModel(CHEAP_DRAFTS, engine.exits)
        self.policy = AutoPolicy(engine, self.costs, NGramDrafter())
        self.session = Session(engine, context_length)

    def on(self, texts: Sequence[ModelInput], seconds: float = 30.0) -> dict[str, float]:
        """Rounds seen of every way."""
        try_out(self.policy, self.session, texts, self.costs, seconds)
        return {way: record.rounds for way, record in self.policy.record.items()}


def test_every_way_is_tried_and_the_session_left_empty() -> None:
    tried = Tried()
    rounds = tried.on([PROMPT, PROMPT])
    assert len(rounds) == 2
    assert all(count >= 4 for count in rounds.values())
    assert tried.session.length == 0


def test_ways_that_never_pay_are_found_to_be_bad() -> None:
    found = {}
    for name, misses in (("right", ()), ("wrong", range(len(TEXT)))):
        tried = Tried(misses, text=NEW)
        tried.on([PROMPT, PROMPT])
        (found[name],) = (record for way, record in tried.policy.record.items() if "exit 1" in way)
    assert found["right"].tokens / found["right"].rounds > 2 * found["wrong"].tokens / found["wrong"].rounds


def test_afterwards_the_policy_is_free_again() -> None:
    tried = Tried(range(len(TEXT)))
    tried.on([PROMPT])
    tried.session.prefill(PROMPT.prompt)
    tried.policy.begin(PROMPT.prompt, tried.session)
    assert tried.policy.next(8).drafter is None  # too short to risk anything


def test_texts_that_do_not_fit_are_left_out() -> None:
    assert not any(Tried(context_length=70).on([PROMPT]).values())
    assert any(Tried(context_length=80).on([PROMPT]).values())


def test_without_time_nothing_is_tried() -> None:
    assert not any(Tried().on([PROMPT], seconds=0.0).values())


@pytest.mark.parametrize("engine", [ScriptedEngine(TEXT), ScriptedTranslator(lambda source: source)])
def test_a_model_tries_once_and_the_next_one_begins_with_it(
    engine: ScriptedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(policy: AutoPolicy, *more: object) -> None:
        calls.append(policy)
        try_builtin_texts(policy, *more)  # type: ignore[arg-type]

    monkeypatch.setattr("skipstone.model.open_engine", lambda _bundle, _options: engine)
    monkeypatch.setattr("skipstone.model.measure", lambda _engine, **_: CHEAP_DRAFTS)
    monkeypatch.setattr("skipstone.model.try_builtin_texts", counted)
    bundle = write_bundle(tmp_path / "bundle", encoder=engine.encoder)
    for _ in range(2):
        with Model(bundle, context_length=300) as model:
            assert isinstance(model.policy("auto"), AutoPolicy)
            given = {"prompt": TEXT[:16]} if engine.encoder is None else {"source": TEXT[:16]}
            assert model.generate(**given, max_new_tokens=4).tokens  # type: ignore[arg-type]
            assert any(record.rounds for record in model.policy("auto").record.values())  # type: ignore[attr-defined]
    assert len(calls) == 1


def test_an_encoder_decoder_is_tried_to_the_end_of_its_output_and_no_further() -> None:
    source = bytes(TEXT[:16])
    given = ModelInput((ENCODER.start_token_id,), (*source, EOS))

    def tokens_by_exit(eos: tuple[int, ...]) -> float:
        engine = ScriptedTranslator(lambda read: read)
        costs, session = CostModel(CHEAP_DRAFTS, engine.exits), Session(engine, 200)
        policy = AutoPolicy(engine, costs, NGramDrafter())
        try_out(policy, session, [given], costs, 30.0, eos)
        (found,) = (record for way, record in policy.record.items() if "exit" in way)
        return found.tokens

    assert 1 < tokens_by_exit((EOS,)) <= len(source) + 1
    assert tokens_by_exit(()) > len(source) + 1
