"""Context binaries for Qualcomm's NPUs: what the compiler makes, what it refuses, what the bundle says of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from skipstone.benchmark.run import BenchOptions, run_bench
from skipstone.bundle import Bundle, OnnxManifest, hash_file, manifest_of, open_bundle
from skipstone.devices.profiles import load_profile, profile_names
from skipstone.errors import ExportError, UsageError
from skipstone.exporters.formats.onnx import qnn
from skipstone.exporters.formats.onnx.qnn_compiler import read_soc
from skipstone.exporters.formats.onnx.schemes import scheme_of
from skipstone.exporters.formats.onnx.socs import SOCS, Soc
from skipstone.exporters.formats.onnx.targets import TARGETS, fitted
from skipstone.exporters.isolation import run_isolated
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.runtimes.engines.onnxruntime.targets import open_session
from tests.exporters.tiny_npu import WIDTHS, tiny_checkpoint, tiny_npu_bundle

pytestmark = [pytest.mark.slow, pytest.mark.engine]
Export = Callable[..., Bundle]
PARTS = ("draft_head", "head", "segment_0", "segment_1")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(tiny_npu_bundle(tmp_path_factory))


@pytest.fixture
def export(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """An export of the tiny model to out/, of one width."""
    return functools.partial(
        export_checkpoint,
        tiny_checkpoint(tmp_path_factory),
        tmp_path / "out",
        device="qualcomm-sm8650",
        exits=(1,),
        context_length=64,
        widths=(4,),
    )


def saved(folder: Path, operators: list[str]) -> Path:
    """A graph of operators one after the other over [1, 4, 4]."""
    value = entering = ir.val("hidden", dtype=ir.DataType.FLOAT, shape=ir.Shape([1, 4, 4]))
    nodes = []
    for index, operator in enumerate(operators):
        inputs = [value, value] if operator in ("Add", "Mul") else [value]
        nodes.append(ir.node(operator, inputs, name=f"node_{index}"))
        value = nodes[-1].outputs[0]
        value.name, value.dtype, value.shape = f"value_{index}", ir.DataType.FLOAT, entering.shape
    graph = ir.Graph([entering], [value], nodes=nodes, opset_imports={"": 21})
    ir.save(ir.Model(graph, ir_version=10), folder / "graph.onnx")
    return folder / "graph.onnx"


def compile_one(graph: Path, soc_id: int) -> tuple[str, int]:
    """SoC and architecture in the binary made of a graph, which is run in the emulator."""
    target = graph.with_name("compiled.onnx")
    (made,) = run_isolated(
        "skipstone.exporters.formats.onnx.qnn_compiler:compile_graphs",
        graphs=[[str(graph), str(target)]],
        soc_id=soc_id,
        half=True,
        share=False,
    )
    assert read_soc(graph.with_name(made["binary"])) == (made["soc"], made["arch"])
    given = np.linspace(-2, 2, 16, dtype=np.float32).reshape(1, 4, 4)
    (found,) = open_session(target, "qnn", 1).run(None, {"hidden": given})
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-2 * given)), atol=2e-3)
    return made["soc"], made["arch"]


def test_every_binary_states_the_soc_it_was_exported_for(bundle: Bundle) -> None:
    graphs = manifest_of(bundle, OnnxManifest).graphs
    assert sorted((graph.part, graph.width) for graph in graphs.graphs) == [
        (part, width) for part in PARTS for width in WIDTHS
    ]
    for graph in graphs.graphs:
        assert graph.weights is not None
        assert read_soc(bundle.file(graph.weights)) == ("SM8650", 75)
        assert b"soc_type=SM8650;arch=75" in bundle.file(graph.weights).read_bytes()
    assert graphs.qnn is not None
    assert (graphs.qnn.soc, graphs.qnn.soc_id, graphs.qnn.arch) == ("SM8650", 57, 75)
    assert (graphs.target, graphs.status, graphs.widths) == ("qnn", "emulated", WIDTHS)


def test_widths_share_one_binary_of_a_part_where_the_user_asks_for_it(bundle: Bundle) -> None:
    graphs = manifest_of(bundle, OnnxManifest).graphs
    assert graphs.qnn is not None
    shared = graphs.qnn.shared
    assert sorted((entry.part, entry.width) for entry in shared) == [
        (part, width) for part in PARTS for width in WIDTHS
    ]
    listed = {entry.path for entry in bundle.manifest.files}
    for part in PARTS:
        (binary,) = {entry.binary for entry in shared if entry.part == part}
        assert binary in listed
        assert read_soc(bundle.file(binary)) == ("SM8650", 75)
    separate = sum(bundle.file(str(graph.weights)).stat().st_size for graph in graphs.graphs)
    together = sum(bundle.file(name).stat().st_size for name in {entry.binary for entry in shared})
    assert together < 0.7 * separate


def test_the_self_test_found_widths_and_drafts_equal_to_the_last_bit(bundle: Bundle) -> None:
    parity = bundle.manifest.parity
    assert parity is not None
    assert (parity.width_noise, parity.draft_verify) == (0.0, 0.0)
    assert parity.agreement_with_reference is not None
    assert parity.agreement_with_reference >= 0.9
    assert 0.0 < parity.split <= parity.split_tolerance


@pytest.mark.parametrize("soc", SOCS.values(), ids=lambda soc: soc.name)
def test_every_soc_is_compiled_for_by_its_name_and_emulated(tmp_path: Path, soc: Soc) -> None:
    assert compile_one(saved(tmp_path, ["Add", "Sigmoid"]), soc.id) == (soc.name, soc.arch)


def test_every_soc_has_a_device() -> None:
    profiles = [load_profile(name) for name in profile_names() if name.startswith("qualcomm-")]
    assert {profile.formats["onnx"].backend for profile in profiles} == set(SOCS)
    for profile in profiles:
        soc = SOCS[profile.formats["onnx"].backend]
        assert profile.name == f"qualcomm-{soc.name.lower()}"
        assert soc.name in profile.title
        assert f"v{soc.arch}" in profile.title


def test_operators_that_the_npu_does_not_take_are_named(tmp_path: Path) -> None:
    graph = saved(tmp_path, ["Add", "Cosh", "Sigmoid", "Sinh"])
    with pytest.raises(ExportError, match=r"graph\.onnx: the NPU takes no Cosh, Sinh"):
        compile_one(graph, 57)


def test_a_soc_that_the_compiler_does_not_know_ends_the_export(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(qnn.SOCS, "qnn-sm8650", Soc("SM8650", 43, 75))
    with pytest.raises(ExportError, match=r"compiled for SM8550 \(v73\), SM8650 \(v75\) was expected"):
        export(quantize="fp16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("scheme", "widths"), [("a16w4", WIDTHS), ("a8w8", (4, 8)), ("fp16", WIDTHS)])
def test_every_scheme_runs_and_speculates_as_it_decodes(
    export: Export, scheme: str, widths: tuple[int, ...]
) -> None:
    made = export(quantize=scheme, widths=WIDTHS)
    graphs = manifest_of(made, OnnxManifest).graphs
    assert graphs.widths == widths
    assert graphs.qnn is not None
    assert graphs.qnn.shared == ()
    options = BenchOptions(
        strategies=("layerskip", "staged"),
        prompts=("def read(",),
        max_new_tokens=10,
        repeats=1,
        memory=False,
    )
    for row in run_bench(made.path, options).rows:
        assert row.other_divergences == 0
        assert row.identical + row.near_tie_divergences == 1


def test_the_users_text_fixes_the_scales(export: Export, tmp_path: Path, bundle: Bundle) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the other day def read(self): return self.other " * 40, encoding="utf-8")
    made = export(calibration=text)
    assert made.manifest.quantization.calibration_sha256 == hash_file(text)
    assert bundle.manifest.quantization.calibration_sha256 is None
    binaries = [item.file("segment_0-4_qnn.bin").read_bytes() for item in (made, bundle)]
    assert binaries[0] != binaries[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "8da4w"}, "--quantize 8da4w: the target qnn-sm8650 takes a16w8, a16w4, a8w8, fp16"),
        ({"quantize": "fp16", "calibration": "t.txt"}, "--calibration t.txt: --quantize fp16 rounds nothing"),
        ({"widths": (4, 1)}, "--widths 4,1: numbers of rows that rise were expected"),
        ({"widths": (1, 2), "quantize": "a8w8"}, "--widths 1,2: --quantize a8w8 computes otherwise in fewer"),
        ({"context_length": 2}, "--context-length 2: this model takes 4 to 256"),
        (
            {"device": "cpu", "format": "onnx", "quantize": "none"},
            "--widths 4: graphs for cpu take any number",
        ),
        ({"device": "cpu", "format": "gguf"}, "--widths 4: its graphs take any number of rows"),
        (
            {"device": "cpu", "format": "gguf", "widths": None, "share_weights": True},
            "--share-weights: its weights",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    export: Export, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        export(**options)
    assert not (tmp_path / "out").exists()


def test_narrow_widths_are_left_out_where_they_compute_otherwise() -> None:
    target = TARGETS["qnn-sm8650"]
    assert fitted(target, None, scheme_of("a16w8")).widths == target.widths
    narrowed = fitted(target, (1, 2, 4, 16), scheme_of("a8w8"))
    assert (narrowed.widths, narrowed.max_width) == ((4, 16), 16)
    assert np.all(np.diff(target.widths) > 0)
