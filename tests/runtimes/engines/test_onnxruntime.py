"""The ONNX Runtime engine: every strategy as plain decoding, fixed widths, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import skipstone.runtimes.generate as generate_module
import skipstone.runtimes.policies.auto as auto_module
from skipstone.benchmark.lossless import first_difference
from skipstone.bundle import Bundle, OnnxManifest, hash_file, manifest_of, open_bundle
from skipstone.errors import (
    BundleError,
    ContextFullError,
    DeviceError,
    EngineError,
    SkipstoneError,
    UsageError,
)
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.engines.base import Engine, Share
from skipstone.runtimes.engines.eager import EagerEngine
from skipstone.runtimes.rows import ROOT, RowTree
from skipstone.runtimes.session import Session
from skipstone.runtimes.text import TextCodec
from tests.runtimes.even_time import EvenTime
from tests.runtimes.greedy import generated

pytestmark = [pytest.mark.engine, pytest.mark.slow]
TEXTS = ("def read_lines(path):\n", "class Stack:\n    def push(self, item):\n")
TOKENS = 40
ONE = EngineOptions(threads=1)


@pytest.fixture(scope="module", params=["none", "8da4w"])
def coder(request: pytest.FixtureRequest, export_coder_onnx: Callable[[str], Path]) -> Bundle:
    return open_bundle(export_coder_onnx(request.param))


@pytest.fixture(scope="module")
def coder_engine(coder: Bundle) -> Iterator[Engine]:
    engine = open_engine(coder, ONE)
    yield engine
    engine.close()


@pytest.fixture
def narrow(tiny_narrow_onnx_bundle: Bundle) -> Iterator[Engine]:
    engine = open_engine(tiny_narrow_onnx_bundle, ONE)
    yield engine
    engine.close()


@pytest.mark.parametrize("strategy", ["layerskip", "staged", "auto"])
def test_a_strategy_generates_what_plain_decoding_does(
    coder: Bundle, coder_engine: Engine, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In f32 the very tokens; with rounded activations, a divergence may occur at a near-tie only."""
    for module in (generate_module, auto_module):
        monkeypatch.setattr(module, "time", EvenTime(1e-3))
    codec = TextCodec(coder.file(coder.manifest.tokenizer), coder.manifest.model.vocab_size)
    accepted = 0
    for prompt in map(codec.encode, TEXTS):
        plain, _ = generated(coder_engine, "plain", prompt, TOKENS)
        found, drafts = generated(coder_engine, strategy, prompt, TOKENS)
        accepted += drafts
        at = first_difference(plain, found)
        if at is not None:
            assert coder.manifest.quantization.scheme != "none", "f32 must agree token by token"
            with Session(coder_engine, 200) as session:
                logits = session.prefill([*prompt, *plain[:at]])
            assert abs(logits[plain[at]] - logits[found[at]]) <= coder.manifest.near_tie_margin
    assert accepted > 5, "nothing was drafted, so nothing was shown"


def test_the_logits_are_those_of_eager_torch(
    coder_checkpoint: Path, export_coder_onnx: Callable[[str], Path]
) -> None:
    engine = open_engine(open_bundle(export_coder_onnx("none")), ONE)
    eager = EagerEngine.from_checkpoint(coder_checkpoint, engine.exits[:-1], engine.draft_vocabulary)
    with Session(engine, 200) as ours, Session(eager, 200) as reference:
        np.testing.assert_allclose(ours.prefill(range(40, 140)), reference.prefill(range(40, 140)), atol=1e-4)
        for exit_layer in engine.exits:
            found = ours.advance(ours.push([7, 8], [ROOT, ROOT]), exit_layer)
            expected = reference.advance(reference.push([7, 8], [ROOT, ROOT]), exit_layer)
            np.testing.assert_allclose(np.stack(found), np.stack(expected), atol=1e-4)
    engine.close()


