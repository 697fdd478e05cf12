"""Bundles on several engines: which belong together, what ran where, and that nothing of the output changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import skipstone.runtimes.generate as generate_module
import skipstone.runtimes.policies.auto as auto_module
from skipstone.benchmark.lossless import first_difference
from skipstone.bundle import Bundle, CostCurve, EncoderFacts, open_bundle
from skipstone.errors import BundleError, EngineError, UsageError, VocabularyMismatchError
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.engines import EngineOptions
from skipstone.runtimes.engines.eager import EagerEngine
from skipstone.runtimes.engines.executorch import ExecuTorchEngine
from skipstone.runtimes.engines.executorch.engine import methods_of
from skipstone.runtimes.engines.llamacpp import LlamaCppEngine
from skipstone.runtimes.engines.placement import Placement, check_same_model, open_placed
from skipstone.runtimes.generate import GenerationLimits, generate
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.sampling import Sampler, SamplingConfig
from skipstone.runtimes.session import Session
from skipstone.runtimes.strategies import Materials, StrategyOptions, make_policy
from skipstone.runtimes.text import TextCodec
from tests.conftest import Export
from tests.runtimes.even_time import EvenTime

pytestmark = pytest.mark.engine
TOKENS = 32
TEXTS = ("def read_lines(path):\n", "import os\nimport ")
STRATEGIES = ("layerskip", "staged", "text", "prompt-lookup", "katz", "recycling", "auto")


@pytest.fixture
def bundles(tiny_bundle: Bundle, tiny_executorch_bundle: Bundle) -> tuple[Bundle, Bundle]:
    return tiny_bundle, tiny_executorch_bundle


def altered(bundle: Bundle, **model: Any) -> Bundle:
    """The same bundle, saying something else of its model."""
    manifest = bundle.manifest
    facts = manifest.model.model_copy(update=model)
    return Bundle(bundle.path, manifest.model_copy(update={"model": facts}))


def test_bundles_of_one_checkpoint_and_the_same_cuts_belong_together(bundles: tuple[Bundle, Bundle]) -> None:
    check_same_model(*bundles)


def test_another_checkpoint_is_refused_by_its_hash(bundles: tuple[Bundle, Bundle]) -> None:
    gguf, executorch = bundles
    origin = executorch.manifest.provenance.model_copy(update={"source_sha256": "0" * 64})
    other = Bundle(executorch.path, executorch.manifest.model_copy(update={"provenance": origin}))
    with pytest.raises(BundleError, match=r"made from another checkpoint .*export both from the same one"):
        Placement((gguf, other), (0, 1, 1))


def test_other_exits_are_refused_with_both(bundles: tuple[Bundle, Bundle]) -> None:
    gguf, executorch = bundles
    other = Bundle(executorch.path, executorch.manifest.model_copy(update={"exits": (1, 3)}))
    with pytest.raises(BundleError, match=rf"exits 1, 3, {gguf.path} has 1, 2"):
        Placement((gguf, other), (0, 1, 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 32}, "hidden size 32, .* has 64"),
        ({"num_layers": 5}, "layers 5, .* has 4"),
        (
            {"encoder": EncoderFacts(num_layers=2, max_source_length=9, start_token_id=0)},
            "encoder layers 2, .* has none",
        ),
    ],
)
def test_another_shape_is_refused(bundles: tuple[Bundle, Bundle], change: dict[str, Any], said: str) -> None:
    with pytest.raises(BundleError, match=said):
        check_same_model(bundles[0], altered(bundles[1], **change))


def test_another_tokenizer_is_refused(bundles: tuple[Bundle, Bundle]) -> None:
    gguf, executorch = bundles
    with pytest.raises(VocabularyMismatchError, match="tokens are not those of"):
        check_same_model(gguf, altered(executorch, vocab_size=321))
    files = tuple(
        entry.model_copy(update={"sha256": "0" * 64}) if entry.path == "tokenizer.json" else entry
        for entry in executorch.manifest.files
    )
    other = Bundle(executorch.path, executorch.manifest.model_copy(update={"files": files}))
    with pytest.raises(VocabularyMismatchError, match="tokens are not those of"):
        check_same_model(gguf, other)


def test_a_placement_says_what_runs_where(bundles: tuple[Bundle, Bundle]) -> None:
    gguf, executorch = (bundle.path.name for bundle in bundles)
    assert [str(stretch) for stretch in Placement(bundles, (1, 0, 0)).stretches()] == [
        f"segment 0 (layers 0–0): executorch, {executorch}/",
        f"segments 1–2 (layers 1–3): gguf, {gguf}/",
    ]
    amid = Placement(bundles, (0, 1, 0)).stretches()
    assert [stretch.segments for stretch in amid] == [(0, 0), (1, 1), (2, 2)]


def test_placements_are_named_apart(bundles: tuple[Bundle, Bundle], tiny_qwen_bundle: Bundle) -> None:
    placements = [
        Placement(bundles, (0, 1, 1)),
        Placement(bundles, (1, 0, 0)),
        Placement(bundles, (0, 1, 1), drafts=1),
        Placement(bundles[::-1], (0, 1, 1), drafts=1),
    ]
    assert len({placement.name for placement in placements}) == 4
    assert Placement(bundles, (0, 1, 1)).name == Placement(bundles[::-1], (1, 0, 0)).name, "the same runs"
    engine = open_placed(placements[0], EngineOptions(threads=1))
    assert engine.placement == placements[0].name
    engine.close()


def test_the_near_tie_margin_is_the_widest_of_those_that_run(bundles: tuple[Bundle, Bundle]) -> None:
    margins = [bundle.manifest.near_tie_margin for bundle in bundles]
    assert Placement(bundles, (0, 1, 1)).near_tie_margin == max(margins)
    assert Placement(bundles, (0, 0, 0)).near_tie_margin == margins[0]
    assert Placement(bundles, (1, 1, 1)).near_tie_margin == margins[1]


def test_engines_load_and_keep_only_what_they_run(bundles: tuple[Bundle, Bundle]) -> None:
    engine = open_placed(Placement(bundles, (1, 0, 0)), EngineOptions(threads=1))
    gguf, executorch = engine.engines[0], engine.engines[1]
    assert isinstance(gguf, LlamaCppEngine)
    assert isinstance(executorch, ExecuTorchEngine)
    assert sorted(gguf._parts) == [1, 2]
    assert gguf._head is None
    with Session(engine, 64) as session:
        session.prefill([1, 2, 3])
        lanes = [sorted(cache._lanes) for cache in session._cache._caches if hasattr(cache, "_lanes")]  # type: ignore[attr-defined]
    assert lanes == [[1, 2]]
    loaded = set(executorch._idle[0]._methods)
    assert loaded == {"embed", "segment_0", "draft_head", "compact"}
    manifest = executorch._manifest
    assert methods_of(manifest, None) == {entry.name for entry in manifest.program.methods}
    engine.close()


def test_options_of_one_engine_are_the_first_bundles(bundles: tuple[Bundle, Bundle]) -> None:
    """K and V in half precision are llama.cpp's; ExecuTorch has none, and refuses layers on a GPU."""
    engine = open_placed(Placement(bundles, (1, 0, 0)), EngineOptions(threads=1, kv_type="f16"))
    assert engine.kv_type == "f16"
    engine.close()
    with pytest.raises(UsageError, match="--kv-type f16"):
        open_placed(Placement(bundles[::-1], (1, 0, 0)), EngineOptions(threads=1, kv_type="f16"))
    with pytest.raises((UsageError, EngineError), match="GPU"):
        open_placed(Placement(bundles, (1, 0, 0)), EngineOptions(threads=1, gpu_layers=1))


