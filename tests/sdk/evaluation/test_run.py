"""`skipstone evaluate`: small models as a whole, the shipped one from the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from skipstone.bundle import open_bundle
from skipstone.cli import run
from skipstone.errors import UsageError
from skipstone.evaluation import EvaluateOptions, evaluate
from skipstone.evaluation.render import facts
from skipstone.evaluation.speed import SpeedOptions
from tests.conftest import Export
from tests.exporters.tiny import GENTLE, make_checkpoint
from tests.exporters.tiny_t5 import T5_CASES, T5Case, make_t5

ROOT = Path(__file__).resolve().parents[3]
HELD_OUT = ROOT / "samples" / "prompts" / "held_out.jsonl"


def test_a_bundle_and_its_checkpoint_side_by_side(tmp_path: Path) -> None:
    from skipstone.exporters.pipeline import export_checkpoint

    checkpoint = make_checkpoint(tmp_path / "dense", GENTLE)
    export_checkpoint(checkpoint, tmp_path / "q4_0", quantize="q4_0", exits=(1,))
    text = tmp_path / "text.txt"
    text.write_text("def read(self):\n    return self.file.read()\n" * 20, encoding="utf-8")
    told: list[str] = []
    report = evaluate(
        (str(checkpoint), str(tmp_path / "q4_0")),
        EvaluateOptions(
            text,
            str(checkpoint),
            threads=1,
            speed=SpeedOptions("staged", ("def f",), max_new_tokens=6, repeats=1),
        ),
        lambda what, _done, _total: told.append(what),
    )
    dense, bundle = report.rows
    assert (dense.prediction.kl_divergence, dense.prediction.agreement) == (0.0, 1.0)
    assert (dense.speed, dense.memory_mb, dense.correction) == (None, None, None)
    assert bundle.prediction.kl_divergence is not None
    assert bundle.prediction.kl_divergence > 1e-4
    assert bundle.prediction.dense_perplexity == pytest.approx(dense.prediction.perplexity)
    assert bundle.bytes == sum(entry.size for entry in open_bundle(tmp_path / "q4_0").manifest.files)
    assert [exit.dense_exit for exit in bundle.prediction.exits] == [1]
    assert bundle.speed is not None
    assert (bundle.speed.strategy, bundle.speed.prompts) == ("staged", 1)
    assert bundle.speed.plain > 0
    assert bundle.memory_mb is not None
    assert bundle.memory_mb > 20
    assert told == ["dense: predicting", "q4_0: predicting", "q4_0: memory", "q4_0: speed"]
    assert report.longest_window == 256  # the narrowest model's
    json.dumps(report.as_json())


def test_an_encoder_decoder_also_writes_its_texts(tmp_path: Path) -> None:
    checkpoint = make_t5(tmp_path / "dense", T5_CASES["flan-t5"])
    pairs = [("teh river", "the river"), ("read teh files", "read the file")]
    file = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"source": source, "target": target}) for source, target in pairs]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    report = evaluate((str(checkpoint),), EvaluateOptions(file, max_texts=1))
    (row,) = report.rows
    assert row.correction is not None
    assert row.correction.sentences == 1
    assert report.uncorrected is not None
    assert report.uncorrected.character_error_rate == pytest.approx(2 / len("the river"))
    assert row.prediction.kl_divergence is None
    assert len(row.prediction.exits) == 1


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("encodes", [False, True], ids=["decoder", "encoder-decoder"])
def test_an_onnx_bundle_has_the_figures_of_its_checkpoint(encodes: bool, tmp_path: Path) -> None:
    """Not quantised, and with the whole vocabulary at its exit."""
    from skipstone.exporters.pipeline import export_checkpoint

    checkpoint = (
        make_t5(tmp_path / "dense", T5Case({"num_layers": 1, "num_decoder_layers": 2}))
        if encodes
        else make_checkpoint(tmp_path / "dense", replace(GENTLE, config={"num_hidden_layers": 2}))
    )
    (checkpoint / "exits.json").write_text('{"exits": [1]}', encoding="utf-8")
    text = "the river is never the same, and so are the files that we read\n"
    line = {"source": "teh river", "target": text} if encodes else {"text": text * 2}
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps(line), encoding="utf-8")
    export_checkpoint(
        checkpoint,
        tmp_path / "onnx",
        format="onnx",
        quantize="none",
        draft_vocab_size=0,
        context_length=96,
        max_source_length=32 if encodes else None,
    )
    models = (str(checkpoint), str(tmp_path / "onnx"))
    dense, bundle = evaluate(models, EvaluateOptions(file, models[0], threads=1, memory=False)).rows
    assert bundle.format == "onnx"
    found, expected = bundle.prediction, dense.prediction
    assert found.tokens == expected.tokens > 20
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
    assert found.kl_divergence == pytest.approx(0.0, abs=1e-6)
    assert found.agreement == 1.0
    assert found.exits == expected.exits
    assert 0 < found.exits[0].own_last < 1
    assert bundle.correction == dense.correction
    assert (bundle.correction is not None) == encodes


def test_a_text_that_holds_nothing_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "dense", GENTLE)
    short = tmp_path / "short.txt"
    short.write_text("a", encoding="utf-8")
    with pytest.raises(UsageError, match="no two tokens to predict"):
        evaluate((str(checkpoint),), EvaluateOptions(short))


@pytest.mark.slow
@pytest.mark.engine
def test_the_shipped_model_from_the_command_line(
    export_coder: Export, coder_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle, page = export_coder("q4_0"), tmp_path / "page.html"
    flags = (
        "--held-out",
        HELD_OUT,
        "--against",
        coder_checkpoint,
        "--max-tokens",
        600,
        "--no-memory",
        "--json",
    )
    assert run([*map(str, ("evaluate", bundle, *flags, "--output", page))]) == 0
    told = capfd.readouterr()
    report = json.loads(told.out)
    (row,) = report["rows"]
    found = row["prediction"]
    assert 550 < found["tokens"] < 600
    assert 0.001 < found["kl_divergence"] < 0.3
    assert 0.8 < found["agreement"] < 1
    assert found["dense_perplexity"] < found["perplexity"] < 2 * found["dense_perplexity"]
    assert [exit["exit"] for exit in found["exits"]] == list(open_bundle(bundle).manifest.exits)
    assert all(0.2 < exit["own_last"] < 1 and 0.5 < exit["dense"] <= 1 for exit in found["exits"])
    assert report["size_front"] == ["q4_0"]
    assert "data:image/svg+xml;base64," in page.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.engine
def test_k_and_v_of_fewer_bits_say_something_else_and_the_report_names_them(
    coder_bundle_q8_0: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def read(self):\n    return self.file.read()\n" * 20, encoding="utf-8")
    usual, four = (
        evaluate((str(coder_bundle_q8_0),), EvaluateOptions(text, threads=1, memory=False, kv_type=kv_type))
        for kv_type in (None, "q4_0")
    )
    assert (usual.kv_type, four.kv_type) == (None, "q4_0")
    assert 0.001 < abs(four.rows[0].prediction.loss - usual.rows[0].prediction.loss) < 0.5
    assert "; K and V in q4_0" in facts(four)
    assert "K and V" not in facts(usual)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--held-out", str(HELD_OUT), "--kv-type", "q8_0"), "is of format checkpoint; only GGUF bundles"),
        (("--held-out", "missing.txt"), "--held-out missing.txt: cannot be read"),
        ((), "Missing option '--held-out'"),
        (("--held-out", str(HELD_OUT), "--output", "nowhere/page.html"), "--output nowhere/page.html"),
        (("--held-out", str(HELD_OUT), "--speed", "--strategy", "draft-model"), "opens no draft model"),
    ],
)
def test_flags_that_cannot_work_are_told_in_one_line(
    flags: tuple[str, ...], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint(tmp_path / "dense", GENTLE)
    assert run(["evaluate", str(checkpoint), *flags]) == 2
    told = capfd.readouterr()
    assert message in told.err
    assert told.out == ""
