"""Encoder-decoders on llama.cpp: trees, exits, commits and rewinds against eager torch, sources one after another, and
what must not kill the process.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from numpy.typing import NDArray

from skipstone.bundle import Bundle, GgufManifest, manifest_of
from skipstone.errors import BundleError, ContextFullError, EngineError, UsageError
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.engines.eager_t5 import EagerT5Engine
from skipstone.runtimes.engines.llamacpp.cross import CrossLane
from skipstone.runtimes.engines.llamacpp.engine import LlamaCppEngine
from skipstone.runtimes.engines.llamacpp.watch import write_rows
from skipstone.runtimes.session import Session
from tests.exporters.tiny import VOCAB_SIZE
from tests.exporters.tiny_t5 import EOS, PAD, T5_CASES, make_t5
from tests.runtimes.session_machine import make_machine
from tests.runtimes.toy_engine import ROOT

pytestmark = pytest.mark.engine

TOLERANCE = 2e-4  # against torch; the same engine agrees with itself to less
EXITS, ENCODER_EXITS = (1, 2), (1, 3)
_random = np.random.default_rng(5)
SOURCE = [*map(int, _random.integers(2, VOCAB_SIZE, 21)), EOS]
OTHER = [*map(int, _random.integers(2, VOCAB_SIZE, 150)), EOS]
PROMPT = [PAD, *map(int, _random.integers(2, VOCAB_SIZE, 10))]
# Two branches from the context, one of them forking twice: (token, index of the parent in this list, or ROOT)
TREE = [(5, ROOT), (6, 0), (7, 1), (8, 0), (9, 3), (10, ROOT), (11, 5), (12, 0), (13, 3)]


@pytest.fixture(scope="module", params=["t5", "flan-t5"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_t5(tmp_path_factory.mktemp("t5") / request.param, T5_CASES[request.param])


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from skipstone.exporters.pipeline import export_checkpoint

    output = tmp_path_factory.mktemp("bundles") / checkpoint.name
    return export_checkpoint(
        checkpoint,
        output,
        quantize="none",
        exits=EXITS,
        encoder_exits=ENCODER_EXITS,
        draft_vocab_size=128,
        max_source_length=200,
    )


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Iterator[LlamaCppEngine]:
    engine = open_engine(bundle, EngineOptions(threads=1))
    assert isinstance(engine, LlamaCppEngine)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def eager(checkpoint: Path, engine: Engine) -> EagerT5Engine:
    return EagerT5Engine.from_checkpoint(checkpoint, EXITS, engine.draft_vocabulary, ENCODER_EXITS)


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with Session(engine, 128) as session:
        session.encode(SOURCE)
        yield session


def fresh(engine: Engine, text: list[int], source: list[int] = SOURCE) -> NDArray[np.float32]:
    """Logits after a text, by a session of its own."""
    with Session(engine, 128) as session:
        session.encode(source)
        return session.prefill(text)


def push_tree(session: Session) -> list[int]:
    rows: list[int] = []
    for token, parent in TREE:
        rows += session.push([token], [ROOT if parent == ROOT else rows[parent]])
    return rows


def path_of(index: int) -> list[int]:
    tokens: list[int] = []
    while index != ROOT:
        token, index = TREE[index]
        tokens.insert(0, token)
    return tokens


def lanes_of(session: Session) -> list[CrossLane]:
    lanes = list(session._cache._lanes.values())  # type: ignore[attr-defined]
    assert all(isinstance(lane, CrossLane) for lane in lanes)
    return lanes


def test_a_tree_has_the_logits_of_eager_at_every_exit(session: Session, eager: EagerT5Engine) -> None:
    other = Session(eager, 128)
    other.encode(SOURCE)
    np.testing.assert_allclose(session.prefill(PROMPT), other.prefill(PROMPT), atol=TOLERANCE)
    rows, expected_rows = push_tree(session), push_tree(other)
    for exit_layer in session.exits:
        found, expected = session.advance(rows, exit_layer), other.advance(expected_rows, exit_layer)
        np.testing.assert_allclose(np.stack(found), np.stack(expected), atol=TOLERANCE)
        assert np.stack(expected).std() > 0.1


def test_every_row_of_a_tree_sees_its_own_path_and_the_source(session: Session) -> None:
    session.prefill(PROMPT)
    found = session.advance(push_tree(session), session.exits[-1])
    for index, logits in enumerate(found):
        expected = fresh(session.engine, [*PROMPT, *path_of(index)])
        np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("accepted", [0, 2, 4, 6, 8])
def test_rejected_drafts_leave_the_cache_as_plain_decoding_would(session: Session, accepted: int) -> None:
    session.prefill(PROMPT)
    rows = push_tree(session)
    session.advance(rows, 1)
    session.advance([rows[4], rows[6], rows[accepted]], 2)  # branches come to different exits
    session.advance([rows[accepted]], session.exits[-1])
    session.commit(rows[accepted])
    text = [*PROMPT, *path_of(accepted)]
    for token in (20, 21, 22):
        text.append(token)
        (row,) = session.push([token])
        (logits,) = session.advance([row], session.exits[-1])
        session.commit(row)
        np.testing.assert_allclose(logits, fresh(session.engine, text), atol=1e-4)


def test_any_sequence_of_operations_agrees_with_plain_prefill(bundle: Bundle) -> None:
    engine = open_engine(bundle, EngineOptions(threads=1))
    inner = {exit_layer: Session(engine, 16) for exit_layer in engine.exits}
    for session in inner.values():
        session.encode(SOURCE)

    @cache
    def reference(text: tuple[int, ...], exit_layer: int) -> NDArray[np.float32]:
        session = inner[exit_layer]
        session.rewind(0)
        row = session.push(text)[-1]
        return session.advance([row], exit_layer)[0]

    machine = make_machine(engine, reference, context_length=14, tolerance=1e-4, tokens=4, source=SOURCE)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=25,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
    engine.close()


def test_a_text_of_several_batches_has_the_logits_of_eager(engine: Engine, eager: EagerT5Engine) -> None:
    text = [PAD, *np.random.default_rng(1).integers(0, VOCAB_SIZE, 150).tolist()]
    with Session(engine, 200) as ours:
        other = Session(eager, 200)
        for one in (ours, other):
            one.encode(OTHER)
        np.testing.assert_allclose(ours.prefill(text), other.prefill(text), atol=TOLERANCE)


def test_a_second_source_leaves_nothing_of_the_first(session: Session) -> None:
    first = session.prefill(PROMPT)
    session.advance(push_tree(session), session.exits[-1])
    session.encode(OTHER)
    np.testing.assert_allclose(session.prefill(PROMPT), fresh(session.engine, PROMPT, OTHER), atol=1e-5)
    session.encode(SOURCE)
    np.testing.assert_allclose(session.prefill(PROMPT), first, atol=1e-5)
    assert np.abs(fresh(session.engine, PROMPT, OTHER) - first).max() > 0.1


def test_sessions_attend_to_their_own_sources(engine: Engine) -> None:
    with Session(engine, 64) as one, Session(engine, 64) as other:
        one.encode(SOURCE)
        other.encode(OTHER)
        found = [session.prefill(PROMPT) for session in (one, other)]
    for logits, source in zip(found, (SOURCE, OTHER), strict=True):
        np.testing.assert_allclose(logits, fresh(engine, PROMPT, source), atol=1e-5)


@pytest.mark.parametrize("stop", [*ENCODER_EXITS, 4])
def test_the_encoder_stops_where_it_is_told_and_shows_what_eagers_does(
    stop: int, session: Session, eager: EagerT5Engine
) -> None:
    other = Session(eager, 128)
    seen: dict[Session, list[tuple[int, NDArray[np.float32], NDArray[np.float32]]]] = {session: [], other: []}
    for one in (session, other):

        def settled(
            exit_layer: int,
            before: NDArray[np.float32],
            after: NDArray[np.float32],
            one: Session = one,
        ) -> bool:
            seen[one].append((exit_layer, before, after))
            return exit_layer == stop

        assert one.encode(OTHER, settled) == stop
    asked = [exit_layer for exit_layer in ENCODER_EXITS if exit_layer <= stop]
    assert [entry[0] for entry in seen[session]] == [entry[0] for entry in seen[other]] == asked
    for (_, *ours), (_, *theirs) in zip(seen[session], seen[other], strict=True):
        np.testing.assert_allclose(np.stack(ours), np.stack(theirs), atol=TOLERANCE)
    np.testing.assert_allclose(session.prefill(PROMPT), other.prefill(PROMPT), atol=TOLERANCE)


def test_idle_layers_are_left_out_and_would_change_nothing(session: Session) -> None:
    assert all(lane._distance is not None for lane in lanes_of(session))
    left_out = session.prefill(PROMPT)
    for lane in lanes_of(session):
        lane._distance = None
    session.encode(SOURCE)
    np.testing.assert_allclose(session.prefill(PROMPT), left_out, atol=1e-4)


def test_states_that_do_not_arrive_are_computed_instead(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a device's graph is split, and what was written is overwritten."""
    expected = session.prefill(PROMPT)
    monkeypatch.setattr(
        "skipstone.runtimes.engines.llamacpp.cross.write_rows", lambda last, rows: write_rows(last, rows * 0)
    )
    session.encode(SOURCE)
    assert all(lane._distance is None for lane in lanes_of(session))
    np.testing.assert_allclose(session.prefill(PROMPT), expected, atol=1e-4)


