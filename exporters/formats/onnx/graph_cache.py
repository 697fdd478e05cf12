"""Graphs that were traced before.

Tracing takes most of the export of a small model, and what it gives depends neither on the scheme nor on the widths
that graphs are narrowed to. So traced graphs, weights in float32, are kept in the user's cache folder under a hash
of all that went in. The oldest are dropped beyond a few gigabytes, and large models are traced every time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import onnx_ir as ir

from skipstone.runtimes.user_cache import cache_folder

Graphs = Iterator[tuple[str, ir.Model]]

_CACHE_BYTES = 2 << 30
_MODEL_BYTES = 256 << 20
_PARTS = "parts.json"  # written last
_LIBRARIES = ("onnx", "onnx-ir", "onnxscript", "torch", "transformers")
# what a traced graph depends on, of this package
_MADE_BY = (
    "formats/onnx/graph_cache",
    "formats/onnx/graphs",
    "formats/onnx/modules",
    "formats/onnx/source_graphs",
    "formats/onnx/source_modules",
    "checkpoint",
    "encoder_decoder",
    "encoder_decoder_modules",
    "factors",
    "segments",
)


def traced_once(trace: Callable[[], Graphs], num_bytes: int, **ingredients: object) -> Graphs:
    """Name and graph of every part, traced now or before; they may be changed.

    Args:
        trace: makes them.
        num_bytes: of all weights in float32.
        ingredients: what they are made from beside this package's code and the libraries.
    """
    if num_bytes > _MODEL_BYTES:
        return trace()
    folder = _folder() / _key(ingredients)
    return _fetched(folder) or _kept(trace(), folder)


def _fetched(folder: Path) -> Graphs | None:
    """The graphs kept in a folder; None where there are none, or the disk spoilt them."""
    try:
        parts = json.loads((folder / _PARTS).read_text(encoding="utf-8"))
        found = [(part, ir.load(folder / f"{part}.onnx")) for part in parts]
        os.utime(folder)
    except Exception:  # protobuf has kinds of its own
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return iter(found)


def _kept(graphs: Graphs, folder: Path) -> Graphs:
    """The same graphs, kept for the next export once all are there; a disk that refuses is no error."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}.", dir=folder.parent))
    except OSError:
        yield from graphs
        return
    saved: dict[str, bool] = {}
    try:
        for part, graph in graphs:
            saved[part] = _saved(graph, draft / f"{part}.onnx")
            yield part, graph
        if all(saved.values()):
            with contextlib.suppress(OSError):
                (draft / _PARTS).write_text(json.dumps(list(saved)), encoding="utf-8")
                draft.rename(folder)
                _drop_oldest(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _saved(graph: ir.Model, file: Path) -> bool:
    try:
        ir.save(graph, file)
    except OSError:
        return False
    return True


def _drop_oldest(kept: Path) -> None:
    total = 0
    folders = [file.parent for file in kept.glob(f"*/{_PARTS}")]
    for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True):
        total += sum(file.stat().st_size for file in folder.iterdir())
        if total > _CACHE_BYTES:
            shutil.rmtree(folder, ignore_errors=True)


def _folder() -> Path:
    return cache_folder() / "onnx"


def _key(ingredients: dict[str, object]) -> str:
    everything = {**ingredients, "versions": [importlib.metadata.version(name) for name in _LIBRARIES]}
    digest = hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode())
    digest.update(_code())
    return digest.hexdigest()


@cache
def _code() -> bytes:
    root = Path(__file__).parents[2]
    return b"".join((root / f"{name}.py").read_bytes() for name in _MADE_BY)
