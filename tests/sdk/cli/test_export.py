"""`skipstone export` and `skipstone inspect`, from the command line's arguments to what is printed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from skipstone.bundle import open_bundle
from skipstone.cli import run
from skipstone.cli.export import parse_exits
from skipstone.errors import UsageError
from tests.exporters.tiny import CASES, make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("cli") / "tiny", CASES["llama"])


def export(checkpoint: Path, output: Path, *more: str) -> int:
    return run(["export", str(checkpoint), "--output", str(output), *more])


def test_export_says_what_it_made_and_what_comes_next(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--device", "cpu", "--format", "gguf", "--quantize", "q8_0", "--exits", "1,3")
    assert export(checkpoint, tmp_path / "out", *flags) == 0
    printed = capsys.readouterr().out
    assert "q8_0" in printed
    assert "exits 1, 3" in printed
    assert f"skipstone generate {tmp_path / 'out'}" in printed
    assert open_bundle(tmp_path / "out").manifest.exits == (1, 3)


def test_export_and_inspect_print_the_manifest_as_json(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(checkpoint, tmp_path / "out", "--quantize", "f32", "--exits", "none", "--json") == 0
    exported = json.loads(capsys.readouterr().out)
    assert run(["inspect", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == exported
    assert exported["exits"] == []


def test_inspect_shows_every_file_and_the_parity(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(checkpoint, tmp_path / "out", "--quantize", "f32", "--exits", "2")
    capsys.readouterr()
    assert run(["inspect", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for entry in open_bundle(tmp_path / "out").manifest.files:
        assert entry.path in printed
    assert "reference" in printed
    assert "LlamaForCausalLM" in printed


def test_inspect_names_an_altered_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(checkpoint, tmp_path / "out", "--quantize", "f32", "--exits", "2")
    segment = tmp_path / "out" / "segment-0.gguf"
    content = bytearray(segment.read_bytes())
    content[-1] ^= 1
    segment.write_bytes(content)
    capsys.readouterr()
    assert run(["inspect", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "segment-0.gguf" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--exits", "2,x"), "--exits 2,x: whole numbers were expected"),
        (("--exits", "9"), "exit 9 is out of range for 4 layers"),
        (("--quantize", "q4_00"), "did you mean q4_0?"),
        (("--device", "toaster"), "--device toaster"),
    ],
)
def test_a_flag_that_cannot_work_is_one_line_and_exit_code_two(
    flags: tuple[str, ...], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(checkpoint, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_checkpoint_ends_the_process_with_two(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "skipstone",
        "export",
        str(tmp_path / "no" / "model"),
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no such folder" in done.stderr


@pytest.mark.parametrize(("text", "expected"), [(None, None), ("none", ()), ("2", (2,)), ("4, 2", (4, 2))])
def test_exits_are_read_from_text(text: str | None, expected: tuple[int, ...] | None) -> None:
    assert parse_exits(text) == expected


def test_exits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(UsageError, match="--exits two"):
        parse_exits("two")
