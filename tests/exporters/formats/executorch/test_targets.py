"""Targets of the ExecuTorch format beside XNNPACK: what they refuse, and what the programs made for them hold."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from skipstone.bundle import Bundle, ExecuTorchManifest, manifest_of, open_bundle
from skipstone.errors import DeviceError, ExportError, UsageError
from skipstone.exporters.formats.executorch import decoder_program, exporter
from skipstone.exporters.formats.executorch.coreml import infer_rows
from skipstone.exporters.formats.executorch.schemes import SCHEMES, parse_mix
from skipstone.exporters.formats.executorch.targets import TARGETS, target_of
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.model import load_model
from skipstone.runtimes.engines.executorch.backends import BACKENDS
from skipstone.runtimes.quiet import quiet_libraries
from tests.exporters.tiny import CASES, make_checkpoint
from tests.sdk.cli.command import skipstone

METHODS = {"embed", "segment_0", "segment_1", "head", "draft_head", "compact"}
IOS_18 = 9  # of Core ML's specification versions
SMALL = {"num_hidden_layers": 2, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers."""
    return make_checkpoint(tmp_path_factory.mktemp("small") / "llama", replace(CASES["llama"], config=SMALL))


def export(checkpoint: Path, folder: Path, device: str, quantize: str | None) -> Bundle:
    return export_checkpoint(
        checkpoint, folder, device=device, quantize=quantize, exits=(1,), context_length=64
    )


def contents(bundle: Bundle) -> Any:
    """The program, taken apart by ExecuTorch's own reader of the file format."""
    with quiet_libraries():
        program = importlib.import_module("executorch.exir._serialize._program")
        return program.deserialize_pte_binary(bundle.file("model.pte").read_bytes())


def delegates(bundle: Bundle) -> Iterator[tuple[str, str, bytes]]:
    """Method, delegate and what it was given, for every part of the program that a delegate runs."""
    program = contents(bundle).program
    for plan in program.execution_plan:
        for part in plan.delegates:
            yield plan.name, part.id, bytes(program.backend_delegate_data[part.processed.index].data)


def check_compiled(bundle: Bundle, target: str) -> None:
    """What the manifest says is what the file holds, and what was not tested is not said to be."""
    manifest = manifest_of(bundle, ExecuTorchManifest)
    assert manifest.program.target == target
    assert manifest.program.status == "compiled"
    assert manifest.parity is None
    assert {method.name for method in manifest.program.methods} == METHODS
    assert {plan.name for plan in contents(bundle).program.execution_plan} == METHODS
    shares = {method.name: method.delegated for method in manifest.program.methods}
    assert min(shares[name] for name in METHODS if name.startswith("segment_")) > 0.7
    assert min(shares["head"], shares["draft_head"]) > 0.8
    assert shares["compact"] == 0
    assert {(name, backend) for name, backend, _ in delegates(bundle)} == {
        (name, BACKENDS[target]) for name in METHODS - {"compact"}
    }


def check_not_opened(bundle: Bundle, target: str) -> None:
    with pytest.raises(DeviceError, match=rf"lowered for {target}; .* runs xnnpack.* --device cpu"):
        load_model(bundle.path, threads=1)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_names_schemes_and_a_delegate_that_exist(name: str) -> None:
    assert set(TARGETS[name].schemes) <= set(SCHEMES)
    assert BACKENDS[name]
    for scheme in TARGETS[name].schemes:
        assert target_of(name, parse_mix(scheme, None, 2)).name == name


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"target steam: expected one of xnnpack, vulkan, coreml"):
        target_of("steam", parse_mix("none", None, 2))