class Placed:
    """The shipped model on both engines."""

    def __init__(self, gguf: Path, executorch: Path, owners: tuple[int, ...]) -> None:
        self.bundles = open_bundle(gguf), open_bundle(executorch)
        self.placement = Placement(self.bundles, owners)
        self.engine = open_placed(self.placement, EngineOptions(threads=1))
        facts = self.bundles[0].manifest.model
        codec = TextCodec(self.bundles[0].file(self.bundles[0].manifest.tokenizer), facts.vocab_size)
        self.prompts = [codec.encode(text) for text in TEXTS]
        self._plain: dict[tuple[int, ...], list[int]] = {}

    def plain(self, prompt: list[int]) -> list[int]:
        """What plain decoding gives."""
        key = tuple(prompt)
        if key not in self._plain:
            self._plain[key] = self.generated("plain", prompt)[0]
        return self._plain[key]

    def generated(self, strategy: str, prompt: list[int]) -> tuple[list[int], int]:
        """Greedy tokens, and how many of them were accepted drafts. Further rows are nearly free, so much is drafted."""
        exits = self.engine.exits
        curve = CostCurve(
            widths=(1, 32),
            segments=((1e-3, 1.5e-3),) * len(exits),
            draft_head=(1e-4, 1e-4),
            threads=1,
            machine="flat",
        )
        costs = CostModel(curve, exits)
        policy = make_policy(strategy, Materials(self.engine, costs, StrategyOptions()))
        with Session(self.engine, 200) as session:
            steps = list(
                generate(session, prompt, policy, Sampler(SamplingConfig()), GenerationLimits(TOKENS), costs)
            )
        return [token for step in steps for token in step.tokens], sum(step.accepted for step in steps)


