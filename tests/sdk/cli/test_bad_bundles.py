"""Bundles that are missing, damaged or made to harm: one line, exit code 2, no crash."""

import shutil
from pathlib import Path

import pytest

from tests.sdk.cli.command import assert_refused, skipstone
from tests.sdk.cli.damage import edit, generate, list_anew


@pytest.fixture
def bundle(coder_bundle_f32: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(coder_bundle_f32, tmp_path / "bundle"))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert_refused(generate(tmp_path / "nothing"), "nothing", "no such folder", "skipstone export")


def test_a_folder_that_is_no_bundle_is_refused(coder_checkpoint: Path) -> None:
    assert_refused(generate(coder_checkpoint), "not a bundle", "manifest.json")


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"weights")
    assert_refused(generate(tmp_path / "model.bin"), "model.bin", "not a bundle")


@pytest.mark.parametrize("command", ["generate", "bench", "inspect"])
def test_every_command_that_opens_bundles_refuses_an_altered_file(bundle: Path, command: str) -> None:
    target = bundle / "segment-1.gguf"
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(content)
    more = ["--prompt", "x"] if command == "generate" else []
    assert_refused(skipstone(command, bundle, *more), "segment-1.gguf", "sha256")


def test_a_truncated_file_is_named_with_both_sizes(bundle: Path) -> None:
    target = bundle / "segment-0.gguf"
    size = target.stat().st_size
    with target.open("r+b") as stream:
        stream.truncate(size - 1000)
    assert_refused(generate(bundle), "segment-0.gguf", str(size), str(size - 1000))


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "draft-head.gguf").unlink()
    assert_refused(generate(bundle), "draft-head.gguf", "missing")


def test_a_wrong_hash_in_the_manifest_is_found(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest["files"][0].update(sha256="0" * 64))
    assert_refused(generate(bundle), "sha256")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\x00", "{}"])
def test_a_manifest_that_is_no_manifest_is_refused(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_text(text)
    assert_refused(skipstone("inspect", bundle), "manifest.json")


def test_a_newer_schema_says_to_upgrade(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest.update(schema_version=99))
    assert_refused(generate(bundle), "schema version 99", "upgrade")


@pytest.mark.parametrize("path", ["../../outside", "/etc/passwd", "a/../../b", "..", "C:\\x", "a\\..\\b"])
def test_a_path_out_of_the_folder_is_refused(bundle: Path, path: str) -> None:
    edit(bundle, lambda manifest: manifest["files"][0].update(path=path))
    assert_refused(generate(bundle), "manifest.json", "relative path inside the bundle")


def test_a_link_out_of_the_folder_is_refused(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.gguf"
    (bundle / "segment-0.gguf").rename(outside)
    (bundle / "segment-0.gguf").symlink_to(outside)
    assert_refused(generate(bundle), "segment-0.gguf", "outside the bundle")


def test_exits_that_do_not_fit_the_segments_are_refused(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest.update(exits=[1, 4]))
    assert_refused(generate(bundle), "exits")


@pytest.mark.parametrize("damage", ["empty", "garbage", "cut", "header", "swapped"])
def test_a_damaged_segment_with_a_right_hash_does_not_kill_the_process(bundle: Path, damage: str) -> None:
    target = bundle / "segment-0.gguf"
    content = target.read_bytes()
    target.write_bytes(
        {
            "empty": b"",
            "garbage": bytes(range(256)) * 40,
            "cut": content[: len(content) // 2],
            "header": content[:4] + b"\xff" * 16 + content[20:],
            "swapped": (bundle / "draft-head.gguf").read_bytes(),
        }[damage]
    )
    list_anew(bundle, target.name)
    assert_refused(generate(bundle), "segment-0.gguf")


def test_a_damaged_tokenizer_with_a_right_hash_is_named(bundle: Path) -> None:
    (bundle / "tokenizer.json").write_text('{"version": "1.0"}')
    list_anew(bundle, "tokenizer.json")
    assert_refused(generate(bundle), "tokenizer.json", "not a tokenizer")


def test_an_embedding_table_past_the_files_end_is_refused(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest["embedding"].update(offset=1 << 40))
    assert_refused(generate(bundle), "embedding")


def test_a_draft_vocabulary_outside_the_models_is_refused(bundle: Path) -> None:
    target = bundle / "draft-vocabulary.i32"
    target.write_bytes(b"\xff\xff\xff\x7f" + target.read_bytes()[4:])
    list_anew(bundle, target.name)
    assert_refused(generate(bundle), "draft tokens outside the vocabulary")
