"""Context binaries in Qualcomm's emulator: the checkpoint's numbers, whatever the width, and whole generations."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import skipstone
from skipstone.bundle import Bundle, CostCurve, open_bundle
from skipstone.errors import BundleError, DeviceError, EngineError
from skipstone.exporters.checkpoint import load_eager
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.engines.onnxruntime import qnn
from skipstone.runtimes.engines.onnxruntime.parts import Part
from skipstone.runtimes.rows import ROOT, RowTree
from skipstone.runtimes.session import Session
from tests.exporters.tiny_npu import WIDTHS, tiny_checkpoint, tiny_npu_bundle

pytestmark = [pytest.mark.slow, pytest.mark.engine]
# The emulator's own times say nothing; here the second segment costs most, in eight rows as much as in one.
WIDE_IS_CHEAP = CostCurve(
    widths=WIDTHS,
    segments=((0.01, 0.01, 0.01), (1.0, 1.0, 1.0)),
    draft_head=(0.01, 0.01, 0.01),
    threads=1,
    machine="made up",
)
TOKENS = [0, *np.random.default_rng(4).integers(3, 260, 23).tolist()]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(tiny_npu_bundle(tmp_path_factory))


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Iterator[Engine]:
    opened = open_engine(bundle, EngineOptions(threads=1))
    yield opened
    opened.close()


def in_batches(engine: Engine, sizes: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits behind every token, run in batches of these sizes."""
    found, start = [], 0
    with Session(engine, 64) as session:
        for size in sizes:
            rows = session.push(TOKENS[start : start + size])
            found += session.advance(rows, session.exits[-1])
            session.commit(rows[-1])
            start += size
    return np.stack(found)


def test_every_segment_computes_what_the_eager_model_does(
    engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = load_eager(tiny_checkpoint(tmp_path_factory))
    with torch.no_grad():
        eager = model(torch.tensor([TOKENS[:8]]), output_hidden_states=True)
    tree = RowTree()
    cache = engine.open_cache(64, tree)
    rows = [tree.add(token, index - 1) for index, token in enumerate(TOKENS[:8])]
    state = cache.embed(TOKENS[:8])
    expected = [eager.hidden_states[1][0].numpy(), eager.logits[0].numpy()]
    for segment, wanted in enumerate(expected):
        state = cache.run(segment, rows, list(state), [True] * 8)
        error = np.sqrt(((state - wanted) ** 2).mean()) / wanted.std()
        assert 0.0 < error < 0.03
        for row in rows:
            tree.progress[row] = segment + 1
    cache.close()


def test_a_row_computes_the_same_to_the_last_bit_whatever_stands_beside_it(engine: Engine) -> None:
    alone = in_batches(engine, [1] * 24)
    for sizes in ([4] * 6, [8] * 3, [3, 5, 8, 7, 1]):
        np.testing.assert_array_equal(in_batches(engine, sizes), alone)


def test_rows_accepted_out_of_a_tree_are_as_rows_of_a_chain(engine: Engine) -> None:
    alone, found = in_batches(engine, [1] * 24), []
    with Session(engine, 64) as session:
        for start in range(0, 8, 2):
            parent, rows = ROOT, []
            for token in TOKENS[start : start + 2]:
                wrong, right = session.push([(token + 1) % 260, token], [parent, parent])
                rows += [wrong, right]
                parent = right
            session.advance(rows[:2], session.exits[0])  # drafted first, and verified in the next call
            found += session.advance(rows, session.exits[-1])[1::2]
            session.commit(parent)
    np.testing.assert_array_equal(np.stack(found), alone[:8])


@pytest.mark.parametrize("strategy", ["layerskip", "staged"])
def test_drafts_are_verified_in_wide_batches_and_change_nothing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    widths: list[tuple[str, int]] = []
    run = Part.run

    def watched(self: Part, width: int, inputs: Any) -> Any:
        widths.append((self._name, width))
        return run(self, width, inputs)

    monkeypatch.setattr(Part, "run", watched)
    monkeypatch.setattr("skipstone.model.kept_or_measured", lambda *_args, **_options: WIDE_IS_CHEAP)
    with skipstone.load(bundle.path) as model:
        for prompt in ("def read(", "the other day the other day the"):
            plain = model.generate(prompt, max_new_tokens=16, strategy="plain")
            widths.clear()
            drafted = model.generate(prompt, max_new_tokens=16, strategy=strategy)
            assert drafted.tokens == plain.tokens
            verified = {width for part, width in widths if part == "segment_1"}
            assert verified & {4, 8}
            assert verified <= set(WIDTHS)


def test_a_batch_wider_than_any_graph_is_refused(engine: Engine) -> None:
    tree = RowTree()
    cache = engine.open_cache(64, tree)
    assert cache.max_width == max(WIDTHS)
    rows = [tree.add(token, index - 1) for index, token in enumerate(TOKENS[:9])]
    with pytest.raises(EngineError, match="segment_0: 9 rows, the graphs take 1 to 8"):
        cache.run(0, rows, list(cache.embed(TOKENS[:9])), [True] * 9)
    cache.close()


@pytest.mark.parametrize("damage", ["cut", "zeros", "flipped", "gone"])
def test_a_damaged_binary_is_refused_in_one_line(bundle: Bundle, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle.path, copy)
    binary = copy / "segment_1-4_qnn.bin"
    content = bytearray(binary.read_bytes())
    if damage == "gone":
        binary.unlink()
    elif damage == "cut":
        binary.write_bytes(content[: len(content) // 2])
    elif damage == "zeros":
        binary.write_bytes(bytes(len(content)))
    else:
        for place in np.random.default_rng(0).integers(0, len(content), 200):
            content[place] ^= 0xFF
        binary.write_bytes(content)
    with pytest.raises(BundleError, match=r"segment_1-4_qnn\.bin"):
        open_bundle(copy)
    unchecked = Bundle(copy, bundle.manifest)
    with pytest.raises(EngineError, match=r"segment_1-4\.onnx: ONNX Runtime cannot load it: ") as raised:
        open_engine(unchecked, EngineOptions(threads=1))
    assert "\n" not in str(raised.value)


def test_without_the_provider_one_line_says_what_to_install(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    qnn._provider.cache_clear()
    try:
        with pytest.raises(
            DeviceError, match=r"onnxruntime-qnn is not installed .*skipstone\[onnx,qualcomm\]"
        ):
            open_engine(bundle, EngineOptions(threads=1))
        assert qnn.qnn_presence() == "compiled"
    finally:
        monkeypatch.undo()
        qnn._provider.cache_clear()
    assert qnn.qnn_presence() == "emulated"


def test_a_program_that_runs_a_bundle_writes_nothing_of_the_emulators_and_needs_no_torch(
    bundle: Bundle,
) -> None:
    code = (
        "import json, sys, skipstone\n"
        f"with skipstone.load({str(bundle.path)!r}) as model:\n"
        "    text = model.generate('def read(', max_new_tokens=4, strategy='plain').text\n"
        "print(json.dumps({'text': text, 'torch': 'torch' in sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["torch"] is False
