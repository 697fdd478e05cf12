"""Ranges that calibration finds, against eager torch; texts it takes and writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tokenizers import Tokenizer

from skipstone.bundle import ModelFacts
from skipstone.errors import UsageError
from skipstone.exporters.checkpoint import load_eager
from skipstone.exporters.formats.onnx.calibration import (
    NUM_TOKENS,
    measure_ranges,
    read_tokens,
    write_tokens,
)
from skipstone.exporters.formats.onnx.graphs import graphs_of
from skipstone.exporters.formats.onnx.modules import cut_for_graphs
from tests.exporters.conftest import MakeTiny

pytestmark = pytest.mark.slow
SLOTS = 32
Traced = tuple[Mapping[str, ir.Model], Any]
FACTS = ModelFacts(
    name="tiny",
    architecture="LlamaForCausalLM",
    hidden_size=64,
    num_layers=4,
    vocab_size=320,
    context_length=SLOTS,
    parameters=1,
    bos_token_id=0,
)


@pytest.fixture(scope="module")
def traced(tiny: MakeTiny) -> Traced:
    """Graphs of a tiny model cut after layer 1, and its embeddings."""
    parts = cut_for_graphs(tiny("llama"), (1,), None, SLOTS)
    table: Any = parts.embedding.table
    return dict(graphs_of(parts, 64)), table.weight.numpy()


def test_the_ranges_are_those_of_the_eager_model(traced: Traced, tiny: MakeTiny) -> None:
    tokens = np.random.default_rng(0).integers(3, 260, SLOTS).tolist()
    ranges = measure_ranges(*traced, tokens, SLOTS)
    with torch.no_grad():
        states = load_eager(tiny("llama"))(torch.tensor([tokens]), output_hidden_states=True)
    for part, index in (("segment_0", 1), ("segment_1", 1)):
        name = "hidden_out" if part == "segment_0" else "hidden"
        entering = states.hidden_states[index]
        assert ranges[part][name].low == pytest.approx(float(entering.min()), abs=1e-3)
        assert ranges[part][name].high == pytest.approx(float(entering.max()), abs=1e-3)
    assert ranges["head"]["logits"].high == pytest.approx(float(states.logits.max()), abs=1e-3)


def test_what_the_model_writes_is_the_same_every_time_and_likely_to_it(
    traced: Traced, tiny: MakeTiny
) -> None:
    tokens = write_tokens(*traced, FACTS, SLOTS)
    assert len(tokens) == NUM_TOKENS
    assert tokens == write_tokens(*traced, FACTS, SLOTS)
    assert tokens[::SLOTS] == [FACTS.bos_token_id] * (NUM_TOKENS // SLOTS)
    with torch.no_grad():
        scores = load_eager(tiny("llama"))(torch.tensor(tokens).reshape(-1, SLOTS)).logits.log_softmax(-1)
    written = torch.tensor(tokens).reshape(-1, SLOTS)[:, 1:, None]
    likely = float(scores[:, :-1].gather(-1, written).mean())
    chance = float(scores[:, :-1].mean())
    assert likely > chance + 0.5


def test_a_text_that_is_too_short_is_refused(tiny: MakeTiny, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("too short", encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(tiny("llama") / "tokenizer.json"))
    with pytest.raises(UsageError, match=r"--calibration .*text\.txt: .* tokens, at least 64 are needed"):
        read_tokens(text, tokenizer)
    text.write_text("the other day " * 1000, encoding="utf-8")
    assert len(read_tokens(text, tokenizer)) == NUM_TOKENS
