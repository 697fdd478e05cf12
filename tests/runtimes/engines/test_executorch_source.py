"""Encoder-decoders on ExecuTorch against eager transformers: logits, drafts, trees, sources, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from numpy.typing import NDArray

from skipstone.bundle import Bundle, ExecuTorchManifest, manifest_of, open_bundle
from skipstone.errors import BundleError, ContextFullError, EngineError, UsageError
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.exporters.reference import EagerReference
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.engines.eager_t5 import EagerT5Engine
from skipstone.runtimes.engines.executorch import ExecuTorchEngine
from skipstone.runtimes.engines.executorch.memory import report_memory
from skipstone.runtimes.engines.executorch.profile import profile_bundle
from skipstone.runtimes.engines.placement import Placement, open_placed
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
Export = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("t5")
    return {name: make_t5(folder / name, T5_CASES[name]) for name in (*EXACT, "gentle")}


@pytest.fixture(scope="module")
def export(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Export:
    """From a checkpoint's name to its bundle: exact, but for `gentle`, which is quantised."""

    @cache
    def get(name: str) -> Bundle:
        return export_checkpoint(
            checkpoints[name],
            tmp_path_factory.mktemp("bundle") / name,
            format="executorch",
            quantize="none" if name in EXACT else "8da4w",
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
def engine(name: str, export: Export) -> Iterator[ExecuTorchEngine]:
    yield from opened(export(name))


@pytest.fixture
def relu(export: Export) -> Iterator[ExecuTorchEngine]:
    yield from opened(export("t5"))


def opened(bundle: Bundle) -> Iterator[ExecuTorchEngine]:
    engine = open_engine(bundle, EngineOptions(threads=1))
    assert isinstance(engine, ExecuTorchEngine)
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
    engine: ExecuTorchEngine, reference: EagerReference, width: int
) -> None:
    expected = reference.logits(TEXT, SOURCE)
    assert expected.std() > 0.3
    with Session(engine) as session:
        assert session.encode(SOURCE) == 4
        np.testing.assert_allclose(logits(session, TEXT, width), expected, atol=1e-4)


def test_rows_drafted_to_an_exit_and_verified_are_as_rows_run_at_once(
    engine: ExecuTorchEngine, reference: EagerReference, checkpoints: dict[str, Path], name: str
) -> None:
    eager = EagerT5Engine.from_checkpoint(checkpoints[name], (1,), engine.draft_vocabulary)
    expected = reference.logits(TEXT[:20], SOURCE)
    with Session(engine) as session, Session(eager) as other:
        session.encode(SOURCE)
        other.encode(SOURCE)
        for start in range(0, 20, 4):
            rows = session.push(TEXT[start : start + 4])
            early = [session.advance([row], 1)[0] for row in rows]
            wanted = other.advance(other.push(TEXT[start : start + 4]), 1)
            np.testing.assert_allclose(np.stack(early), np.stack(wanted), atol=1e-4)
            found = session.advance(rows, 3)
            np.testing.assert_allclose(np.stack(found), expected[start : start + 4], atol=1e-4)
            session.commit(rows[-1])
            other.commit(len(other._rows) - 1)


def test_a_session_driven_at_random_computes_what_transformers_does(
    relu: ExecuTorchEngine, checkpoints: dict[str, Path]
) -> None:
    """Chains, trees, early exits, compaction, lagging rows, rewinding."""
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
    engine: ExecuTorchEngine, reference: EagerReference
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
    engine: ExecuTorchEngine, reference: EagerReference
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


