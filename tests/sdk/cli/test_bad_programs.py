"""ExecuTorch bundles that are missing, damaged or made to harm, and flags that do not fit them.

One line, exit code 2, no crash, nothing left behind.
"""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.sdk.cli.command import Done, assert_refused, skipstone
from tests.sdk.cli.damage import edit, generate, list_anew

pytestmark = pytest.mark.slow
PROGRAM, VOCABULARY = "model.pte", "draft-vocabulary.i32"


@pytest.fixture
def bundle(tiny_program: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_program, tmp_path / "bundle"))


@pytest.fixture
def rewrite(bundle: Path) -> Callable[[Callable[[bytearray], Any]], None]:
    """Changes the program's bytes, and the manifest with them."""

    def apply(change: Callable[[bytearray], Any]) -> None:
        content = bytearray((bundle / PROGRAM).read_bytes())
        change(content)
        (bundle / PROGRAM).write_bytes(content)
        list_anew(bundle, PROGRAM)

    return apply


def assert_refused_without_a_trace(bundle: Path, *words: str, flags: tuple[str, ...] = ()) -> None:
    def found() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in bundle.parent.rglob("*") if path.is_file()}

    before = found()
    done = generate(bundle, *flags)
    assert_refused(done, *words)
    assert done.stderr.rstrip().endswith(")"), f"no hint: {done.stderr}"
    assert found() == before


def flip(content: bytearray, at: int, mask: int = 0xFF) -> None:
    content[at] ^= mask


def header(content: bytes) -> tuple[int, int, int]:
    """Bytes of the flatbuffer, where the weights begin, their bytes."""
    return struct.unpack_from("<QQQ", content, 16)


# What the hash and the manifest alone show; ExecuTorch is not even loaded.


def test_a_missing_program_is_named(bundle: Path) -> None:
    (bundle / PROGRAM).unlink()
    assert_refused_without_a_trace(bundle, PROGRAM, "missing")


