"""`skipstone compress`: a table or a record, and one line for what cannot work."""

import json
from pathlib import Path

import pytest

from tests.sdk.cli.command import assert_refused, skipstone


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A calibration text."""
    (tmp_path / "text.txt").write_text("A river is never the same.\n" * 40, encoding="utf-8")
    return tmp_path / "text.txt"


def test_steps_are_tabulated_or_told_as_json_and_the_folder_can_be_exported(
    tiny_checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    cache = {"SKIPSTONE_CACHE": str(tmp_path / "cache")}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[step]]\nkind = "drop_layers"\ncount = 1\n\n[[step]]\nkind = "sparsify"\n', "utf-8")
    flags = ("--recipe", recipe, "--calibration", text, "--output", tmp_path / "small")
    done = skipstone("compress", tiny_checkpoint, *flags, **cache)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()]
    assert [row[0] for row in rows if row[0] in ("source", "drop_layers", "sparsify")] == [
        "source", "drop_layers", "sparsify",
    ]  # fmt: skip

    done = skipstone("compress", tiny_checkpoint, *flags, "--overwrite", "--json", **cache)
    record = json.loads(done.stdout)
    assert record == json.loads((tmp_path / "small" / "compression.json").read_text("utf-8"))
    assert [step["kind"] for step in record["steps"]] == ["drop_layers", "sparsify"]
    assert record["steps"][0]["size"]["parameters"] < record["before"]["parameters"]


def test_codes_that_a_step_chose_are_in_the_bundle(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    cache = {"SKIPSTONE_CACHE": str(tmp_path / "cache")}
    flags = ("--compress", "quantize:scheme=q4_0,method=gptq", "--calibration", text, "--output")
    done = skipstone("compress", tiny_checkpoint, *flags, tmp_path / "small", "--json", **cache)
    assert json.loads(done.stdout)["steps"][0]["details"]["scheme"] == "q4_0"
    done = skipstone("export", tmp_path / "small", "--output", tmp_path / "out", "--json", **cache)
    quantization = json.loads(done.stdout)["quantization"]
    assert quantization["scheme"] == "q4_0"
    assert quantization["codes_sha256"]
    refused = skipstone("export", tmp_path / "small", "--output", tmp_path / "other", "--quantize", "q8_0")
    assert_refused(refused, "--quantize q4_0", "--requantize")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--compress", "drop_layers:count=9,by=top"], ["9 layers cannot go", "0 to 3"]),
        (["--compress", "quantize:bits=4", "--format", "onnx"], ["quantize", "onnx"]),
        (["--recipe", "a.toml", "--compress", "melt"], ["--recipe and --compress"]),
        (["--compress", "drop_layers:count=1,by=top", "--format", "tarball"], ["tarball", "gguf"]),
    ],
)
def test_what_cannot_work_is_one_line(
    tiny_checkpoint: Path, tmp_path: Path, flags: list[str], words: list[str]
) -> None:
    done = skipstone("compress", tiny_checkpoint, *flags, "--output", tmp_path / "out")
    assert_refused(done, *words)
    assert not (tmp_path / "out").exists()


def test_a_gguf_is_no_checkpoint_to_compress(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    flags = ("--compress", "drop_layers:count=1,by=top", "--output", tmp_path / "out")
    assert_refused(
        skipstone("compress", tmp_path / "model.gguf", *flags), "model.gguf", "Hugging Face folder"
    )
