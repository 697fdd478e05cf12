"""Programs for Ethos-U: what they compute, integer for integer, how long they are said to take, and what is refused."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from skipstone.bundle import Bundle, EthosUManifest, manifest_of
from skipstone.devices.curves import MeasuredCurve
from skipstone.devices.estimates import curve_of, estimated_curve
from skipstone.devices.simulator import Device
from skipstone.errors import DeviceError, ExportError, UsageError
from skipstone.exporters.checkpoint import load_eager
from skipstone.exporters.formats.ethosu import exporter, lowering
from skipstone.exporters.formats.ethosu.lowering import Lowered, check_operators
from skipstone.exporters.formats.ethosu.reference import ReferenceProgram
from skipstone.exporters.formats.ethosu.tools import load_tools
from skipstone.exporters.formats.ethosu.walk import GraphWalk
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.exporters.segments import HeadShape
from skipstone.model import load_model
from tests.exporters.tiny import GENTLE, make_checkpoint
from tests.sdk.cli.command import skipstone

pytestmark = pytest.mark.slow
WIDTHS, SLOTS = (1, 4), 16
PARTS = ("segment_0", "head")


@dataclass(frozen=True)
class Made:
    """An export, and what its programs were made from: the rounding graph, its example inputs, and the program."""

    bundle: Bundle
    programs: dict[str, tuple[torch.nn.Module, tuple[torch.Tensor, ...], Lowered]]


@pytest.fixture(scope="session")
def tools() -> None:
    """Arm's tools, installed where they are missing, by the command that the error gives."""
    try:
        load_tools()
    except ExportError as error:
        command = shlex.split((error.hint or "").strip("`"))
        subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
        load_tools()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one layer, because each takes half a minute to compile; not to be changed."""
    folder = tmp_path_factory.mktemp("gentle")
    return make_checkpoint(folder, replace(GENTLE, config={"num_hidden_layers": 1}))


@pytest.fixture(scope="session")
def made(tools: None, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Its export, with what was compiled; not to be changed."""
    folder = tmp_path_factory.mktemp("ethosu")
    programs = {}
    lower = exporter.lower

    def recorded(name: str, graph: Any, inputs: Any, target: str) -> Lowered:
        found = lower(name, graph, inputs, target)
        programs[name] = graph, inputs, found
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(exporter, "lower", recorded)
        bundle = export_checkpoint(
            checkpoint, folder / "out", device="ethos-u85", exits=(), context_length=SLOTS, widths=WIDTHS
        )
    return Made(bundle, programs)


