"""`skipstone bench --profile` and `skipstone inspect --memory`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from skipstone.benchmark.profile_tables import show_profile
from skipstone.bundle import read_manifest
from skipstone.runtimes.engines.executorch.profile import MethodProfile, OperatorTime, Profile
from tests.sdk.cli.command import assert_refused, skipstone

QUICK = ("--strategies", "plain", "--max-new-tokens", "2", "--repeats", "1", "--no-memory", "--threads", "1")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """One short prompt."""
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "def f("}) + "\n")
    return tmp_path / "prompts.jsonl"


@pytest.mark.engine
@pytest.mark.slow
def test_a_profile_stands_in_the_report_and_on_the_terminal(
    tiny_program: Path, prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "report.json"
    done = skipstone("bench", tiny_program, *QUICK, "--prompts", prompts, "--profile", "--json", output)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert [row["strategy"] for row in report["rows"]] == ["plain"]
    profile = report["profile"]
    assert profile["target"] == "xnnpack"
    assert profile["threads"] == 1
    segment = next(
        method
        for method in profile["methods"]
        if (method["method"], method["layout"], method["width"]) == ("segment_1", "tree", 4)
    )
    attention = next(time for time in segment["operators"] if time["operator"] == "llama::custom_sdpa")
    assert attention["calls"] == 3
    assert 0 < attention["microseconds"] < segment["microseconds"] < segment["wall_microseconds"]
    for title in ("embed", "segment_0, chain", "segment_0, tree", "segment_1, tree", "head", "compact"):
        assert re.search(rf"^ *{title} ", done.stdout, re.MULTILINE), title
    assert "llama::custom_sdpa" in done.stdout
    assert "profile" not in done.stderr


@pytest.mark.engine
@pytest.mark.slow
def test_without_the_flag_no_profile_is_taken(tiny_program: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    done = skipstone("bench", tiny_program, *QUICK, "--prompts", prompts, "--json", output)
    assert done.returncode == 0, done.stderr
    assert "profile" not in json.loads(output.read_text())


def table(*methods: MethodProfile) -> list[str]:
    console = Console(width=100, no_color=True)
    with console.capture() as capture:
        show_profile(Profile("xnnpack", 1, 12, methods), console)
    return [" ".join(line.split()) for line in capture.get().splitlines()]


def test_the_longest_operators_are_shown_with_the_widths_beside_each_other() -> None:
    letters = [OperatorTime(letter, 1, 100.0 - index, 0.1) for index, letter in enumerate("abcdef")]
    narrow = MethodProfile("segment_0", "chain", 1, 90.0, 80.0, (OperatorTime("sdpa", 3, 40.0, 0.5),))
    wide = MethodProfile(
        "segment_0", "chain", 16, 900.0, 800.0, (OperatorTime("sdpa", 3, 600.0, 0.75), *letters)
    )
    lines = table(narrow, wide, MethodProfile("head", None, 1, 9.0, 8.0, ()))
    first = lines.index("segment_0, chain 80 800")
    assert lines[first + 1 : first + 6] == [
        "sdpa 3 40 50% 600 75%",
        "a 1 — 100 10%",
        "b 1 — 99 10%",
        "c 1 — 98 10%",
        "d 1 — 97 10%",
    ]
    assert not any(line.startswith("e ") for line in lines)
    assert "head 8" in lines


@pytest.mark.engine
@pytest.mark.slow
def test_memory_stands_beside_the_manifest(tiny_program: Path) -> None:
    program = json.loads((tiny_program / "manifest.json").read_text())["program"]
    plain = json.loads(skipstone("inspect", tiny_program, "--json").stdout)
    done = skipstone("inspect", tiny_program, "--memory", "--json")
    record = json.loads(done.stdout)
    memory = record.pop("memory")
    assert record == plain == json.loads(read_manifest(tiny_program).model_dump_json())
    assert memory["file_bytes"] == (tiny_program / program["file"]).stat().st_size
    assert (
        memory["key_value_bytes"] == 2 * 4 * program["slots"] * 1 * 32 * 4
    )  # K and V, layers, heads, size, f32
    assert (
        sum(
            method["key_value_bytes"] for method in memory["methods"] if method["name"].startswith("segment_")
        )
        == (memory["key_value_bytes"])
    )
    assert {method["name"] for method in memory["methods"]} == {
        method["name"] for method in program["methods"]
    }
    assert memory["loaded"]["private"] > memory["idle"]["private"] + memory["key_value_bytes"]


@pytest.mark.engine
@pytest.mark.slow
def test_memory_is_shown_as_a_table(tiny_program: Path) -> None:
    done = skipstone("inspect", tiny_program, "--memory")
    assert done.returncode == 0, done.stderr
    assert "K/V for 64 positions" in " ".join(done.stdout.split())
    cells = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in done.stdout.splitlines()
        if line.startswith("│") and line.count("│") == 7
    }
    assert cells["segment_0"][1:2] == ["0.02"]  # one layer: 2 x 64 slots x 32 channels x 4 bytes
    assert cells["segment_1"][1:2] == ["0.05"]
    assert cells["all"][1:2] == ["0.07"]
    assert "Memory" not in skipstone("inspect", tiny_program).stdout


@pytest.mark.parametrize(("command", "flag"), [("bench", "--profile"), ("inspect", "--memory")])
def test_other_formats_are_refused_before_the_bundle_is_opened(
    coder_bundle_f32: Path, tmp_path: Path, command: str, flag: str
) -> None:
    """Of this bundle nothing but the manifest is there."""
    shutil.copy(coder_bundle_f32 / "manifest.json", tmp_path)
    words = (f"{flag}: executorch bundles only", "gguf", "--format executorch")
    assert_refused(skipstone(command, tmp_path, flag), *words)


@pytest.mark.parametrize(("command", "flag"), [("bench", "--profile"), ("inspect", "--memory")])
def test_a_folder_without_a_bundle_is_named(tmp_path: Path, command: str, flag: str) -> None:
    assert_refused(skipstone(command, tmp_path / "nowhere", flag), "nowhere: no such folder")


def test_a_refusal_imports_neither_torch_nor_an_engine(coder_bundle_f32: Path) -> None:
    script = (
        "import sys; from skipstone.cli import run\n"
        "status = run(['bench', sys.argv[1], '--profile']), run(['inspect', sys.argv[1], '--memory'])\n"
        "print(*status, *({'torch', 'executorch', 'llama_cpp'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(coder_bundle_f32)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["2", "2"]
