from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from skipstone.errors import SkipstoneError
from skipstone.exporters.tune.evaluate import ExitReport, evaluate_exits, plot_exits
from skipstone.exporters.tune.objective import LayerSkipNet


@pytest.fixture
def net(tiny_model: LlamaForCausalLM) -> LayerSkipNet:
    # Full dropout on a middle layer: the figures are wrong if it acts while evaluating.
    return LayerSkipNet(tiny_model, (0.0, 1.0, 1.0, 0.0)).train()


@pytest.fixture
def text() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 300, 16 * 5 + 1).astype(np.uint16)


def test_every_exits_figures_are_those_of_the_plain_model(
    net: LayerSkipNet, tiny_model: LlamaForCausalLM, text: np.ndarray
) -> None:
    report = evaluate_exits(net, text, length=16, batch_size=2, trained=(2,))

    windows = torch.from_numpy(np.stack([text[i * 16 : i * 16 + 17] for i in range(5)]).astype(np.int64))
    with torch.no_grad():
        states = tiny_model.eval()(windows[:, :-1], output_hidden_states=True).hidden_states
        # transformers has the final norm in its last hidden state already.
        normed = [*(tiny_model.model.norm(state) for state in states[1:-1]), states[-1]]
        logits = [tiny_model.lm_head(state) for state in normed]
    assert report.tokens == 80
    assert [figures.exit for figures in report.exits] == [1, 2, 3, 4]
    assert [figures.trained for figures in report.exits] == [False, True, False, False]
    for figures, own in zip(report.exits, logits, strict=True):
        best = own.argmax(-1)
        loss = functional.cross_entropy(own.flatten(0, 1), windows[:, 1:].flatten()).item()
        assert figures.loss == pytest.approx(loss, rel=1e-5)
        assert figures.agreement == pytest.approx((best == logits[-1].argmax(-1)).double().mean().item())
        assert figures.accuracy == pytest.approx((best == windows[:, 1:]).double().mean().item())


def test_evaluating_leaves_the_net_in_training_as_it_was(net: LayerSkipNet, text: np.ndarray) -> None:
    evaluate_exits(net, text, length=16)
    assert net.training


def test_windows_are_spread_over_the_whole_text(net: LayerSkipNet, text: np.ndarray) -> None:
    ends = np.concatenate([text[:16], text[64:]])  # the first and the last window of the five
    chosen = evaluate_exits(net, text, length=16, max_windows=2)
    assert chosen.tokens == 32
    assert chosen.exits[3].loss == pytest.approx(evaluate_exits(net, ends, length=16).exits[3].loss, abs=0.3)
    assert chosen != evaluate_exits(net, text[:33], length=16)


def test_the_last_exit_agrees_with_itself(net: LayerSkipNet, text: np.ndarray) -> None:
    assert evaluate_exits(net, text, length=16).exits[-1].agreement == 1.0


def test_too_little_held_out_text_is_refused(net: LayerSkipNet, text: np.ndarray) -> None:
    with pytest.raises(SkipstoneError, match="16 tokens, less than one sequence of 16"):
        evaluate_exits(net, text[:16], length=16)


def test_a_report_is_read_back_as_it_was_saved(net: LayerSkipNet, text: np.ndarray, tmp_path: Path) -> None:
    report = evaluate_exits(net, text, length=16, trained=(1, 2))
    report.save(tmp_path / "exit_report.json")
    assert ExitReport.read(tmp_path / "exit_report.json") == report


def test_the_plot_is_a_png(net: LayerSkipNet, text: np.ndarray, tmp_path: Path) -> None:
    plot_exits(evaluate_exits(net, text, length=16, trained=(1, 2)), tmp_path / "exit_report.png")
    content = (tmp_path / "exit_report.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 5_000
