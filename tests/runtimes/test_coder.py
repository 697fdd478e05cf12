"""The reference model on llama.cpp: every strategy says what plain decoding says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import skipstone.runtimes.generate as generate_module
import skipstone.runtimes.policies.auto as auto_module
from skipstone.benchmark.lossless import first_difference
from skipstone.bundle import Bundle, CostCurve, open_bundle
from skipstone.exporters.checkpoint import open_checkpoint
from skipstone.exporters.formats.gguf.schemes import SCHEMES as EXPORT_SCHEMES
from skipstone.exporters.formats.gguf.schemes import TERNARY
from skipstone.exporters.formats.gguf.vocabulary import tokenizer_keys
from skipstone.exporters.formats.gguf.whole import write_whole
from skipstone.exporters.isolation import run_isolated
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters.base import Drafter
from skipstone.runtimes.drafters.draft_model import DraftModelDrafter
from skipstone.runtimes.drafters.growth import GrowthOptions
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.generate import GenerationLimits, generate
from skipstone.runtimes.sampling import Sampler, SamplingConfig
from skipstone.runtimes.session import Session
from skipstone.runtimes.strategies import STRATEGIES, Materials, StrategyOptions, make_policy
from skipstone.runtimes.text import TextCodec
from tests.conftest import Export
from tests.runtimes.even_time import EvenTime

pytestmark = [pytest.mark.slow, pytest.mark.engine]

PROMPTS = [
    "def read_lines(path):\n    with open(path) as file:\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "zq 93 ;; Lorem 0x1f ipsum\n\t??",
]
TOKENS = 40
SCHEMES = ["f32", "q8_0", "q4_0"]
# Every scheme has kernels of its own; those of the inner exits and of wide batches are what matters here.
OTHER_SCHEMES = [name for name in EXPORT_SCHEMES if name not in (*SCHEMES, *TERNARY)]


def flat_costs(engine: Engine) -> CostModel:
    """Width is nearly free, so that every strategy drafts much; what it costs here is of no interest."""
    widths = (1, 8, 32)
    seconds = (1e-3, 1.1e-3, 1.4e-3)
    curve = CostCurve(
        widths=widths, segments=(seconds,) * len(engine.exits), draft_head=seconds, threads=1, machine=""
    )
    return CostModel(curve, engine.exits)


class Opened:
    """A bundle of one scheme, with another one as its draft model if need be."""

    def __init__(self, bundle: Bundle, draft: Bundle | None = None) -> None:
        options = EngineOptions(threads=1)
        self.engine = open_engine(bundle, options)
        self.draft = None if draft is None else open_engine(draft, options)
        self.exact = bundle.manifest.quantization.scheme == "f32"
        self.margin = bundle.manifest.parity.near_tie_margin
        codec = TextCodec(bundle.file(bundle.manifest.tokenizer), self.engine.vocab_size)
        self.prompts = [codec.encode(text) for text in PROMPTS]
        self.plain = [self.tokens("plain", prompt)[0] for prompt in self.prompts]

    def tokens(self, strategy: str, prompt: list[int]) -> tuple[list[int], int]:
        """What a strategy generates, and how many of its drafts were accepted."""
        costs = flat_costs(self.engine)

        def draft_model(source: Drafter | None, shape: GrowthOptions) -> Drafter:
            assert self.draft is not None
            return DraftModelDrafter(Session(self.draft, 256), costs, "draft", source, shape)

        def guide() -> list[int]:
            """What is to be said, every fifth token of it changed."""
            said = [token for text in self.plain for token in text]
            return [5 if index % 5 == 4 else token for index, token in enumerate(said)]

        given = guide if strategy == "aggressive" else None
        materials = Materials(self.engine, costs, StrategyOptions(), draft_model=draft_model, guide=given)
        policy = make_policy(strategy, materials)
        with Session(self.engine, 256) as session:
            steps = generate(
                session, prompt, policy, Sampler(SamplingConfig()), GenerationLimits(TOKENS), costs
            )
            made = list(steps)
        return [t for step in made for t in step.tokens], sum(step.accepted for step in made)

    def gap(self, text: list[int], one: int, other: int) -> float:
        """How far apart plain decoding scores two tokens after a text."""
        with Session(self.engine, 256) as session:
            logits = session.prefill(text)
        return float(abs(logits[one] - logits[other]))

    def check(self, strategy: str) -> None:
        """In f32 plain decoding's very tokens; elsewhere a divergence may occur at a near-tie only."""
        accepted = 0
        for prompt, plain in zip(self.prompts, self.plain, strict=True):
            found, drafts = self.tokens(strategy, prompt)
            accepted += drafts
            assert len(found) == len(plain) == TOKENS
            if found == plain:
                continue
            assert not self.exact, "f32 must agree token by token"
            at = first_difference(plain, found)
            assert at is not None
            assert self.gap([*prompt, *plain[:at]], plain[at], found[at]) <= self.margin
        assert accepted > 5, "nothing was drafted, so nothing was shown"

    def close(self) -> None:
        self.engine.close()
        if self.draft is not None:
            self.draft.close()


