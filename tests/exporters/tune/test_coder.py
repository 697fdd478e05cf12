"""The shipped model `coder` and the held-out files beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from skipstone.exporters.tune.evaluate import ExitReport, evaluate_exits
from skipstone.exporters.tune.objective import LayerSkipNet
from skipstone.exporters.tune.recipe import exits_of, load_recipe

SAMPLES = Path(__file__).parents[3] / "samples"
CODER = SAMPLES / "models" / "coder"


@pytest.fixture(scope="module")
def report() -> ExitReport:
    return ExitReport.read(CODER / "exit_report.json")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(CODER)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(CODER)


def lines(name: str, key: str) -> list[str]:
    return [json.loads(line)[key] for line in (SAMPLES / "prompts" / name).read_text("utf-8").splitlines()]


def test_the_weights_are_a_small_bfloat16_llama(model: PreTrainedModel) -> None:
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers == 12
    assert 9e6 < sum(parameter.numel() for parameter in model.parameters()) < 12e6
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_the_tokenizer_is_lossless_and_adds_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in (*lines("code.jsonl", "prompt"), *lines("random.jsonl", "prompt")):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert max(ids) < len(tokenizer) == 4096
        assert min(ids) > 1  # neither of the special tokens
    assert tokenizer.convert_ids_to_tokens([0, 1]) == ["<|endoftext|>", "<|pad|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)


def test_the_card_states_the_reports_figures(report: ExitReport) -> None:
    card = (CODER / "README.md").read_text()
    rows = re.findall(r"^\| (\d+)( \*)? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", card, re.MULTILINE)
    stated = [(int(e), bool(t), float(loss), float(agree), float(right)) for e, t, loss, agree, right in rows]
    assert stated == [
        (f.exit, f.trained, round(f.loss, 3), round(f.agreement, 3), round(f.accuracy, 3))
        for f in report.exits
    ]
    assert f"{report.tokens:,} tokens" in card


def test_the_card_names_a_licence_for_every_source() -> None:
    card = (CODER / "README.md").read_text()
    recipe = load_recipe(SAMPLES / "recipes" / "coder.toml")
    for package in (*recipe.corpus.packages, "python-stdlib"):
        row = re.search(rf"^\| {re.escape(package)} \| ([^|]+) \| ([^|]+) \|", card, re.MULTILINE)
        assert row, package
        assert row[1].strip()
        assert row[2].strip()


def test_the_trained_exits_are_the_recipes(report: ExitReport) -> None:
    recipe = load_recipe(SAMPLES / "recipes" / "coder.toml")
    assert tuple(f.exit for f in report.exits if f.trained) == exits_of(recipe.layerskip.rotation)


def test_the_shipped_weights_exit_as_well_on_held_out_text_as_the_report_says(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, report: ExitReport
) -> None:
    ids = [0]
    for text in lines("held_out.jsonl", "text"):
        ids += [*tokenizer(text).input_ids, 0]
    net = LayerSkipNet(model, (0.0,) * 12)
    measured = evaluate_exits(net, np.array(ids), length=256)
    assert measured.tokens > 10_000
    for own, stated in zip(measured.exits, report.exits, strict=True):
        # One excerpt per package instead of whole files, and shorter context: harder, but not far off.
        assert own.agreement == pytest.approx(stated.agreement, abs=0.08)
        assert own.loss == pytest.approx(stated.loss, rel=0.35)


def test_early_exits_draft_well_enough_to_be_worth_it(report: ExitReport) -> None:
    agreement = {figures.exit: figures.agreement for figures in report.exits}
    for early, at_least in ((2, 0.49), (4, 0.58), (6, 0.63), (8, 0.82)):
        assert agreement[early] > at_least


def test_prompts_are_of_the_length_that_their_recipe_states(tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = [len(tokenizer(prompt).input_ids) for prompt in lines("code.jsonl", "prompt")]
    assert len(lengths) >= 24
    assert min(lengths) >= 60
    assert max(lengths) <= 200
    assert len(lines("random.jsonl", "prompt")) >= 8