@pytest.fixture(
    scope="module", params=["f32, llama.cpp drafts", "f32, ExecuTorch drafts", "q8_0, ExecuTorch drafts"]
)
def placed(
    request: pytest.FixtureRequest, export_coder: Export, coder_bundle_executorch: Path
) -> Iterator[Placed]:
    scheme, drafter, _ = request.param.replace(",", "").split()
    gguf = export_coder(scheme)
    segments = len(open_bundle(gguf, verify_hashes=False).manifest.exits) + 1
    drafts = 0 if drafter == "llama.cpp" else 1
    owners = (drafts, *[1 - drafts] * (segments - 1))
    placed = Placed(gguf, coder_bundle_executorch, owners)
    yield placed
    placed.engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_generates_what_plain_decoding_of_the_same_placement_does(
    placed: Placed, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In f32 the very tokens; quantised, a divergence may occur at a near-tie only."""
    for module in (generate_module, auto_module):
        monkeypatch.setattr(module, "time", EvenTime(1e-3))
    accepted = 0
    for prompt in placed.prompts:
        plain = placed.plain(prompt)
        found, drafts = placed.generated(strategy, prompt)
        accepted += drafts
        at = first_difference(plain, found)
        if at is not None:
            assert placed.bundles[0].manifest.quantization.scheme != "f32", "f32 must agree token by token"
            with Session(placed.engine, 200) as session:
                logits = session.prefill([*prompt, *plain[:at]])
            gap = float(abs(logits[plain[at]] - logits[found[at]]))
            assert gap <= placed.placement.near_tie_margin
    assert accepted > 5, "nothing was drafted, so nothing was shown"


@pytest.mark.slow
def test_every_exit_of_the_shipped_model_has_the_logits_of_eager(
    placed: Placed, coder_checkpoint: Path
) -> None:
    if placed.bundles[0].manifest.quantization.scheme != "f32":
        return  # quantised weights are other weights
    exits, text = placed.engine.exits, placed.prompts[0]
    eager = EagerEngine.from_checkpoint(coder_checkpoint, exits[:-1], placed.engine.draft_vocabulary)
    with Session(placed.engine, 128) as ours, Session(eager, 128) as oracle:
        np.testing.assert_allclose(ours.prefill(text), oracle.prefill(text), atol=1e-3)
        for session in (ours, oracle):
            session.push([20, 21, 22], [ROOT, 0, ROOT])
        rows = list(range(3))
        for exit_layer in exits:
            found, expected = ours.advance(rows, exit_layer), oracle.advance(rows, exit_layer)
            np.testing.assert_allclose(np.stack(found), np.stack(expected), atol=1e-3)
            if exit_layer != exits[-1]:
                states = [np.stack([s._rows.hidden[row] for row in rows]) for s in (ours, oracle)]  # type: ignore[misc]
                np.testing.assert_allclose(states[0], states[1], atol=1e-3 * np.abs(states[1]).max())
