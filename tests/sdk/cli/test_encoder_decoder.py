"""The commands on an encoder-decoder's bundle, exported from a tiny T5."""

import json
import re
from pathlib import Path

import pytest

from skipstone.beams import search_beams
from skipstone.model import load_model
from skipstone.runtimes.beam import BeamOptions
from tests.exporters.tiny_t5 import T5_CASES, make_t5
from tests.sdk.cli.command import assert_refused, skipstone

pytestmark = pytest.mark.engine

SOURCE = "the tent on the heat"
FLAGS = ("--threads", "1", "--max-new-tokens", "12")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its decoder is cut after layer 1, its encoder after layer 2."""
    from skipstone.exporters.pipeline import export_checkpoint

    folder = tmp_path_factory.mktemp("t5")
    checkpoint = make_t5(folder / "checkpoint", T5_CASES["gentle"])
    export_checkpoint(checkpoint, folder / "bundle", quantize="f32", exits=(1,), encoder_exits=(2,))
    return folder / "bundle"


@pytest.mark.parametrize("strategy", ["plain", "aggressive", "auto", "staged"])
def test_generate_reads_a_source(bundle: Path, strategy: str) -> None:
    with load_model(bundle, threads=1) as model:
        expected = model.generate(source=SOURCE, max_new_tokens=12, strategy="plain")
    done = skipstone("generate", bundle, "--source", SOURCE, *FLAGS, "--strategy", strategy, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["text"], tuple(record["tokens"])) == (expected.text, expected.tokens)
    assert record["stats"]["source_tokens"] == expected.stats.source_tokens > 4
    assert record["stats"]["encoder_layers"] == 4


def test_a_source_comes_from_a_file_too(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "source.txt").write_text(SOURCE)
    given = skipstone("generate", bundle, "--source", SOURCE, *FLAGS)
    read = skipstone("generate", bundle, "--source-file", tmp_path / "source.txt", *FLAGS)
    assert read.stdout == given.stdout != ""


def test_a_guide_is_drafted_from(bundle: Path) -> None:
    with load_model(bundle, threads=1) as model:
        text = model.generate(source=SOURCE, max_new_tokens=12, strategy="plain").text
    flags = ("--guide", "the heat", "--strategy", "aggressive", "--json")
    record = json.loads(skipstone("generate", bundle, "--source", SOURCE, *FLAGS, *flags).stdout)
    assert record["text"] == text
    assert record["stats"]["rounds_by_drafter"]["aggressive+guide"] > 0


def test_beams_are_searched_and_the_best_shown(bundle: Path) -> None:
    options = BeamOptions(3, 2, length_penalty=0.5)
    with load_model(bundle, threads=1) as model:
        expected = search_beams(model, source=SOURCE, options=options, max_new_tokens=12)
    flags = ("--num-beams", "3", "--num-return-sequences", "2", "--length-penalty", "0.5")
    done = skipstone("generate", bundle, "--source", SOURCE, *FLAGS, *flags, "--json")
    record = json.loads(done.stdout)
    assert record["text"] == record["texts"][0]["text"] == expected.texts[0].text
    assert [text["score"] for text in record["texts"]] == pytest.approx([t.score for t in expected.texts])
    shown = skipstone("generate", bundle, "--source", SOURCE, *FLAGS, *flags)
    assert shown.stdout == "".join(f"{text.text}\n" for text in expected.texts)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--prompt", "x"), ("encoder-decoder", "--source")),
        (("--source", "the " * 600), ("source", "takes 512")),
        (("--source", "x", "--strategy", "draft-model"), ("--assistant-model",)),
    ],
)
def test_what_does_not_fit_an_encoder_decoder_is_refused(
    bundle: Path, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_refused(skipstone("generate", bundle, *FLAGS, *flags), *words)


def test_a_source_for_a_decoder_is_refused(coder_bundle_f32: Path) -> None:
    done = skipstone("generate", coder_bundle_f32, "--source", "x", "--threads", "1")
    assert_refused(done, "--source", "decoder alone")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--source", ""), ("--source", "empty")),
        (("--source", "a", "--source-file", "b"), ("exactly one", "--source-file")),
        (("--source-file", "/nowhere/source.txt"), ("/nowhere/source.txt",)),
        (("--source", "a", "--guide", ""), ("--guide", "empty")),
        (("--source", "a", "--num-beams", "0"), ("--num-beams 0",)),
        (("--source", "a", "--num-beams", "4", "--num-beam-groups", "3"), ("--num-beam-groups 3",)),
        (("--source", "a", "--num-beams", "4", "--temperature", "1"), ("--num-beams", "--temperature")),
        (("--source", "a", "--num-beams", "4", "--show-drafts"), ("--num-beams", "--show-drafts")),
    ],
)
def test_a_flag_that_cannot_work_is_refused_before_the_bundle_is_opened(
    tmp_path: Path, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_refused(skipstone("generate", tmp_path / "no-bundle", *flags), *words)


@pytest.mark.slow
def test_a_benchmark_reads_sources_and_says_whether_outputs_agree(bundle: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "sources.jsonl", tmp_path / "out.json"
    lines = [{"source": SOURCE, "target": "ignored"}, {"source": "on and on the heat", "prompt": "ignored"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = (
        "--prompts",
        prompts,
        "--strategies",
        "plain,aggressive,auto",
        "--json",
        out,
        "--repeats",
        "1",
    )
    done = skipstone("bench", bundle, *arguments, *FLAGS)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert [row["strategy"] for row in report["rows"]] == ["plain", "aggressive", "auto"]
    for row in report["rows"]:
        assert (row["identical"], row["near_tie_divergences"], row["other_divergences"]) == (2, 0, 0)
        assert row["peak_rss_mb"] > 20
        assert row["ttft_ms"] > 0
    assert report["prompts"] == 2
    assert report["ignore_eos"] is False
    assert max(report["cost"]["widths"]) == 64


def test_a_benchmark_without_sources_is_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    assert_refused(skipstone("bench", bundle, "--prompts", tmp_path / "p.jsonl"), "no sources", '"source"')
    assert_refused(skipstone("bench", bundle, "--baselines"), "--baselines", "decoders only")


def test_the_default_benchmark_of_an_encoder_decoder_includes_aggressive_decoding(bundle: Path) -> None:
    done = skipstone("bench", bundle, *FLAGS, "--repeats", "1", "--limit", "1", "--no-memory")
    assert done.returncode == 0, done.stderr
    for strategy in ("plain", "aggressive", "prompt-lookup", "layerskip", "staged", "auto"):
        assert re.search(rf"^\s*{strategy}\s", done.stdout, re.MULTILINE), strategy
