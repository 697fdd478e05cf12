"""Kept curves: measured once for one machine, engine and bundle, and never the reason for a failure."""

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skipstone.bundle import Bundle, CostCurve, open_bundle
from skipstone.devices import curves, machine
from skipstone.devices.curves import (
    MeasuredCurve,
    check_fits,
    curve_key,
    keep,
    kept_curves,
    kept_or_measured,
    new_curve,
    read_curve,
)
from skipstone.errors import UsageError
from skipstone.runtimes.engines import EngineOptions
from skipstone.runtimes.engines.llamacpp import library
from tests.sdk.scripted import CHEAP_DRAFTS, ScriptedEngine, write_bundle

OPTIONS = EngineOptions(threads=1)


class Opened:
    """A bundle on an engine, and how often its curve was measured."""

    def __init__(self, folder: Path) -> None:
        self.bundle, self.engine, self.options = write_bundle(folder), ScriptedEngine(range(64)), OPTIONS
        self.measured = 0

    def curve(self) -> CostCurve:
        def measure() -> CostCurve:
            self.measured += 1
            return CHEAP_DRAFTS

        return kept_or_measured(self.bundle, self.engine, self.options, measure, budget_seconds=0.5)

    @property
    def file(self) -> Path:
        (file,) = (self.bundle.path / ".skipstone").iterdir()
        return file

    def edit(self, **changes: Any) -> None:
        self.file.write_text(json.dumps(json.loads(self.file.read_text()) | changes))


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(curves, "_library", lambda _format: "llama 1")
    return Opened(tmp_path / "bundle")


def test_the_second_opening_measures_nothing_and_plans_with_the_same_figures(opened: Opened) -> None:
    assert opened.curve() == opened.curve() == CHEAP_DRAFTS
    assert opened.measured == 1
    assert MeasuredCurve.model_validate_json(opened.file.read_text()).budget_seconds == 0.5
    assert open_bundle(opened.bundle.path).manifest == opened.bundle.manifest, "no file of the bundle changed"


@pytest.mark.parametrize(
    "name", ["processor", "cores", "library", "threads", "threads left to the engine", "K/V", "GPU", "driver"]
)
def test_what_a_curve_depends_on_has_it_measured_again(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "driver":
        opened.options = replace(OPTIONS, gpu_layers=2)
    opened.curve()
    if name == "processor":
        monkeypatch.setattr(curves, "processor_name", lambda: "another one")
    elif name == "cores":
        monkeypatch.setattr(curves, "num_cores", lambda: 77)
    elif name == "library":
        monkeypatch.setattr(curves, "_library", lambda _format: "llama 2")
    elif name == "threads":
        monkeypatch.setattr(opened.engine, "threads", 3, raising=False)
    elif name == "threads left to the engine":
        opened.options = EngineOptions()
    elif name == "K/V":
        monkeypatch.setattr(opened.engine, "kv_type", "f16", raising=False)
    elif name == "GPU":
        opened.options = replace(OPTIONS, gpu_layers=1)
    else:
        monkeypatch.setattr(curves, "gpu_driver", lambda: "NVRM version 999")
    opened.curve()
    opened.curve()
    assert opened.measured == 2
    monkeypatch.undo()


def test_another_artefact_in_the_same_folder_has_it_measured_again(opened: Opened) -> None:
    opened.curve()
    manifest = opened.bundle.manifest
    entry, *others = manifest.files
    changed = manifest.model_copy(update={"files": (entry.model_copy(update={"sha256": "0" * 64}), *others)})
    opened.bundle = Bundle(opened.bundle.path, changed)
    opened.curve()
    assert opened.measured == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda opened: opened.file.write_text("{"),
        lambda opened: opened.file.write_bytes(b"\xff\xfe\x00"),
        lambda opened: opened.file.write_text("[" * 100_000),
        lambda opened: opened.file.write_text(opened.file.read_text()[:-40]),
        lambda opened: opened.edit(schema_version=2),
        lambda opened: opened.edit(kind="a shopping list"),
        lambda opened: opened.edit(surprise=1),
        lambda opened: opened.edit(exits=[1]),
        lambda opened: opened.edit(curve=CHEAP_DRAFTS.model_dump() | {"segments": [[1e-3], [1e-3]]}),
        lambda opened: opened.edit(curve=CHEAP_DRAFTS.model_dump() | {"widths": [8, 1]}),
        lambda opened: opened.edit(curve=CHEAP_DRAFTS.model_dump() | {"draft_head": [0.0, float("nan")]}),
        lambda opened: opened.edit(key=json.loads(opened.file.read_text())["key"] | {"cores": 99}),
    ],
)
def test_a_damaged_newer_or_foreign_file_is_measured_again_and_replaced(opened: Opened, damage: Any) -> None:
    opened.curve()
    damage(opened)
    assert opened.curve() == CHEAP_DRAFTS
    assert opened.measured == 2
    opened.curve()
    assert opened.measured == 2


def test_a_bundle_that_cannot_be_written_has_its_curve_in_the_users_cache(
    opened: Opened, tmp_path: Path
) -> None:
    (opened.bundle.path / ".skipstone").write_text("in the way, as a read-only folder would be")
    opened.curve()
    opened.curve()
    assert opened.measured == 1
    assert len(list((tmp_path / "cache" / "costs").glob("*/cost-*.json"))) == 1


