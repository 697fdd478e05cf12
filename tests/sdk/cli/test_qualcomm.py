"""The shipped model for a phone's NPU, from the command line: exported, and run in the emulator."""

import json
from pathlib import Path

import pytest

from skipstone.bundle import CostCurve, OnnxManifest, read_manifest
from skipstone.cli import run
from skipstone.exporters.formats.onnx.qnn_compiler import read_soc
from tests.sdk.cli.command import assert_refused, skipstone

pytestmark = [pytest.mark.engine, pytest.mark.slow]
PROMPT = "def quicksort("


# The emulator's own times say nothing; here the second segment costs most, in eight rows as much as in one.
WIDE_IS_CHEAP = CostCurve(
    widths=(1, 4, 8),
    segments=((0.01, 0.01, 0.01), (1.0, 1.0, 1.0)),
    draft_head=(0.01, 0.01, 0.01),
    threads=1,
    machine="made up",
)


@pytest.fixture(scope="module")
def bundle(coder_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("qualcomm") / "bundle"
    flags = ("--device", "qualcomm-sm8650", "--context-length", "64", "--widths", "1,4,8")
    assert run(["export", str(coder_checkpoint), *flags, "--output", str(output)]) == 0
    return output


def test_the_shipped_model_writes_the_same_with_and_without_drafts_and_as_eager_torch_does(
    bundle: Path,
    coder_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr("skipstone.model.kept_or_measured", lambda *_args, **_options: WIDE_IS_CHEAP)
    found = {}
    for strategy in ("plain", "layerskip", "staged"):
        flags = ("--prompt", PROMPT, "--max-new-tokens", "8", "--strategy", strategy, "--json")
        capsys.readouterr()
        assert run(["generate", str(bundle), *flags]) == 0
        found[strategy] = json.loads(capsys.readouterr().out)["tokens"]
    assert found["layerskip"] == found["staged"] == found["plain"]
    tokenizer = AutoTokenizer.from_pretrained(coder_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(coder_checkpoint, dtype="float32")
    given = tokenizer(PROMPT, return_tensors="pt")
    written = model.generate(**given, max_new_tokens=8, do_sample=False)
    assert found["plain"] == written[0, given["input_ids"].shape[1] :].tolist()


def test_its_binaries_state_the_soc_and_its_self_test_found_no_difference_between_widths(
    bundle: Path,
) -> None:
    manifest = read_manifest(bundle)
    assert isinstance(manifest, OnnxManifest)
    assert manifest.graphs.qnn is not None
    assert manifest.graphs.status == "emulated"
    for graph in manifest.graphs.graphs:
        assert read_soc(bundle / str(graph.weights)) == ("SM8650", 75)
    assert manifest.parity is not None
    assert (manifest.parity.width_noise, manifest.parity.draft_verify) == (0.0, 0.0)
    assert (manifest.parity.agreement_with_reference or 0.0) >= 0.9


def test_inspect_names_target_and_widths(bundle: Path) -> None:
    done = skipstone("inspect", bundle)
    assert done.returncode == 0, done.stderr
    for words in (
        "qnn graph: segment_1, 8 rows",
        "weights of segment_1",
        "a16w8",
        "against the reference in f32",
    ):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--device", "qualcomm-sm9999"), ("--device qualcomm-sm9999: unknown device", "qualcomm-sm8650")),
        (("--device", "qualcomm-sm8650", "--quantize", "8w"), ("--quantize 8w", "a16w8, a16w4, a8w8, fp16")),
        (("--device", "qualcomm-sm8650", "--widths", "one"), ("--widths one", "whole numbers")),
        (("--device", "qualcomm-sm8650", "--widths", "8,4"), ("--widths 8,4", "rise")),
        (("--device", "cpu", "--format", "onnx", "--widths", "8"), ("--widths 8", "any number of rows")),
    ],
)
def test_what_cannot_be_exported_is_refused_on_one_line(
    coder_checkpoint: Path, tmp_path: Path, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    done = skipstone("export", coder_checkpoint, *flags, "--output", tmp_path / "out")
    assert_refused(done, *words)
    assert not (tmp_path / "out").exists()
