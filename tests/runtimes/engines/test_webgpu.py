"""ONNX bundles on a GPU through WebGPU; where there is none, on SwiftShader, which computes in software.

Debian: `apt-get install chromium-common libvulkan1`. To leave these out: `-m "not webgpu"`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from skipstone.bundle import Bundle, OnnxManifest, manifest_of, open_bundle
from skipstone.cli._untested import untested
from skipstone.errors import DeviceError
from skipstone.exporters import probe
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.engines.eager import EagerEngine
from skipstone.runtimes.engines.onnxruntime import webgpu
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.session import Session
from skipstone.runtimes.text import TextCodec
from tests.runtimes.greedy import generated

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.webgpu]
DRIVER = Path(os.environ.get("SKIPSTONE_TEST_VULKAN", "/usr/lib/chromium/vk_swiftshader_icd.json"))
ALLOWED = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"
PROMPT, TOKENS = "def read_lines(path):\n", 16
ONE = EngineOptions(threads=1)


@pytest.fixture(scope="module", autouse=True)
def gpu() -> Iterator[None]:
    """The machine's own, or one in software."""
    with pytest.MonkeyPatch.context() as patch:
        if not webgpu.webgpu_devices():
            if not DRIVER.is_file():
                pytest.fail(
                    f"no GPU, and no Vulkan driver in software at {DRIVER}: `apt-get install chromium-common "
                    'libvulkan1`, or leave these tests out with -m "not webgpu"'
                )
            patch.setenv("VK_ICD_FILENAMES", str(DRIVER))
            patch.setenv(ALLOWED, "1")
            assert webgpu.webgpu_devices()
        yield


@pytest.fixture(scope="module")
def tiny(gpu: None, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A random Llama in float32."""
    output = tmp_path_factory.mktemp("webgpu") / "tiny"
    return export_checkpoint(
        tiny_checkpoint, output, device="webgpu", quantize="none", exits=(1,), draft_vocab_size=128
    )


@pytest.fixture(scope="module")
def coder(gpu: None, coder_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shipped model in the device's own scheme, int4, tested on a short text: software is slow."""
    output = tmp_path_factory.mktemp("webgpu") / "coder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "_COUNT", 16)
        return export_checkpoint(coder_checkpoint, output, device="webgpu", context_length=128)


def test_the_export_was_tested_where_it_runs_and_says_so(tiny: Bundle, coder: Bundle) -> None:
    for bundle, scheme, most in ((tiny, "none", 1e-4), (coder, "4w", 1e-3)):
        entry, parity = manifest_of(bundle, OnnxManifest).graphs, bundle.manifest.parity
        assert (entry.target, bundle.manifest.quantization.scheme) == ("webgpu", scheme)
        assert entry.status in ("runs", "emulated")
        assert parity is not None
        assert max(parity.split, parity.draft_verify) <= most
    assert tiny.manifest.parity is not None
    assert tiny.manifest.parity.reference is not None
    assert tiny.manifest.parity.reference <= 1e-4


def test_the_graphs_are_the_gpus(tiny: Bundle) -> None:
    engine = open_engine(tiny, ONE)
    for part in engine._parts.values():  # type: ignore[attr-defined]
        for graph in part._graphs.values():
            assert graph._session.get_providers()[0] == webgpu.PROVIDER
    engine.close()


def test_trees_and_commits_have_the_logits_of_eager_torch(tiny: Bundle, tiny_checkpoint: Path) -> None:
    engine = open_engine(tiny, ONE)
    eager = EagerEngine.from_checkpoint(tiny_checkpoint, (1,), engine.draft_vocabulary)
    with Session(engine, 64) as ours, Session(eager, 64) as reference:
        found = []
        for session in (ours, reference):
            logits = [session.prefill([5, 6, 7])]
            first, second = session.push([8, 9], [ROOT, ROOT])
            third = session.push([10], [second])[0]
            for exit_layer in session.exits:
                logits += session.advance([first, second, third], exit_layer)
            session.commit(third)
            logits += session.advance(session.push([11]), session.exits[-1])
            found.append(logits)
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)
    engine.close()


@pytest.mark.parametrize("name", ["tiny", "coder"])
def test_strategies_generate_what_plain_decoding_does(request: pytest.FixtureRequest, name: str) -> None:
    """In float32 and with int4 weights: neither rounds what flows, so the very tokens."""
    bundle: Bundle = request.getfixturevalue(name)
    prompt = TextCodec(bundle.file(bundle.manifest.tokenizer), bundle.manifest.model.vocab_size).encode(
        PROMPT
    )
    engine = open_engine(bundle, ONE)
    plain, _ = generated(engine, "plain", prompt, TOKENS)
    accepted = 0
    for strategy in ("layerskip", "staged"):
        found, drafts = generated(engine, strategy, prompt, TOKENS, cheap_rows=4)
        assert found == plain
        accepted += drafts
    assert accepted > 2 or name == "tiny", "nothing was drafted, so nothing was shown"
    engine.close()


def test_without_a_gpu_a_bundle_is_refused_with_what_to_do(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webgpu, "_offered", list)
    assert webgpu.webgpu_presence() == "compiled"
    with pytest.raises(
        DeviceError, match=r"made for webgpu; ONNX Runtime finds no GPU here \(install the GPU"
    ):
        open_engine(tiny, ONE)


def test_an_export_without_a_gpu_says_that_it_was_not_tested(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webgpu, "_offered", list)
    bundle = export_checkpoint(
        tiny_checkpoint, tmp_path / "out", device="webgpu", quantize="none", exits=(1,)
    )
    assert manifest_of(bundle, OnnxManifest).graphs.status == "compiled"
    assert bundle.manifest.parity is None
    (line,) = untested(bundle.manifest)
    assert line.startswith("made for webgpu, not run")


def test_without_an_adapter_nothing_falls_back_to_the_cpu(tiny: Bundle) -> None:
    script = (
        "import sys; from skipstone.bundle import open_bundle; from skipstone.errors import DeviceError\n"
        "from skipstone.runtimes.engines import open_engine\n"
        "try: open_engine(open_bundle(sys.argv[1]))\n"
        "except DeviceError as error: print(error); sys.exit(2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny.path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "VK_ICD_FILENAMES": "/nonexistent.json", ALLOWED: "1"},
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "no adapter can be had here" in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_gpu_goes_before_the_cpu_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    kinds = onnxruntime.OrtHardwareDeviceType
    cpu, card = (SimpleNamespace(device=SimpleNamespace(type=kind)) for kind in (kinds.CPU, kinds.GPU))
    monkeypatch.setattr(webgpu, "_offered", lambda: [cpu, card])
    assert webgpu.webgpu_devices() == [card, cpu]
    assert webgpu.webgpu_presence() == "runs"
    monkeypatch.setattr(webgpu, "_offered", lambda: [cpu])
    assert webgpu.webgpu_presence() == "emulated"


def test_a_bundle_opened_again_is_the_same(tiny: Bundle) -> None:
    """Sessions of one process share the GPU."""
    one, other = open_engine(open_bundle(tiny.path), ONE), open_engine(tiny, ONE)
    with Session(one, 64) as first, Session(other, 64) as second:
        np.testing.assert_array_equal(first.prefill([5, 6, 7]), second.prefill([5, 6, 7]))
    one.close()
    with Session(other, 64) as second:
        assert np.isfinite(second.prefill([5])).all()
    other.close()