def test_a_disk_that_takes_nothing_costs_a_measurement_and_leaves_nothing_half_written(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    assert opened.curve() == CHEAP_DRAFTS
    assert [path for path in tmp_path.rglob("*cost-*") if path.is_file()] == []


def test_a_curve_that_cannot_be_planned_with_is_used_and_not_kept(opened: Opened) -> None:
    odd = CHEAP_DRAFTS.model_copy(update={"segments": ((0.0, 0.0), (1e-3, 1e-3))})
    assert kept_or_measured(opened.bundle, opened.engine, OPTIONS, lambda: odd, budget_seconds=0.1) == odd
    assert not (opened.bundle.path / ".skipstone").exists()


def test_kept_curves_are_listed_with_what_is_wrong_with_them(opened: Opened) -> None:
    opened.curve()
    good = opened.file
    (good.parent / "cost-0.json").write_text("{}")
    foreign = json.loads(good.read_text())
    foreign["key"]["artefacts"] = "1" * 64
    (good.parent / "cost-1.json").write_text(json.dumps(foreign))
    found = {curve.path.name: curve for curve in kept_curves(opened.bundle)}
    assert found.pop(good.name).content is not None
    assert [found[name].problem for name in sorted(found)] == [
        "not a cost curve",
        "measured with other artefacts",
    ]


def test_the_library_is_named_with_its_plug_ins_and_of_several_engines_all_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"onnxruntime": "1.2", "onnxruntime-qnn": "3.4", "executorch": "5.6"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(library, "build_identity", lambda: "llama 7")
    assert curves._library("onnx") == "onnxruntime 1.2, onnxruntime-qnn 3.4"
    assert curves._library("executorch") == "executorch 5.6"
    bundle, engine = write_bundle(tmp_path), ScriptedEngine(range(64))
    assert curve_key(bundle, engine, OPTIONS).library == "llama 7"
    monkeypatch.setattr(engine, "placement", "0=here,1=there", raising=False)
    key = curve_key(bundle, engine, OPTIONS)
    assert key.library == "llama 7; executorch 5.6; onnxruntime 1.2, onnxruntime-qnn 3.4"
    assert key.placement == "0=here,1=there"


# --- curves from elsewhere ---


def elsewhere(opened: Opened, **changes: Any) -> Path:
    """A curve file as another machine writes it."""
    measured = new_curve(opened.bundle, opened.engine, OPTIONS, CHEAP_DRAFTS, 4.0)
    file = opened.bundle.path.parent / "phone.json"
    file.write_text(json.dumps(measured.model_dump(mode="json") | changes))
    return file


def test_a_curve_of_the_same_bundle_on_another_machine_is_taken(opened: Opened) -> None:
    key = curve_key(opened.bundle, opened.engine, OPTIONS).model_dump() | {"processor": "a phone's"}
    measured = read_curve(elsewhere(opened, key=key))
    check_fits(measured, opened.bundle, Path("phone.json"))
    assert measured.curve == CHEAP_DRAFTS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": 9}, "schema version 9, this Skipstone reads 1"),
        ({"exits": [1, 2, 3]}, "2 segments for exits"),
        ({"curve": CHEAP_DRAFTS.model_dump() | {"widths": [2, 4]}}, "planning needs 1 and at least one more"),
        (
            {
                "curve": CHEAP_DRAFTS.model_dump()
                | {"widths": [1], "segments": [[1.0], [1.0]], "draft_head": []}
            },
            "widths 1: planning needs 1 and at least one more",
        ),
    ],
)
def test_a_curve_that_cannot_be_planned_with_is_refused_by_name(
    opened: Opened, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        read_curve(elsewhere(opened, **changes))
    assert "--curve" in str(refused.value)
    assert "phone.json" in str(refused.value)
    assert "--curve-only" in refused.value.hint


def test_a_curve_of_other_exits_or_other_artefacts_is_refused(opened: Opened) -> None:
    path = Path("phone.json")
    measured = read_curve(elsewhere(opened, exits=[1, 3]))
    with pytest.raises(UsageError, match=r"up to layers 1, 3, these end at 1, 2"):
        check_fits(measured, opened.bundle, path)
    key = curve_key(opened.bundle, opened.engine, OPTIONS).model_dump() | {"artefacts": "2" * 64}
    measured = read_curve(elsewhere(opened, key=key))
    with pytest.raises(UsageError, match=r"artefacts 222222222222, here"):
        check_fits(measured, opened.bundle, path)


def test_a_new_measurement_takes_the_place_of_the_kept_one(opened: Opened) -> None:
    opened.curve()
    dearer = CHEAP_DRAFTS.model_copy(update={"segments": ((2e-3, 2e-3), (4e-2, 4e-2))})
    assert keep(opened.bundle, new_curve(opened.bundle, opened.engine, OPTIONS, dearer, 1.0)) == opened.file
    assert opened.curve() == dearer


def test_the_machine_has_a_processor_and_an_absent_driver_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine.processor_name()
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some Core 9\nmodel name\t: Some Core 9\n")
    monkeypatch.setattr(machine, "_CPUINFO", info)
    monkeypatch.setattr(machine, "_NVIDIA", tmp_path / "version")
    assert (machine.processor_name(), machine.gpu_driver()) == ("Some Core 9", "")
    (tmp_path / "version").write_text("NVRM version: 999\nGCC version: 1\n")
    assert machine.gpu_driver() == "NVRM version: 999"
