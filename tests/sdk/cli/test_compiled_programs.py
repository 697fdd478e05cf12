"""Bundles made for a device that this machine is not: shown for what they are, and refused when opened to run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.sdk.cli.command import assert_refused, skipstone
from tests.sdk.cli.damage import edit, generate

pytestmark = pytest.mark.slow


@pytest.fixture
def compiled(tiny_program: Path, tmp_path: Path) -> Path:
    """A bundle whose manifest says that it was compiled for Vulkan, and no more."""
    bundle = Path(shutil.copytree(tiny_program, tmp_path / "bundle"))
    edit(bundle, lambda manifest: manifest["program"].update(target="vulkan", status="compiled"))
    edit(bundle, lambda manifest: manifest.update(parity=None, device="android-vulkan"))
    return bundle


def test_inspect_says_what_was_checked_and_what_was_not(compiled: Path) -> None:
    done = skipstone("inspect", compiled)
    assert done.returncode == 0, done.stderr
    assert "compiled for vulkan, not run" in done.stdout
    assert "no self-test" in done.stdout
    assert "largest difference" not in done.stdout
    methods = json.loads((compiled / "manifest.json").read_text())["program"]["methods"]
    shown = " ".join(done.stdout.split())
    assert all(f"{entry['name']} {entry['delegated']:.0%}" in shown for entry in methods)


@pytest.mark.parametrize("target", ["vulkan", "npu-of-tomorrow"])
def test_running_it_says_what_this_machine_runs(compiled: Path, target: str) -> None:
    edit(compiled, lambda manifest: manifest["program"].update(target=target))
    assert_refused(generate(compiled), f"lowered for {target}", "runs xnnpack", "--device cpu")


def test_bench_refuses_it_and_writes_nothing(compiled: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert_refused(skipstone("bench", compiled, "--json", str(report)), "lowered for vulkan")
    assert not report.exists()


def test_a_manifest_written_before_there_was_a_status_is_read(tiny_program: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_program, tmp_path / "old"))
    edit(bundle, lambda manifest: manifest["program"].pop("status"))
    assert generate(bundle).returncode == 0
    assert "Parity" in skipstone("inspect", bundle).stdout


@pytest.mark.parametrize("change", [{"parity": None}, {"program": {"status": "compiled"}}])
def test_figures_and_status_must_agree(tiny_program: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    bundle = Path(shutil.copytree(tiny_program, tmp_path / "figures"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    program = manifest["program"] | change.get("program", {})
    edit(bundle, lambda manifest: manifest.update(change | {"program": program}))
    assert_refused(generate(bundle), "program.status", "parity figures")
