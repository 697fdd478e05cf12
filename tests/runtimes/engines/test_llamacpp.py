"""What is llama.cpp's own: how rows leave it, its sequences, what must not kill the process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from skipstone.bundle import Bundle
from skipstone.errors import BundleError, ContextFullError, EngineError, UsageError
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.session import Session
from tests.runtimes.conftest import VOCAB
from tests.runtimes.toy_engine import ROOT

pytestmark = pytest.mark.engine

PROMPT = [68, 69, 70, 32, 71, 72, 40, 300, 12, 9, 301]


@pytest.fixture
def session(tiny_bundle: Bundle) -> Iterator[Session]:
    engine = open_engine(tiny_bundle, EngineOptions(threads=1))
    with Session(engine, 128) as session:
        yield session
    engine.close()


@pytest.mark.parametrize(("which", "output"), [("tiny_bundle", "nextn"), ("tiny_qwen_bundle", "callback")])
def test_rows_leave_without_a_callback_where_the_architecture_allows(
    request: pytest.FixtureRequest, which: str, output: str
) -> None:
    bundle: Bundle = request.getfixturevalue(which)
    assert {segment.output for segment in bundle.manifest.segments[:-1]} == {output}


def test_a_tree_may_have_as_many_leaves_as_there_are_sequences_and_no_more(session: Session) -> None:
    session.prefill(PROMPT)
    limit = session.max_branches
    rows = session.push(list(range(limit)), [ROOT] * limit)
    found = session.advance(rows, session.exits[-1])
    with Session(session.engine, 128) as plain:
        np.testing.assert_allclose(found[-1], plain.prefill([*PROMPT, limit - 1]), atol=1e-4)
    session.discard()
    rows = session.push(list(range(limit + 1)), [ROOT] * (limit + 1))
    with pytest.raises(ContextFullError, match="leaves"):
        session.advance(rows, session.exits[0])
    session.discard()
    assert list(session.tokens) == PROMPT
    (row,) = session.push([limit - 1])
    np.testing.assert_allclose(session.advance([row], session.exits[-1])[0], found[-1], atol=1e-4)


@pytest.mark.parametrize("threads", [0, -1, 513])
def test_a_number_of_threads_that_cannot_work_is_refused(tiny_bundle: Bundle, threads: int) -> None:
    with pytest.raises(UsageError, match="--threads"):
        open_engine(tiny_bundle, EngineOptions(threads=threads))


def test_gpu_layers_without_a_gpu_backend_are_refused(tiny_bundle: Bundle) -> None:
    from skipstone.runtimes.engines.llamacpp.library import library

    if library().llama.llama_supports_gpu_offload():
        open_engine(tiny_bundle, EngineOptions(threads=1, gpu_layers=1)).close()
    else:
        with pytest.raises(EngineError, match="GPU"):
            open_engine(tiny_bundle, EngineOptions(threads=1, gpu_layers=1))


def test_a_type_of_k_and_v_in_blocks_is_refused_where_heads_are_no_whole_blocks(tiny_bundle: Bundle) -> None:
    """Heads of 16."""
    with pytest.raises(UsageError, match="--kv-type q8_0: heads keep 16 values of K"):
        open_engine(tiny_bundle, EngineOptions(threads=1, kv_type="q8_0"))


def test_half_precision_kv_stays_close_to_full(tiny_bundle: Bundle) -> None:
    full = open_engine(tiny_bundle, EngineOptions(threads=1, kv_type="f32"))
    half = open_engine(tiny_bundle, EngineOptions(threads=1, kv_type="f16"))
    with Session(full, 64) as one, Session(half, 64) as other:
        difference = np.abs(one.prefill(PROMPT) - other.prefill(PROMPT)).max()
    assert 0 < difference < 0.05
    full.close()
    half.close()


def test_a_draft_vocabulary_outside_the_model_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "altered"
    shutil.copytree(tiny_bundle.path, folder)
    head = tiny_bundle.manifest.draft_head
    assert head is not None
    ids = np.fromfile(folder / head.vocabulary, "<i4")
    ids[-1] = VOCAB
    ids.tofile(folder / head.vocabulary)
    with pytest.raises(BundleError, match="draft tokens"):
        open_engine(Bundle(folder, tiny_bundle.manifest), EngineOptions(threads=1))


def test_a_segment_that_is_not_gguf_is_refused_with_its_name(tiny_bundle: Bundle, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "altered"
    shutil.copytree(tiny_bundle.path, folder)
    name = tiny_bundle.manifest.segments[1].file
    (folder / name).write_bytes(b"not a model")
    with pytest.raises(EngineError, match=name):
        open_engine(Bundle(folder, tiny_bundle.manifest), EngineOptions(threads=1))
