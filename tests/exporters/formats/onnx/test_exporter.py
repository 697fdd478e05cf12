"""The ONNX exporter: what it writes, what it refuses, what its self-test finds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skipstone.benchmark.run import BenchOptions, run_bench
from skipstone.bundle import Bundle, OnnxManifest, manifest_of, open_bundle
from skipstone.errors import BundleError, ExportError, UsageError
from skipstone.exporters.checkpoint import load_eager
from skipstone.exporters.formats.onnx import files
from skipstone.exporters.formats.onnx.modules import RotaryTable
from skipstone.exporters.formats.onnx.oracle import EagerDecoder
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.session import Session
from tests.exporters.conftest import MakeTiny
from tests.exporters.tiny import GENTLE, make_checkpoint

pytestmark = pytest.mark.slow
Export = Callable[..., Bundle]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where these tests' exports keep what they traced: they trace, whatever this machine has kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def export(tmp_path: Path, graphs: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    """An export to out/."""
    monkeypatch.setenv("SKIPSTONE_CACHE", str(graphs))
    return functools.partial(
        export_checkpoint, output=tmp_path / "out", format="onnx", quantize="none", exits=(1,)
    )


def test_the_manifest_says_what_the_graphs_hold(tiny: MakeTiny, export: Export) -> None:
    bundle = export(tiny("llama-3"))
    entry, model = manifest_of(bundle, OnnxManifest).graphs, load_eager(tiny("llama-3"))
    assert [graph.part for graph in entry.graphs] == ["segment_0", "segment_1", "head", "draft_head"]
    assert (entry.target, entry.status, entry.widths, entry.slots) == ("cpu", "runs", (), 256)
    assert (entry.key_value_heads, entry.head_size) == (1, 32)
    parity = bundle.manifest.parity
    assert parity is not None
    assert parity.reference is not None
    assert max(parity.reference, parity.split, parity.draft_verify) <= 1e-4
    assert entry.weight_bytes("head") >= 4 * model.lm_head.weight.numel()
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    found = entry.weight_bytes("segment_0") + entry.weight_bytes("segment_1")
    assert 4 * layers <= found <= 4 * layers + 1000
    table = np.fromfile(bundle.file(entry.embedding.file), "<f4").reshape(entry.embedding.rows, -1)
    np.testing.assert_array_equal(table, model.model.embed_tokens.weight.numpy())


def test_weights_get_a_file_of_their_own_where_they_are_large(
    tiny: MakeTiny, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "EXTERNAL_FROM", 100_000)
    outside = export(tiny("llama"), exits=(1, 2))
    kept = {graph.part: graph.weights for graph in manifest_of(outside, OnnxManifest).graphs.graphs}
    assert kept == {
        "segment_0": "segment_0.onnx_data",
        "segment_1": "segment_1.onnx_data",
        "segment_2": "segment_2.onnx_data",
        "head": None,
        "draft_head": None,
    }
    named = outside.file("segment_1.onnx_data")
    content = bytearray(named.read_bytes())
    assert len(content) > 100_000
    content[50_000] ^= 0xFF
    named.write_bytes(content)
    with pytest.raises(BundleError, match=r"segment_1\.onnx_data: its sha256 differs"):
        open_bundle(outside.path)


def test_wrong_angles_fail_the_self_test(
    tiny: MakeTiny, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = RotaryTable.__init__

    def wrong(self: RotaryTable, rotary: Any, length: int) -> None:
        made(self, rotary, length)
        self.get_buffer("sines")[7] += 0.1

    monkeypatch.setattr(RotaryTable, "__init__", wrong)
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ExportError, match=r"self-test: .* differ by"):
        export(tiny("llama"))
    assert not (tmp_path / "out").exists()


def test_a_draft_head_of_other_rows_than_its_definition_fails_the_self_test(
    tiny: MakeTiny, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = EagerDecoder.draft_logits
    monkeypatch.setattr(
        EagerDecoder, "draft_logits", lambda self, hidden, ids: right(self, hidden, np.roll(ids, 1))
    )
    with pytest.raises(ExportError, match="self-test: draft head"):
        export(tiny("llama-3"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "q8_0"}, "--quantize q8_0: unknown scheme for --format onnx"),
        ({"quantize": "8w"}, "--quantize 8w: the target cpu takes none, 8da4w, 8da8w, 4w"),
        ({"context_length": 10}, "--context-length 10: this model takes 64 to 256"),
        ({"context_length": 257}, "--context-length 257: this model takes 64 to 256"),
        ({"imatrix": "text.txt"}, "--imatrix text.txt: importance matrices belong to --format gguf"),
        ({"mix": "head=none"}, "--mix head=none: mixes of schemes belong to --format executorch"),
        ({"calibration": "text.txt"}, "--calibration text.txt: no scheme of cpu rounds activations"),
        ({"exits": (99,)}, "99"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tiny: MakeTiny, export: Export, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        export(tiny("llama"), **options)
    assert not (tmp_path / "out").exists()


def test_a_gguf_is_no_input_for_this_format(export: Export) -> None:
    with pytest.raises(UsageError, match="starts from a checkpoint"):
        export("model.gguf", quantize=None)


@pytest.mark.parametrize(("device", "scheme"), [("webgpu", "4w"), ("qualcomm-sm8650", "a16w8")])
def test_an_encoder_decoder_is_refused_for_devices_that_do_not_take_it(
    tiny_t5: MakeTiny, export: Export, tmp_path: Path, device: str, scheme: str
) -> None:
    with pytest.raises(UsageError, match=r"target .*: encoder-decoders are exported for cpu alone"):
        export(tiny_t5("t5"), device=device, quantize=scheme)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("scheme", "weights"), [("4w", 0.5), ("8da4w", 0.5), ("8da8w", 1.0)])
def test_every_scheme_runs_and_speculates_as_it_decodes(
    tmp_path: Path, export: Export, scheme: str, weights: float
) -> None:
    checkpoint = make_checkpoint(tmp_path / "gentle", replace(GENTLE, config={"num_hidden_layers": 2}))
    bundle = export(checkpoint, quantize=scheme)
    entry, config = manifest_of(bundle, OnnxManifest).graphs, load_eager(checkpoint).config
    per_weight = entry.weight_bytes("head") / (config.hidden_size * config.vocab_size)
    assert weights < per_weight < weights + 0.2
    assert entry.embedding.type == "float16"
    bench = BenchOptions(
        strategies=("layerskip", "staged"),
        prompts=("def read(", "the other day"),
        max_new_tokens=24,
        repeats=1,
        memory=False,
    )
    for row in run_bench(bundle.path, bench).rows:
        assert row.other_divergences == 0
        assert row.identical + row.near_tie_divergences == 2


def test_a_model_without_exits_has_one_segment_and_no_draft_head(tiny: MakeTiny, export: Export) -> None:
    bundle = export(tiny("llama"), exits=())
    assert [graph.part for graph in manifest_of(bundle, OnnxManifest).graphs.graphs] == ["segment_0", "head"]
    engine = open_engine(bundle, EngineOptions(threads=1))
    assert engine.draft_vocabulary is None
    with Session(engine) as session:
        assert session.prefill([1, 2, 3]).shape == (320,)
    engine.close()
