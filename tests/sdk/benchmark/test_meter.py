"""Counting what an engine is asked to run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from skipstone.benchmark.meter import MeteredEngine, PartBytes, part_bytes
from skipstone.benchmark.subject import Subject
from skipstone.bundle import open_bundle
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.engines import EngineOptions
from skipstone.runtimes.session import Session
from tests.sdk.scripted import CHEAP_DRAFTS, ScriptedEngine, ScriptedTranslator

SIZES = PartBytes(segments=(100, 1000), draft_head=7)


@pytest.fixture
def metered() -> Iterator[tuple[MeteredEngine, Session]]:
    engine = ScriptedEngine(range(64))
    wrapped = MeteredEngine(engine, CostModel(CHEAP_DRAFTS, engine.exits), SIZES)
    with Session(wrapped, 64) as session:
        yield wrapped, session


def test_a_plain_token_costs_every_segment_once(metered: tuple[MeteredEngine, Session]) -> None:
    engine, session = metered
    session.prefill([0])
    assert engine.meter.bytes_read == 1100
    assert engine.meter.predicted_seconds == pytest.approx(0.021)


def test_a_draft_costs_its_segment_and_the_draft_head_and_its_verification_the_rest(
    metered: tuple[MeteredEngine, Session],
) -> None:
    engine, session = metered
    session.prefill([0])
    engine.meter.reset()
    rows = session.push([1, 2, 3])
    session.advance(rows, 1)
    assert engine.meter.bytes_read == 107
    assert engine.meter.predicted_seconds == pytest.approx(0.0011)
    session.advance(rows, 2)
    assert engine.meter.bytes_read == 1107
    assert engine.meter.predicted_seconds == pytest.approx(0.0211)


def test_a_metered_engine_computes_what_the_engine_computes(
    metered: tuple[MeteredEngine, Session],
) -> None:
    _, session = metered
    assert session.prefill([0, 1, 2]).argmax() == 3


def test_reading_a_source_is_passed_on_and_not_counted() -> None:
    engine = ScriptedTranslator(bytes)
    wrapped = MeteredEngine(engine, CostModel(CHEAP_DRAFTS, engine.exits), SIZES)
    with Session(wrapped, 64) as session:
        assert session.encode(list(b"abc")) == 2
        assert (wrapped.meter.bytes_read, wrapped.meter.predicted_seconds) == (0, 0.0)
        assert session.prefill([0]).argmax() == ord("a")
    assert engine.sources == [b"abc"]


@pytest.mark.engine
def test_plain_decoding_of_a_real_bundle_reads_all_its_weights_at_every_token(
    coder_bundle_q8_0: Path,
) -> None:
    bundle = open_bundle(coder_bundle_q8_0)
    segments = [coder_bundle_q8_0 / segment.file for segment in bundle.manifest.segments]
    sizes = part_bytes(bundle)
    assert bundle.manifest.model.tied_embeddings  # the table is the head's weights, so it is read
    assert sum(sizes.segments) == sum(path.stat().st_size for path in segments)
    with Subject(bundle, EngineOptions(threads=1), 64) as subject:
        logits = subject.session.prefill([5, 6, 7])
        subject.engine.meter.reset()
        for _ in range(4):
            (row,) = subject.session.push([int(logits.argmax())])
            (logits,) = subject.session.advance([row], subject.session.exits[-1])
            subject.session.commit(row)
        assert subject.engine.meter.bytes_read == 4 * sum(sizes.segments)
        assert subject.engine.meter.predicted_seconds == pytest.approx(4 * subject.costs.plain)


def test_a_table_that_is_only_looked_up_is_not_counted(coder_bundle_q8_0: Path) -> None:
    bundle = open_bundle(coder_bundle_q8_0)
    table = bundle.manifest.embedding
    assert table.type.upper() == "Q8_0"
    tied = part_bytes(bundle)
    untied_facts = bundle.manifest.model.model_copy(update={"tied_embeddings": False})
    bundle.manifest = bundle.manifest.model_copy(update={"model": untied_facts})
    untied = part_bytes(bundle)
    holder = [segment.file for segment in bundle.manifest.segments].index(table.file)
    assert tied.segments[holder] - untied.segments[holder] == table.rows * table.columns // 32 * 34