@pytest.fixture(scope="module", params=SCHEMES)
def opened(request: pytest.FixtureRequest, coder_bundle_f32: Path) -> Iterator[Opened]:
    folder = request.getfixturevalue(f"coder_bundle_{request.param}")
    with closing(Opened(open_bundle(folder), open_bundle(coder_bundle_f32))) as opened:
        yield opened


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "plain"])
def test_a_strategy_generates_what_plain_decoding_does(
    opened: Opened, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_module, "time", EvenTime(1e-3))
    monkeypatch.setattr(auto_module, "time", EvenTime(0.0))
    opened.check(strategy)


@pytest.mark.parametrize("scheme", OTHER_SCHEMES)
def test_early_exits_draft_what_plain_decoding_says_in_every_other_scheme(
    scheme: str, export_coder: Export
) -> None:
    with closing(Opened(open_bundle(export_coder(scheme)))) as opened:
        for strategy in ("layerskip", "staged"):
            opened.check(strategy)


def test_a_gguf_in_a_type_that_quantize_does_not_offer_is_cut_and_drafts_losslessly(
    coder_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint, whole, made = open_checkpoint(coder_checkpoint), tmp_path / "f32.gguf", tmp_path / "iq3.gguf"
    keys = tokenizer_keys(checkpoint, checkpoint.config.vocab_size)
    write_whole(checkpoint, whole, "f32", tokenizer=keys)
    run_isolated(
        "skipstone.exporters.formats.gguf.schemes:quantize_file",
        source=str(whole),
        target=str(made),
        file_type=26,  # LLAMA_FTYPE_MOSTLY_IQ3_S
        imatrix=None,
        threads=1,
    )
    bundle = export_checkpoint(made, tmp_path / "out", exits=(3,))
    assert bundle.manifest.quantization.scheme == "ftype-26"
    with closing(Opened(bundle)) as opened:
        for strategy in ("layerskip", "staged"):
            opened.check(strategy)


def test_the_session_after_speculation_goes_on_as_after_plain_decoding(opened: Opened) -> None:
    prompt, plain = opened.prompts[0], opened.plain[0]
    if not opened.exact:
        plain = opened.tokens("staged", prompt)[0]
    costs = flat_costs(opened.engine)
    policy = make_policy("staged", Materials(opened.engine, costs, StrategyOptions()))
    with Session(opened.engine, 256) as session, Session(opened.engine, 256) as fresh:
        steps = generate(session, prompt, policy, Sampler(SamplingConfig()), GenerationLimits(TOKENS), costs)
        assert [t for step in steps for t in step.tokens] == plain
        assert list(session.tokens) == [*prompt, *plain[:-1]]
        found, expected = session.prefill(plain[-1:]), fresh.prefill([*prompt, *plain])
        np.testing.assert_allclose(found, expected, atol=max(opened.margin, 1e-3))
