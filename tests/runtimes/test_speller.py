"""The shipped corrector on every engine: every strategy says what plain decoding says, and quantising costs little."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import skipstone.runtimes.generate as generate_module
import skipstone.runtimes.policies.auto as auto_module
from skipstone.benchmark.lossless import first_difference
from skipstone.bundle import CostCurve, open_bundle
from skipstone.devices.curves import new_curve
from skipstone.exporters.tune.correction import edit_distance
from skipstone.model import Model, load_model
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.session import Session
from skipstone.runtimes.strategies import STRATEGIES
from tests.conftest import ROOT, Export
from tests.runtimes.even_time import EvenTime

pytestmark = [pytest.mark.slow, pytest.mark.engine]

PAIRS = [
    json.loads(line)
    for line in (ROOT / "samples" / "prompts" / "speller_held_out.jsonl").read_text("utf-8").splitlines()
]
SOURCES = [pair["source"] for pair in PAIRS[5:29:4]]
SCHEMES = ["f32", "q8_0", "q4_0", "executorch none", "executorch 8da4w", "onnx none", "onnx 8da4w"]
LOST = 0.01  # of the characters, by quantising


def keep_flat_curve(folder: Path, file: Path) -> None:
    """A cost curve by which further rows are nearly free, so that all drafts are long however busy the machine."""
    bundle, options = open_bundle(folder), EngineOptions(threads=1)
    with closing(open_engine(bundle, options)) as engine:
        seconds = (1e-3, 1.5e-3)
        segments = (seconds,) * len(engine.exits)
        flat = CostCurve(
            widths=(1, 64), segments=segments, draft_head=(1e-4, 1e-4), threads=1, machine="flat"
        )
        measured = new_curve(bundle, engine, options, flat, 0.0)
    file.write_text(measured.model_dump_json())


class Opened:
    """A bundle, and what plain decoding makes of the sources."""

    def __init__(self, folder: Path, curve: Path) -> None:
        keep_flat_curve(folder, curve)
        self.model: Model = load_model(folder, threads=1, context_length=192, curve=curve)
        self.exact = self.model.bundle.manifest.quantization.scheme in ("f32", "none")
        self.margin = self.model.bundle.manifest.parity.near_tie_margin
        self.plain = [self.tokens("plain", source)[0] for source in SOURCES]

    def tokens(self, strategy: str, source: str) -> tuple[list[int], int]:
        """What a strategy generates, and how many of its drafts were accepted."""
        result = self.model.generate(source=source, max_new_tokens=96, strategy=strategy)
        return list(result.tokens), result.stats.accepted

    def gap(self, source: str, text: list[int], one: int, other: int) -> float:
        """How far apart plain decoding scores two tokens after a text."""
        encoder = self.model.bundle.manifest.model.encoder
        assert encoder is not None
        with Session(self.model.engine, 192) as session:
            session.encode(self.model.codec.source(source))
            logits = session.prefill([encoder.start_token_id, *text])
        return float(abs(logits[one] - logits[other]))


@pytest.fixture(scope="module", params=SCHEMES)
def opened(
    request: pytest.FixtureRequest, export_speller: Export, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Opened]:
    opened = Opened(export_speller(request.param), tmp_path_factory.mktemp("curve") / "flat.json")
    yield opened
    opened.model.close()


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name not in ("plain", "draft-model")])
def test_a_strategy_corrects_as_plain_decoding_does(
    opened: Opened, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_module, "time", EvenTime(1e-3))
    monkeypatch.setattr(auto_module, "time", EvenTime(0.0))
    accepted = 0
    for source, plain in zip(SOURCES, opened.plain, strict=True):
        found, drafts = opened.tokens(strategy, source)
        accepted += drafts
        at = first_difference(plain, found)
        if at is None:
            continue
        assert not opened.exact, "f32 must agree token by token"
        assert opened.gap(source, plain[:at], plain[at], found[at]) <= opened.margin
    assert accepted > (40 if strategy == "aggressive" else 0), "next to nothing was drafted"


@pytest.mark.parametrize("scheme", ["q8_0", "q4_0", "executorch 8da4w", "onnx 8da4w"])
def test_quantising_costs_less_than_one_character_in_a_hundred(scheme: str, export_speller: Export) -> None:
    pairs = PAIRS[::4]

    def error_rate(scheme: str) -> float:
        with load_model(export_speller(scheme), threads=1, context_length=192) as model:
            texts = [model.generate(source=p["source"], max_new_tokens=96).text for p in pairs]
        wrong = [edit_distance(text, p["target"]) for text, p in zip(texts, pairs, strict=True)]
        return sum(wrong) / sum(len(p["target"]) for p in pairs)

    assert error_rate(scheme) < error_rate("f32") + LOST
