"""The shipped models, compressed, their codes carried into both engines: strategies say what plain decoding says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import skipstone.model as model_module
import skipstone.runtimes.generate as generate_module
import skipstone.runtimes.policies.auto as auto_module
from skipstone.benchmark.lossless import first_difference
from skipstone.bundle import Bundle, CostCurve
from skipstone.exporters.compress.recipe import parse_steps
from skipstone.exporters.compress.run import compress
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.inputs import encode_input
from skipstone.model import load_model
from skipstone.results import GenerationResult
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.session import Session
from skipstone.runtimes.strategies import STRATEGIES, StrategyOptions
from tests.conftest import ROOT
from tests.runtimes.even_time import EvenTime

pytestmark = [pytest.mark.slow, pytest.mark.engine]

CONTEXT, NEW = 128, 24
PROMPTS = ("def read_lines(path):\n    with open(path) as file:\n", "class Stack:\n    def __init__(self):\n")
PAIRS = (ROOT / "samples/prompts/speller_held_out.jsonl").read_text("utf-8").splitlines()
SOURCES = tuple(json.loads(line)["source"] for line in PAIRS[5:13:4])
NARROW = "prune_width:share=0.25,by=magnitude,refit=false"
SEARCH = "generations=1,offspring=2,tokens=256,method=gptq"


@dataclass(frozen=True)
class Case:
    """A shipped model, and what it loses: layers, a quarter of its neurons, bits; its codes are of several layouts."""

    model: str
    scheme: str
    layouts: frozenset[str]
    steps: tuple[str, ...]

    @property
    def text(self) -> Path:
        """What its steps learn from."""
        return ROOT / "samples/calibration" / ("code.jsonl" if self.model == "coder" else "prose.jsonl")


HALF = {
    "coder": ("drop_layers:count=6,by=alternate",),
    "speller": ("drop_layers:count=3,by=alternate,stack=encoder", "drop_layers:layers=2"),
}
CASES = {
    "coder on llama.cpp": Case(
        "coder",
        "q4_0",
        frozenset({"q4_0", "q5_0"}),
        (*HALF["coder"], NARROW, f"search:over=bits,scheme=q4_0,levels=q4_0+q5_0,target_size=3.3MB,{SEARCH}"),
    ),
    "coder on ExecuTorch": Case(
        "coder",
        "8da4w",
        frozenset({"int4_g32", "int8_channel"}),
        ("drop_layers:count=8,by=top", NARROW, "quantize:scheme=8da4w,method=gptq,mix=1.k_proj:8da8w"),
    ),
    "speller on llama.cpp": Case(
        "speller",
        "q4_k_m",
        frozenset({"q4_k", "q6_k", "q8_0"}),
        (*HALF["speller"], NARROW, "quantize:scheme=q4_k_m,method=gptq,mix=encoder.0:q8_0"),
    ),
    "speller on ExecuTorch": Case(
        "speller",
        "8da4w",
        frozenset({"int4_g32", "int8_channel"}),
        (
            "drop_layers:count=5,by=top,stack=encoder",
            "drop_layers:count=1,by=top",
            NARROW,
            "quantize:scheme=8da4w,method=gptq,mix=encoder.0:8da8w",
        ),
    ),
}


def flat_costs(_bundle: Bundle, engine: Engine, _options: object) -> CostModel:
    """Further rows are nearly free, so that much is drafted on however busy a machine."""
    seconds = (1e-3, 1.5e-3)
    segments = (seconds,) * len(engine.exits)
    return CostModel(
        CostCurve(widths=(1, 32), segments=segments, draft_head=(1e-4, 1e-4), threads=1, machine="flat"),
        engine.exits,
    )


class Opened:
    """A bundle, and what plain decoding says."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.model = load_model(bundle.path, threads=1, context_length=CONTEXT)
        encodes = bundle.manifest.model.encoder is not None
        self.inputs: list[dict[str, Any]] = (
            [{"source": text} for text in SOURCES] if encodes else [{"prompt": text} for text in PROMPTS]
        )
        self.plain = [self.says("plain", given) for given in self.inputs]

    def says(self, strategy: str, given: dict[str, Any], guide: str | None = None) -> GenerationResult:
        """What a strategy generates; a draft model is the bundle itself."""
        return self.model.generate(
            **given,
            max_new_tokens=NEW,
            strategy=strategy,
            ignore_eos=True,
            options=StrategyOptions(num_assistant_tokens=4, guide=guide),
            assistant_model=str(self.bundle.path) if strategy == "draft-model" else None,
        )

    def gap(self, given: dict[str, Any], text: list[int], one: int, other: int) -> float:
        """How far apart plain decoding scores two tokens after a text."""
        model = self.model
        read = encode_input(model.codec, self.bundle.manifest.model, given.get("prompt"), given.get("source"))
        with Session(model.engine, CONTEXT) as session:
            read.enter(session)
            logits = session.prefill([*read.prompt, *text])
        return float(abs(logits[one] - logits[other]))


@pytest.fixture(scope="module", params=CASES)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    case, root = CASES[request.param], tmp_path_factory.mktemp("shipped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKIPSTONE_CACHE", str(root / "cache"))
        record = compress(
            ROOT / "samples/models" / case.model,
            root / "small",
            parse_steps(case.steps),
            calibration=case.text,
            calibration_tokens=256,
        )
    bundle = export_checkpoint(
        root / "small",
        root / "out",
        context_length=None
        if case.scheme == "q4_0"
        else CONTEXT,  # of such a decoder it is given when it is opened
        max_source_length=64 if case.model == "speller" else None,
    )
    assert bundle.manifest.compression == record
    assert bundle.manifest.quantization.scheme == case.scheme
    assert bundle.manifest.quantization.codes_sha256 is not None
    assert bundle.manifest.exits
    assert layouts_of(record.steps[-1].details) >= case.layouts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "_costs_of", flat_costs)
        patch.setattr(generate_module, "time", EvenTime(1e-3))
        patch.setattr(auto_module, "time", EvenTime(0.0))
        opened = Opened(bundle)
        yield opened
        opened.model.close()


def layouts_of(details: Any) -> set[str]:
    """The layouts that a step chose, or the step that a search found."""
    return set((details["chosen"][0]["details"] if "chosen" in details else details)["layouts"])


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "plain"])
def test_a_strategy_says_what_plain_decoding_of_the_compressed_model_says(
    opened: Opened, strategy: str
) -> None:
    """But for near-ties, as of any quantised model."""
    accepted, copies = 0, strategy == "aggressive" and "prompt" in opened.inputs[0]
    for given, plain in zip(opened.inputs, opened.plain, strict=True):
        found = opened.says(strategy, given, plain.text if copies else None)
        accepted += found.stats.accepted
        assert len(found.tokens) == len(plain.tokens) == NEW
        at = first_difference(plain.tokens, found.tokens)
        if at is None:
            continue
        gap = opened.gap(given, list(plain.tokens[:at]), plain.tokens[at], found.tokens[at])
        assert gap <= opened.bundle.manifest.parity.near_tie_margin
    assert accepted > 0, "nothing was drafted, so nothing was shown"
