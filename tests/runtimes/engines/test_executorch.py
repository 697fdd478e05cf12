"""The ExecuTorch engine: every strategy as plain decoding, trees, compaction, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import skipstone.runtimes.engines.executorch.program as program_module
import skipstone.runtimes.generate as generate_module
import skipstone.runtimes.policies.auto as auto_module
from skipstone.benchmark.lossless import first_difference
from skipstone.bundle import Bundle, CostCurve, ExecuTorchManifest, manifest_of, open_bundle
from skipstone.errors import BundleError, ContextFullError, EngineError, UsageError
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.engines.eager import EagerEngine
from skipstone.runtimes.engines.executorch import ExecuTorchEngine
from skipstone.runtimes.engines.executorch.program import Program
from skipstone.runtimes.generate import GenerationLimits, generate
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.sampling import Sampler, SamplingConfig
from skipstone.runtimes.session import Session
from skipstone.runtimes.strategies import Materials, StrategyOptions, make_policy
from skipstone.runtimes.text import TextCodec
from tests.runtimes.even_time import EvenTime

pytestmark = [pytest.mark.engine, pytest.mark.slow]
CODER = Path(__file__).parents[3] / "samples/models/coder"
TEXTS = ("def read_lines(path):\n", "class Stack:\n    def push(self, item):\n", "import os\nimport ")
TOKENS = 40


@pytest.fixture(scope="module", params=["none", "8da4w"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    name = "coder_bundle_executorch" if request.param == "none" else "coder_bundle_executorch_8da4w"
    return open_bundle(request.getfixturevalue(name))


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Iterator[ExecuTorchEngine]:
    engine = open_engine(bundle, EngineOptions(threads=1))
    assert isinstance(engine, ExecuTorchEngine)
    yield engine
    engine.close()


@pytest.fixture
def exact(coder_bundle_executorch: Path) -> Iterator[ExecuTorchEngine]:
    engine = open_engine(open_bundle(coder_bundle_executorch), EngineOptions(threads=1))
    assert isinstance(engine, ExecuTorchEngine)
    yield engine
    engine.close()


def prompts(bundle: Bundle) -> list[list[int]]:
    codec = TextCodec(bundle.file(bundle.manifest.tokenizer), bundle.manifest.model.vocab_size)
    return [codec.encode(text) for text in TEXTS]


def flat_curve(segments: int) -> CostCurve:
    """Further rows are nearly free, so that much is drafted."""
    seconds = (1e-3, 1.5e-3)
    return CostCurve(
        widths=(1, 32), segments=(seconds,) * segments, draft_head=(1e-4, 1e-4), threads=1, machine="flat"
    )


def generated(engine: ExecuTorchEngine, strategy: str, prompt: list[int]) -> tuple[list[int], int]:
    """Greedy tokens, and how many of them were accepted drafts."""
    costs = CostModel(flat_curve(len(engine.exits)), engine.exits)
    policy = make_policy(strategy, Materials(engine, costs, StrategyOptions()))
    with Session(engine, 200) as session:
        steps = list(
            generate(session, prompt, policy, Sampler(SamplingConfig()), GenerationLimits(TOKENS), costs)
        )
    return [token for step in steps for token in step.tokens], sum(step.accepted for step in steps)


@pytest.mark.parametrize(
    "strategy", ["layerskip", "staged", "text", "prompt-lookup", "katz", "recycling", "auto"]
)
def test_a_strategy_generates_what_plain_decoding_does(
    bundle: Bundle, engine: ExecuTorchEngine, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In f32 the very tokens; quantised, a divergence may occur at a near-tie only."""
    for module in (generate_module, auto_module):
        monkeypatch.setattr(module, "time", EvenTime(1e-3))
    accepted = 0
    for prompt in prompts(bundle):
        plain, _ = generated(engine, "plain", prompt)
        found, drafts = generated(engine, strategy, prompt)
        accepted += drafts
        at = first_difference(plain, found)
        if at is not None:
            assert bundle.manifest.quantization.scheme != "none", "f32 must agree token by token"
            with Session(engine, 200) as session:
                logits = session.prefill([*prompt, *plain[:at]])
            gap = float(abs(logits[plain[at]] - logits[found[at]]))
            assert gap <= bundle.manifest.parity.near_tie_margin
    assert accepted > 5, "nothing was drafted, so nothing was shown"


def test_a_chain_and_a_tree_of_one_branch_are_the_same_to_the_model(exact: ExecuTorchEngine) -> None:
    """The causal kernel and the masked one: a chain takes the first, and the second once a sibling is there."""
    with Session(exact, 128) as session:
        session.prefill([5, 6, 7])
        chain = session.advance(session.push([8, 9, 10]), session.exits[-1])
        session.discard()
        first = session.push([8, 11], [ROOT, ROOT])[0]
        second, third = session.push([9, 10], [first, first + 2])
        tree = session.advance([first, second, third], session.exits[-1])
    np.testing.assert_allclose(np.stack(tree), np.stack(chain), atol=1e-4)


def test_the_logits_are_those_of_eager_torch(exact: ExecuTorchEngine) -> None:
    eager = EagerEngine.from_checkpoint(CODER, exact.exits[:-1], exact.draft_vocabulary)
    text = list(range(40, 140))
    with Session(exact, 200) as ours, Session(eager, 200) as reference:
        np.testing.assert_allclose(ours.prefill(text), reference.prefill(text), atol=1e-4)
        for exit_layer in exact.exits:
            found = ours.advance(ours.push([7, 8], [ROOT, ROOT]), exit_layer)
            expected = reference.advance(reference.push([7, 8], [ROOT, ROOT]), exit_layer)
            np.testing.assert_allclose(np.stack(found), np.stack(expected), atol=1e-4)