def test_batches_are_filled_up_to_the_next_width(
    narrow: Engine, tiny_onnx_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skipstone.runtimes.engines.onnxruntime.graph import Graph

    shapes, run = [], Graph.run

    def watched(self: Graph, inputs: Any) -> Any:
        shapes.append(
            (inputs["hidden"].shape[1], *(inputs[name].shape[3] for name in ("mask",) if name in inputs))
        )
        return run(self, inputs)

    monkeypatch.setattr(Graph, "run", watched)
    free = open_engine(tiny_onnx_bundle, ONE)
    with Session(narrow, 128) as session, Session(free, 128) as other:
        assert session.max_width == 16
        found = []
        for one in (session, other):
            rows = one.push([3, 4, 5])
            found.append(np.stack(one.advance(rows, one.exits[-1])))
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    assert shapes[:4] == [(4, 256 + 4)] * 3 + [(4,)]
    assert shapes[4:] == [(3, 64 + 3)] * 3 + [(3,)]
    free.close()


def test_slots_come_in_steps_as_the_context_grows(tiny_onnx_bundle: Bundle) -> None:
    engine = open_engine(tiny_onnx_bundle, ONE)
    text = np.random.default_rng(3).integers(0, 320, 200).tolist()
    with Session(engine, 256) as session:
        cache: Any = session._cache
        capacities = []
        for start in range(0, 200, 40):
            session.prefill(text[start : start + 40])
            capacities.append(cache._store.capacity)
        assert capacities == [64, 128, 128, 192, 256]
        grown = session.prefill([5])
    with Session(engine, 256) as plain:
        np.testing.assert_allclose(grown, plain.prefill([*text, 5]), atol=1e-4)
    engine.close()


def test_a_text_longer_than_the_graphs_hold_is_refused(narrow: Engine) -> None:
    with pytest.raises(UsageError, match="holds 1 to 256"):
        Session(narrow, 257)
    with Session(narrow, 20) as session:
        session.prefill([1] * 19)
        rows = session.push([1, 2])
        with pytest.raises(ContextFullError, match="21 positions: the session holds 20"):
            session.advance(rows, session.exits[-1])


def test_a_batch_wider_than_any_graph_is_refused(narrow: Engine) -> None:
    tree = RowTree()
    rows = [tree.add(token, token - 1) for token in range(17)]
    cache = narrow.open_cache(64, tree)
    with pytest.raises(EngineError, match="segment_0: 17 rows, the graphs take 1 to 16"):
        cache.run(0, rows, list(cache.embed(rows)), ())


def test_a_share_opens_only_its_own_graphs(tiny_onnx_bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "part"
    shutil.copytree(tiny_onnx_bundle.path, folder)
    for name in ("segment_1.onnx", "segment_2.onnx", "head.onnx"):
        (folder / name).write_bytes(b"x" * (folder / name).stat().st_size)
    bundle = open_bundle(folder, verify_hashes=False)
    with pytest.raises(EngineError, match="segment_1"):
        open_engine(bundle, ONE)
    engine = open_engine(bundle, EngineOptions(threads=1, share=Share(frozenset({0}), draft_head=True)))
    with Session(engine, 32) as session:
        (logits,) = session.advance(session.push([5]), 1)
    assert np.isfinite(logits).all()
    engine.close()


def test_options_of_another_engine_are_refused(tiny_onnx_bundle: Bundle) -> None:
    for options, message in (
        (EngineOptions(gpu_layers=3), "--gpu-layers 3"),
        (EngineOptions(kv_type="f16"), "--kv-type f16"),
        (EngineOptions(threads=0), "--threads 0"),
    ):
        with pytest.raises(UsageError, match=message):
            open_engine(tiny_onnx_bundle, options)


def altered(bundle: Bundle, folder: Path, change: Callable[[dict[str, Any]], object]) -> Bundle:
    """A copy whose manifest says something else."""
    shutil.copytree(bundle.path, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return open_bundle(folder, verify_hashes=False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda m: m["graphs"].update(target="toaster"),
            DeviceError,
            "made for toaster; this release runs cpu",
        ),
        (
            lambda m: m["graphs"].update(interface=9),
            BundleError,
            "interface 9, this release calls interface 1",
        ),
        (
            lambda m: m["graphs"].update(head_size=8),
            BundleError,
            r"key is float32 \[1, 2, any, 16\], by the mani",
        ),
        (lambda m: m.update(exits=[1, 3]), BundleError, r"segment_1\.onnx: has the inputs"),
        (
            lambda m: m["graphs"]["embedding"].update(type="float16"),
            BundleError,
            r"320 x 64 float16 take 40960",
        ),
    ],
    ids=["target", "interface", "shape", "layers", "table"],
)
def test_a_manifest_that_means_other_graphs_is_refused(
    tiny_onnx_bundle: Bundle,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    error: type[SkipstoneError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        open_engine(altered(tiny_onnx_bundle, tmp_path / "altered", change), ONE)


@pytest.mark.parametrize("kind", ["empty", "text", "cut in half", "head of another model"])
def test_a_damaged_graph_is_refused_and_the_process_lives(
    tiny_onnx_bundle: Bundle, tmp_path: Path, kind: str
) -> None:
    """In a process of its own, should ONNX Runtime die after all; the manifest tells the truth of the file."""
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_onnx_bundle.path, folder)
    file = folder / "segment_1.onnx"
    whole = file.read_bytes()
    content = {
        "empty": b"",
        "text": b"not a graph at all, but long enough to be read as one" * 10,
        "cut in half": whole[: len(whole) // 2],
        "head of another model": (folder / "head.onnx").read_bytes(),
    }[kind]
    file.write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["path"] == file.name:
            entry.update(size=len(content), sha256=hash_file(file))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    script = (
        "import sys; from skipstone.bundle import open_bundle; from skipstone.errors import SkipstoneError\n"
        "from skipstone.runtimes.engines import open_engine\n"
        "try: open_engine(open_bundle(sys.argv[1]))\n"
        "except SkipstoneError as error: print(error); sys.exit(2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "segment_1.onnx" in done.stdout
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_altered_bytes_never_kill_the_process(tiny_onnx_bundle: Bundle, tmp_path: Path) -> None:
    """Two hundred graphs with a byte of their structure changed are opened and run: refused or computed, no more."""
    script = """
import sys, numpy as np
from pathlib import Path
from skipstone.bundle import OnnxManifest, manifest_of, open_bundle
from skipstone.errors import SkipstoneError
from skipstone.runtimes.engines.onnxruntime.graph import Graph
from skipstone.runtimes.engines.onnxruntime.signature import signature
bundle, folder = open_bundle(sys.argv[1]), Path(sys.argv[2])
manifest, random = manifest_of(bundle, OnnxManifest), np.random.default_rng(0)
expected, whole = signature(manifest, "segment_1", None, 128), bundle.file("segment_1.onnx").read_bytes()
given = {name: np.zeros([max(n, 1) for n in array.shape], array.dtype) for name, array in expected.inputs.items()}
given["mask"] = np.zeros((1, 1, 1, 2), np.float32)
structure = [at for at in range(len(whole)) if at < 12000 or at > len(whole) - 3000]
for _ in range(200):
    content, at = bytearray(whole), random.choice(structure)
    content[at] = (content[at] + random.integers(1, 256)) % 256
    (folder / "graph.onnx").write_bytes(content)
    try:
        Graph(folder / "graph.onnx", "cpu", 1, expected).run(given)
        print("ran")
    except SkipstoneError:
        print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_onnx_bundle.path), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(done.stdout.split()) == {"ran", "refused"}
    assert len(done.stdout.split()) == 200


def test_a_missing_onnxruntime_is_named_with_the_extra_that_brings_it(
    tiny_onnx_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r'onnxruntime .*pip install "skipstone\[onnx\]"'):
        open_engine(tiny_onnx_bundle, ONE)


def test_running_a_bundle_imports_neither_torch_nor_what_exports(tiny_onnx_bundle: Bundle) -> None:
    script = (
        "import sys, skipstone\n"
        "model = skipstone.load(sys.argv[1], threads=1)\n"
        "model.generate('def', max_new_tokens=4, strategy='plain')\n"
        "print(*({'torch', 'onnx', 'onnxscript', 'onnx_ir', 'executorch', 'llama_cpp'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_onnx_bundle.path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == ""


def test_a_closed_engine_refuses_to_compute(tiny_onnx_bundle: Bundle) -> None:
    engine = open_engine(tiny_onnx_bundle, ONE)
    session = Session(engine, 64)
    session.prefill([1, 2])
    engine.close()
    with pytest.raises(EngineError, match="called after its engine was closed"):
        session.prefill([3])


def test_the_manifest_names_every_file_of_the_bundle(tiny_narrow_onnx_bundle: Bundle) -> None:
    manifest = manifest_of(tiny_narrow_onnx_bundle, OnnxManifest)
    files = {path.name for path in tiny_narrow_onnx_bundle.path.iterdir()} - {"manifest.json"}
    assert {name for name in files if not name.startswith(".")} == set(manifest.contents)
    assert [graph.width for graph in manifest.graphs.of("segment_1")] == [1, 4, 16]