def inputs_of(made: Made, name: str, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """Embeddings of random tokens, and a past that is empty; everything else as in the example."""
    table = np.fromfile(made.bundle.file("embeddings.f16"), "<f2").reshape(-1, 64)
    hidden, *rest = (each.numpy() for each in made.programs[name][1])
    tokens = np.random.default_rng(seed).integers(0, len(table), hidden.shape[1])
    return [table[None, tokens].astype(np.float32), *rest]


@pytest.mark.parametrize(
    ("name", "tolerances"),
    [("segment_0-4", (0.03, 1e-3, 1e-3)), ("segment_0-1", (0.03, 1e-3, 1e-3)), ("head-4", (1e-3,))],
)
def test_the_reference_model_computes_what_the_rounding_graph_does(
    made: Made, name: str, tolerances: tuple[float, ...]
) -> None:
    """Looser for hidden states alone, behind the tables of softmax and SiLU, which torch's graph does not have."""
    graph, _, lowered = made.programs[name]
    inputs = inputs_of(made, name)
    found = ReferenceProgram(name, lowered)(inputs)
    with torch.no_grad():
        expected = [each.numpy() for each in graph(*map(torch.from_numpy, inputs))]
    assert len(found) == len(expected) == len(tolerances)
    for ours, theirs, tolerance in zip(found, expected, tolerances, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max())
        assert np.abs(theirs).max() > 0


def test_programs_compute_the_checkpoints_logits(
    made: Made, checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two calls of 4 rows, the second behind what the first kept; against float32, with no part of ours in between, and
    nothing written to the terminal.
    """
    programs = {part: ReferenceProgram(part, made.programs[f"{part}-4"][2]) for part in PARTS}
    table = np.fromfile(made.bundle.file("embeddings.f16"), "<f2").reshape(-1, 64)
    shapes = [[HeadShape(heads=1, size=32)]]
    walk = GraphWalk(lambda part, inputs: programs[part](inputs), shapes, table, 4, SLOTS)
    tokens = [int(each) for each in np.random.default_rng(1).integers(0, len(table), 8)]
    found = np.concatenate([walk.logits(tokens[:4]), walk.logits(tokens[4:])])
    assert capfd.readouterr() == ("", "")
    with torch.no_grad():
        expected = load_eager(checkpoint)(torch.tensor([tokens])).logits[0].numpy()
    errors = np.abs(found - expected) / np.abs(expected).max()
    assert np.quantile(errors, 0.9) < 0.015
    assert errors.max() < 0.1  # what lies outside of what was calibrated on is cut off
    assert (found.argmax(-1) == expected.argmax(-1)).sum() >= 7


def test_programs_of_all_widths_round_alike(made: Made) -> None:
    hidden = inputs_of(made, "head-4")[0]
    wide = ReferenceProgram("head-4", made.programs["head-4"][2])([hidden])[0]
    narrow = ReferenceProgram("head-1", made.programs["head-1"][2])
    for row in range(4):
        found = narrow([hidden[:, row : row + 1]])[0][0, 0]
        np.testing.assert_allclose(found, wide[0, row], atol=1e-3 * np.abs(wide).max())


def test_the_npu_takes_every_part_whole_and_its_time_is_estimated(made: Made) -> None:
    npu = manifest_of(made.bundle, EthosUManifest).npu
    assert (npu.status, npu.target, npu.widths) == ("estimated", "ethos-u85-256", WIDTHS)
    assert [(each.part, each.width) for each in npu.programs] == [
        (part, width) for part in PARTS for width in WIDTHS
    ]
    assert npu.agreement >= 0.8
    for each in npu.programs:
        assert b"vela_bin_stream" in made.bundle.file(each.file).read_bytes()
        assert each.cycles == made.programs[each.file.removesuffix(".pte")][2].cycles
        assert each.cycles > 0
        assert each.operators > 0
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96
    assert all(
        0.8 * layer < each.weight_bytes < 1.5 * layer for each in npu.programs if "segment" in each.part
    )


def test_a_bundles_estimates_are_a_cost_curve_to_simulate_with(made: Made) -> None:
    found, npu = curve_of(made.bundle.path), manifest_of(made.bundle, EthosUManifest).npu
    assert isinstance(found, MeasuredCurve)
    assert (found.status, found.exits, found.curve.widths) == ("estimated", (1,), WIDTHS)
    seconds = {(each.part, each.width): each.cycles / 1e9 for each in npu.programs}
    assert found.curve.segments[0] == pytest.approx(
        [seconds["segment_0", width] + seconds["head", width] for width in WIDTHS]
    )
    assert found.curve.draft_head == ()
    assert Device(found, widths=WIDTHS)


def test_the_last_segment_pays_for_the_head_and_drafts_for_theirs(made: Made) -> None:
    manifest = manifest_of(made.bundle, EthosUManifest)
    cycles = {"segment_0": 100, "segment_1": 200, "head": 30, "draft_head": 4}
    one = manifest.npu.programs[0]
    programs = tuple(
        one.model_copy(update={"part": part, "width": width, "cycles": count * width})
        for part, count in cycles.items()
        for width in WIDTHS
    )
    npu = manifest.npu.model_copy(update={"programs": programs, "draft_vocabulary": "ids", "clock": 10.0})
    curve = estimated_curve(made.bundle, manifest.model_copy(update={"exits": (1,), "npu": npu})).curve
    assert curve.segments == ((10.0, 40.0), (23.0, 92.0))
    assert curve.draft_head == (0.4, 1.6)


def test_a_bundle_says_what_was_estimated_and_is_refused_where_nothing_runs_it(made: Made) -> None:
    with pytest.raises(DeviceError, match="made for ethos-u85; no engine here runs format ethosu"):
        load_model(made.bundle.path, threads=1)
    done = skipstone("inspect", made.bundle.path)
    shown = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stderr
    assert "compiled for ethos-u85-256 by vela 5.1.0, not run" in shown
    assert "ms for a token by itself" in shown


def test_estimates_of_one_width_are_too_few_to_plan_with(made: Made, tmp_path: Path) -> None:
    manifest = manifest_of(made.bundle, EthosUManifest)
    wide = tuple(each for each in manifest.npu.programs if each.width == 4)
    folder = Path(shutil.copytree(made.bundle.path, tmp_path / "wide"))
    npu = manifest.npu.model_copy(update={"widths": (4,), "programs": wide})
    (folder / "manifest.json").write_text(manifest.model_copy(update={"npu": npu}).model_dump_json())
    with pytest.raises(UsageError, match="widths 4: planning needs 1 and at least one more"):
        curve_of(folder)


def test_a_compiler_that_fails_is_named_with_the_part(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, inputs, _ = made.programs["head-1"]
    monkeypatch.setattr(lowering, "SYSTEM", "Nowhere")
    with pytest.raises(ExportError, match=r"head-1: it cannot be compiled for .*Error: .*Nowhere"):
        lowering.lower("head-1", graph, inputs, "ethos-u85-256")


def test_the_draft_head_is_calibrated_behind_every_inner_exit() -> None:
    called = []

    def call(part: str, inputs: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        called.append((part, float(inputs[0][0, 0, 0])))
        return [inputs[0] + 1]

    GraphWalk(call, [[], [], []], np.zeros((2, 4)), 1, SLOTS).logits([0], draft="draft_head")
    assert [value for part, value in called if part == "draft_head"] == [1.0, 2.0]


def test_operators_left_over_too_little_memory_and_poor_agreement_are_named() -> None:
    graph = torch.fx.symbolic_trace(lambda x: torch.sin(x)).graph
    with pytest.raises(ExportError, match=r"head-1: the NPU does not take .*sin.* \(0 pieces"):
        check_operators("head-1", graph)
    exporter.check_memory("head-1.pte", 4 << 20)
    with pytest.raises(ExportError, match=r"head-1\.pte: a call needs 5\.0 MB of SRAM, 4\.2 is allowed"):
        exporter.check_memory("head-1.pte", 5_000_000)
    exporter.check_agreement(0.8, 0.8)
    for found in (0.79, float("nan")):
        with pytest.raises(ExportError, match="at least 80% were expected"):
            exporter.check_agreement(found, 0.8)


def test_what_cannot_be_made_is_refused_before_anything_is_read(
    tools: None, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for quantize, widths, words in (
        ("4w", WIDTHS, "--quantize 4w: .*a16w8"),
        (None, (4, 1), "--widths 4,1: numbers of rows that rise"),
    ):
        with pytest.raises(UsageError, match=words):
            export_checkpoint(
                checkpoint, tmp_path / "out", device="ethos-u85", quantize=quantize, widths=widths
            )
    for change, words in (
        (
            lambda: monkeypatch.setattr("importlib.metadata.version", lambda _: "4.0"),
            "ethos-u-vela is 4.0, 5.1.0",
        ),
        (
            lambda: monkeypatch.setitem(sys.modules, "tosa_reference_model", None),
            "Arm's tools for Ethos-U are not",
        ),
    ):
        change()
        with pytest.raises(ExportError, match=words) as refused:
            export_checkpoint(checkpoint, tmp_path / "out", device="ethos-u85")
        assert "pip install --upgrade --no-deps --target" in (refused.value.hint or "")
    assert not list(tmp_path.iterdir())
