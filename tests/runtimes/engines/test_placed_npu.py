"""Segments on the CPU and others on an NPU, which Qualcomm's emulator plays: drafts on one, the rest on the other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import skipstone
from skipstone.benchmark.lossless import first_difference
from skipstone.bundle import Bundle, CostCurve, open_bundle
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.model import Model
from skipstone.runtimes.engines.eager import EagerEngine
from skipstone.runtimes.engines.placed import PlacedEngine
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.session import Session
from tests.exporters.tiny_npu import WIDTHS, tiny_checkpoint, tiny_npu_bundle

pytestmark = [pytest.mark.slow, pytest.mark.engine]
# The emulator's own times say nothing; here eight rows cost as much as one, and the second segment most.
WIDE_IS_CHEAP = CostCurve(
    widths=WIDTHS,
    segments=((0.01, 0.01, 0.01), (1.0, 1.0, 1.0)),
    draft_head=(0.01, 0.01, 0.01),
    threads=1,
    machine="made up",
)
PROMPTS = ("def read(", "the other day the other day the")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """One checkpoint for llama.cpp, and for the NPU."""
    gguf = export_checkpoint(
        tiny_checkpoint(tmp_path_factory),
        tmp_path_factory.mktemp("placed-npu") / "gguf",
        quantize="none",
        exits=(1,),
    )
    return gguf, open_bundle(tiny_npu_bundle(tmp_path_factory))


@pytest.fixture(scope="module", params=[0, 1], ids=["the NPU drafts", "the NPU verifies"])
def model(request: pytest.FixtureRequest, bundles: tuple[Bundle, Bundle]) -> Iterator[Model]:
    gguf, npu = bundles
    with skipstone.load(gguf.path, threads=1, context_length=64, place={request.param: npu.path}) as model:
        yield model


@pytest.mark.parametrize("strategy", ["layerskip", "staged"])
def test_drafts_change_nothing_of_what_both_devices_say(
    model: Model, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skipstone.model.kept_or_measured", lambda *_args, **_options: WIDE_IS_CHEAP)
    assert isinstance(model.engine, PlacedEngine)
    drafted = 0
    for prompt in PROMPTS:
        plain = model.generate(prompt, max_new_tokens=16, strategy="plain")
        found = model.generate(prompt, max_new_tokens=16, strategy=strategy)
        drafted += found.stats.drafted
        at = first_difference(list(plain.tokens), list(found.tokens))
        if at is not None:
            given = [*model.codec.encode(prompt), *plain.tokens[:at]]
            with Session(model.engine, 64) as session:
                logits = session.prefill(given)
            assert abs(logits[plain.tokens[at]] - logits[found.tokens[at]]) <= model.opened.near_tie_margin
    assert drafted > 0
    assert {stretch.split(": ")[1].partition(",")[0] for stretch in model.opened.described} == {
        "gguf",
        "onnx",
    }


def test_rows_cross_between_the_devices_as_the_eager_model_has_them(
    model: Model, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Eight-bit weights on one side: close, not equal. Drafted, lagging and branching rows are all there."""
    engine, checkpoint = model.engine, tiny_checkpoint(tmp_path_factory)
    eager = EagerEngine.from_checkpoint(checkpoint, (1,), engine.draft_vocabulary)
    text = np.random.default_rng(4).integers(3, 260, 12).tolist()
    found, expected = [], []
    with Session(engine, 64) as ours, Session(eager, 64) as oracle:
        for session, kept in ((ours, found), (oracle, expected)):
            kept.append(session.prefill(text))
            rows = session.push([20, 21, 22], [ROOT, 0, ROOT])
            session.run(rows, 1)
            session.commit(rows[1])  # stopped at the exit: both rows lag
            (last,) = session.push([23])
            kept += session.advance([last], session.exits[-1])
    error = np.stack(found) - np.stack(expected)
    assert 0.0 < np.sqrt((error**2).mean()) / np.stack(expected).std() < 0.05
