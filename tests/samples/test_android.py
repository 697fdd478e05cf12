"""The Android sample's Kotlin decodes as the eager model does.

No Android is needed: the app's own files are compiled for the desktop, with `samples/android/desktop` in place of the
ExecuTorch library's classes. Those hand every call to this process, which runs the program in the Python runtime with a
state of its own for every method, as the Android library has it.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from skipstone.bundle import PROGRAM_INTERFACE
from skipstone.runtimes.engines.executorch.backends import BACKENDS
from skipstone.runtimes.quiet import quiet_libraries
from tests.samples.eager_drafting import Eager, Expected

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
APP = ROOT / "samples/android/app"
SOURCES = APP / "src/main/kotlin/skipstone/sample"
NEEDS_ANDROID = "MainActivity.kt"
COMPILER = "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler"
NEW_TOKENS = 16
DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i8"), 6: np.dtype("<f4")}
MASK, TREE = 4, 5  # of a segment's inputs
Answer = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


def _jars() -> Path:
    """The Kotlin compiler and its libraries, out of the package of the Jupyter kernel."""
    found = importlib.util.find_spec("run_kotlin_kernel")
    assert found is not None, "pip install kotlin-jupyter-kernel"
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "jars"


def _java() -> str:
    java = shutil.which("java")
    if java is None:
        pytest.skip("compiling Kotlin needs a Java runtime, 17 or newer, on the PATH")
    return java


def _libraries(jars: Path) -> str:
    kept = ("kotlin-stdlib-*", "kotlinx-serialization-core-*", "kotlinx-serialization-json-*")
    return os.pathsep.join(str(jar) for pattern in kept for jar in sorted(jars.glob(pattern)))


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Class path of the compiled sample."""
    out, jars = tmp_path_factory.mktemp("kotlin"), _jars()
    sources = [path for path in SOURCES.glob("*.kt") if path.name != NEEDS_ANDROID]
    sources += (ROOT / "samples/android/desktop").glob("*.kt")
    options = ["-Werror", "-no-stdlib", "-no-reflect", "-cp", _libraries(jars), "-d", str(out)]
    command = [_java(), "-Xmx1g", "-cp", f"{jars}/*", COMPILER, *options, *map(str, sources)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stdout + made.stderr
    return os.pathsep.join((str(out), _libraries(jars)))


class Runtime:
    """Serves the stand-ins' calls; see ExecuTorch.kt for the messages.

    Args:
        calls: where they come from.
        answers: where they go.
    """

    def __init__(self, calls: IO[bytes], answers: IO[bytes]) -> None:
        self._calls, self._answers = calls, answers
        self._path, self._methods = "", dict[str, Any]()
        self.chains: list[tuple[int, tuple[int, ...]]] = []
        """Of every call of a segment as a chain: rows, and the shape of the mask."""

    def serve(self) -> None:
        """Until the other side closes."""
        while length := self._calls.read(2):
            name = self._calls.read(struct.unpack(">H", length)[0]).decode()
            try:
                answer = self._answer(name)
            except RuntimeError as error:
                answer = b"\0" + _utf(str(error))
            self._answers.write(answer)
            self._answers.flush()

    def _answer(self, name: str) -> bytes:
        if name == "backends":
            return b"\1" + _names(self._executorch().backend_registry.registered_backend_names)
        return self._load() if name == "load" else self._run(name, self._inputs())

    def _load(self) -> bytes:
        (length,) = struct.unpack(">H", self._calls.read(2))
        self._path, self._methods = self._calls.read(length).decode(), {}
        return b"\1" + _names(self._program().method_names)

    def _executorch(self) -> Any:
        with quiet_libraries():
            from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
            from executorch.runtime import Runtime as ExecuTorch

            return ExecuTorch.get()

    def _program(self) -> Any:
        with quiet_libraries():
            return self._executorch().load_program(self._path)

    def _inputs(self) -> list[torch.Tensor]:
        (count,) = struct.unpack(">i", self._calls.read(4))
        return [self._tensor() for _ in range(count)]

    def _tensor(self) -> torch.Tensor:
        dtype_code, rank = struct.unpack(">bi", self._calls.read(5))
        shape = struct.unpack(f">{rank}q", self._calls.read(8 * rank))
        dtype = DTYPES[dtype_code]
        data = self._calls.read(int(np.prod(shape)) * dtype.itemsize)
        return torch.from_numpy(np.frombuffer(bytearray(data), dtype).reshape(shape))

    def _run(self, name: str, inputs: list[torch.Tensor]) -> bytes:
        if name not in self._methods:
            self._methods[name] = self._program().load_method(name)  # another program: another state
        if name.startswith("segment_"):
            assert int(inputs[TREE]) == 0, "the app has no trees"
            self.chains.append((inputs[0].shape[1], tuple(inputs[MASK].shape)))
        out = np.ascontiguousarray(self._methods[name].execute(inputs)[0].numpy(), dtype="<f4")
        return b"\1" + struct.pack(f">i{out.ndim}q", out.ndim, *out.shape) + out.tobytes()


def _names(names: Collection[str]) -> bytes:
    return struct.pack(">i", len(names)) + b"".join(map(_utf, names))


def _utf(text: str) -> bytes:
    return struct.pack(">H", len(text.encode())) + text.encode()


@pytest.fixture(scope="module")
def chains() -> list[tuple[int, tuple[int, ...]]]:
    """Rows and masks of the segments' calls in the last answer."""
    return []


@pytest.fixture(scope="module")
def answer(
    classes: str, chains: list[tuple[int, tuple[int, ...]]], tmp_path_factory: pytest.TempPathFactory
) -> Answer:
    """Requests to what the sample makes of them."""
    folder = tmp_path_factory.mktemp("answers")

    def ask(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        (folder / "requests.json").write_text(json.dumps(requests), encoding="utf-8")
        files = [str(folder / name) for name in ("requests.json", "results.json")]
        command = [_java(), "-cp", classes, "skipstone.sample.desktop.MainKt", *files]
        with (folder / "errors.txt").open("wb") as errors:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=-1
            )
            with process:
                assert process.stdin
                assert process.stdout
                runtime = Runtime(process.stdout, process.stdin)
                runtime.serve()
                chains[:] = runtime.chains
        assert process.returncode == 0, (folder / "errors.txt").read_text()
        answers: list[dict[str, Any]] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return answers

    return ask


def _request(bundle: Path, prompt: str, new: int = NEW_TOKENS, drafts: int = 4) -> dict[str, Any]:
    return {"bundle": str(bundle), "prompt": prompt, "max_new_tokens": new, "draft_length": drafts}


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    lines = (ROOT / "samples/prompts/code.jsonl").read_text(encoding="utf-8").splitlines()
    return [*(json.loads(line)["prompt"] for line in lines[:1]), "def quicksort("]


@pytest.fixture(scope="module")
def tokenizer(coder_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(coder_checkpoint / "tokenizer.json"))


def test_the_kotlin_loop_decodes_as_the_eager_model(
    answer: Answer,
    prompts: list[str],
    tokenizer: Tokenizer,
    coder_checkpoint: Path,
    coder_bundle_executorch: Path,
) -> None:
    eager = Eager(coder_checkpoint, coder_bundle_executorch)
    cases = [(prompt, drafts) for prompt in prompts for drafts in (0, 4)]
    answers = answer([_request(coder_bundle_executorch, prompt, drafts=drafts) for prompt, drafts in cases])
    for (prompt, drafts), made in zip(cases, answers, strict=True):
        ids = tokenizer.encode(prompt).ids
        assert made["prompt_tokens"] == ids
        drafting = Expected(*(made[key] for key in ("tokens", "rounds", "drafted", "accepted")))
        assert drafting == eager.greedy(ids, NEW_TOKENS, drafts)
        assert made["text"] == tokenizer.decode(made["tokens"], skip_special_tokens=False)
        assert made["seen"] == len(made["tokens"])
        assert made["tested"] is True
    assert sum(made["accepted"] for made in answers) > 0


def test_the_kotlin_tokenizer_encodes_and_decodes_as_tokenizers_does(
    answer: Answer, tokenizer: Tokenizer, coder_bundle_executorch: Path
) -> None:
    texts = [
        "x",
        "def f(a,  b):\n\n    return a\t+ b   # it's we'll 12345 naïve 漢字 🙂\n   ",
        "\u00a0wide\u2003space\u0085next\u3000 \u200bzero",
        "''s 'S don't\r\n\t\t x²½ ٣ _a_b __init__",
    ]
    answers = answer([_request(coder_bundle_executorch, text, 1, 0) for text in texts])
    for text, made in zip(texts, answers, strict=True):
        assert made["prompt_tokens"] == tokenizer.encode(text).ids


def test_a_chain_hands_in_the_narrowest_mask_once_the_slots_are_known(
    answer: Answer, chains: list[tuple[int, tuple[int, ...]]], coder_bundle_executorch: Path
) -> None:
    manifest = json.loads((coder_bundle_executorch / "manifest.json").read_text())
    segments, program = len(manifest["exits"]) + 1, manifest["program"]
    (made,) = answer([_request(coder_bundle_executorch, "def quicksort(")])
    assert made["rounds"] > 1
    rehearsed, run = chains[:segments], chains[segments:]
    assert rehearsed == [(1, (program["max_width"], program["slots"]))] * segments
    assert {rows for rows, _ in run} > {1}
    assert all(mask == (rows, 1) for rows, mask in run)


def test_a_program_that_was_only_compiled_says_so(
    answer: Answer, coder_bundle_executorch: Path, tmp_path: Path
) -> None:
    folder = _linked(coder_bundle_executorch, tmp_path / "compiled")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["program"]["status"], manifest["parity"] = "compiled", None
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (made,) = answer([_request(folder, "x", 1)])
    assert made["tested"] is False


def test_kotlin_refuses_what_cannot_be_run(
    answer: Answer, coder_bundle_executorch: Path, tmp_path: Path
) -> None:
    manifest = json.loads((coder_bundle_executorch / "manifest.json").read_text())
    program, slots = manifest["program"], manifest["program"]["slots"]
    changed = {
        "format": manifest | {"format": "gguf"},
        "schema": manifest | {"schema_version": 2},
        "older": manifest | {"program": program | {"interface": PROGRAM_INTERFACE - 1}},
        "oldest": manifest | {"program": {k: v for k, v in program.items() if k != "interface"}},
        "newer": manifest | {"program": program | {"interface": PROGRAM_INTERFACE + 1}},
        "target": manifest | {"program": program | {"target": "vulkan", "status": "compiled"}},
        "status": manifest | {"program": program | {"status": "dreamt"}},
        "slots": manifest | {"program": program | {"slots": slots + 1}},
        "width": manifest | {"program": program | {"max_width": slots}},
        "narrow": manifest | {"program": program | {"max_width": 8, "slots": 8 * slots}},
        "hidden": manifest | {"model": manifest["model"] | {"hidden_size": 64}},
        "vocabulary": manifest | {"model": manifest["model"] | {"vocab_size": 8192}},
        "lost": manifest | {"program": {k: v for k, v in program.items() if k != "slots"}},
        "outside": manifest | {"program": program | {"file": "../model.pte"}},
        "exits": manifest | {"exits": [3, 6]},
        "unlisted": manifest | {"files": []},
    }
    folders = {
        name: _linked(coder_bundle_executorch, tmp_path / name) for name in (*changed, "damaged", "text")
    }
    for name, record in changed.items():
        (folders[name] / "manifest.json").write_text(json.dumps(record))
    (folders["text"] / "manifest.json").write_text("{")
    whole = bytearray((coder_bundle_executorch / program["file"]).read_bytes())
    whole[-1] ^= 1
    (folders["damaged"] / program["file"]).unlink()
    (folders["damaged"] / program["file"]).write_bytes(whole)
    cases = [
        (_request(tmp_path / "nowhere", "x"), "manifest.json: no such file"),
        (_request(folders["format"], "x"), 'format is "gguf"; expected "executorch"'),
        (_request(folders["schema"], "x"), "schema_version is 2; expected 1 to 1"),
        (
            _request(folders["older"], "x"),
            f"manifest.json: program.interface is {PROGRAM_INTERFACE - 1}; this app calls interface "
            f"{PROGRAM_INTERFACE}; export the bundle again",
        ),
        (_request(folders["oldest"], "x"), "program.interface is 1; this app calls"),
        (_request(folders["newer"], "x"), f"this app calls interface {PROGRAM_INTERFACE}; update the app"),
        (_request(folders["target"], "x"), "lowered for vulkan; this app's ExecuTorch runs [xnnpack]"),
        (_request(folders["status"], "x"), 'program.status is "dreamt"; expected "runs" or "compiled"'),
        (_request(folders["slots"], "x"), f"{program['file']}: segment_0: "),
        (_request(folders["width"], "x"), f"{program['file']}: embed: "),
        (_request(folders["narrow"], "x"), f"{program['file']}: takes batches of more than 8 rows"),
        (_request(folders["hidden"], "x"), "embed gave 16384 values; by the manifest it gives 4096"),
        (_request(folders["vocabulary"], "x"), "head gave 4096 values; by the manifest it gives 8192"),
        (_request(folders["lost"], "x"), "program.slots is missing"),
        (_request(folders["outside"], "x"), "is not a path inside the bundle"),
        (_request(folders["exits"], "x"), "program.methods are"),
        (_request(folders["unlisted"], "x"), "is not listed under files"),
        (_request(folders["text"], "x"), "not JSON"),
        (_request(folders["damaged"], "x"), "is damaged: its SHA-256 is not the one listed"),
        (_request(coder_bundle_executorch, ""), "an empty prompt"),
        (_request(coder_bundle_executorch, "x", new=slots + 1), f"do not fit the context of {slots}"),
        (_request(coder_bundle_executorch, "x", new=0), "expected at least 1"),
        (_request(coder_bundle_executorch, "x", drafts=64), "expected 0 to 63"),
    ]
    for (_, reason), made in zip(cases, answer([request for request, _ in cases]), strict=True):
        assert reason in made.get("error", "no error")


def test_kotlin_refuses_other_tokenizers(
    answer: Answer, coder_bundle_executorch: Path, tmp_path: Path
) -> None:
    whole = json.loads((coder_bundle_executorch / "tokenizer.json").read_text(encoding="utf-8"))
    model = whole["model"]
    cases = {
        "{": "not JSON",
        "[]": "model.type is missing",
        json.dumps(whole | {"normalizer": {"type": "NFC"}}): "normalizer: not the plain byte-level BPE",
        json.dumps(
            whole | {"post_processor": {"type": "TemplateProcessing"}}
        ): "post_processor: not the plain",
        json.dumps(whole | {"pre_tokenizer": {"type": "Sequence"}}): "BPE after Sequence: not the plain",
        json.dumps(whole | {"model": model | {"ignore_merges": True}}): "model.ignore_merges: not the plain",
        json.dumps(whole | {"model": model | {"vocab": []}}): "model.vocab is not an object",
        json.dumps(whole | {"model": model | {"vocab": {"a": "1"}}}): "model.vocab.a is not an integer",
        json.dumps(
            whole | {"model": model | {"merges": [["a"]]}}
        ): "model.merges: entry 0 is no pair of texts",
        json.dumps(
            whole | {"model": model | {"merges": [["a", "b"], {}]}}
        ): "model.merges: entry 1 is no pair of texts",
        json.dumps(
            whole | {"model": model | {"merges": ["a b c"]}}
        ): "model.merges: entry 0 is no pair of texts",
        json.dumps(whole | {"model": model | {"merges": [f"{a} {b}" for a, b in model["merges"]]}}): "",
    }
    folders = [
        _with_tokenizer(coder_bundle_executorch, tmp_path / str(index), text)
        for index, text in enumerate(cases)
    ]
    answers = answer([_request(folder, "x", 1) for folder in folders])
    for folder, reason, made in zip(folders, cases.values(), answers, strict=True):
        expected = f"{folder / 'tokenizer.json'}: {reason}" if reason else "no error"
        assert made.get("error", "no error").startswith(expected)


def _with_tokenizer(bundle: Path, folder: Path, text: str) -> Path:
    """The bundle with another tokenizer, which its manifest lists."""
    _linked(bundle, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = next(entry for entry in manifest["files"] if entry["path"] == "tokenizer.json")
    content = (folder / "tokenizer.json").read_bytes()
    entry.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _linked(bundle: Path, folder: Path) -> Path:
    """The bundle as links, its manifest apart."""
    shutil.copytree(bundle, folder, copy_function=os.link)
    text = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_bytes(text)
    return folder


def test_every_key_and_method_the_app_names_is_in_a_bundle(coder_bundle_executorch: Path) -> None:
    manifest = json.loads((coder_bundle_executorch / "manifest.json").read_text())
    source = "".join(path.read_text(encoding="utf-8") for path in SOURCES.glob("*.kt"))
    keys = re.findall(r'manifest\.\w+\("([\w.]+)"', (SOURCES / "Bundle.kt").read_text(encoding="utf-8"))
    assert len(keys) >= 12
    for key in keys:
        value = manifest
        for part in key.split("."):
            value = value[part]
    assert {"path", "size", "sha256"} <= manifest["files"][0].keys()
    called = set(re.findall(r'(?:call|bestRows)\(\s*"(\w+)"', source)) - {"segment_"}
    methods = {method["name"] for method in manifest["program"]["methods"]}
    assert called == {"embed", "head", "draft_head"}
    assert called <= methods
    assert '"segment_$index"' in source
    assert {f"segment_{k}" for k in range(len(manifest["exits"]) + 1)} <= methods


def test_the_app_takes_the_runtime_that_the_exporter_wrote_for() -> None:
    build = (APP / "build.gradle.kts").read_text(encoding="utf-8")
    (version,) = re.findall(r'"org\.pytorch:executorch-android:([\d.]+)"', build)
    assert version == importlib.metadata.version("executorch").split("+")[0]


def test_the_app_knows_the_targets_and_the_interface_that_the_package_knows() -> None:
    delegates = re.findall(r'"(\w+)" to "(\w+Backend)"', (SOURCES / "Program.kt").read_text(encoding="utf-8"))
    assert dict(delegates) == BACKENDS
    (number,) = re.findall(r"PROGRAM_INTERFACE = (\d+)", (SOURCES / "Bundle.kt").read_text(encoding="utf-8"))
    assert int(number) == PROGRAM_INTERFACE


def test_the_app_opens_on_its_one_screen() -> None:
    android = "{http://schemas.android.com/apk/res/android}"
    (activity,) = ElementTree.parse(APP / "src/main/AndroidManifest.xml").getroot().iter("activity")
    (package,) = re.findall(r'namespace = "([\w.]+)"', (APP / "build.gradle.kts").read_text(encoding="utf-8"))
    screen = (SOURCES / f"{activity.attrib[android + 'name'].lstrip('.')}.kt").read_text(encoding="utf-8")
    assert f"package {package}\n" in screen
    assert "class MainActivity : Activity()" in screen
    assert [action.attrib[android + "name"] for action in activity.iter("action")] == [
        "android.intent.action.MAIN"
    ]
