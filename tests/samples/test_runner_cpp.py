"""The C++ runner builds against the wheel and decodes as the eager model and the package do."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import executorch
import pytest
from tokenizers import Tokenizer

from skipstone.bundle import PROGRAM_INTERFACE
from tests.samples.eager_drafting import Eager, Expected

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 16
DRAFT_LENGTH = 4
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("runner")
    prefix = f"-DCMAKE_PREFIX_PATH={executorch.__path__[0]}"
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("the runner is built with cmake, 3.19 or newer")
    source = str(ROOT / "samples/runner_cpp")
    for command in (["-S", source, "-B", str(build), prefix], ["--build", str(build), "-j", "2"]):
        made = subprocess.run([cmake, *command], capture_output=True, text=True)
        assert made.returncode == 0, made.stdout + made.stderr
    return build / "skipstone-runner"


@pytest.fixture(scope="module")
def run(runner: Path) -> Run:
    def call(bundle: Path, tokens: list[int], new: int, *flags: str) -> subprocess.CompletedProcess[str]:
        command = [
            runner,
            bundle,
            "--tokens",
            ",".join(map(str, tokens)),
            "--max-new-tokens",
            str(new),
            *flags,
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    return call


@pytest.fixture(scope="module")
def eager(coder_checkpoint: Path, coder_bundle_executorch: Path) -> Eager:
    return Eager(coder_checkpoint, coder_bundle_executorch)


@pytest.fixture(scope="module")
def prompts(coder_checkpoint: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(coder_checkpoint / "tokenizer.json"))
    lines = (ROOT / "samples/prompts/code.jsonl").read_text(encoding="utf-8").splitlines()
    long = [tokenizer.encode(json.loads(line)["prompt"]).ids[:70] for line in lines[:3]]
    short = [tokenizer.encode(text).ids for text in ("def quicksort(", "import ")]
    assert max(map(len, long)) > 64, "one prompt must not fit a single batch"
    return [*long, *short]


def _made(result: subprocess.CompletedProcess[str], mask_slots: int = 1) -> Expected:
    """What was generated; `mask_slots`: of the widest mask, one where rows take the chain's kernel."""
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    out = json.loads(result.stdout)
    assert out["mask_slots"] == mask_slots
    assert out["prefill_seconds"] > 0
    assert (out["tokens_per_second"] > 0) == (len(out["tokens"]) > 1)
    return Expected(out["tokens"], out["rounds"], out["drafted"], out["accepted"])


def test_layerskip_drafts_and_decodes_as_the_eager_model(
    run: Run, eager: Eager, prompts: list[list[int]], coder_bundle_executorch: Path
) -> None:
    accepted = 0
    for prompt in prompts:
        flags = ("--json", "--draft-length", str(DRAFT_LENGTH))
        made = _made(run(coder_bundle_executorch, prompt, NEW_TOKENS, *flags))
        assert made == eager.greedy(prompt, NEW_TOKENS, DRAFT_LENGTH)
        accepted += made.accepted
    assert accepted > 0


def test_plain_decoding_decodes_as_the_eager_model(
    run: Run, eager: Eager, prompts: list[list[int]], coder_bundle_executorch: Path
) -> None:
    for prompt in prompts:
        made = _made(run(coder_bundle_executorch, prompt, NEW_TOKENS, "--strategy", "plain", "--json"))
        assert made == eager.greedy(prompt, NEW_TOKENS, 0)


@pytest.mark.parametrize("strategy", ["plain", "staged"])
def test_the_runner_decodes_as_the_package_does_with_and_without_trees(
    strategy: str, run: Run, prompts: list[list[int]], coder_bundle_executorch: Path
) -> None:
    import skipstone

    with skipstone.load(coder_bundle_executorch) as model:
        expected = [
            list(model.generate(prompt, max_new_tokens=NEW_TOKENS, strategy=strategy).tokens)
            for prompt in prompts
        ]
    assert [_made(run(coder_bundle_executorch, p, NEW_TOKENS, "--json")).tokens for p in prompts] == expected


@pytest.mark.parametrize("reference_width", [1, 8])
def test_masks_end_at_the_last_row_and_change_nothing(
    reference_width: int,
    run: Run,
    eager: Eager,
    prompts: list[list[int]],
    coder_bundle_executorch: Path,
    tmp_path: Path,
) -> None:
    widened = _copy(
        coder_bundle_executorch, tmp_path, lambda m: m["program"].update(reference_width=reference_width)
    )
    slots = json.loads((widened / "manifest.json").read_text())["program"]["slots"]
    for prompt in (*prompts, prompts[0][:1]):
        for flags, drafts in ((("--strategy", "plain"), 0), ((), DRAFT_LENGTH)):
            expected = eager.greedy(prompt, NEW_TOKENS, drafts)
            seen = len(prompt) + len(expected.tokens) - 1  # the last token is never run
            assert seen < slots
            result = run(widened, prompt, NEW_TOKENS, *flags, "--masked", "--json")
            assert _made(result, mask_slots=seen) == expected