@pytest.mark.parametrize(
    ("target", "quantize", "mix", "message"),
    [
        ("coreml", "8da4w", None, r"--quantize 8da4w: the target coreml takes none, fp16, 4w, 8w"),
        ("coreml", "4w", "head=8da8w", r"--quantize 8da8w: the target coreml takes"),
        ("vulkan", "int8", None, r"--quantize int8: the target vulkan takes none"),
        ("xnnpack", "4w", None, r"--quantize 4w: the target xnnpack takes none, fp16, 8da4w"),
    ],
)
def test_a_scheme_that_the_target_does_not_compute_with_is_refused(
    target: str, quantize: str, mix: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        target_of(target, parse_mix(quantize, mix, 2))
    assert "--device" in refused.value.hint


def test_a_refused_scheme_stops_the_export_before_anything_is_lowered(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_arguments: object) -> None:
        raise AssertionError("cut")

    monkeypatch.setattr(decoder_program, "cut_decoder", never)
    with pytest.raises(UsageError, match="the target coreml takes"):
        export(small, tmp_path / "out", "apple-coreml", "8da4w")
    assert not (tmp_path / "out").exists()


def test_reshapes_find_the_number_of_rows_themselves() -> None:
    class Heads(torch.nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows.view(1, rows.shape[1], 4, 8).transpose(1, 2)

    width = torch.export.Dim("width", min=1, max=64)
    module = torch.export.export(
        Heads(), (torch.zeros(1, 5, 32),), dynamic_shapes=({1: width},), strict=False
    ).module()
    sizes = [node for node in module.graph.nodes if "sym_size" in str(node.target)]
    assert sizes
    done = infer_rows(module)
    views = [node for node in done.graph_module.graph.nodes if "view" in str(node.target)]
    assert [list(node.args[1]) for node in views] == [[1, -1, 4, 8]]
    for count in (1, 2, 64):
        rows = torch.arange(count * 32.0).reshape(1, count, 32)
        assert torch.equal(done.graph_module(rows), Heads()(rows))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [None, "4w"])
def test_core_ml_gets_packages_that_take_any_width(small: Path, tmp_path: Path, scheme: str | None) -> None:
    flags = ("--device", "apple-coreml", "--exits", "1", "--context-length", "64")
    quantize = () if scheme is None else ("--quantize", scheme)
    done = skipstone("export", small, *flags, *quantize, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "compiled for coreml, not run" in done.stdout
    assert "self-test passed" not in done.stdout
    bundle = open_bundle(tmp_path / "out")
    assert bundle.manifest.quantization.scheme == (scheme or "fp16")
    check_compiled(bundle, "coreml")
    with quiet_libraries():
        native = importlib.import_module("executorch.backends.apple.coreml.executorchcoreml")
        load_spec = importlib.import_module("coremltools").utils.load_spec
    for index, (method, _, packed) in enumerate(delegates(bundle)):
        folder = tmp_path / str(index)
        folder.mkdir()
        assert native.unflatten_directory_contents(packed, str(folder))
        (package,) = folder.glob("**/*.mlpackage")
        spec = load_spec(str(package))
        assert spec.specificationVersion == IOS_18
        assert not spec.description.state, "K/V are ours"
        for given in spec.description.input:
            bounds = [
                (size.lowerBound, size.upperBound) for size in given.type.multiArrayType.shapeRange.sizeRanges
            ]
            assert (1, 64) in bounds, f"{method}: {given.name} takes {bounds}"
    check_not_opened(bundle, "coreml")


@pytest.mark.slow
def test_vulkan_gets_quantised_weights(small: Path, tmp_path: Path) -> None:
    bundle = export(small, tmp_path / "out", "android-vulkan", None)
    assert bundle.manifest.quantization.scheme == "8da4w"
    check_compiled(bundle, "vulkan")
    head = next(data for method, _, data in delegates(bundle) if method == "head")
    assert b"et_vk.linear_dq8ca_q4gsw" in head, "the head is no 4-bit product with rounded activations"
    check_not_opened(bundle, "vulkan")


@pytest.mark.slow
def test_a_compiled_program_that_lost_a_method_is_not_kept(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "has_target", lambda _target: False)
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))
    first = export_checkpoint(small, tmp_path / "out", format="executorch", quantize="none", exits=(1,))
    assert manifest_of(first, ExecuTorchManifest).program.status == "compiled"

    def fetch(_key: str, output: Path) -> dict[str, float]:
        output.write_bytes(first.file("model.pte").read_bytes())
        return dict.fromkeys([*METHODS, "tail"], 0.5)

    monkeypatch.setattr(exporter, "fetch", fetch)
    with pytest.raises(ExportError, match=r"model\.pte: lowered for xnnpack, holds the methods .* tail"):
        export_checkpoint(small, tmp_path / "again", format="executorch", quantize="none", exits=(1,))
    assert not (tmp_path / "again").exists()
