"""Core ML packages: what they hold, what they compute, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from skipstone.bundle import Bundle, CoreMlManifest, manifest_of
from skipstone.errors import BundleError, CheckpointError, DeviceError, ExportError, UsageError
from skipstone.exporters.formats.coreml import evaluate, exporter
from skipstone.exporters.formats.coreml.contents import (
    IOS_18,
    OPERATORS,
    PACKED,
    check_contents,
    read_contents,
    weights_file,
)
from skipstone.exporters.formats.coreml.evaluate import FloatArray, Package
from skipstone.exporters.formats.coreml.walk import PackageWalk
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.exporters.reference import EagerReference
from skipstone.model import load_model
from tests.exporters.conftest import MakeTiny
from tests.exporters.tiny import GENTLE, make_checkpoint
from tests.sdk.cli.command import skipstone

pytestmark = pytest.mark.slow
WIDTHS, SLOTS = (1, 4), 64
PARTS = ("segment_0", "segment_1", "head", "draft_head")
NAMES = {part: tuple(f"{part}_{width}" for width in WIDTHS) for part in PARTS}
ALONE = dict.fromkeys((name for names in NAMES.values() for name in names), 20_000)
TEXT = [5, 40, 41, 42, 7, 90]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers."""
    case = replace(GENTLE, config={"num_hidden_layers": 2})
    return make_checkpoint(tmp_path_factory.mktemp("package") / "gentle", case)


def export(checkpoint: Path, folder: Path, quantize: str | None, widths: tuple[int, ...] = WIDTHS) -> Bundle:
    return export_checkpoint(
        checkpoint, folder, device="apple-coreml", format="coreml", quantize=quantize, exits=(1,),
        context_length=SLOTS, widths=widths,
    )  # fmt: skip


@pytest.fixture(scope="module")
def packed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its package in the default scheme, int4; not to be changed."""
    return export(checkpoint, tmp_path_factory.mktemp("package") / "4w", None)


@pytest.fixture(scope="module")
def halves(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its package in float16; not to be changed."""
    return export(checkpoint, tmp_path_factory.mktemp("package") / "fp16", "fp16")


def walk_of(bundle: Bundle) -> PackageWalk:
    table = np.fromfile(bundle.file("embeddings.f16"), "<f2").reshape(-1, 64)
    return PackageWalk(Package(bundle.path / "model.mlpackage"), 2, table, SLOTS)


def eager(checkpoint: Path, tokens: Sequence[int]) -> FloatArray:
    return EagerReference(checkpoint).logits(tokens)


def test_a_package_holds_stateful_functions_of_int4_weights_for_ios_18(packed: Bundle) -> None:
    contents = read_contents(packed.path / "model.mlpackage")
    assert contents.specification == IOS_18
    assert contents.functions.keys() == {name for names in NAMES.values() for name in names}
    for name, function in contents.functions.items():
        assert function.operator_set == OPERATORS
        assert function.operators["linear"] == function.operators[PACKED] == (7 if "segment" in name else 1)
        states = [*function.states.values()]
        assert states == ([(1, 1, SLOTS, 32)] * 2 if "segment" in name else [])
        assert function.operators.get("write_state", 0) == len(states)


