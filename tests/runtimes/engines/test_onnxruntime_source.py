"""Encoder-decoders on ONNX Runtime against eager transformers: logits, drafts, trees, sources, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from numpy.typing import NDArray

from skipstone.bundle import Bundle, OnnxManifest, manifest_of, open_bundle
from skipstone.errors import BundleError, ContextFullError, EngineError, UsageError
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.exporters.reference import EagerReference
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.engines.base import Share
from skipstone.runtimes.engines.eager_t5 import EagerT5Engine
from skipstone.runtimes.engines.onnxruntime import OnnxRuntimeEngine
from skipstone.runtimes.engines.onnxruntime.parts import Part
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.session import Session
from tests.exporters.tiny import VOCAB_SIZE
from tests.exporters.tiny_t5 import EOS, PAD, T5_CASES, make_t5
from tests.runtimes.session_machine import make_machine

pytestmark = [pytest.mark.engine, pytest.mark.slow]
FloatArray = NDArray[np.float32]
EXACT = ("t5", "flan-t5")  # relu with a tied head; gated GELU with a head of its own
CONTEXT, LONGEST = 96, 72
_random = np.random.default_rng(7)
SOURCE = [*(int(token) for token in _random.integers(2, VOCAB_SIZE, 40)), EOS]
TEXT = [PAD, *(int(token) for token in _random.integers(2, VOCAB_SIZE, 69))]
ONE = EngineOptions(threads=1)
Export = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("t5")
    return {name: make_t5(folder / name, T5_CASES[name]) for name in (*EXACT, "gentle")}


@pytest.fixture(scope="module")
def export(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Export:
    """From a checkpoint's name to its bundle, exact; of `gentle`, from its scheme."""

    @cache
    def get(name: str) -> Bundle:
        exact = name in EXACT
        return export_checkpoint(
            checkpoints[name if exact else "gentle"],
            tmp_path_factory.mktemp("bundle") / name,
            format="onnx",
            quantize="none" if exact else name,
            exits=(1,),
            encoder_exits=(1, 3),
            context_length=CONTEXT,
            max_source_length=LONGEST,
        )

    return get


@pytest.fixture(params=EXACT)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def reference(name: str, checkpoints: dict[str, Path]) -> EagerReference:
    return EagerReference(checkpoints[name])


@pytest.fixture
def engine(name: str, export: Export) -> Iterator[OnnxRuntimeEngine]:
    yield from opened(export(name))


@pytest.fixture
def relu(export: Export) -> Iterator[OnnxRuntimeEngine]:
    yield from opened(export("t5"))


def opened(bundle: Bundle) -> Iterator[OnnxRuntimeEngine]:
    engine = open_engine(bundle, ONE)
    assert isinstance(engine, OnnxRuntimeEngine)
    yield engine
    engine.close()


def logits(session: Session, tokens: list[int], width: int = 64) -> FloatArray:
    """Logits [n, vocab_size] after every token of a fresh text."""
    session.rewind(0)
    found: list[FloatArray] = []
    for start in range(0, len(tokens), width):
        rows = session.push(tokens[start : start + width])
        found += session.advance(rows, session.exits[-1])
        session.commit(rows[-1])
    return np.stack(found)


@pytest.mark.parametrize("width", [1, 5, 64])
def test_the_logits_are_those_of_transformers(
    engine: OnnxRuntimeEngine, reference: EagerReference, width: int
) -> None:
    """Past the first step of slots too."""
    expected = reference.logits(TEXT, SOURCE)
    assert expected.std() > 0.3
    with Session(engine) as session:
        assert session.encode(SOURCE) == 4
        np.testing.assert_allclose(logits(session, TEXT, width), expected, atol=1e-4)


