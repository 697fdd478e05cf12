"""Memory of an ExecuTorch bundle: planned to the byte, and every packed weight there once."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from skipstone.bundle import Bundle, ExecuTorchManifest, manifest_of, open_bundle
from skipstone.errors import BundleError, EngineError
from skipstone.runtimes.engines import EngineOptions
from skipstone.runtimes.engines.executorch.memory import MemoryReport, report_memory
from skipstone.runtimes.engines.executorch.plan import read_plan
from tests.runtimes.conftest import VOCAB, write_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow]
OPTIONS = EngineOptions(threads=1)
LAYERS, KV_HEADS, HEAD_SIZE = 4, 2, 16  # of the tiny Llama
SLACK = 2_000_000  # what an allocator rounds up to


def key_value_bytes(layers: int, slots: int, heads: int, size: int) -> int:
    """K and V of float32."""
    return 2 * layers * slots * heads * size * 4


def test_key_values_are_planned_to_the_byte_and_once(tiny_executorch_bundle: Bundle) -> None:
    program = manifest_of(tiny_executorch_bundle, ExecuTorchManifest).program
    plan = read_plan(tiny_executorch_bundle.file(program.file))
    found = {method.name: method.key_value_bytes for method in plan.methods}
    slots = program.slots
    expected = {f"segment_{index}": layers for index, layers in enumerate((1, 1, 2))} | {"compact": LAYERS}
    for name, size in found.items():
        assert size == key_value_bytes(expected.get(name, 0), slots, KV_HEADS, HEAD_SIZE), name
    assert plan.key_value_bytes == key_value_bytes(LAYERS, slots, KV_HEADS, HEAD_SIZE)


def test_activations_hold_at_least_what_goes_in_and_out_of_the_widest_batch(
    tiny_executorch_bundle: Bundle,
) -> None:
    manifest = manifest_of(tiny_executorch_bundle, ExecuTorchManifest)
    plan = read_plan(tiny_executorch_bundle.file(manifest.program.file))
    found = {method.name: method.activation_bytes for method in plan.methods}
    rows, hidden = 4 * manifest.program.max_width, manifest.model.hidden_size
    assert rows * (hidden + VOCAB) <= found["head"] <= rows * (4 * hidden + VOCAB)
    assert found["segment_0"] >= rows * (2 * hidden + manifest.program.slots)
    assert plan.activation_bytes == max(found.values())


def test_the_file_is_weights_tables_and_a_small_header(tiny_executorch_bundle: Bundle) -> None:
    program = manifest_of(tiny_executorch_bundle, ExecuTorchManifest).program
    path = tiny_executorch_bundle.file(program.file)
    plan = read_plan(path)
    table = 4 * VOCAB * tiny_executorch_bundle.manifest.model.hidden_size
    assert table <= plan.constant_bytes < table + 20_000
    assert plan.packed_bytes == pytest.approx(
        sum(method.weight_bytes for method in program.methods), rel=0.05
    )
    assert plan.packed_bytes + plan.constant_bytes < path.stat().st_size


def test_a_longer_context_is_paid_for_in_key_values_alone(
    tiny_checkpoint: Path, tiny_executorch_bundle: Bundle, tmp_path: Path
) -> None:
    from skipstone.exporters.pipeline import export_checkpoint

    shorter = export_checkpoint(
        tiny_checkpoint,
        tmp_path / "shorter",
        format="executorch",
        quantize="none",
        exits=(1, 2),
        draft_vocab_size=128,
        context_length=100,
    )
    plans = [
        read_plan(bundle.file(manifest_of(bundle, ExecuTorchManifest).program.file))
        for bundle in (shorter, tiny_executorch_bundle)
    ]
    assert plans[0].key_value_bytes == key_value_bytes(LAYERS, 100, KV_HEADS, HEAD_SIZE)
    assert plans[0].packed_bytes == plans[1].packed_bytes


def assert_weights_are_there_once(report: MemoryReport) -> None:
    """Everything is loaded, and a second copy of the largest method's weights would not fit into the bound."""
    planned = report.packed_bytes + report.key_value_bytes + report.activation_bytes
    grown = report.loaded - report.idle
    assert 0.9 * report.packed_bytes < grown.private < 1.1 * planned + SLACK
    largest = max(method.weight_bytes for method in report.methods)
    assert grown.private + largest > 1.1 * planned + SLACK
    for method in report.methods:
        assert method.loading.private < 1.1 * method.weight_bytes + SLACK, method.name
        assert method.loading.private > 0.9 * method.weight_bytes - SLACK, method.name
        assert method.calling.private < report.activation_bytes + report.key_value_bytes + SLACK, method.name


