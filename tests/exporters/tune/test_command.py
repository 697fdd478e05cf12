"""`skipstone tune` as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest

from skipstone.cli import run
from skipstone.exporters.tune.evaluate import ExitReport


def test_the_command_trains_and_says_where_the_model_is(
    config_file: Path, texts: Path, recipe_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = config_file.parent / "out"
    flags = ["--from-config", config_file, "--recipe", recipe_file, "--data", texts, "--output", output]
    flags += ["--max-steps", 3, "--no-compile", "--cpu"]
    assert run(["tune", *map(str, flags)]) == 0
    assert str(output) in capfd.readouterr().err.replace("\n", "")
    assert len(ExitReport.read(output / "exit_report.json").exits) == 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["/no/such/model", "--max-steps", "3"], "/no/such/model"),
        (["--max-steps", "3"], "--from-config"),
        (["--from-config", "{config}"], "--max-minutes"),
        (["--from-config", "{config}", "--max-steps", "3", "--recipe", "other"], "--recipe other"),
        (["--from-config", "{recipe}", "--max-steps", "3", "--data", "{texts}"], "tiny.toml"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    named: str,
    config_file: Path,
    texts: Path,
    recipe_file: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output = config_file.parent / "out"
    filled = [a.format(config=config_file, recipe=recipe_file, texts=texts) for a in arguments]
    assert run(["tune", *filled, "--output", str(output), "--cpu"]) == 2
    told = capfd.readouterr().err
    assert named in told
    assert "Traceback" not in told
    assert not output.exists()