def test_weights_are_stored_once_however_many_functions_read_them(
    packed: Bundle, checkpoint: Path, tmp_path: Path
) -> None:
    contents, entry = (
        read_contents(packed.path / "model.mlpackage"),
        manifest_of(packed, CoreMlManifest).package,
    )
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96
    weights = 2 * layer + 320 * 64  # the draft head's rows are all of the head's
    rest = contents.stored_bytes - weights // 2 - weights // 32 * 2
    angles = 2 * SLOTS * 32 * 2  # rotary tables
    assert 6 * 64 * 2 <= rest - angles < 2_000  # norms, and biases of zeros
    single = export(checkpoint, tmp_path / "single", "4w", (4,))
    size, alone = (weights_file(each.path / "model.mlpackage").stat().st_size for each in (packed, single))
    assert contents.stored_bytes < size == contents.expected_bytes
    assert abs(size - alone) < 0.01 * alone  # a second width adds no weights
    assert entry.stored_bytes == contents.stored_bytes
    assert {each.name: each.weight_bytes for each in entry.functions} == {
        name: function.weight_bytes for name, function in contents.functions.items()
    }


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ({"specification": 8}, "specification 8, 9 was expected"),
        ({"functions": {}}, "functions  in place of draft_head_1"),
        (
            {"file_bytes": 10**9},
            "the file of weights has 1000000000 bytes, those that the functions read take 58624",
        ),
    ],
)
def test_a_package_that_is_not_as_planned_is_refused(
    packed: Bundle, damage: dict[str, object], found: str
) -> None:
    contents = read_contents(packed.path / "model.mlpackage")
    check_contents(contents, NAMES, ALONE, packed=True)
    with pytest.raises(ExportError, match=found):
        check_contents(replace(contents, **damage), NAMES, ALONE, packed=True)  # type: ignore[arg-type]


def test_functions_with_weights_of_their_own_or_unpacked_ones_are_refused(packed: Bundle) -> None:
    contents = read_contents(packed.path / "model.mlpackage")
    head = contents.functions["head_4"]
    moved = replace(head, weights={at + 64: size for at, size in head.weights.items()})
    with pytest.raises(ExportError, match=r"58624 bytes, 56000 are enough for one function of each part"):
        check_contents(contents, NAMES, dict.fromkeys(ALONE, 14_000), packed=True)
    for changed, found in (
        (moved, "head_4 and head_1 do not share"),
        (
            replace(head, operators={"linear": 2, PACKED: 1}),
            "head_4 has 1 packed weights for 2 linear layers",
        ),
        (replace(head, operator_set="CoreML7"), "head_4 has operators of CoreML7"),
    ):
        functions = {**contents.functions, "head_4": changed}
        with pytest.raises(ExportError, match=found):
            check_contents(replace(contents, functions=functions), NAMES, ALONE, packed=True)


def test_texts_give_the_checkpoints_logits_at_every_width(halves: Bundle, checkpoint: Path) -> None:
    expected = eager(checkpoint, TEXT)
    walk = walk_of(halves)
    found = [walk.logits(TEXT[:3], 4), walk.logits(TEXT[3:4], 1), walk.logits(TEXT[4:], 4)]
    np.testing.assert_allclose(np.concatenate(found), expected, atol=0.02 * np.abs(expected).max())


def test_branches_of_a_tree_see_their_ancestors_alone_and_slots_are_written_anew(
    halves: Bundle, checkpoint: Path
) -> None:
    walk, length = walk_of(halves), len(TEXT)
    walk.logits(TEXT[:4], 4)
    walk.logits(TEXT[4:], 4)
    # two children of the text, a grandchild below the first; the second time other tokens in the same slots
    for first, grandchild, second in ((11, 12, 13), (21, 22, 23)):
        sees = np.tile(np.arange(SLOTS) < length, (3, 1))
        for row, ancestors in enumerate(((0,), (0, 1), (2,))):
            sees[row, [length + each for each in ancestors]] = True
        hidden = walk.embed([first, grandchild, second])
        positions, slots = np.array([length, length + 1, length]), length + np.arange(3)
        for segment in range(2):
            hidden = walk.run(segment, hidden, positions, slots, sees, 4)
        found = walk.head("head", hidden, 4)
        for row, path in enumerate(([first], [first, grandchild], [second])):
            expected = eager(checkpoint, [*TEXT, *path])[-1]
            np.testing.assert_allclose(found[row], expected, atol=0.02 * np.abs(expected).max())


def test_the_draft_head_gives_the_heads_logits_of_its_tokens(halves: Bundle) -> None:
    walk = walk_of(halves)
    hidden = walk.embed(TEXT[:4])
    tokens = np.fromfile(halves.file("draft-vocabulary.i32"), "<i4")
    np.testing.assert_array_equal(walk.head("draft_head", hidden, 4), walk.head("head", hidden, 4)[:, tokens])


