"""Calibrating early stopping on models that are told when to err; reading texts; keeping the outcome and using it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skipstone.bundle import MANIFEST_NAME, Calibration, EncoderFacts, open_bundle
from skipstone.calibration import (
    CalibrationOptions,
    RiskBound,
    Sample,
    calibrate,
    check_samples,
    key_of,
    read_samples,
    store_calibration,
)
from skipstone.calibration.run import loss
from skipstone.errors import BundleError, UsageError
from skipstone.model import Model
from skipstone.runtimes.adaptive import AdaptiveOptions
from skipstone.runtimes.engines.base import Settled
from skipstone.runtimes.risk import Guarantee
from skipstone.runtimes.rows import RowTree
from tests.sdk.scripted import (
    CHEAP_DRAFTS,
    ENCODER,
    VOCAB,
    FloatArray,
    ScriptedEngine,
    ScriptedSourceCache,
    ScriptedTranslator,
    write_bundle,
)

BOUND = RiskBound(max_loss=0.1, confidence=0.9)
SAMPLES = [Sample(f"text number {number}, forty characters in all"[:40]) for number in range(24)]
HALTING = EncoderFacts(num_layers=2, exits=(1,), max_source_length=120, start_token_id=0)
DIGEST = "0" * 64


class HalfSure(ScriptedEngine):
    """Every fourth token its exit is wrong, with 3/4 against 1/4: a margin of a half."""

    def logits(self, position: int, *, draft: bool) -> FloatArray:
        right = super().logits(position, draft=draft)
        if not draft or position % 4:
            return right
        out = np.full(VOCAB, -40.0, np.float32)
        out[int(right.argmax())], out[ord("#")] = 0.0, math.log(3)
        return out


class HalfSureTranslator(ScriptedTranslator):
    def open_cache(self, context_length: int, tree: RowTree) -> ScriptedSourceCache:
        return HalfSureCache(self, context_length, tree)


class HalfSureCache(ScriptedSourceCache):
    def encode(self, source: Sequence[int], settled: Settled | None = None) -> int:
        layers = super().encode(source, settled)
        self.engine = HalfSure(self.engine.script)
        return layers


class HaltingTranslator(ScriptedTranslator):
    """An encoder with an exit: after a text with a "!" the states still turn to a cosine of 0.87, and it is answered
    wrongly from there; after others to 0.96, and no harm is done.
    """

    encoder = HALTING

    def open_cache(self, context_length: int, tree: RowTree) -> ScriptedSourceCache:
        return HaltingCache(self, context_length, tree)


class HaltingCache(ScriptedSourceCache):
    def encode(self, source: Sequence[int], settled: Settled | None = None) -> int:
        layers = super().encode(source)
        cosine = 0.87 if ord("!") in source else 0.96
        before = np.array([[1.0, 0.0]], np.float32)
        after = np.array([[cosine, math.sqrt(1 - cosine**2)]], np.float32)
        if settled is None or not settled(1, before, after):
            return layers
        if ord("!") in source:
            self.engine = ScriptedEngine([0, *b"wrong"])
        return 1


Make = Callable[[ScriptedEngine], Model]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    models: list[Model] = []

    def make(engine: ScriptedEngine) -> Model:
        monkeypatch.setattr("skipstone.model.open_engine", lambda _bundle, _options: engine)
        monkeypatch.setattr("skipstone.model.measure", lambda _engine, **_: CHEAP_DRAFTS)
        encoder = ENCODER if engine.encoder is not None else None
        models.append(Model(write_bundle(tmp_path / f"bundle-{len(models)}", encoder=encoder)))
        return models[-1]

    yield make
    for model in models:
        model.close()


def test_the_margin_falls_to_where_the_exit_begins_to_err(opened: Make) -> None:
    model = opened(HalfSureTranslator(bytes))
    outcome = calibrate(model, SAMPLES, CalibrationOptions(bound=BOUND))
    assert outcome.value == 0.5
    *held, failed = outcome.trials
    assert [trial.value for trial in held][-1] == 0.5
    assert all((trial.mean_loss, trial.holds) == (0.0, True) for trial in held)
    assert (failed.value, failed.holds) == (0.45, False)
    assert 0.15 < failed.mean_loss <= 0.25  # the first tokens must be surer, then every fourth is wrong
    assert failed.p_value == 1.0
    # three of four tokens leave early where the exit is sure, all but the first few in the end
    assert 0.6 < held[-1].saved < 0.76 < failed.saved < 1


def test_a_larger_bound_lets_the_margin_fall_to_nothing(opened: Make) -> None:
    model = opened(HalfSureTranslator(bytes))
    options = CalibrationOptions(bound=RiskBound(0.6, 0.9))
    outcome = calibrate(model, SAMPLES, options)
    assert outcome.value == 0.0
    assert [trial.value for trial in outcome.trials] == list(options.grid)
    assert sorted(options.grid, reverse=True) == list(options.grid)


def test_quality_counts_only_what_the_reference_minds(opened: Make) -> None:
    """Where the whole model is as wrong as it can be, leaving early loses nothing."""
    model = opened(HalfSureTranslator(bytes))
    options = CalibrationOptions(risk="quality", bound=BOUND, values=(0.9, 0.2, 0.1))
    hopeless = [Sample(sample.text, "Z") for sample in SAMPLES]
    assert calibrate(model, hopeless, options).value == 0.1
    exact = [Sample(sample.text, sample.text) for sample in SAMPLES]
    assert calibrate(model, exact, options).value == 0.9


def test_the_encoders_threshold_falls_to_where_stopping_does_harm(opened: Make) -> None:
    model = opened(HaltingTranslator(bytes))
    samples = [Sample(f"{sample.text}!" if n % 2 else sample.text) for n, sample in enumerate(SAMPLES)]
    outcome = calibrate(model, samples, CalibrationOptions(knob="encoder-saturation", bound=BOUND))
    assert outcome.value == 0.875
    saved = {trial.value: trial.saved for trial in outcome.trials}
    assert (saved[0.97], saved[0.95], saved[0.875], saved[0.85]) == (0.0, 0.25, 0.25, 0.5)
    assert outcome.trials[-1].mean_loss > 0.3


def test_where_the_first_threshold_fails_nothing_is_chosen(opened: Make) -> None:
    model = opened(HalfSureTranslator(bytes))
    outcome = calibrate(model, SAMPLES, CalibrationOptions(bound=BOUND, values=(0.2, 0.1)))
    assert outcome.value is None
    assert len(outcome.trials) == 1
    record = outcome.record(DIGEST)
    assert (record.value, record.mean_loss) == (None, None)


def test_a_decoder_is_calibrated_on_prompts(opened: Make) -> None:
    script = SAMPLES[0].text.encode() + b" and on it goes, as it always did before."
    model = opened(HalfSure(script))
    options = CalibrationOptions(bound=BOUND, max_new_tokens=30, values=(0.9, 0.6, 0.3))
    outcome = calibrate(model, [SAMPLES[0]] * 24, options)
    assert outcome.value == 0.6
    with pytest.raises(UsageError, match=r"--knob encoder-saturation: .*decoder alone.*early-exit-margin"):
        calibrate(model, SAMPLES, CalibrationOptions(knob="encoder-saturation", bound=BOUND))


def test_a_model_that_cannot_stop_early_is_refused(opened: Make) -> None:
    engine = ScriptedTranslator(bytes)
    model = opened(engine)
    with pytest.raises(UsageError, match=r"encoder has no early exits.*--encoder-exits"):
        calibrate(model, SAMPLES, CalibrationOptions(knob="encoder-saturation", bound=BOUND))
    engine.exits = (2,)
    with pytest.raises(UsageError, match=r"no early exits.*--exits"):
        calibrate(model, SAMPLES, CalibrationOptions(bound=BOUND))


def test_progress_is_told_text_by_text(opened: Make) -> None:
    told: list[tuple[str, int, int]] = []
    options = CalibrationOptions(bound=BOUND, values=(0.9, 0.2, 0.1))
    calibrate(opened(HalfSureTranslator(bytes)), SAMPLES, options, lambda *at: told.append(at))
    assert [done for _, done, _ in told] == list(range(72))
    assert {total for _, _, total in told} == {96}
    assert [name for name, done, _ in told if done % 24 == 0] == [
        "whole model",
        "early-exit-margin 0.9",
        "early-exit-margin 0.2",
    ]


def test_a_text_that_does_not_fit_is_named(opened: Make) -> None:
    samples = [*SAMPLES, Sample("x" * 300, where="--prompts held_out.jsonl, line 25")]
    with pytest.raises(UsageError, match=r"held_out\.jsonl, line 25: source of 301 tokens"):
        calibrate(opened(HalfSureTranslator(bytes)), samples, CalibrationOptions(bound=BOUND))


def test_too_few_texts_are_refused() -> None:
    check_samples([Sample("x")] * 149, RiskBound())
    with pytest.raises(UsageError, match=r"148 texts; .*149 or more are needed"):
        check_samples([Sample("x")] * 148, RiskBound())


@pytest.mark.parametrize(
    ("values", "words"), [((0.5, 1.5), "1.5"), ((0.5, 0.5), "must fall"), ((0.5, 0.6), "must fall")]
)
def test_thresholds_that_mean_nothing_are_refused(values: tuple[float, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        CalibrationOptions(values=values)


@pytest.mark.parametrize(
    ("early", "whole", "reference", "text", "quality"),
    [
        ("abcd", "abcd", "abcx", 0.0, 0.0),
        ("abxd", "abcd", "abcd", 0.25, 0.25),
        ("abcd", "abxd", "abcd", 0.25, 0.0),  # better than the whole model
        ("something quite long", "abc", "abc", 1.0, 1.0),
        ("", "", "abc", 0.0, 0.0),
        ("", "ab", "ab", 1.0, 1.0),
        ("a", "", "a", 1.0, 0.0),
    ],
)
def test_losses_are_edits_per_character(
    early: str, whole: str, reference: str, text: float, quality: float
) -> None:
    assert loss("text", early, whole, reference) == text
    assert loss("quality", early, whole, reference) == quality


# --- what a bundle keeps, and using it ---


def calibration(**changes: Any) -> Calibration:
    values = {"knob": "early-exit-margin", "value": 0.6, "risk": "text", "max_loss": 0.02, "confidence": 0.95}
    counts = {"mean_loss": 0.01, "samples": 256, "max_new_tokens": 64, "prompts_sha256": DIGEST}
    return Calibration(**values | counts | changes)


def test_an_outcome_is_kept_used_and_named(opened: Make) -> None:
    engine = HalfSureTranslator(bytes)
    folder = opened(engine).bundle.path
    outcome = calibrate(opened(engine), SAMPLES, CalibrationOptions(bound=BOUND, max_new_tokens=64))
    store_calibration(folder, outcome.record(DIGEST))
    with Model(open_bundle(folder)) as model:
        text = SAMPLES[0].text
        result = model.generate(source=text, adaptive=model.calibrated())
        assert result.text == text
        assert result.stats.lossy
        assert result.stats.rounds_by_drafter["exit 1"] > 20
        assert result.stats.guarantee == Guarantee("text", 0.1, 0.9, 24, 64)
        assert model.generate(source=text).stats.guarantee is None
        with pytest.raises(
            UsageError, match=r"encoder-saturation calibrated: .*skipstone calibrate .*--knob"
        ):
            model.calibrated("encoder-saturation")


def test_a_calibrated_margin_falls_as_when_it_was_calibrated(opened: Make) -> None:
    """Not over however many tokens are now allowed: the threshold of equation 5 depends on that."""
    model = opened(HalfSureTranslator(bytes))
    shown = Guarantee("text", 0.1, 0.9, 24, 40)
    given = AdaptiveOptions(early_exit_margin=0.45, guarantee=shown)
    text = SAMPLES[0].text
    plain = AdaptiveOptions(early_exit_margin=0.45)
    expected = model.generate(source=text, max_new_tokens=40, adaptive=plain).text
    assert model.generate(source=text, max_new_tokens=400, adaptive=given).text == expected
    assert model.generate(source=text, max_new_tokens=400, adaptive=plain).text != expected


def test_where_nothing_was_shown_nothing_stops_early(opened: Make) -> None:
    folder = opened(HalfSureTranslator(bytes)).bundle.path
    store_calibration(folder, calibration(value=None, mean_loss=None))
    with Model(open_bundle(folder)) as model:
        result = model.generate(source="a text", strategy="aggressive", adaptive=model.calibrated())
        assert (result.text, result.stats.lossy) == ("a text", False)


def test_a_calibration_replaces_the_one_of_its_knob_alone(tmp_path: Path) -> None:
    before = write_bundle(tmp_path / "bundle").manifest
    other = calibration(knob="encoder-saturation", value=0.9)
    for kept in (calibration(), other, calibration(value=0.3)):
        store_calibration(tmp_path / "bundle", kept)
    after = open_bundle(tmp_path / "bundle").manifest
    assert after.calibrations == (other, calibration(value=0.3))
    assert after.model_copy(update={"calibrations": ()}) == before


def test_a_manifest_of_before_calibrations_is_read(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    raw = json.loads((tmp_path / MANIFEST_NAME).read_text())
    del raw["calibrations"]
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(raw))
    assert open_bundle(tmp_path).manifest.calibrations == ()


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ([calibration(), calibration()], "at most one of each"),
        ([{**calibration().model_dump(), "value": 2.0}], r"calibrations\.0\.value"),
        ([{**calibration().model_dump(), "knob": "top-p"}], r"calibrations\.0\.knob"),
    ],
)
def test_calibrations_that_cannot_be_are_refused(tmp_path: Path, kept: list[Any], words: str) -> None:
    write_bundle(tmp_path)
    raw = json.loads((tmp_path / MANIFEST_NAME).read_text())
    raw["calibrations"] = [entry if isinstance(entry, dict) else entry.model_dump() for entry in kept]
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=words):
        open_bundle(tmp_path)


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_a_refusing_disk_leaves_the_bundle_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    write_bundle(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def refuse(path: Path, *_arguments: object, **_options: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, step, refuse)
    with pytest.raises(BundleError, match=r"manifest\.json: cannot be written: .*No space"):
        store_calibration(tmp_path, calibration())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# --- the file ---


def test_lines_hold_texts_and_references(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        '{"source": "teh", "target": "the"}\n\n{"source": "a eror", "reference": "an error", "prompt": "x"}\n'
    )
    samples = read_samples(file, "source", references=True)
    assert samples == (
        Sample("teh", "the", f"--prompts {file}, line 1"),
        Sample("a eror", "an error", f"--prompts {file}, line 3"),
    )
    file.write_text('{"prompt": "def f("}\n')
    assert [sample.text for sample in read_samples(file, "prompt", references=False)] == ["def f("]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not an object"),
        ('{"source": ""}', "line 2: no text under the key 'source'"),
        ('{"source": 5, "target": "x"}', "line 2: no text under the key 'source'"),
        ('{"source": "x"}', "line 2: no text under the key 'reference' or 'target'"),
        ('{"source": "x", "reference": 3}', "line 2: no text under the key 'reference' or 'target'"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "p.jsonl").write_text(f'{{"source": "a", "target": "b"}}\n{line}\n')
    with pytest.raises(UsageError, match=words):
        read_samples(tmp_path / "p.jsonl", "source", references=True)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b"\xff\xfe")
    for file in (tmp_path / "p.jsonl", tmp_path / "nowhere"):
        with pytest.raises(UsageError, match=rf"--prompts {file}: cannot be read"):
            read_samples(file, "source", references=False)


def test_what_a_line_must_hold_depends_on_the_model(tmp_path: Path) -> None:
    assert key_of(write_bundle(tmp_path / "decoder").manifest) == "prompt"
    assert key_of(write_bundle(tmp_path / "translator", encoder=ENCODER).manifest) == "source"
