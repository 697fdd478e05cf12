"""`skipstone calibrate` on a tiny T5's bundle, and generating with what it has found."""

from __future__ import annotations

import json
import math
import shutil
from itertools import product
from pathlib import Path

import pytest
from scipy.stats import binom, entropy

from skipstone.bundle import hash_file, open_bundle
from skipstone.cli import run
from skipstone.model import Model, load_model
from skipstone.runtimes.adaptive import AdaptiveOptions
from tests.exporters.tiny_t5 import T5_CASES, make_t5
from tests.sdk.scripted import CHEAP_DRAFTS, ENCODER, write_bundle

pytestmark = pytest.mark.engine

WORDS = ("the tent", "on the heat", "a red hen", "near ten men")
SOURCES = [f"{one} {other}" for one, other in product(WORDS, WORDS) if one != other]
FLAGS = ("--threads", "1", "--max-new-tokens", "10")
MAX_LOSS, CONFIDENCE = 0.4, 0.9
BOUND = ("--max-loss", str(MAX_LOSS), "--confidence", str(CONFIDENCE))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose exits, after layer 1 of its decoder and 2 of its encoder, are right often, but not always."""
    from skipstone.exporters.pipeline import export_checkpoint

    folder = tmp_path_factory.mktemp("t5")
    checkpoint = make_t5(folder / "checkpoint", T5_CASES["flan-t5"])
    export_checkpoint(checkpoint, folder / "bundle", quantize="f32", exits=(1,), encoder_exits=(2,))
    return folder / "bundle"


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy, for a calibration is kept in it."""
    return shutil.copytree(exported, tmp_path / "bundle")


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are of no use to plain decoding, and seconds to measure."""
    monkeypatch.setattr("skipstone.model.measure", lambda _engine, **_: CHEAP_DRAFTS)


def call(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """What a command line that works prints: standard output and standard error."""
    assert run(list(map(str, arguments))) == 0
    told = capfd.readouterr()
    return told.out, told.err


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"source": text, "target": text}) + "\n" for text in SOURCES))
    return file


def distance(one: str, other: str) -> int:
    """Levenshtein's, row by row."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


def error_rate(text: str, reference: str) -> float:
    return min(1.0, distance(text, reference) / max(1, len(reference)))


def p_value(losses: list[float]) -> float:
    n, r = len(losses), min(sum(losses) / len(losses), MAX_LOSS)
    hoeffding = math.exp(-n * float(entropy([r, 1 - r], [MAX_LOSS, 1 - MAX_LOSS])))
    few = math.ceil(round(sum(losses), 9))
    return min(1.0, hoeffding, math.e * float(binom.cdf(few, n, MAX_LOSS)))


def texts(model: Model, adaptive: AdaptiveOptions) -> list[str]:
    return [
        model.generate(source=source, max_new_tokens=10, strategy="plain", adaptive=adaptive).text
        for source in SOURCES
    ]


@pytest.mark.parametrize(("knob", "risk"), [("early-exit-margin", "text"), ("encoder-saturation", "quality")])
def test_the_chosen_threshold_is_the_last_that_holds_computed_by_hand(
    bundle: Path, pairs: Path, capfd: pytest.CaptureFixture[str], knob: str, risk: str
) -> None:
    with load_model(bundle, threads=1) as model:
        whole = texts(model, AdaptiveOptions())
    # The whole model is right of two texts in three, so leaving early can make them worse, but not the third.
    right = [whole[n] or "x" if n % 3 else source for n, source in enumerate(SOURCES)]
    lines = ({"source": source, "reference": text} for source, text in zip(SOURCES, right, strict=True))
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--prompts", pairs, "--knob", knob, "--risk", risk, *BOUND, *FLAGS, "--json")
    record = json.loads(call(capfd, "calibrate", bundle, *flags)[0])
    with load_model(bundle, threads=1) as model:
        for trial in (record["trials"][0], *record["trials"][-3:]):
            early = texts(model, AdaptiveOptions(**{knob.replace("-", "_"): trial["value"]}))
            if risk == "text":
                losses = list(map(error_rate, early, whole))
            else:
                rates = (list(map(error_rate, side, right)) for side in (early, whole))
                losses = [max(0.0, ours - full) for ours, full in zip(*rates, strict=True)]
            assert trial["mean_loss"] == pytest.approx(sum(losses) / len(losses))
            assert trial["p_value"] == pytest.approx(p_value(losses), rel=1e-6)
            assert trial["holds"] == (trial["p_value"] <= 1 - CONFIDENCE)
    held = [trial["value"] for trial in record["trials"] if trial["holds"]]
    assert record["value"] == held[-1]
    assert [trial["holds"] for trial in record["trials"]] == [True] * len(held) + [False]
    assert record["trials"][-1]["mean_loss"] > record["trials"][0]["mean_loss"] == 0.0
    assert record["trials"][-1]["saved"] > record["trials"][0]["saved"] == 0.0
    kept = open_bundle(bundle).manifest.calibrations[0]
    assert (kept.knob, kept.value, kept.risk, kept.samples) == (knob, record["value"], risk, len(SOURCES))
    assert kept.prompts_sha256 == hash_file(pairs)


