"""Tuning a tiny encoder-decoder from texts to the finished folder."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, LlamaForCausalLM

from skipstone.errors import SkipstoneError
from skipstone.exporters.exits import recorded_encoder_exits, recorded_exits
from skipstone.exporters.lexicon import LEXICON_FILE
from skipstone.exporters.tune.evaluate import ExitReport
from skipstone.exporters.tune.evaluate_seq2seq import CorrectionReport
from skipstone.exporters.tune.run import TuneOptions, tune
from skipstone.runtimes.drafters.lexicon import Lexicon
from tests.exporters.tune.conftest import TINY_T5

RECIPE = """
task = "seq2seq"

[corpus]
held_out_modulus = 4

[layerskip]
max_dropout = 0.1
rotation = [[1], [2]]

[seq2seq]
encoder_exits = [2]
encoder_share = 0.3

[noise]
clean = 0.3

[training]
sequence_length = 32
batch_size = 8
learning_rate = 1e-2
matrix_learning_rate = 1e-2
warmup_steps = 5
"""


@pytest.fixture
def options(tmp_path: Path) -> TuneOptions:
    """A T5 to train from scratch on sixty files of ten sentences, about a quarter of them held out."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        lines = [f"The {'abcdefghij'[i]} of part number {number} is in the list." for i in range(10)]
        lines += [f"This is what the part of the number {number * 10 + i} does." for i in range(5)]
        (folder / f"{number:02}.txt").write_text("\n\n".join(lines))
    # Words with a capital, so that the sentences do not count as copies of each other.
    for number, file in enumerate(sorted(folder.iterdir())):
        names = ("red", "green", "blue", "dark", "pale", "warm", "cold", "old")
        file.write_text(file.read_text().replace("part", f"{names[number % 8]} {names[number // 8]} part"))
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps({**TINY_T5, "model_type": "t5", "architectures": ["T5ForConditionalGeneration"]})
    )
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    return TuneOptions(
        output=tmp_path / "tuned",
        from_config=config,
        recipe=str(recipe),
        data=(folder,),
        max_steps=60,
        compile=False,
        cpu=True,
        evaluate_windows=24,
    )


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_a_tiny_model_learns_its_sentences_and_its_exits_follow(options: TuneOptions) -> None:
    start = tune(dataclasses.replace(options, output=options.output.with_name("start"), max_steps=1), quiet())
    report = tune(options, quiet())
    assert report.exits[-1].loss < 0.5 * start.exits[-1].loss
    assert report.exits[0].loss < 0.6 * start.exits[0].loss
    assert [figures.trained for figures in report.exits] == [True, True, False]
    assert [figures.trained for figures in report.encoder_exits] == [False, True, False, False]
    assert report.exits[-1].agreement == report.encoder_exits[-1].agreement == 1.0
    assert report.encoder_exits[-1].loss == pytest.approx(report.exits[-1].loss, rel=1e-3)


def test_the_output_is_a_checkpoint_with_its_exits_reports_plot_and_card(options: TuneOptions) -> None:
    chosen = dataclasses.replace(options, max_steps=3)
    report = tune(chosen, quiet())
    assert ExitReport.read(chosen.output / "exit_report.json") == report
    model = AutoModelForSeq2SeqLM.from_pretrained(chosen.output)
    tokenizer = AutoTokenizer.from_pretrained(chosen.output)
    assert (model.config.num_layers, model.config.num_decoder_layers) == (4, 3)
    assert model.dtype == torch.bfloat16
    assert tokenizer("The list.").input_ids[-1] == model.config.eos_token_id == 1
    assert recorded_exits(chosen.output, model.config) == (1, 2)
    assert recorded_encoder_exits(chosen.output, model.config) == (2,)
    correction = CorrectionReport.read(chosen.output / "correction_report.json").correctors
    assert set(correction) == {"uncorrected", "dictionary", "model"}
    assert correction["uncorrected"].recall == 0.0
    assert correction["dictionary"].recall > 0.0
    lexicon = Lexicon.load(chosen.output / LEXICON_FILE)
    assert lexicon.amend("Tha lsit.") == "The list."
    card = (chosen.output / "README.md").read_text()
    assert chosen.command() in card
    assert "text2text-generation" in card
    assert f"| 3 | {report.exits[2].loss:.3f} | 1.000 |" in card
    assert f"| model | {correction['model'].accuracy:.3f} |" in card
    assert 'task = "seq2seq"' in card
    assert (chosen.output / "exit_report.png").is_file()


def test_a_run_cut_in_two_ends_as_one_in_one_go(options: TuneOptions) -> None:
    # More steps than an epoch has, so that the cut is in the second epoch.
    whole = dataclasses.replace(options, max_steps=48, save_minutes=0.0, dtype="float32")
    whole_report = tune(whole, quiet())
    cut = dataclasses.replace(whole, output=options.output.with_name("cut"), resume=True)
    whole.work.rename(cut.work)
    last = cut.work / "checkpoint-48"
    epoch = json.loads((cut.work / "checkpoint-47" / "trainer_state.json").read_text())["epoch"]
    assert epoch > 1
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    resumed_report = tune(cut, quiet())
    assert (cut.work / "checkpoint-48").is_dir()
    for first, second in zip(whole_report.exits, resumed_report.exits, strict=True):
        assert second.loss == pytest.approx(first.loss, abs=1e-4)


def test_a_checkpoint_is_continued_with_its_own_tokenizer(options: TuneOptions) -> None:
    started = tune(dataclasses.replace(options, max_steps=30), quiet())
    more = dataclasses.replace(
        options,
        from_config=None,
        checkpoint=str(options.output),
        output=options.output.with_name("more"),
        max_steps=30,
    )
    continued = tune(more, quiet())
    assert continued.exits[-1].loss < started.exits[-1].loss
    assert (more.output / "tokenizer.json").read_bytes() == (options.output / "tokenizer.json").read_bytes()


def test_a_decoder_is_refused_for_the_task(
    options: TuneOptions, config_file: Path, tiny_model: LlamaForCausalLM
) -> None:
    config = config_file.parent / "decoder.json"
    config.write_text(json.dumps(tiny_model.config.to_dict()))
    with pytest.raises(SkipstoneError, match=r"decoder\.json"):
        tune(dataclasses.replace(options, from_config=config), quiet())
    assert not options.work.exists()


def test_an_encoder_decoder_is_refused_by_a_decoders_recipe(options: TuneOptions) -> None:
    with pytest.raises(SkipstoneError, match=r"config\.json"):
        tune(dataclasses.replace(options, recipe="layerskip"), quiet())
    assert not options.work.exists()
