"""What the commands print, and how they end."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import skipstone as package
from skipstone import cli
from skipstone.devices.profiles import load_profile, profile_names
from skipstone.model import load_model
from tests.sdk.cli.command import skipstone

PROMPT = "def read_lines(path):\n"
FLAGS = ("--prompt", PROMPT, "--max-new-tokens", "24", "--threads", "1")


def test_help_lists_the_commands_and_needs_no_command() -> None:
    asked, bare = skipstone("--help"), skipstone()
    assert asked.returncode == bare.returncode == 0
    for command in ("export", "generate", "bench", "simulate", "inspect", "tune", "devices"):
        assert re.search(rf"^\W*{command}\b", asked.stdout, re.MULTILINE), command
        assert command in bare.stdout


def test_version_is_the_packages() -> None:
    assert skipstone("--version").stdout.strip() == f"skipstone {package.__version__}"


@pytest.mark.parametrize("strategy", ["plain", "auto"])
def test_generate_streams_the_models_text_to_standard_output(coder_bundle_f32: Path, strategy: str) -> None:
    with load_model(coder_bundle_f32, threads=1) as model:
        expected = model.generate(PROMPT, max_new_tokens=24, strategy="plain").text
    done = skipstone("generate", coder_bundle_f32, *FLAGS, "--strategy", strategy)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected + "\n"
    assert "24 tokens" in done.stderr or "eos" in done.stderr


def test_generate_prints_one_json_object(coder_bundle_f32: Path) -> None:
    with load_model(coder_bundle_f32, threads=1) as model:
        expected = model.generate(PROMPT, max_new_tokens=24, strategy="plain")
    done = skipstone("generate", coder_bundle_f32, *FLAGS, "--strategy", "staged", "--json")
    record = json.loads(done.stdout)
    assert record["text"] == expected.text
    assert tuple(record["tokens"]) == expected.tokens
    assert record["stop_reason"] == expected.stop_reason
    assert record["stats"]["new_tokens"] == len(expected.tokens)
    assert record["stats"]["rounds"] < len(expected.tokens)
    assert record["stats"]["tokens_per_second"] > 0
    assert done.stderr == ""


def test_marked_drafts_leave_the_text_when_the_marks_are_taken_out(coder_bundle_f32: Path) -> None:
    with load_model(coder_bundle_f32, threads=1) as model:
        expected = model.generate(PROMPT, max_new_tokens=24, strategy="plain").text
    done = skipstone("generate", coder_bundle_f32, *FLAGS, "--strategy", "layerskip", "--show-drafts")
    assert "{+" in done.stdout
    without_refused = re.sub(r"\[-.*?-\]", "", done.stdout)
    assert without_refused.replace("{+", "").replace("+}", "") == expected + "\n"


def test_a_prompt_comes_from_standard_input_with_a_dash(coder_bundle_f32: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from skipstone.cli import main; main()",
        "generate",
        str(coder_bundle_f32),
    ]
    flags = ["--prompt-file", "-", "--max-new-tokens", "8", "--threads", "1", "--strategy", "plain"]
    piped = subprocess.run([*command, *flags], input=PROMPT, capture_output=True, text=True, check=True)
    given = skipstone(*command[3:], "--prompt", PROMPT, *flags[2:])
    assert piped.stdout == given.stdout


def test_devices_says_what_this_machine_has_and_why_not_the_rest() -> None:
    records = json.loads(skipstone("devices", "--json").stdout)
    formats = [(name, format) for name in profile_names() for format in load_profile(name).formats]
    assert [(record["name"], record["format"]) for record in records] == formats
    usable = {(record["name"], record["format"]): record["usable"] for record in records}
    assert usable["cpu", "gguf"] is usable["cpu", "executorch"] is True
    assert usable["android-vulkan", "executorch"] is False
    assert all(record["reason"] for record in records)
    shown = skipstone("devices").stdout
    for record in records:
        here, _, elsewhere = shown.partition("Not here")
        said = f"{record['name']}, {record['format']}: {record['reason']}"
        assert said in (here if record["usable"] else elsewhere).splitlines(), "on one line"
        assert record["verified"] in elsewhere


def test_inspect_prints_the_manifest_as_json(coder_bundle_f32: Path) -> None:
    record = json.loads(skipstone("inspect", coder_bundle_f32, "--json").stdout)
    assert record == json.loads((coder_bundle_f32 / "manifest.json").read_text())


def test_a_reader_that_goes_away_is_no_error(coder_bundle_f32: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from skipstone.cli import main; main()",
        "generate",
        str(coder_bundle_f32),
    ]
    flags = ["--prompt", PROMPT, "--max-new-tokens", "400", "--threads", "1", "--ignore-eos"]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=120) == 141
    assert said == ""


def test_an_interruption_ends_with_130_and_without_a_traceback(coder_bundle_f32: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from skipstone.cli import main; main()",
        "generate",
        str(coder_bundle_f32),
    ]
    flags = ["--prompt", PROMPT, "--max-new-tokens", "1500", "--threads", "1", "--ignore-eos"]
    process = subprocess.Popen(
        [*command, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background shells ignore it
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Traceback" not in said


def broken(monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of `skipstone devices` with a fault inside."""

    def fail() -> None:
        raise RuntimeError("the cause")

    monkeypatch.setattr("skipstone.devices.profiles.profile_names", fail)
    return cli.run(["devices"])


def test_a_fault_of_ours_says_how_to_see_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SKIPSTONE_TRACEBACK", raising=False)
    assert broken(monkeypatch) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "RuntimeError: the cause" in said
    assert "SKIPSTONE_TRACEBACK=1" in said


def test_the_traceback_is_there_for_those_who_ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SKIPSTONE_TRACEBACK", "1")
    assert broken(monkeypatch) == 1
    assert "Traceback" in capsys.readouterr().err