def test_a_truncated_program_is_named_with_both_sizes(bundle: Path) -> None:
    size = (bundle / PROGRAM).stat().st_size
    with (bundle / PROGRAM).open("r+b") as stream:
        stream.truncate(size // 2)
    assert_refused_without_a_trace(bundle, PROGRAM, str(size), str(size // 2), "truncated")


@pytest.mark.parametrize("command", ["generate", "bench", "inspect"])
def test_every_command_that_opens_bundles_refuses_an_altered_program(bundle: Path, command: str) -> None:
    content = bytearray((bundle / PROGRAM).read_bytes())
    flip(content, len(content) // 2, 1)
    (bundle / PROGRAM).write_bytes(content)
    report = bundle.parent / "report.json"
    more = {"generate": ["--prompt", "x"], "bench": ["--json", str(report)], "inspect": []}[command]
    assert_refused(skipstone(command, bundle, *more), PROGRAM, "sha256")
    assert not report.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda manifest: manifest.update(schema_version=2), ("schema version 2", "upgrade")),
        (lambda manifest: manifest.update(format="tflite"), ("tflite", "executorch")),
        (lambda manifest: manifest.pop("program"), ("program", "required")),
        (lambda manifest: manifest["program"]["methods"].pop(), ("need the methods",)),
        (
            lambda manifest: manifest["program"]["methods"][0].update(name="other"),
            ("need the methods", "other"),
        ),
        (lambda manifest: manifest.update(exits=[]), ("exits ()", "segment_1")),
        (lambda manifest: manifest.update(exits=[4]), ("exits (4,)", "4 layers")),
        (lambda manifest: manifest.update(exits=[0]), ("exits (0,)",)),
        (lambda manifest: manifest["program"].update(max_width=0), ("max_width",)),
        (
            lambda manifest: manifest["program"].update(reference_width=65),
            ("reference_width 65", "max_width 64"),
        ),
        (lambda manifest: manifest["program"].update(slots=63), ("max_width 64", "slots 63")),
        (lambda manifest: manifest["program"].update(file="../model.pte"), ("not listed", "../model.pte")),
        (lambda manifest: manifest["program"].update(draft_vocabulary=None), ("need the methods",)),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    bundle: Path, change: Callable[[dict[str, Any]], object], words: tuple[str, ...]
) -> None:
    edit(bundle, change)
    assert_refused_without_a_trace(bundle, "manifest.json", *words)


# Damage that the hash does not show, because the manifest was changed with it.


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (lambda _whole: b"", "not an ExecuTorch program"),
        (
            lambda _whole: b"text that is long enough to be taken for a header of a program " * 40,
            "not an ExecuTorch",
        ),
        (lambda whole: whole[:64], "64 bytes, its header states"),
        (lambda whole: whole[: len(whole) // 2], "its header states"),
        (lambda whole: whole + b"more", "its header states"),
    ],
    ids=["empty", "text", "header alone", "cut in half", "something behind it"],
)
def test_what_is_no_whole_program_is_refused(
    bundle: Path, content: Callable[[bytes], bytes], word: str
) -> None:
    (bundle / PROGRAM).write_bytes(content((bundle / PROGRAM).read_bytes()))
    list_anew(bundle, PROGRAM)
    assert_refused_without_a_trace(bundle, PROGRAM, word)


@pytest.mark.parametrize(
    "at", [0, 5, 9, 17, 24, 33], ids=["root", "identifier", "magic", "size", "offset", "rest"]
)
def test_a_flipped_byte_of_the_header_is_refused(
    bundle: Path, rewrite: Callable[[Callable[[bytearray], Any]], None], at: int
) -> None:
    rewrite(lambda content: flip(content, at))
    assert_refused_without_a_trace(bundle, PROGRAM)


def test_flipped_bytes_of_the_layout_are_refused(
    bundle: Path, rewrite: Callable[[Callable[[bytearray], Any]], None]
) -> None:
    """The root table's offset to its list of fields, which the whole file hangs on."""
    rewrite(lambda content: flip(content, struct.unpack_from("<I", content)[0] + 1))
    assert_refused_without_a_trace(bundle, PROGRAM, "ExecuTorch cannot load it")


def test_a_delegates_spoilt_descriptions_are_refused(
    bundle: Path, rewrite: Callable[[Callable[[bytearray], Any]], None]
) -> None:
    """A third of what XNNPACK reads of its graphs: node counts, tensors' sizes and places."""

    def spoil(content: bytearray) -> None:
        at = content.find(b"XH00")  # XNNPACK's own header, before its description of a graph
        while at >= 0:
            first, size = struct.unpack_from("<II", content, at + 6)
            for place in range(at - 4 + first + 40, at - 4 + first + size, 3):
                flip(content, place, 0x80)
            at = content.find(b"XH00", at + 4)

    rewrite(spoil)
    assert_refused_without_a_trace(bundle, PROGRAM)


def test_a_flipped_byte_of_the_weights_leaves_the_process_alive(
    bundle: Path, rewrite: Callable[[Callable[[bytearray], Any]], None]
) -> None:
    """Other weights are another model: nothing can tell, and nothing may break."""
    rewrite(lambda content: flip(content, len(content) - 3000, 0x7F))
    done = generate(bundle)
    assert done.returncode in (0, 2), done.stderr


def test_a_program_without_a_method_of_the_manifest_is_refused(
    bundle: Path, rewrite: Callable[[Callable[[bytearray], Any]], None]
) -> None:
    """One that has another in its place, which the manifest does not name."""
    name, other = "segment_1", "segment_7"

    def rename(content: bytearray) -> None:
        assert name.encode() in content
        content[:] = content.replace(name.encode(), other.encode())

    rewrite(rename)
    assert_refused_without_a_trace(bundle, PROGRAM, "has the methods", name, other)


def test_a_program_with_a_method_more_than_the_manifest_is_refused(bundle: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        program = manifest["program"]
        program["draft_vocabulary"] = None
        program["methods"] = [entry for entry in program["methods"] if entry["name"] != "draft_head"]

    edit(bundle, change)
    assert_refused_without_a_trace(bundle, PROGRAM, "has the methods", "draft_head")


@pytest.mark.parametrize(
    ("part", "figure", "value", "words"),
    [
        ("program", "slots", 4096, ("segment_0", "[64, 4096]", "[64, 64]")),
        ("model", "hidden_size", 128, ("embed", "[1, 64, 128]", "[1, 64, 64]")),
        ("model", "vocab_size", 1000, ("head", "[1, 64, 1000]", "[1, 64, 320]")),
    ],
)
def test_figures_that_are_not_the_programs_are_refused_before_a_call(
    bundle: Path, part: str, figure: str, value: int, words: tuple[str, ...]
) -> None:
    edit(bundle, lambda manifest: manifest[part].update({figure: value}))
    assert_refused_without_a_trace(bundle, PROGRAM, "manifest", *words)


@pytest.mark.parametrize("interface", [1, 3])
def test_a_program_of_another_release_is_refused_before_a_call(bundle: Path, interface: int) -> None:
    edit(bundle, lambda manifest: manifest["program"].update(interface=interface))
    assert_refused_without_a_trace(bundle, PROGRAM, f"follow interface {interface}")


def test_batches_wider_than_the_program_takes_are_refused_before_a_call(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest["program"].update(max_width=128, slots=128))
    assert_refused_without_a_trace(bundle, PROGRAM, "manifest", "[1, 128]", "[1, 64]")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ids: ids + 1, ("outside the vocabulary",)),
        (lambda ids: ids - 1, ("outside the vocabulary",)),
        (lambda ids: ids[::-1], ("out of order",)),
        (lambda ids: ids[:0], ("outside the vocabulary",)),
        (lambda ids: ids[:-1], ("draft_head", "[1, 64, 319]", "[1, 64, 320]")),
    ],
    ids=["above", "below", "backwards", "none", "one less"],
)
def test_a_draft_vocabulary_that_does_not_fit_is_refused(
    bundle: Path, change: Callable[[Any], Any], words: tuple[str, ...]
) -> None:
    ids = np.fromfile(bundle / VOCABULARY, "<i4")
    (bundle / VOCABULARY).write_bytes(change(ids).astype("<i4").tobytes())
    list_anew(bundle, VOCABULARY)
    assert_refused_without_a_trace(bundle, *words)