def test_a_tree_may_have_as_many_leaves_as_there_are_sequences_and_no_more(session: Session) -> None:
    session.prefill(PROMPT)
    limit = session.max_branches
    for leaves in (2, 9, limit):
        rows = session.push(list(range(leaves)), [ROOT] * leaves)
        found = session.advance(rows, session.exits[-1])
        np.testing.assert_allclose(
            found[-1], fresh(session.engine, [*PROMPT, leaves - 1]), atol=1e-4, err_msg=str(leaves)
        )
        session.discard()
    rows = session.push(list(range(limit + 1)), [ROOT] * (limit + 1))
    with pytest.raises(ContextFullError, match="leaves"):
        session.advance(rows, session.exits[0])


def test_a_source_that_cannot_be_is_refused_and_the_next_one_works(session: Session) -> None:
    expected = session.prefill(PROMPT)
    for source, error in (([], UsageError), ([5] * 201, ContextFullError), ([VOCAB_SIZE], UsageError)):
        with pytest.raises(error):
            session.encode(source)
    session.encode(SOURCE)
    np.testing.assert_allclose(session.prefill(PROMPT), expected, atol=1e-5)


def test_the_cache_guards_llama_cpp_by_itself(engine: LlamaCppEngine) -> None:
    """Each of these would abort the process."""
    with Session(engine, 64) as session:
        cache = session._cache
        for source in ([], [5] * 201):
            with pytest.raises(EngineError, match="1 to 200"):
                cache.encode(source)  # type: ignore[attr-defined]
        lane = lanes_of(session)[0]
        with pytest.raises(EngineError, match="no source was encoded"):
            lane.decode(1)
        with pytest.raises(EngineError, match="1 to 200"):
            lane.take_in(np.zeros((201, 64), np.float32), np.zeros((201, 64), np.float32))