@pytest.mark.parametrize("scheme", ["none", "8da4w"])
def test_every_packed_weight_is_in_memory_once(scheme: str, request: pytest.FixtureRequest) -> None:
    name = "coder_bundle_executorch" if scheme == "none" else "coder_bundle_executorch_8da4w"
    bundle = open_bundle(request.getfixturevalue(name))
    report = report_memory(bundle, OPTIONS)
    assert_weights_are_there_once(report)
    assert report.file_bytes == bundle.file("model.pte").stat().st_size
    assert report.slots == manifest_of(bundle, ExecuTorchManifest).program.slots
    assert report.methods[0].name == "embed"


def test_a_model_cut_at_its_exits_takes_as_much_as_the_whole_one(tmp_path: Path) -> None:
    """The reference has one segment and no draft head: file at most 1.05 times, memory at most 1.1 times as large."""
    from transformers import LlamaConfig

    from skipstone.exporters.pipeline import export_checkpoint

    (tmp_path / "checkpoint").mkdir()
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint",
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=2,
            num_attention_heads=12,
            num_key_value_heads=4,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=0,
        ),
    )
    reports = []
    for name, exits in (("whole", ()), ("cut", (1,))):
        bundle = export_checkpoint(
            checkpoint,
            tmp_path / name,
            format="executorch",
            quantize="none",
            exits=exits,
            draft_vocab_size=128,
        )
        reports.append(report_memory(bundle, OPTIONS))
    whole, cut = reports
    assert_weights_are_there_once(whole)
    assert_weights_are_there_once(cut)
    assert [method.name for method in whole.methods] == ["embed", "segment_0", "head", "compact"]
    assert cut.key_value_bytes == whole.key_value_bytes == key_value_bytes(2, whole.slots, 4, 64)
    assert cut.file_bytes <= 1.05 * whole.file_bytes
    for before in ("loaded", "called"):
        ours, reference = (getattr(report, before) - report.idle for report in (cut, whole))
        assert ours.private <= 1.1 * reference.private
        assert ours.total <= 1.1 * reference.total


def test_what_is_no_program_is_named(tmp_path: Path, tiny_bundle: Bundle) -> None:
    (tmp_path / "text.pte").write_bytes(b"not a program at all, but long enough to be one")
    (tmp_path / "short.pte").write_bytes(b"short")
    for name in ("text.pte", "short.pte"):
        with pytest.raises(BundleError, match=f"{name}: not an ExecuTorch program"):
            read_plan(tmp_path / name)
    with pytest.raises(BundleError, match=r"gone\.pte: cannot be read"):
        read_plan(tmp_path / "gone.pte")
    with pytest.raises(BundleError, match="executorch was expected"):
        report_memory(tiny_bundle, OPTIONS)


def test_a_process_that_fails_says_why(tiny_executorch_bundle: Bundle, tmp_path: Path) -> None:
    gone = Bundle(tmp_path / "gone", tiny_executorch_bundle.manifest)
    with pytest.raises(EngineError, match=r"^[^:]*gone: no such folder"):
        report_memory(gone, OPTIONS)


def test_a_process_that_dies_is_told_of(
    tiny_executorch_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def died(*_command: object, **_options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], -6, "", "one line\nthe last line\n")

    monkeypatch.setattr(subprocess, "run", died)
    with pytest.raises(EngineError, match=r"measuring the memory of .*: exit status -6: the last line"):
        report_memory(tiny_executorch_bundle, OPTIONS)
