"""Strategies in a benchmark begin as they do in an app that uses a bundle for the first time."""

from pathlib import Path

import pytest

from skipstone.benchmark import subject as benchmarked
from skipstone.benchmark.subject import Subject, new_policy
from skipstone.runtimes.engines import EngineOptions
from skipstone.runtimes.policies.auto import AutoPolicy
from skipstone.runtimes.strategies import StrategyOptions
from skipstone.trials import try_builtin_texts
from tests.sdk.scripted import CHEAP_DRAFTS, ScriptedEngine, write_bundle


def rounds_of(subject: Subject, **more: object) -> list[float]:
    policy = new_policy("auto", subject, None, StrategyOptions(), **more)  # type: ignore[arg-type]
    assert isinstance(policy, AutoPolicy)
    return [record.rounds for record in policy.record.values()]


def test_auto_begins_with_ways_that_were_tried_once_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def counted(policy: AutoPolicy, *more: object) -> None:
        tries.append(policy)
        try_builtin_texts(policy, *more)  # type: ignore[arg-type]

    engine = ScriptedEngine([*range(1, 9)] * 60)
    monkeypatch.setattr(benchmarked, "open_engine", lambda _bundle, _options: engine)
    monkeypatch.setattr(benchmarked, "measure", lambda _engine, **_: CHEAP_DRAFTS)
    monkeypatch.setattr(benchmarked, "try_builtin_texts", counted)
    with Subject(write_bundle(tmp_path / "bundle"), EngineOptions(threads=1), 400) as subject:
        assert not any(rounds_of(subject, record={}))
        assert tries == []
        assert all(rounds_of(subject))
        assert all(rounds_of(subject))
        assert len(tries) == 1
