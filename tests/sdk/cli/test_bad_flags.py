"""Flags that cannot work: one line, exit code 2."""

import json
import shutil
from pathlib import Path

import pytest

from skipstone.bundle import describe_file, read_manifest, write_manifest
from tests.sdk.cli.command import assert_refused, skipstone

QUICK = ("--threads", "1", "--max-new-tokens", "2")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), ("--prompt", "--prompt-file")),
        (("--prompt", "a", "--prompt-file", "b"), ("exactly one",)),
        (("--prompt", ""), ("--prompt", "empty")),
        (("--prompt-file", "/nowhere/prompt.txt"), ("/nowhere/prompt.txt",)),
        (("--prompt", "a", "--max-new-tokens", "-1"), ("--max-new-tokens", "-1")),
        (("--prompt", "a", "--max-new-tokens", "many"), ("--max-new-tokens", "integer")),
        (("--prompt", "a", "--strategy", "guess"), ("--strategy guess", "layerskip")),
        (("--prompt", "a", "--temperature", "-1"), ("--temperature -1",)),
        (("--prompt", "a", "--temperature", "nan"), ("--temperature nan",)),
        (("--prompt", "a", "--top-p", "0"), ("--top-p 0",)),
        (("--prompt", "a", "--top-k", "-3"), ("--top-k -3",)),
        (("--prompt", "a", "--min-p", "1"), ("--min-p 1",)),
        (("--prompt", "a", "--repetition-penalty", "0"), ("--repetition-penalty 0",)),
        (("--prompt", "a", "--seed", "-1"), ("--seed -1",)),
        (("--prompt", "a", "--num-assistant-tokens", "0"), ("--num-assistant-tokens 0",)),
        (("--prompt", "a", "--assistant-confidence-threshold", "2"), ("threshold 2",)),
        (("--prompt", "a", "--gpu-layers", "-2"), ("--gpu-layers",)),
        (("--prompt", "a", "--json", "--show-drafts"), ("--json", "--show-drafts")),
        (("--prompt", "a", "--no-such-flag"), ("--no-such-flag", "--help")),
    ],
)
def test_a_flag_that_cannot_work_is_refused_before_the_bundle_is_opened(
    tmp_path: Path, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_refused(skipstone("generate", tmp_path / "no-bundle", *flags), *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--threads", "0"), ("--threads 0",)),
        (("--threads", "100000"), ("--threads 100000",)),
        (("--kv-type", "q2"), ("--kv-type q2", "f16, bf16, q8_0")),
        (("--context-length", "0"), ("context length 0",)),
        (("--context-length", "99999999"), ("context length 99999999",)),
        (
            ("--strategy", "layerskip", "--assistant-early-exit", "5"),
            ("--assistant-early-exit 5", "exits are 3"),
        ),
        (("--strategy", "layerskip", "--assistant-early-exit", "-1"), ("--assistant-early-exit -1",)),
        (("--strategy", "draft-model"), ("--assistant-model",)),
        (("--strategy", "draft-model", "--assistant-model", "/nowhere"), ("/nowhere",)),
        (("--context-length", "16", "--prompt", "word " * 50), ("room for 16", "--context-length")),
    ],
)
def test_a_flag_that_does_not_fit_the_bundle_is_refused(
    coder_bundle_f32: Path, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    prompt = () if "--prompt" in flags else ("--prompt", "def f(")
    assert_refused(skipstone("generate", coder_bundle_f32, *prompt, "--threads", "1", *flags), *words)


def test_gpu_layers_without_a_gpu_backend_are_refused(coder_bundle_f32: Path) -> None:
    import llama_cpp

    assert not llama_cpp.llama_supports_gpu_offload(), "this test wants a CPU build of llama-cpp-python"
    done = skipstone("generate", coder_bundle_f32, "--prompt", "x", "--gpu-layers", "4")
    assert_refused(done, "GPU", "backend")


def test_a_prompt_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompt.bin").write_bytes(b"\xff\xfe\x00")
    done = skipstone("generate", tmp_path, "--prompt-file", tmp_path / "prompt.bin")
    assert_refused(done, "prompt.bin", "UTF-8")


def test_a_draft_model_with_another_tokenizer_is_refused_with_the_first_difference(
    coder_bundle_f32: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(coder_bundle_f32, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    manifest = read_manifest(other)
    files = tuple(describe_file(other, entry.path) for entry in manifest.files)
    write_manifest(other, manifest.model_copy(update={"files": files}))
    arguments = ("--prompt", "x", "--strategy", "draft-model", "--assistant-model", other)
    done = skipstone("generate", coder_bundle_f32, *arguments, *QUICK)
    assert_refused(done, "token 10", "tokenizer")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', ("line 2", "not JSON")),
        ('{"prompt": "a"}\n\n{"text": "b"}\n', ("line 3", "'prompt'")),
        ('{"prompt": ""}\n', ("line 1",)),
        ("[1]\n", ("line 1",)),
        ("", ("no prompts",)),
    ],
)
def test_a_malformed_line_of_prompts_is_named_by_file_and_line(
    tmp_path: Path, lines: str, words: tuple[str, ...]
) -> None:
    (tmp_path / "prompts.jsonl").write_text(lines)
    done = skipstone("bench", tmp_path, "--prompts", tmp_path / "prompts.jsonl")
    assert_refused(done, "prompts.jsonl", *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--strategies", "plain,guess"), ("--strategies guess", "staged")),
        (("--strategies", " , "), ("--strategies",)),
        (("--max-new-tokens", "1"), ("--max-new-tokens",)),
        (("--repeats", "0"), ("--repeats",)),
        (("--json", "/nowhere/report.json"), ("/nowhere/report.json",)),
        (("--baselines", "--temperature", "1"), ("--baselines", "greedily")),
        (("--prompts", "/nowhere.jsonl"), ("/nowhere.jsonl",)),
    ],
)
def test_a_benchmark_that_cannot_work_is_refused_before_the_bundle_is_opened(
    tmp_path: Path, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_refused(skipstone("bench", tmp_path / "no-bundle", *flags), *words)


def test_baselines_want_a_whole_gguf(coder_bundle_f32: Path, tmp_path: Path) -> None:
    assert_refused(skipstone("bench", coder_bundle_f32, "--baselines"), "--whole-gguf")
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    done = skipstone("bench", coder_bundle_f32, "--baselines", "--whole-gguf", tmp_path / "x.gguf")
    assert_refused(done, "x.gguf", "not a GGUF")


def test_a_prompt_too_long_for_the_benchmark_is_named_by_number(
    coder_bundle_f32: Path, tmp_path: Path
) -> None:
    lines = [{"prompt": "short"}, {"prompt": "word " * 300}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ("--prompts", tmp_path / "prompts.jsonl", "--context-length", "128", "--threads", "1")
    assert_refused(skipstone("bench", coder_bundle_f32, *arguments), "prompt 2", "128")