def test_int4_weights_are_the_checkpoints_to_half_a_step(packed: Bundle, checkpoint: Path) -> None:
    """The head alone, on hidden states of one channel each: its logits are columns of its weights."""
    from skipstone.exporters.checkpoint import load_eager

    model = load_eager(checkpoint)
    hidden = np.eye(64, dtype=np.float32)[:4]
    with torch.no_grad():
        normed = model.model.norm(torch.from_numpy(hidden)).numpy()
    weight = model.lm_head.weight.detach().numpy()
    steps = np.repeat(np.abs(weight.reshape(320, 2, 32)).max(-1) / 7, 32, 1)
    found = walk_of(packed).head("head", hidden, 4)
    bound = np.abs(normed) @ steps.T * 0.56  # 0.5, and what float16 takes
    assert (np.abs(found - normed @ weight.T) <= bound).all()
    assert np.abs(found - normed @ weight.T).max() > bound.max() / 10


def test_what_computes_something_else_is_not_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(evaluate._OPERATORS, "silu", lambda x: -x)
    with pytest.raises(
        ExportError, match=r"the best token is the checkpoint's at \d+% of positions, at least 95%"
    ):
        export(checkpoint, tmp_path / "out", "fp16", (4,))
    assert not (tmp_path / "out").exists()


def test_an_operator_that_cannot_be_computed_here_is_named(
    halves: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(evaluate._OPERATORS, "softmax")
    with pytest.raises(ExportError, match="segment_0_1: the operator softmax of Core ML cannot be checked"):
        walk_of(halves).logits([5], 1)


def test_what_cannot_be_made_is_refused_before_anything_is_read(
    checkpoint: Path, tiny_t5: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for quantize, widths, found in (
        ("8da4w", WIDTHS, "--quantize 8da4w: .*4w, 8w, fp16"),
        (None, (4, 1), "--widths 4,1: numbers of rows that rise"),
    ):
        with pytest.raises(UsageError, match=found):
            export(checkpoint, tmp_path / "out", quantize, widths)
    with pytest.raises(CheckpointError, match="encoder-decoder; --format coreml takes decoders"):
        export_checkpoint(next(iter(t5(tiny_t5))), tmp_path / "out", device="apple-coreml", format="coreml")
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(ExportError, match="Core ML packages cannot be written") as missing:
        export(checkpoint, tmp_path / "out", None)
    assert "pip install coremltools" in (missing.value.hint or "")
    assert not (tmp_path / "out").exists()


def t5(tiny_t5: MakeTiny) -> list[Path]:
    return [tiny_t5("t5")]


def test_a_bundle_says_what_was_checked_and_is_refused_where_nothing_runs_it(
    packed: Bundle, tmp_path: Path
) -> None:
    manifest = manifest_of(packed, CoreMlManifest)
    assert (manifest.package.status, manifest.parity) == ("compiled", None)
    assert manifest.package.agreement >= 0.5
    assert packed.manifest.quantization.scheme == "4w"
    with pytest.raises(DeviceError, match="made for apple-coreml; no engine here runs format coreml"):
        load_model(packed.path, threads=1)
    done = skipstone("inspect", packed.path)
    shown = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stderr
    assert "compiled for coreml, not run" in shown
    apart = sum(each.weight_bytes for each in manifest.package.functions)
    stored = manifest.package.stored_bytes
    assert (
        f"8 functions share {stored / 1e6:.1f} MB of weights, apart they would hold {apart / 1e6:.1f}"
        in shown
    )
    damaged = Path(shutil.copytree(packed.path, tmp_path / "damaged"))
    said = json.loads((damaged / "manifest.json").read_text())
    said["package"]["functions"].pop()
    (damaged / "manifest.json").write_text(json.dumps(said))
    with pytest.raises(BundleError, match=r"exits \(1,\) need .*; found"):
        load_model(damaged, threads=1)


def test_agreement_below_the_schemes_is_named() -> None:
    exporter.check_agreement(0.5, 0.5)
    for found in (0.4, float("nan")):
        with pytest.raises(ExportError, match="at least 50% were expected"):
            exporter.check_agreement(found, 0.5)
