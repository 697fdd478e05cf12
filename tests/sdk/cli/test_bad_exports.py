"""Exports that cannot work: one line, exit code 2, and nothing left behind."""

import json
import resource
import shutil
from pathlib import Path

import pytest

from tests.sdk.cli.command import Done, assert_refused, skipstone


def export(checkpoint: Path | str, output: Path, *flags: str, megabytes: int | None = None) -> Done:
    def limit() -> None:
        assert megabytes is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes << 20, megabytes << 20))

    limits = None if megabytes is None else limit
    return skipstone("export", checkpoint, "--output", output, *flags, limit=limits)


def assert_nothing_left(output: Path) -> None:
    """Neither the bundle nor anything begun beside it."""
    assert list(output.parent.iterdir()) == []


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A bundle to be, in a folder of its own."""
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs" / "bundle"


def test_an_unknown_device_is_refused_and_the_known_ones_are_listed(
    coder_checkpoint: Path, output: Path
) -> None:
    done = export(coder_checkpoint, output, "--device", "toaster")
    assert_refused(done, "--device toaster", "cpu", "cuda", "metal", "vulkan")
    assert_nothing_left(output)


def test_an_unknown_format_is_refused(coder_checkpoint: Path, output: Path) -> None:
    assert_refused(export(coder_checkpoint, output, "--format", "tarball"), "--format tarball", "gguf")
    assert_nothing_left(output)


def test_an_unknown_scheme_is_refused(coder_checkpoint: Path, output: Path) -> None:
    assert_refused(export(coder_checkpoint, output, "--quantize", "q9"), "--quantize q9")
    assert_nothing_left(output)


@pytest.mark.parametrize("exits", ["99", "0", "-2", "2,12", "two", "4,2,x"])
def test_exits_out_of_range_are_refused(coder_checkpoint: Path, output: Path, exits: str) -> None:
    assert_refused(export(coder_checkpoint, output, "--exits", exits), "exit")
    assert_nothing_left(output)


def test_a_missing_checkpoint_is_named(tmp_path: Path, output: Path) -> None:
    assert_refused(export(tmp_path / "nothing", output), "nothing")
    assert_nothing_left(output)


def test_a_folder_without_a_model_is_refused(tmp_path: Path, output: Path) -> None:
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "notes.txt").write_text("no model here")
    assert_refused(export(tmp_path / "junk", output), "junk")
    assert_nothing_left(output)


@pytest.mark.parametrize("name", ["weights.gguf", "weights.bin"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, output: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"nothing like a model" * 100)
    assert_refused(export(tmp_path / name, output), name)
    assert_nothing_left(output)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing"])
def test_damaged_weights_are_refused(
    coder_checkpoint: Path, tmp_path: Path, output: Path, damage: str
) -> None:
    copy = Path(shutil.copytree(coder_checkpoint, tmp_path / "copy"))
    weights = copy / "model.safetensors"
    content = weights.read_bytes()
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"\xff" * 4096)
    assert_refused(export(copy, output), "copy")
    assert_nothing_left(output)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "no-such-model", "architectures": ["X"]}'])
def test_a_config_that_says_nothing_usable_is_refused(
    coder_checkpoint: Path, tmp_path: Path, output: Path, text: str
) -> None:
    copy = Path(shutil.copytree(coder_checkpoint, tmp_path / "copy"))
    (copy / "config.json").write_text(text)
    assert_refused(export(copy, output), "copy")
    assert_nothing_left(output)


@pytest.mark.parametrize("format", ["gguf", "executorch"])
def test_a_tokenizer_larger_than_the_vocabulary_is_refused(
    coder_checkpoint: Path, tmp_path: Path, output: Path, format: str
) -> None:
    copy = Path(shutil.copytree(coder_checkpoint, tmp_path / "copy"))
    tokenizer = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"].append(
        {
            "id": 4096, "content": "<one-too-many>", "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }
    )  # fmt: skip
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert_refused(export(copy, output, "--format", format), "tokenizer.json", "4097 tokens", "4096")
    assert_nothing_left(output)


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [1, 12, 30])
def test_no_space_left_while_writing_leaves_nothing_behind(
    coder_checkpoint: Path, output: Path, megabytes: int
) -> None:
    """A file size limit stands for a full disk: both make the write call fail part of the way."""
    done = export(coder_checkpoint, output, "--quantize", "f32", megabytes=megabytes)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert_nothing_left(output)


def test_a_folder_that_holds_something_else_is_not_touched(coder_checkpoint: Path, output: Path) -> None:
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    assert_refused(export(coder_checkpoint, output, "--overwrite"), "not a bundle")
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]


def test_a_bundle_is_only_replaced_when_asked(
    coder_bundle_f32: Path, coder_checkpoint: Path, output: Path
) -> None:
    shutil.copytree(coder_bundle_f32, output)
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    assert_refused(export(coder_checkpoint, output), "--overwrite")
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_refused(coder_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = export(coder_checkpoint, tmp_path / "file" / "bundle")
    assert_refused(done, "file")
