"""What `auto` learned is found again by the next process, for the same bundle on the same machine only."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from skipstone.bundle import Bundle
from skipstone.devices import curves, records
from skipstone.devices.curves import CurveKey, curve_key
from skipstone.devices.records import KeptRecord, keep_records, kept_records
from skipstone.runtimes.engines import EngineOptions
from skipstone.runtimes.policies.arms import Record
from tests.sdk.scripted import ScriptedEngine, write_bundle

FOUND = {"katz": Record(12, 30.5, 14.25), "exit 2": Record(3, 4, 6, 3.5, 4.25)}


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(curves, "_library", lambda _format: "llama 1")
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def key(bundle: Bundle) -> CurveKey:
    return curve_key(bundle, ScriptedEngine(range(64)), EngineOptions(threads=1))


def file_of(bundle: Bundle) -> Path:
    (file,) = (bundle.path / ".skipstone").iterdir()
    return file


def test_a_record_is_found_again_but_for_ways_never_tried(bundle: Bundle, key: CurveKey) -> None:
    keep_records(bundle, key, FOUND | {"exit 6": Record()})
    assert kept_records(bundle, key) == FOUND


@pytest.mark.parametrize(
    "changes",
    [{"schema_version": 2}, {"ways": {"katz": {"rounds": -1, "tokens": 0, "price": 0}}}, {"ways": None}],
    ids=["newer", "negative", "damaged"],
)
def test_what_cannot_be_used_counts_as_nothing(
    bundle: Bundle, key: CurveKey, changes: dict[str, object]
) -> None:
    keep_records(bundle, key, FOUND)
    file = file_of(bundle)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert kept_records(bundle, key) == {}


def test_another_machine_begins_anew(bundle: Bundle, key: CurveKey) -> None:
    keep_records(bundle, key, FOUND)
    other = key.model_copy(update={"threads": 2})
    assert kept_records(bundle, other) == {}
    file = file_of(bundle)  # even where its file goes by the other one's name
    file.rename(file.with_name(f"drafts-{other.digest}.json"))
    assert kept_records(bundle, other) == {}


def test_a_bundle_that_cannot_be_written_is_kept_elsewhere(bundle: Bundle, key: CurveKey) -> None:
    (bundle.path / ".skipstone").write_text("in the way")
    keep_records(bundle, key, FOUND)
    assert kept_records(bundle, key) == FOUND


def test_a_disk_that_takes_nothing_is_no_error(
    bundle: Bundle, key: CurveKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundle.path / ".skipstone").write_text("in the way")
    monkeypatch.setenv("SKIPSTONE_CACHE", str(bundle.path / ".skipstone"))
    keep_records(bundle, key, FOUND)
    assert kept_records(bundle, key) == {}


def test_it_is_written_now_and_then_and_at_the_end(
    bundle: Bundle, key: CurveKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(records.time, "monotonic", lambda: now)
    kept = KeptRecord(bundle, key)
    kept.update(FOUND)
    assert kept_records(bundle, key) == {}
    now = 31.0
    more = {"katz": replace(FOUND["katz"], rounds=13)}
    kept.update(more)
    assert kept_records(bundle, key) == FOUND | more
    kept.update(FOUND)
    kept.save()
    assert kept_records(bundle, key) == FOUND


def test_nothing_new_is_not_written(bundle: Bundle, key: CurveKey) -> None:
    keep_records(bundle, key, FOUND)
    KeptRecord(bundle, key).save()
    file_of(bundle).unlink()
    again = KeptRecord(bundle, key)
    again.update({})
    again.save()
    assert not list((bundle.path / ".skipstone").iterdir())