def test_generate_uses_what_was_calibrated_and_names_it(
    bundle: Path, pairs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told, _ = call(capfd, "calibrate", bundle, "--prompts", pairs, *BOUND, *FLAGS)
    (kept,) = open_bundle(bundle).manifest.calibrations
    assert f"--early-exit-margin {kept.value:g} has a text loss of at most 0.4 with confidence 0.9" in told
    assert "p-value" in told
    calibrated = ("--early-exit-margin", "calibrated")
    flags = ("--source", SOURCES[0], *FLAGS, *calibrated)
    record = json.loads(call(capfd, "generate", bundle, *flags, "--json")[0])
    with load_model(bundle, threads=1) as model:
        adaptive = AdaptiveOptions(early_exit_margin=kept.value)
        expected = model.generate(source=SOURCES[0], max_new_tokens=10, adaptive=adaptive)
    assert tuple(record["tokens"]) == expected.tokens
    assert record["stats"]["lossy"]
    assert record["stats"]["rounds_by_drafter"] == expected.stats.rounds_by_drafter
    assert record["stats"]["guarantee"] == {
        "risk": "text",
        "max_loss": 0.4,
        "confidence": 0.9,
        "samples": len(SOURCES),
        "max_new_tokens": 10,
    }
    assert "lossy: text loss ≤ 0.4 with confidence 0.9" in call(capfd, "generate", bundle, *flags)[1]
    inspected = " ".join(call(capfd, "inspect", bundle)[0].split())
    assert f"--early-exit-margin calibrated: {kept.value:g} (text loss ≤ 0.4 with confidence 0.9" in inspected


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command line that exits with code 2 says, in one line."""
    assert run(list(map(str, arguments))) == 2
    told = capfd.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), ("--prompts",)),
        (("--prompts", "/nowhere.jsonl"), ("/nowhere.jsonl",)),
        (("--prompts", "PAIRS", "--knob", "top-p"), ("--knob", "encoder-saturation")),
        (("--prompts", "PAIRS", "--risk", "none"), ("--risk", "quality")),
        (("--prompts", "PAIRS", "--max-loss", "0"), ("--max-loss 0",)),
        (("--prompts", "PAIRS", "--confidence", "1"), ("--confidence 1",)),
        (("--prompts", "PAIRS", "--max-new-tokens", "0"), ("--max-new-tokens 0",)),
        (("--prompts", "PAIRS"), ("12 texts", "149")),
        (("--prompts", "PROMPTS"), ("line 1", "'source'")),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_the_weights_are_loaded(
    tmp_path: Path,
    pairs: Path,
    capfd: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    write_bundle(tmp_path / "bundle", encoder=ENCODER)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    files = {"PAIRS": str(pairs), "PROMPTS": str(tmp_path / "prompts.jsonl")}
    line = refused(capfd, "calibrate", tmp_path / "bundle", *(files.get(flag, flag) for flag in flags))
    assert all(word in line for word in words), line


@pytest.mark.parametrize("knob", ["early-exit-margin", "encoder-saturation"])
def test_without_a_calibration_the_command_to_run_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], knob: str
) -> None:
    folder = write_bundle(tmp_path / "bundle", encoder=ENCODER).path
    line = refused(capfd, "generate", folder, "--source", "x", f"--{knob}", "calibrated")
    assert f"skipstone calibrate {folder} --prompts FILE.jsonl --knob {knob}" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--early-exit-margin", "often"), ("--early-exit-margin often", "'calibrated'")),
        (("--early-exit-margin", "1.5"), ("--early-exit-margin 1.5",)),
        (("--encoder-saturation", "nan"), ("--encoder-saturation nan",)),
        (
            ("--early-exit-margin", "calibrated", "--encoder-saturation", "0.9"),
            ("calibrated without the other",),
        ),
        (
            ("--early-exit-margin", "calibrated", "--encoder-saturation", "calibrated"),
            ("calibrated without the other",),
        ),
        (("--early-exit-margin", "0.5", "--num-beams", "2"), ("--num-beams", "stop early")),
        (("--encoder-saturation", "calibrated", "--num-beams", "2"), ("--num-beams", "stop early")),
    ],
)
def test_thresholds_that_cannot_work_are_refused_before_the_bundle_is_opened(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    line = refused(capfd, "generate", tmp_path / "no-bundle", "--source", "x", *flags)
    assert all(word in line for word in words), line