def test_a_closed_sessions_program_serves_the_next_one(exact: ExecuTorchEngine) -> None:
    with Session(exact, 64) as session:
        first = session.prefill([5, 6, 7])
    with Session(exact, 64) as session:
        np.testing.assert_array_equal(session.prefill([5, 6, 7]), first)


def test_a_text_longer_than_the_program_holds_is_refused(exact: ExecuTorchEngine) -> None:
    with pytest.raises(UsageError, match="holds 1 to 512"):
        Session(exact, 513)
    with Session(exact) as session, pytest.raises(ContextFullError, match="room for 512"):
        session.prefill([1] * 513)


def test_a_call_the_program_was_not_made_for_is_refused_before_it_is_made(exact: ExecuTorchEngine) -> None:
    """ExecuTorch itself would divide by zero."""
    program = exact._idle[0]
    for width in (0, 65):
        with pytest.raises(EngineError, match=f"{width} rows, the program takes 1 to 64"):
            program.call("embed", width, np.zeros((1, width), np.int64))
    with pytest.raises(EngineError, match="contiguous"):
        program.call("head", 2, np.zeros((1, 256, 2), np.float32).transpose(0, 2, 1))
    with pytest.raises(EngineError, match="embed failed"):
        program.call("embed", 2, np.zeros((1, 2), np.float32))


def test_options_of_another_engine_are_refused(coder_bundle_executorch: Path) -> None:
    bundle = open_bundle(coder_bundle_executorch)
    with pytest.raises(UsageError, match="--gpu-layers 3"):
        open_engine(bundle, EngineOptions(gpu_layers=3))
    with pytest.raises(UsageError, match="--kv-type f16"):
        open_engine(bundle, EngineOptions(kv_type="f16"))
    with pytest.raises(UsageError, match="--threads 0"):
        open_engine(bundle, EngineOptions(threads=0))


def test_a_model_with_another_number_of_threads_is_refused_while_one_is_open(
    exact: ExecuTorchEngine, coder_bundle_executorch: Path
) -> None:
    with pytest.raises(EngineError, match="2 threads: models that use 1 are open"):
        open_engine(open_bundle(coder_bundle_executorch), EngineOptions(threads=2))


def damaged(source: Path, folder: Path, content: bytes) -> Bundle:
    """A bundle whose program holds something else, with the manifest telling the truth of its size."""
    shutil.copytree(source, folder)
    bundle = open_bundle(folder)
    program = manifest_of(bundle, ExecuTorchManifest).program.file
    (folder / program).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["path"] == program:
            entry["size"] = len(content)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return open_bundle(folder, verify_hashes=False)


@pytest.mark.parametrize("kind", ["empty", "text", "cut in half", "header alone"])
def test_a_damaged_program_is_refused_and_the_process_lives(
    coder_bundle_executorch: Path, tmp_path: Path, kind: str
) -> None:
    """In a process of its own, should ExecuTorch die after all."""
    whole = (coder_bundle_executorch / "model.pte").read_bytes()
    content = {
        "empty": b"",
        "text": b"not a program at all, but long enough to be read as one" * 10,
        "cut in half": whole[: len(whole) // 2],
        "header alone": whole[:64],
    }[kind]
    bundle = damaged(coder_bundle_executorch, tmp_path / "damaged", content)
    script = (
        "import sys; from skipstone.bundle import open_bundle; from skipstone.errors import SkipstoneError\n"
        "from skipstone.runtimes.engines import open_engine\n"
        "try: open_engine(open_bundle(sys.argv[1], verify_hashes=False))\n"
        "except SkipstoneError as error: print(error); sys.exit(2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(bundle.path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "model.pte" in done.stdout


def test_altered_weights_are_noticed_by_their_hash(coder_bundle_executorch: Path, tmp_path: Path) -> None:
    """ExecuTorch loads flipped bytes silently."""
    folder = tmp_path / "altered"
    shutil.copytree(coder_bundle_executorch, folder)
    content = bytearray((folder / "model.pte").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (folder / "model.pte").write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.pte: its sha256 differs"):
        open_bundle(folder)


def test_a_manifest_that_names_other_methods_is_refused(coder_bundle_executorch: Path) -> None:
    bundle = open_bundle(coder_bundle_executorch)
    entry = manifest_of(bundle, ExecuTorchManifest).program
    fewer = entry.model_copy(update={"methods": entry.methods[:-1]})
    with pytest.raises(BundleError, match="the manifest names"):
        Program(bundle.file(entry.file), fewer, threads=1)


def test_a_file_that_is_gone_is_named(coder_bundle_executorch: Path, tmp_path: Path) -> None:
    entry = manifest_of(open_bundle(coder_bundle_executorch), ExecuTorchManifest).program
    with pytest.raises(BundleError, match=r"gone\.pte: cannot be read"):
        Program(tmp_path / "gone.pte", entry, threads=1)


def test_closing_an_engine_frees_the_programs_of_sessions_that_are_still_held(
    coder_bundle_executorch: Path,
) -> None:
    engine = open_engine(open_bundle(coder_bundle_executorch), EngineOptions(threads=1))
    before = len(program_module._LIVE)
    one, other = Session(engine, 64), Session(engine, 64)
    assert len(program_module._LIVE) == before + 1, "the engine's own, and one more"
    for session in (one, other):
        session.prefill([20, 21])
    engine.close()
    assert len(program_module._LIVE) == before - 1
    for session in (one, other):
        with pytest.raises(EngineError, match="called after its engine was closed"):
            session.prefill([22])
