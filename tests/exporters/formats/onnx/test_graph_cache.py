"""Graphs kept for the next export: the same files come of them, and nothing but whole sets of them is taken."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import pytest

from skipstone.exporters.formats import ExportOptions
from skipstone.exporters.formats.onnx import graph_cache
from skipstone.exporters.formats.onnx.exporter import export_onnx
from skipstone.exporters.formats.onnx.graph_cache import Graphs, traced_once
from tests.exporters.tiny_npu import tiny_checkpoint


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where graphs are kept."""
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "onnx"


def graph(name: str) -> ir.Model:
    value = ir.val(name, dtype=ir.DataType.FLOAT, shape=ir.Shape([1, "rows"]))
    node = ir.node("Relu", [value], name=name)
    return ir.Model(
        ir.Graph([value], list(node.outputs), nodes=[node], opset_imports={"": 21}), ir_version=10
    )


def named(parts: str) -> Graphs:
    return iter([(part, graph(part)) for part in parts])


def no_graphs() -> Graphs:
    raise AssertionError("traced again")


def parts_of(graphs: Iterator[tuple[str, ir.Model]]) -> list[tuple[str, str]]:
    return [(part, str(model.graph.inputs[0].name)) for part, model in graphs]


@pytest.mark.slow
def test_one_trace_serves_every_scheme_and_gives_the_files_that_tracing_again_gives(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = str(tiny_checkpoint(tmp_path_factory))

    def export(scheme: str, exits: tuple[int, ...] = (1,)) -> dict[str, bytes]:
        folder, scratch = tmp_path / "out", tmp_path / "scratch"
        for made in (folder, scratch):
            made.mkdir(exist_ok=True)
        export_onnx(checkpoint, ExportOptions(scheme, exits), folder, scratch, lambda _step: None)
        return {file.name: file.read_bytes() for file in folder.glob("*.onnx")}

    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "other"))
    expected = export("8da4w")
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))
    export("none")
    with monkeypatch.context() as patch:
        patch.setattr("skipstone.exporters.formats.onnx.graphs.trace", lambda *_given: no_graphs())
        assert export("8da4w") == expected
        with pytest.raises(AssertionError, match="traced again"):
            export("8da4w", exits=())


def test_what_it_was_made_from_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parts_of(traced_once(lambda: named("ab"), 1, source="x", exits=(1,))) == [("a", "a"), ("b", "b")]
    assert parts_of(traced_once(no_graphs, 1, source="x", exits=(1,))) == [("a", "a"), ("b", "b")]
    for changed in ({"source": "y", "exits": (1,)}, {"source": "x", "exits": (2,)}):
        assert parts_of(traced_once(lambda: named("c"), 1, **changed)) == [("c", "c")]
    monkeypatch.setattr(graph_cache, "_code", lambda: b"another way to trace")
    with pytest.raises(AssertionError, match="traced again"):
        traced_once(no_graphs, 1, source="x", exits=(1,))


def test_the_key_covers_every_module_of_the_exporters_that_tracing_imports() -> None:
    root = Path(graph_cache.__file__).parents[2]
    covered = {f"skipstone.exporters.{name.replace('/', '.')}" for name in graph_cache._MADE_BY}
    for name in graph_cache._MADE_BY:
        for node in ast.walk(ast.parse((root / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("skipstone.exporters"):
                assert node.module in covered, f"{name}: {node.module}"


def test_graphs_can_be_changed_without_changing_what_is_kept() -> None:
    for _time in range(3):
        for _part, model in traced_once(lambda: named("a"), 1):
            assert model.graph.inputs[0].name == "a"
            model.graph.inputs[0].name = "changed"


def test_half_a_model_and_a_large_one_are_not_kept(kept: Path) -> None:
    half = traced_once(lambda: named("ab"), 1)
    next(half)
    half.close()  # type: ignore[attr-defined]
    assert parts_of(traced_once(lambda: named("ab"), 1 << 40)) == [("a", "a"), ("b", "b")]
    assert list(kept.iterdir()) == []


@pytest.mark.parametrize("file", ["a.onnx", "parts.json"])
def test_what_the_disk_spoilt_is_traced_again(kept: Path, file: str) -> None:
    list(traced_once(lambda: named("a"), 1))
    (found,) = kept.iterdir()
    (found / file).write_bytes(b"\xff\xff")
    assert parts_of(traced_once(lambda: named("a"), 1)) == [("a", "a")]
    assert parts_of(traced_once(no_graphs, 1)) == [("a", "a")]


def test_a_folder_that_cannot_be_written_is_no_error(kept: Path) -> None:
    kept.parent.write_text("a file")
    for _time in range(2):
        assert parts_of(traced_once(lambda: named("a"), 1)) == [("a", "a")]


def test_the_oldest_go_when_the_cache_is_full(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list(traced_once(lambda: named("a"), 1, source=0))
    size = sum(file.stat().st_size for file in kept.glob("*/*"))
    monkeypatch.setattr(graph_cache, "_CACHE_BYTES", 2 * size)
    for source in (1, 2):
        list(traced_once(lambda: named("a"), 1, source=source))
    assert len(list(kept.iterdir())) == 2
    assert parts_of(traced_once(no_graphs, 1, source=2)) == [("a", "a")]