def test_the_longest_source_and_the_shortest_work(session: Session, eager: EagerT5Engine) -> None:
    other = Session(eager, 128)
    for source in (SOURCE[:1], [*(OTHER * 2)[:200]]):
        found = []
        for one in (session, other):
            one.encode(source)
            found.append(one.prefill(PROMPT))
        np.testing.assert_allclose(found[0], found[1], atol=TOLERANCE)


def _altered(bundle: Bundle, folder: Path) -> Bundle:
    shutil.copytree(bundle.path, folder)
    return Bundle(folder, bundle.manifest)


@pytest.mark.parametrize("which", ["encoder_segments", "segments"])
def test_a_truncated_segment_is_refused_with_its_name(bundle: Bundle, which: str, tmp_path: Path) -> None:
    altered = _altered(bundle, tmp_path / "altered")
    file = altered.path / getattr(manifest_of(bundle, GgufManifest), which)[0].file
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(EngineError, match=file.name):
        open_engine(altered, EngineOptions(threads=1))


@pytest.mark.parametrize("into", ["segments", "encoder_segments"])
def test_segments_that_were_swapped_are_refused(bundle: Bundle, into: str, tmp_path: Path) -> None:
    """A decoder's part where the encoder's is expected, or the other way round: decoding could kill the process."""
    manifest = manifest_of(bundle, GgufManifest)
    files = {"encoder_segments": manifest.encoder_segments[0].file, "segments": manifest.segments[0].file}
    altered = _altered(bundle, tmp_path / "altered")
    (source,) = (file for which, file in files.items() if which != into)
    shutil.copy(bundle.file(source), altered.path / files[into])
    with pytest.raises(BundleError, match=files[into]):
        open_engine(altered, EngineOptions(threads=1))


def test_another_models_segment_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    altered = _altered(bundle, tmp_path / "altered")
    manifest = manifest_of(bundle, GgufManifest)
    first, second = (part.file for part in manifest.encoder_segments[:2])  # of one layer, and of two
    shutil.copy(bundle.file(second), altered.path / first)
    with pytest.raises(BundleError, match=first):
        open_engine(altered, EngineOptions(threads=1))


def test_threads_are_chosen_for_every_part(bundle: Bundle) -> None:
    engine = open_engine(bundle, EngineOptions())
    with Session(engine, 64) as session:
        session.encode(SOURCE)
        np.testing.assert_allclose(session.prefill(PROMPT), fresh(engine, PROMPT), atol=1e-4)
    engine.close()


def test_k_and_v_may_be_kept_in_half_the_bits_but_not_in_blocks(bundle: Bundle, eager: EagerT5Engine) -> None:
    half = open_engine(bundle, EngineOptions(threads=1, kv_type="bf16"))
    with Session(half, 64) as one, Session(eager, 64) as other:
        one.encode(SOURCE)
        other.encode(SOURCE)
        difference = np.abs(one.prefill(PROMPT) - other.prefill(PROMPT)).max()
    half.close()
    assert TOLERANCE < difference < 0.3
    with pytest.raises(UsageError, match=r"--kv-type q8_0: llama\.cpp cannot quantise"):
        open_engine(bundle, EngineOptions(threads=1, kv_type="q8_0"))