def test_a_session_driven_at_random_computes_what_transformers_does(
    relu: OnnxRuntimeEngine, checkpoints: dict[str, Path]
) -> None:
    """Chains, trees, early exits, commits, lagging rows, rewinding."""
    eager = EagerT5Engine.from_checkpoint(checkpoints["t5"], (1,), relu.draft_vocabulary)
    source = SOURCE[:9]

    @cache
    def straight(text: tuple[int, ...], exit_layer: int) -> FloatArray:
        with Session(eager, 40) as session:
            session.encode(source)
            return session.advance(session.push(text), exit_layer)[-1]

    machine = make_machine(relu, straight, context_length=14, tolerance=1e-4, tokens=3, source=source)
    wishes = settings(max_examples=12, stateful_step_count=20, deadline=None, database=None)
    run_state_machine_as_test(machine, settings=settings(wishes, suppress_health_check=list(HealthCheck)))


def test_a_branch_accepted_out_of_a_tree_is_context_as_any(
    engine: OnnxRuntimeEngine, reference: EagerReference
) -> None:
    with Session(engine) as session:
        session.encode(SOURCE)
        session.prefill(TEXT[:6])
        wrong, right = session.push([9, 12], [ROOT, ROOT])
        rows = [wrong, right, *session.push([4, 5, 6], [wrong, right, right])]
        texts = [[9], [12], [9, 4], [12, 5], [12, 6]]
        for found, tail in zip(session.advance(rows, 3), texts, strict=True):
            expected = reference.logits([*TEXT[:6], *tail], SOURCE)[-1]
            np.testing.assert_allclose(found, expected, atol=1e-4)
        session.commit(rows[-1])
        found = session.advance(session.push([7]), 3)[0]
        expected = reference.logits([*TEXT[:6], 12, 6, 7], SOURCE)[-1]
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_one_session_reads_sources_one_after_another(
    engine: OnnxRuntimeEngine, reference: EagerReference
) -> None:
    """Long, short, long: nothing of the one before is seen. And sessions of one engine keep their own."""
    with Session(engine) as session, Session(engine) as beside:
        beside.encode(SOURCE[5:25])
        for source in (SOURCE, SOURCE[:1], [*SOURCE[3:30], *SOURCE]):
            session.encode(source)
            np.testing.assert_allclose(
                logits(session, TEXT[:9]), reference.logits(TEXT[:9], source), atol=1e-4
            )
            expected = reference.logits(TEXT[:3], SOURCE[5:25])
            np.testing.assert_allclose(logits(beside, TEXT[:3]), expected, atol=1e-4)


