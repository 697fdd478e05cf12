"""Checkpoints and bundles as they are read, against transformers' own hidden states."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from skipstone.bundle import open_bundle
from skipstone.exporters.evaluation.measure import measure, open_artefact
from skipstone.exporters.evaluation.readers import CheckpointReader
from skipstone.exporters.probe import Probe

MakeTiny = Callable[[str], Path]
EXITS = (1, 3)
_RANDOM = np.random.default_rng(5)
PROBES = tuple(
    Probe(tuple(int(token) for token in _RANDOM.integers(2, 300, length))) for length in (40, 17, 2)
)
PAIRS = tuple(Probe((1, *probe.tokens), probe.tokens[::-1]) for probe in PROBES)


def _by_transformers(folder: Path, tokens: tuple[int, ...]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Logits of the last layer and of the exits, from the hidden states that transformers gives out itself."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found = model(torch.tensor([tokens]), output_hidden_states=True)
        exits = {exit: model.lm_head(model.model.norm(found.hidden_states[exit][0])) for exit in EXITS}
    return found.logits[0], exits


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_a_model_agrees_with_itself(kind: str, tiny: MakeTiny, tiny_t5: MakeTiny) -> None:
    folder, probes, exits = (
        (tiny("llama"), PROBES, EXITS) if kind == "decoder" else (tiny_t5("t5"), PAIRS, (1, 2))
    )
    reader = CheckpointReader(folder, exits)
    found = measure(reader, probes, exits, reader, exits)
    assert found.kl_divergence == 0.0
    assert found.agreement == 1.0
    assert found.perplexity == found.dense_perplexity
    assert [exit.dense for exit in found.exits] == [1.0, 1.0]
    assert all(0 < exit.own_last < 1 for exit in found.exits)  # an exit that always agreed would show nothing


def test_exits_agree_as_their_hidden_states_have_it(tiny: MakeTiny) -> None:
    found = measure(CheckpointReader(tiny("llama"), EXITS), PROBES, EXITS)
    agreed, right, tokens, loss = dict.fromkeys(EXITS, 0), 0, 0, 0.0
    for probe in PROBES:
        last, exits = _by_transformers(tiny("llama"), probe.tokens)
        best, following = last[:-1].argmax(-1), torch.tensor(probe.tokens[1:])
        loss += float(functional.cross_entropy(last[:-1], following, reduction="sum"))
        right, tokens = right + int((best == following).sum()), tokens + len(following)
        for exit, logits in exits.items():
            agreed[exit] += int((logits[:-1].argmax(-1) == best).sum())
    assert [exit.own_last for exit in found.exits] == [agreed[exit] / tokens for exit in EXITS]
    assert (found.tokens, found.accuracy) == (tokens, right / tokens)
    assert found.loss == pytest.approx(loss / tokens, rel=1e-5)


def test_a_model_with_softer_logits_diverges_as_torch_computes_it(tiny: MakeTiny) -> None:
    dense, softer = CheckpointReader(tiny("llama-untied")), CheckpointReader(tiny("llama-untied"))
    with torch.no_grad():
        softer.model.lm_head.weight.mul_(0.5)
    found = measure(softer, PROBES, (), dense)
    total = 0.0
    for probe in PROBES:
        last = torch.from_numpy(dense.read(probe).last[:-1]).double()
        half, whole = functional.log_softmax(last / 2, -1), functional.log_softmax(last, -1)
        total += float(functional.kl_div(half, whole, log_target=True, reduction="sum"))
    assert found.kl_divergence == pytest.approx(total / found.tokens, rel=1e-5)
    assert found.kl_divergence > 0.01
    assert found.agreement == 1.0


@pytest.mark.engine
def test_a_bundles_exits_choose_among_its_draft_heads_tokens(tiny: MakeTiny, tmp_path: Path) -> None:
    from skipstone.exporters.pipeline import export_checkpoint

    export_checkpoint(tiny("llama"), tmp_path / "out", quantize="f32", exits=EXITS, draft_vocab_size=64)
    reader = open_artefact(tmp_path / "out", 64)
    try:
        for probe in PROBES:
            found = reader.read(probe)
            last, exits = _by_transformers(tiny("llama"), probe.tokens)
            assert np.abs(found.last - last.numpy()).max() < 1e-3
            head = np.fromfile(tmp_path / "out" / "draft-vocabulary.i32", "<i4")
            assert len(head) == 64
            for exit, logits in exits.items():
                chosen = head[logits[:, torch.from_numpy(head.astype(np.int64))].argmax(-1).numpy()]
                assert found.best[exit].tolist() == chosen.tolist()
    finally:
        reader.close()
    assert open_bundle(tmp_path / "out").manifest.exits == EXITS