# The context, flags and surroundings.


def test_a_prompt_longer_than_the_context_is_refused(tiny_program: Path) -> None:
    done = generate(tiny_program, "--prompt", "word " * 64)
    assert_refused(done, "room for 64", "shorten the prompt")


def test_a_generation_ends_where_the_context_does(tiny_program: Path) -> None:
    flags = ("--max-new-tokens", "500", "--strategy", "staged", "--ignore-eos", "--json")
    done = generate(tiny_program, *flags)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    prompt, new = record["stats"]["prompt_tokens"], record["stats"]["new_tokens"]
    assert record["stop_reason"] == "context"
    assert prompt + new == 64 + 1  # the last token's K and V are not needed any more


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--context-length", "65"), ("context length 65", "1 to 64", "--context-length")),
        (("--kv-type", "f16"), ("--kv-type f16", "f32")),
        (("--gpu-layers", "2"), ("--gpu-layers 2", "xnnpack")),
        (("--gpu-layers", "-1"), ("--gpu-layers -1",)),
        (("--threads", "0"), ("--threads 0", "1 to 512")),
        (("--threads", "100000"), ("--threads 100000",)),
        (
            ("--strategy", "layerskip", "--assistant-early-exit", "2"),
            ("--assistant-early-exit 2", "exits are 1"),
        ),
    ],
)
def test_a_flag_that_does_not_fit_the_program_is_refused(
    tiny_program: Path, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_refused(generate(tiny_program, *flags), *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--context-length", "257"), ("--context-length 257", "64 to 256")),
        (("--exits", "4"), ("--exits 4",)),
    ],
)
def test_an_export_that_cannot_work_leaves_nothing_behind(
    tiny_checkpoint: Path, tmp_path: Path, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    done = skipstone(
        "export", tiny_checkpoint, "--format", "executorch", "--output", tmp_path / "out", *flags
    )
    assert_refused(done, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["executorch", "torch"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    tiny_program: Path, tiny_checkpoint: Path, tmp_path: Path, package: str
) -> None:
    """Simulated by a package of that name that is found first and cannot be imported."""
    shadow = tmp_path / "path" / package
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text(
        f"raise ModuleNotFoundError(\"No module named '{package}'\", name='{package}')\n"
    )
    found = {"PYTHONPATH": str(shadow.parent)}
    arguments = ("generate", tiny_program, "--prompt", "x")
    assert_refused(skipstone(*arguments, **found), package, "skipstone[executorch]")
    arguments = ("export", tiny_checkpoint, "--format", "executorch", "--output", tmp_path / "out")
    assert_refused(skipstone(*arguments, **found), package, "skipstone[export,executorch]")
    assert not (tmp_path / "out").exists()


def test_a_program_is_rehearsed_once_and_the_cache_remembers(tiny_program: Path, tmp_path: Path) -> None:
    marks = tmp_path / "cache" / "trust"
    assert generate_with_cache(tiny_program, tmp_path / "cache").returncode == 0
    (mark,) = marks.iterdir()
    assert mark.name.startswith(
        json.loads((tiny_program / "manifest.json").read_text())["files"][0]["sha256"]
    )
    mark.chmod(0o400)
    written = mark.stat().st_mtime_ns
    assert generate_with_cache(tiny_program, tmp_path / "cache").returncode == 0
    assert [file.stat().st_mtime_ns for file in marks.iterdir()] == [written]


def generate_with_cache(bundle: Path, cache: Path) -> Done:
    arguments = (
        "generate",
        bundle,
        "--prompt",
        "x",
        "--max-new-tokens",
        "2",
        "--threads",
        "1",
        "--strategy",
        "plain",
    )
    return skipstone(*arguments, SKIPSTONE_CACHE=str(cache))
