"""K and V in every type that llama.cpp keeps them in: size, exactness, trees, rewinding, drafts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from skipstone.bundle import Bundle, open_bundle
from skipstone.devices.curves import curve_key
from skipstone.errors import UsageError
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.engines.llamacpp.engine import LlamaCppEngine
from skipstone.runtimes.engines.llamacpp.kv_types import KV_TYPES, chosen_kv_type
from skipstone.runtimes.engines.llamacpp.library import library
from skipstone.runtimes.jitter import gap_jitter
from skipstone.runtimes.session import Session
from tests.runtimes.greedy import generated
from tests.runtimes.toy_engine import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPT = [68, 69, 70, 32, 71, 72, 40, 300, 12, 9, 301, 70, 32, 71, 72, 40]
QUANTIZED = [name for name, kind in KV_TYPES.items() if kind.is_quantized]
FAR = {"bf16": 0.05, "q8_0": 0.05, "q5_1": 0.1, "q5_0": 0.15}  # rms over the logits' spread; four bits: 0.3


def engine_with(bundle: Bundle, kv_type: str | None) -> LlamaCppEngine:
    engine = open_engine(bundle, EngineOptions(threads=1, kv_type=kv_type))
    assert isinstance(engine, LlamaCppEngine)
    return engine


@pytest.fixture(scope="module")
def bundle(coder_bundle_q8_0: Path) -> Bundle:
    return open_bundle(coder_bundle_q8_0)


@pytest.fixture(params=["q8_0", "q4_0"])
def engine(request: pytest.FixtureRequest, bundle: Bundle) -> Iterator[LlamaCppEngine]:
    with closing(engine_with(bundle, request.param)) as engine:
        yield engine


def state_bytes(engine: LlamaCppEngine, tokens: list[int]) -> int:
    """Of K and V of these tokens, as llama.cpp writes them out."""
    llama = library().llama
    with Session(engine, 128) as session:
        session.prefill(tokens)
        lanes = session._cache._lanes.values()
        return sum(int(llama.llama_state_seq_get_size(lane._context, 0)) for lane in lanes)


def test_every_type_takes_its_share_of_memory_and_stays_close_to_full_precision(bundle: Bundle) -> None:
    tokens = PROMPT * 4
    values = 12 * 2 * 2 * 64 * len(tokens)  # layers, heads, K and V, their width
    found = {}
    for name in KV_TYPES:
        with closing(engine_with(bundle, name)) as engine:
            assert engine.kv_type == curve_key(bundle, engine, EngineOptions(kv_type=name)).kv_type == name
            size = state_bytes(engine, tokens)
            with Session(engine, 128) as session:
                found[name] = (size, session.prefill(tokens))
    exact = found["f32"][1]
    overhead = found["f32"][0] - 4 * values
    for name, (size, logits) in found.items():
        kind = KV_TYPES[name]
        assert 0 <= size - kind.num_bytes(values) <= 2 * overhead + 64, f"{name}: {size} bytes"
        far = float(np.sqrt(((logits - exact) ** 2).mean()) / exact.std())
        assert (far > 0) == (name != "f32")
        assert far <= FAR.get(name, 0.3), f"{name}: {far}"


@pytest.mark.parametrize("strategy", ["layerskip", "staged"])
def test_drafts_change_nothing_with_quantised_k_and_v(engine: LlamaCppEngine, strategy: str) -> None:
    """Against plain decoding with the same type; a divergence may occur at a near-tie only."""
    plain, _ = generated(engine, "plain", PROMPT, 40)
    found, accepted = generated(engine, strategy, PROMPT, 40)
    assert accepted > 3, "nothing was drafted, so nothing was shown"
    at = next(
        (index for index, pair in enumerate(zip(plain, found, strict=True)) if pair[0] != pair[1]), None
    )
    if at is not None:
        text = [*PROMPT, *plain[:at]]
        with Session(engine, 128) as session:
            logits = session.prefill(text)
        assert logits[plain[at]] - logits[found[at]] <= gap_jitter(engine, text)


def test_trees_and_rewinding_leave_what_was_computed_in_one_go(engine: LlamaCppEngine) -> None:
    """Rejected siblings before accepted tokens move what is kept; then half of it is cut off and computed again."""
    with Session(engine, 128) as plain:
        expected = plain.prefill([*PROMPT, *PROMPT])
    margin = max(1e-3, 2 * gap_jitter(engine, [*PROMPT, *PROMPT]))
    with Session(engine, 128) as session:
        session.prefill(PROMPT)
        for first, second in zip(PROMPT[::2], PROMPT[1::2], strict=True):
            _, right = session.push([first + 1, first], [ROOT, ROOT])
            _, after = session.push([second + 1, second], [right, right])
            drafted = session.advance([right, after], session.exits[0])
            assert len(drafted) == 2
            logits = session.advance([after], session.exits[-1])[0]
            session.commit(after)
        np.testing.assert_allclose(logits, expected, atol=margin)
        session.rewind(len(PROMPT) + 4)
        np.testing.assert_allclose(session.prefill(PROMPT[4:]), expected, atol=margin)


def test_what_no_model_or_not_this_one_can_have_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--kv-type q3_k: expected one of f32, f16, bf16, q8_0"):
        chosen_kv_type("q3_k", "q8_0", encodes=False)
    for name in QUANTIZED:
        with pytest.raises(UsageError, match=f"--kv-type {name}: .* encoder-decoder"):
            chosen_kv_type(name, "q8_0", encodes=True)
    assert chosen_kv_type("bf16", "q8_0", encodes=True).name == "bf16"
    assert chosen_kv_type(None, "f32", encodes=False).name == "f32"
    assert chosen_kv_type(None, "q4_0", encodes=False).name == "f16"
