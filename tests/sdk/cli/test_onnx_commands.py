"""Exporting an ONNX bundle and using it, from the command line."""

import json
from pathlib import Path

import pytest

from skipstone.bundle import read_manifest
from tests.sdk.cli.command import assert_refused, skipstone

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("onnx") / "bundle"
    done = skipstone(
        "export", tiny_checkpoint, "--device", "cpu", "--format", "onnx", "--quantize", "none", "--exits", "1",
        "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "self-test passed" in done.stdout
    return output


def test_a_bundle_generates_the_same_with_and_without_drafts(bundle: Path) -> None:
    texts = set()
    for strategy in ("plain", "layerskip", "staged"):
        done = skipstone(
            "generate", bundle, "--prompt", "def f(", "--max-new-tokens", "12", "--strategy", strategy,
            "--threads", "1", "--json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        texts.add(tuple(json.loads(done.stdout)["tokens"]))
    assert len(texts) == 1


def test_the_benchmark_compares_strategies_and_finds_no_difference(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    done = skipstone(
        "bench", bundle, "--strategies", "plain,staged", "--max-new-tokens", "8", "--repeats", "1", "--limit", "1",
        "--no-memory", "--threads", "1", "--json", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert [row["strategy"] for row in rows] == ["plain", "staged"]
    assert all(row["other_divergences"] == 0 for row in rows)


def test_inspect_names_the_graphs_and_their_parity(bundle: Path) -> None:
    done = skipstone("inspect", bundle)
    assert done.returncode == 0, done.stderr
    for words in (
        "cpu graph: segment_1",
        "embeddings (float32)",
        "against the reference in f32",
        "onnxruntime",
    ):
        assert words in done.stdout
    assert read_manifest(bundle).format == "onnx"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--quantize", "q8_0"), ("--quantize q8_0", "8da4w")),
        (("--quantize", "8w"), ("--quantize 8w", "the target cpu takes")),
        (("--context-length", "257"), ("--context-length 257", "64 to 256")),
        (("--exits", "4"), ("--exits 4",)),
        (("--mix", "head=none"), ("--mix head=none",)),
    ],
)
def test_an_export_that_cannot_work_leaves_nothing_behind(
    tiny_checkpoint: Path, tmp_path: Path, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    done = skipstone("export", tiny_checkpoint, "--format", "onnx", "--output", tmp_path / "out", *flags)
    assert_refused(done, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnxruntime", "onnx_ir"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    bundle: Path, tiny_checkpoint: Path, tmp_path: Path, package: str
) -> None:
    """Simulated by a package of that name that is found first and cannot be imported."""
    shadow = tmp_path / "path" / package
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text(
        f"raise ModuleNotFoundError(\"No module named '{package}'\", name='{package}')\n"
    )
    found = {"PYTHONPATH": str(shadow.parent)}
    running = skipstone(
        "generate", bundle, "--prompt", "x", "--max-new-tokens", "2", "--threads", "1", **found
    )
    if package == "onnxruntime":
        assert_refused(running, package, "skipstone[onnx]")
    else:
        assert running.returncode == 0, "only exporting needs it"
    arguments = ("export", tiny_checkpoint, "--format", "onnx", "--output", tmp_path / "out")
    assert_refused(skipstone(*arguments, **found), package, "skipstone[export,onnx]")
    assert not (tmp_path / "out").exists()