def test_a_mask_reaches_to_the_last_slot(run: Run, coder_bundle_executorch: Path) -> None:
    slots = json.loads((coder_bundle_executorch / "manifest.json").read_text())["program"]["slots"]
    prompt = [5] * (slots - 3)
    plain = _made(run(coder_bundle_executorch, prompt, 4, "--json"))
    assert len(plain.tokens) == 4
    assert _made(run(coder_bundle_executorch, prompt, 4, "--json", "--masked"), mask_slots=slots) == plain


@pytest.mark.parametrize("draft_length", [1, 63])
def test_any_draft_length_leaves_the_text_as_plain_decoding_has_it(
    draft_length: int, run: Run, prompts: list[list[int]], coder_bundle_executorch: Path
) -> None:
    for prompt in prompts[:2]:
        plain = _made(run(coder_bundle_executorch, prompt, 72, "--strategy", "plain", "--json"))
        flags = ("--json", "--draft-length", str(draft_length))
        assert _made(run(coder_bundle_executorch, prompt, 72, *flags)).tokens == plain.tokens


def test_chains_need_no_state_shared_between_methods(
    run: Run, prompts: list[list[int]], coder_bundle_executorch: Path
) -> None:
    for prompt in prompts[:2]:
        shared = _made(run(coder_bundle_executorch, prompt, NEW_TOKENS, "--json"))
        assert _made(run(coder_bundle_executorch, prompt, NEW_TOKENS, "--json", "--separate-state")) == shared


def test_padding_to_a_reference_width_changes_no_token(
    run: Run, prompts: list[list[int]], coder_bundle_executorch: Path, tmp_path: Path
) -> None:
    padded = _copy(coder_bundle_executorch, tmp_path, lambda m: m["program"].update(reference_width=8))
    for prompt in prompts[:2]:
        expected = _made(run(coder_bundle_executorch, prompt, NEW_TOKENS, "--json"))
        assert _made(run(padded, prompt, NEW_TOKENS, "--json")) == expected


def test_the_context_is_filled_to_its_last_slot_and_no_further(
    run: Run, coder_bundle_executorch: Path
) -> None:
    slots = json.loads((coder_bundle_executorch / "manifest.json").read_text())["program"]["slots"]
    prompt = [5] * (slots - 3)
    assert run(coder_bundle_executorch, prompt, 4).returncode == 0
    _refused(run(coder_bundle_executorch, prompt, 5), f"do not fit the context of {slots}")


def test_without_json_the_figures_are_written_for_people(run: Run, coder_bundle_executorch: Path) -> None:
    tokens, drafts, speed = run(coder_bundle_executorch, [5, 6, 7], 3).stdout.splitlines()
    assert tokens.startswith("tokens: ")
    assert drafts.startswith("rounds: ")
    assert drafts.endswith("mask slots: 1")
    assert speed.endswith(" tokens/s")