def test_the_sources_keys_and_values_are_computed_once(
    relu: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    run = Part.run

    def watched(self: Part, width: int, inputs: Any) -> Any:
        calls.append(self._name)
        return run(self, width, inputs)

    monkeypatch.setattr(Part, "run", watched)
    with Session(relu) as session:
        session.encode(SOURCE)
        for _ in range(3):
            logits(session, TEXT[:9], 3)
    assert [call for call in calls if call.startswith(("encoder_", "cross"))] == calls[:4]
    assert calls[:4] == ["encoder_0", "encoder_1", "encoder_2", "cross"]


@pytest.mark.parametrize("layers", [1, 3])
def test_an_encoder_stopped_early_is_the_encoder_of_so_many_layers(
    engine: OnnxRuntimeEngine, reference: EagerReference, layers: int
) -> None:
    asked: list[int] = []

    def settled(exit_layer: int, before: FloatArray, after: FloatArray) -> bool:
        assert before.shape == after.shape == (len(SOURCE), engine.hidden_size)
        asked.append(exit_layer)
        return exit_layer == layers

    with Session(engine) as session:
        assert session.encode(SOURCE, settled) == layers
        found = logits(session, TEXT[:12])
    assert asked == [exit_layer for exit_layer in (1, 3) if exit_layer <= layers]
    np.testing.assert_allclose(found, reference.logits(TEXT[:12], SOURCE, layers), atol=1e-4)
    assert np.abs(found - reference.logits(TEXT[:12], SOURCE)).max() > 0.1


@pytest.mark.parametrize(("scheme", "limit"), [("4w", 0.3), ("8da4w", 0.3), ("8da8w", 0.05)])
def test_a_quantised_bundle_is_as_near_as_its_manifest_says(
    export: Export, checkpoints: dict[str, Path], scheme: str, limit: float
) -> None:
    """To the eager model with the same weights, and near enough to the float32 one to be of use."""
    bundle = export(scheme)
    parity = bundle.manifest.parity
    assert parity is not None
    assert parity.split <= parity.split_tolerance
    expected = EagerReference(checkpoints["gentle"]).logits(TEXT, SOURCE)
    for engine in opened(bundle):
        with Session(engine) as session:
            session.encode(SOURCE)
            found = logits(session, TEXT)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < limit
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= 0.5


def test_what_cannot_be_read_is_refused_and_the_session_lives(
    relu: OnnxRuntimeEngine, checkpoints: dict[str, Path]
) -> None:
    expected = EagerReference(checkpoints["t5"]).logits(TEXT[:5], SOURCE)
    with Session(relu) as session:
        with pytest.raises(UsageError, match="no source yet"):
            session.push([PAD])
        with pytest.raises(ContextFullError, match=f"source of {LONGEST + 1} tokens"):
            session.encode([5] * (LONGEST + 1))
        session.encode(SOURCE)
        with pytest.raises(ContextFullError, match=f"room for {CONTEXT}"):
            session.prefill([PAD] * (CONTEXT + 1))
        np.testing.assert_allclose(logits(session, TEXT[:5]), expected, atol=1e-4)


def test_a_share_opens_the_whole_encoder_and_its_own_segments_alone(export: Export, tmp_path: Path) -> None:
    folder = shutil.copytree(export("t5").path, tmp_path / "part")
    for name in ("segment_1.onnx", "head.onnx"):
        (folder / name).write_bytes(b"x" * (folder / name).stat().st_size)
    bundle = open_bundle(folder, verify_hashes=False)
    with pytest.raises(EngineError, match="segment_1"):
        open_engine(bundle, ONE)
    engine = open_engine(bundle, EngineOptions(threads=1, share=Share(frozenset({0}), draft_head=True)))
    with Session(engine, 32) as session:
        session.encode(SOURCE)
        (found,) = session.advance(session.push([PAD]), 1)
    assert np.isfinite(found).all()
    engine.close()


@pytest.mark.parametrize("change", ["more encoder exits", "a decoder", "interface 1", "another head size"])
def test_a_manifest_that_means_other_graphs_is_refused(export: Export, tmp_path: Path, change: str) -> None:
    folder = shutil.copytree(export("t5").path, tmp_path / "altered")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if change == "more encoder exits":
        manifest["model"]["encoder"]["exits"] = [1, 2, 3]
    elif change == "a decoder":
        manifest["model"]["encoder"] = None
    elif change == "interface 1":
        manifest["graphs"]["interface"] = 1
    else:
        manifest["graphs"]["head_size"] = 8
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BundleError):
        open_engine(open_bundle(folder), ONE)


def test_every_weight_lies_in_one_graph_alone(export: Export, checkpoints: dict[str, Path]) -> None:
    """The source's projections in `cross`, not in the segments; only the draft head's rows stand twice."""
    entry = manifest_of(export("t5"), OnnxManifest).graphs
    parts = ["encoder_0", "encoder_1", "encoder_2", "cross", "segment_0", "segment_1", "head", "draft_head"]
    assert [graph.part for graph in entry.graphs] == parts
    model = EagerReference(checkpoints["t5"])._model
    layers = sum(
        weight.numel() for stack in (model.encoder, model.decoder) for weight in stack.block.parameters()
    )
    found = sum(entry.weight_bytes(part) for part in parts[:6])
    assert 4 * layers * 0.99 <= found <= 4 * layers * 1.01
    assert entry.weight_bytes("cross") >= 4 * 3 * 2 * 64 * 96