@pytest.mark.parametrize("layers", [1, 3])
def test_an_encoder_stopped_early_is_the_encoder_of_so_many_layers(
    engine: ExecuTorchEngine, reference: EagerReference, layers: int
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


def test_8da4w_is_as_near_as_its_manifest_says(export: Export, checkpoints: dict[str, Path]) -> None:
    """To the eager model with the same weights, and near enough to the float32 one to be of use."""
    bundle = export("gentle")
    parity = bundle.manifest.parity
    assert parity is not None
    assert parity.split <= parity.split_tolerance
    expected = EagerReference(checkpoints["gentle"]).logits(TEXT, SOURCE)
    for engine in opened(bundle):
        with Session(engine) as session:
            session.encode(SOURCE)
            found = logits(session, TEXT)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.3
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= 0.5


def test_what_cannot_be_read_is_refused_and_the_session_lives(
    relu: ExecuTorchEngine, checkpoints: dict[str, Path]
) -> None:
    expected = EagerReference(checkpoints["t5"]).logits(TEXT[:5], SOURCE)
    with Session(relu) as session:
        with pytest.raises(UsageError, match="no source yet"):
            session.push([PAD])
        with pytest.raises(UsageError, match="source is empty"):
            session.encode([])
        with pytest.raises(ContextFullError, match=f"source of {LONGEST + 1} tokens"):
            session.encode([5] * (LONGEST + 1))
        with pytest.raises(UsageError, match=f"token {VOCAB_SIZE}"):
            session.encode([5, VOCAB_SIZE])
        session.encode(SOURCE)
        with pytest.raises(ContextFullError, match=f"room for {CONTEXT}"):
            session.prefill([PAD] * (CONTEXT + 1))
        np.testing.assert_allclose(logits(session, TEXT[:5]), expected, atol=1e-4)


def test_a_call_the_program_was_not_made_for_is_refused_before_it_is_made(relu: ExecuTorchEngine) -> None:
    """ExecuTorch itself would divide by zero, or write past its buffers."""
    program = relu._idle[0]
    hidden = np.zeros((1, LONGEST + 1, relu.hidden_size), np.float32)
    for method, widest in (("embed", LONGEST), ("encoder_0", LONGEST), ("cross", LONGEST), ("head", 64)):
        for width in (0, widest + 1):
            with pytest.raises(EngineError, match=f"{method}: {width} rows, the program takes 1 to {widest}"):
                program.call(method, width, hidden[:, :width])


@pytest.mark.parametrize("change", ["longer sources", "more encoder exits", "a decoder", "interface 2"])
def test_a_manifest_that_means_another_program_is_refused(
    export: Export, tmp_path: Path, change: str
) -> None:
    folder = shutil.copytree(export("t5").path, tmp_path / "altered")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    encoder = manifest["model"]["encoder"]
    if change == "longer sources":
        encoder["max_source_length"] += 1
    elif change == "more encoder exits":
        encoder["exits"] = [1, 2, 3]
    elif change == "a decoder":
        manifest["model"]["encoder"] = None
    else:
        manifest["program"]["interface"] = 2
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BundleError):
        open_engine(open_bundle(folder), EngineOptions(threads=1))


def test_every_method_is_measured_for_time_and_memory(export: Export) -> None:
    bundle = export("t5")
    names = [
        "embed", "encoder_0", "encoder_1", "encoder_2", "cross", "segment_0", "segment_1", "draft_head", "head",
        "compact",
    ]  # fmt: skip
    assert sorted(
        method.name for method in manifest_of(bundle, ExecuTorchManifest).program.methods
    ) == sorted(names)
    report = report_memory(bundle, EngineOptions(threads=1))
    assert [method.name for method in report.methods] == names
    heads, size = 6, 16
    assert report.key_value_bytes >= 3 * 2 * 4 * heads * size * (CONTEXT + LONGEST)
    profile = profile_bundle(bundle, EngineOptions(threads=1), widths=(2,))
    assert list(dict.fromkeys(entry.method for entry in profile.methods)) == names
    assert all(entry.microseconds > 0 for entry in profile.methods)


@pytest.fixture(scope="module")
def gguf(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same checkpoint for llama.cpp, for shorter sources."""
    return export_checkpoint(
        checkpoints["t5"],
        tmp_path_factory.mktemp("bundle") / "gguf",
        quantize="none",
        exits=(1,),
        encoder_exits=(1, 3),
        context_length=CONTEXT,
        max_source_length=48,
    )


@pytest.mark.parametrize("owners", [(0, 1), (1, 0)])
@pytest.mark.parametrize("layers", [4, 3])
def test_segments_placed_on_two_engines_attend_to_the_source_on_both(
    export: Export, gguf: Bundle, checkpoints: dict[str, Path], owners: tuple[int, ...], layers: int
) -> None:
    """Every engine has an encoder, and all stop at the same of its layers."""
    engine = open_placed(Placement((gguf, export("t5")), owners), EngineOptions(threads=1))
    assert engine.encoder is not None
    assert engine.encoder.max_source_length == 48
    eager = EagerT5Engine.from_checkpoint(checkpoints["t5"], (1,), engine.draft_vocabulary, (1, 3))
    with Session(engine, 60) as ours, Session(eager, 60) as oracle:
        for source in (SOURCE, SOURCE[:9]):
            for session in (ours, oracle):
                assert session.encode(source, lambda reached, *_states: reached == layers) == layers
            np.testing.assert_allclose(ours.prefill(TEXT[:3]), oracle.prefill(TEXT[:3]), atol=1e-3)
            rows = [session.push([20, 21, 22], [ROOT] * 3) for session in (ours, oracle)]
            for exit_layer in engine.exits:
                found, expected = ours.advance(rows[0], exit_layer), oracle.advance(rows[1], exit_layer)
                np.testing.assert_allclose(np.stack(found), np.stack(expected), atol=1e-3)
    engine.close()