def test_output_that_cannot_be_written_is_an_error(runner: Path, coder_bundle_executorch: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("a device that is always full is Linux's own")
    command = [runner, coder_bundle_executorch, "--tokens", "5", "--max-new-tokens", "1"]
    with full.open("wb") as stream:
        result = subprocess.run(command, stdout=stream, stderr=subprocess.PIPE, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr == "skipstone-runner: standard output cannot be written\n"


def test_a_program_that_was_only_compiled_runs_with_a_warning(
    run: Run, coder_bundle_executorch: Path, tmp_path: Path
) -> None:
    untested = _copy(
        coder_bundle_executorch,
        tmp_path,
        lambda m: (m["program"].update(status="compiled"), m.update(parity=None)),
    )
    result = run(untested, [5, 6], 2)
    assert result.returncode == 0
    assert result.stdout.startswith("tokens: ")
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        f"skipstone-runner: warning: {untested / _program_of(untested)}: compiled on a machine"
    )


def _copy(bundle: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The bundle with another manifest; its files are links."""
    copy = folder / "bundle"
    shutil.copytree(bundle, copy, copy_function=os.link)
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").unlink()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def _refused(result: subprocess.CompletedProcess[str], reason: str) -> None:
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("skipstone-runner: ")
    assert reason in line


def _methods(*names: str) -> list[dict[str, Any]]:
    return [{"name": name, "weight_bytes": 0, "delegated": 0.0} for name in names]


_CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another format": (lambda m: m.update(format="gguf"), 'format is "gguf"; expected "executorch"'),
    "a newer schema": (lambda m: m.update(schema_version=2), "schema_version is 2; expected 1 to 1"),
    "a missing key": (lambda m: m["program"].pop("slots"), "program.slots is missing"),
    "a text for a number": (lambda m: m["program"].update(slots="512"), "program.slots is not an integer"),
    "half a slot": (lambda m: m["program"].update(slots=0.5), "program.slots is not an integer"),
    "no list": (lambda m: m.update(exits=3), "exits is not an array"),
    "a path outside": (lambda m: m["program"].update(file="../x.pte"), "is not a path inside the bundle"),
    "an unlisted file": (lambda m: m.update(files=[]), "is not listed under files"),
    "an older interface": (
        lambda m: m["program"].update(interface=PROGRAM_INTERFACE - 1),
        f"manifest.json: program.interface is {PROGRAM_INTERFACE - 1}; this runner calls interface "
        f"{PROGRAM_INTERFACE}; export the bundle again",
    ),
    "a manifest from before interfaces": (
        lambda m: m["program"].pop("interface"),
        f"program.interface is 1; this runner calls interface {PROGRAM_INTERFACE}; export the bundle again",
    ),
    "a newer interface": (
        lambda m: m["program"].update(interface=PROGRAM_INTERFACE + 1),
        f"program.interface is {PROGRAM_INTERFACE + 1}; this runner calls interface {PROGRAM_INTERFACE}; "
        "build the runner that came with the exporter",
    ),
    "an interface that is no number": (
        lambda m: m["program"].update(interface="2"),
        "program.interface is not an integer",
    ),
    "another target": (
        lambda m: m["program"].update(target="vulkan", status="compiled"),
        "lowered for vulkan; this runner's ExecuTorch runs xnnpack; export with --device cpu",
    ),
    "an unheard-of target": (lambda m: m["program"].update(target="abacus"), "lowered for abacus"),
    "an unheard-of status": (
        lambda m: m["program"].update(status="dreamt"),
        'program.status is "dreamt"; expected "runs" or "compiled"',
    ),
    "other slots": (
        lambda m: m["program"].update(slots=128),
        "input mask of segment_0 is float32 [64, 512]; by the manifest it is float32 [64, 128]; export or copy",
    ),
    "another width": (
        lambda m: m["program"].update(max_width=8),
        "input tokens of embed is int64 [1, 64]; by the manifest it is int64 [1, 8]",
    ),
    "another hidden size": (
        lambda m: m["model"].update(hidden_size=64),
        "output hidden of embed is float32 [1, 64, 256]; by the manifest it is float32 [1, 64, 64]",
    ),
    "another vocabulary": (
        lambda m: m["model"].update(vocab_size=8192),
        "output logits of head is float32 [1, 64, 4096]; by the manifest it is float32 [1, 64, 8192]",
    ),
    "a reference too wide": (
        lambda m: m["program"].update(reference_width=65),
        "program.reference_width is 65",
    ),
    "an end outside": (lambda m: m["model"].update(eos_token_ids=[-1]), "model.eos_token_ids is -1"),
    "methods that do not fit the exits": (lambda m: m.update(exits=[3, 6]), "program.methods are"),
    "methods the file lacks": (
        lambda m: (
            m.update(exits=[3, 6]),
            m["program"].update(
                methods=_methods(
                    "embed", "head", "draft_head", "compact", "segment_0", "segment_1", "segment_2"
                )
            ),
        ),
        "has no method segment_2",
    ),
    "methods the manifest lacks": (
        lambda m: (
            m.update(exits=[]),
            m["program"].update(
                draft_vocabulary=None, methods=_methods("embed", "head", "compact", "segment_0")
            ),
        ),
        "which the manifest does not name",
    ),
}


@pytest.mark.parametrize("name", _CHANGES)
def test_a_manifest_that_does_not_fit_is_refused(
    name: str, run: Run, coder_bundle_executorch: Path, tmp_path: Path
) -> None:
    change, reason = _CHANGES[name]
    _refused(run(_copy(coder_bundle_executorch, tmp_path, change), [5], 2), reason)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"a" 1}',
        '{"a": }',
        '{"a": 01}',
        '{"a": 1} x',
        '"\\ud800"',
        '"\\x"',
        '"a\nb"',
        "nul",
        "[1,]",
        "[" * 500,
    ],
)
def test_text_that_is_not_json_is_refused(text: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    _refused(run(tmp_path, [5], 2), "manifest.json: not JSON at byte")


def test_escapes_and_exponents_are_read_as_json_means_them(
    run: Run, coder_bundle_executorch: Path, tmp_path: Path
) -> None:
    copy = _copy(
        coder_bundle_executorch, tmp_path, lambda m: m["model"].update(name='\U0001f600 "\\/\b\f\n\r\té')
    )
    text = (copy / "manifest.json").read_text()
    name = json.loads(text)["program"]["file"]
    escaped = "".join(f"\\u{ord(letter):04X}" for letter in name)
    slots = json.loads(text)["program"]["slots"]
    text = text.replace(f'"{name}"', f'"{escaped}"').replace(f'"slots": {slots}', f'"slots": {slots}0.0E-1')
    (copy / "manifest.json").write_text(text)
    assert run(copy, [5], 2).returncode == 0


def _program_of(bundle: Path) -> str:
    return str(json.loads((bundle / "manifest.json").read_text())["program"]["file"])


def _replace_program(bundle: Path, folder: Path, content: bytes, told: bool) -> Path:
    """Another program under the bundle's name; `told`: the manifest lists its size and hash."""
    name = _program_of(bundle)

    def tell(manifest: dict[str, Any]) -> None:
        entry = next(entry for entry in manifest["files"] if entry["path"] == name)
        entry.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())

    copy = _copy(bundle, folder, tell if told else lambda manifest: None)
    (copy / name).unlink()
    (copy / name).write_bytes(content)
    return copy


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("told", [False, True])
def test_a_truncated_program_is_refused(
    share: float, told: bool, run: Run, coder_bundle_executorch: Path, tmp_path: Path
) -> None:
    whole = (coder_bundle_executorch / _program_of(coder_bundle_executorch)).read_bytes()
    copy = _replace_program(coder_bundle_executorch, tmp_path, whole[: int(len(whole) * share)], told)
    _refused(run(copy, [5], 2), "cannot be loaded" if told else "the manifest says")


def test_a_flipped_bit_is_refused(run: Run, coder_bundle_executorch: Path, tmp_path: Path) -> None:
    damaged = bytearray((coder_bundle_executorch / _program_of(coder_bundle_executorch)).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    copy = _replace_program(coder_bundle_executorch, tmp_path, bytes(damaged), told=False)
    _refused(run(copy, [5], 2), "is damaged: its SHA-256 is not the one listed")


def test_missing_files_are_refused(run: Run, coder_bundle_executorch: Path, tmp_path: Path) -> None:
    _refused(run(tmp_path / "nowhere", [5], 2), "no such folder")
    _refused(run(tmp_path, [5], 2), "manifest.json: cannot be read")
    copy = _copy(coder_bundle_executorch, tmp_path, lambda manifest: None)
    (copy / _program_of(copy)).unlink()
    _refused(run(copy, [5], 2), "is missing")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "no bundle given"),
        (["BUNDLE", "--max-new-tokens", "3"], "--tokens is missing"),
        (["BUNDLE", "--tokens", "1"], "--max-new-tokens is missing"),
        (["BUNDLE", "--tokens", "1", "--max-new-tokens"], "--max-new-tokens needs a value"),
        (["BUNDLE", "--tokens", "", "--max-new-tokens", "3"], '--tokens: ""'),
        (["BUNDLE", "--tokens", "1,", "--max-new-tokens", "3"], '--tokens: ""'),
        (
            ["BUNDLE", "--tokens", "1, 2", "--max-new-tokens", "3"],
            '--tokens: " 2" is not an integer from 0 to',
        ),
        (["BUNDLE", "--tokens", "-1", "--max-new-tokens", "3"], '--tokens: "-1"'),
        (["BUNDLE", "--tokens", "1", "--max-new-tokens", "0"], '--max-new-tokens: "0"'),
        (["BUNDLE", "--tokens", "1", "--max-new-tokens", "9" * 30], "--max-new-tokens: "),
        (["BUNDLE", "--tokens", "4096", "--max-new-tokens", "3"], "4096 is not in the vocabulary"),
        (["BUNDLE", "--tokens", "1", "--max-new-tokens", "3", "--draft-length", "64"], "at most 63"),
        (["BUNDLE", "--tokens", "1", "--max-new-tokens", "3", "--strategy", "tree"], '"tree" is unknown'),
        (["BUNDLE", "BUNDLE"], "a second bundle"),
        (["BUNDLE", "--threads", "2"], "--threads: unknown flag"),
    ],
)
def test_a_wrong_command_line_is_refused(
    arguments: list[str], reason: str, runner: Path, coder_bundle_executorch: Path
) -> None:
    given = [str(coder_bundle_executorch) if word == "BUNDLE" else word for word in arguments]
    _refused(subprocess.run([str(runner), *given], capture_output=True, text=True, timeout=120), reason)


def test_help_is_no_error(runner: Path) -> None:
    result = subprocess.run([runner, "--help"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0
    assert result.stdout.startswith("usage: skipstone-runner BUNDLE")
