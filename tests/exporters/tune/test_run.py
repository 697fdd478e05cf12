from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipstone.errors import SkipstoneError
from skipstone.exporters.tune.evaluate import ExitReport
from skipstone.exporters.tune.run import TuneOptions, tune


def options(config_file: Path, texts: Path, recipe_file: Path, **changes: object) -> TuneOptions:
    base = TuneOptions(
        output=config_file.parent / "tuned",
        from_config=config_file,
        recipe=str(recipe_file),
        data=(texts,),
        max_steps=60,
        compile=False,
        cpu=True,
        evaluate_windows=16,
    )
    return dataclasses.replace(base, **changes)


def quiet() -> Console:
    return Console(file=io.StringIO())


def newest(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def test_a_tiny_model_learns_its_text_and_its_exits_follow(
    config_file: Path, texts: Path, recipe_file: Path
) -> None:
    chosen = options(config_file, texts, recipe_file)
    start = tune(dataclasses.replace(chosen, output=config_file.parent / "start", max_steps=1), quiet())
    report = tune(chosen, quiet())
    assert start.exits[-1].loss > 5.0
    assert report.exits[-1].loss < 2.0
    assert all(figures.agreement > 0.8 for figures in report.exits)
    assert [figures.trained for figures in report.exits] == [True, True, True, False]


def test_the_output_is_a_checkpoint_with_report_plot_and_card(
    config_file: Path, texts: Path, recipe_file: Path
) -> None:
    chosen = options(config_file, texts, recipe_file, max_steps=5)
    report = tune(chosen, quiet())
    assert ExitReport.read(chosen.output / "exit_report.json") == report
    model = AutoModelForCausalLM.from_pretrained(chosen.output)
    tokenizer = AutoTokenizer.from_pretrained(chosen.output)
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers == 4
    assert tokenizer("def f1(x):").input_ids == tokenizer.backend_tokenizer.encode("def f1(x):").ids
    card = (chosen.output / "README.md").read_text()
    assert chosen.command() in card
    assert f"| 4 | {report.exits[3].loss:.3f} | 1.000 |" in card
    assert (chosen.output / "exit_report.png").is_file()
    assert not list(chosen.output.parent.glob("*.new"))


def test_a_run_cut_in_two_ends_as_one_in_one_go(config_file: Path, texts: Path, recipe_file: Path) -> None:
    whole = options(config_file, texts, recipe_file, max_steps=12, save_minutes=0.0)
    whole_report = tune(whole, quiet())
    # Put aside all but an early checkpoint, as a run killed there would have left it.
    cut = dataclasses.replace(whole, output=config_file.parent / "cut", resume=True)
    whole.work.rename(cut.work)
    checkpoints = {int(path.name.split("-")[1]): path for path in cut.work.glob("checkpoint-*")}
    last, before = sorted(checkpoints, reverse=True)[:2]
    assert (before, last) == (11, 12)
    for file in checkpoints[last].iterdir():
        file.unlink()
    checkpoints[last].rmdir()

    resumed_report = tune(cut, quiet())
    assert json.loads((newest(cut.work) / "trainer_state.json").read_text())["global_step"] == 12
    schedules = [json.loads((newest(cut.work) / "trainer_state.json").read_text())["max_steps"]]
    assert schedules == [12]
    for first, second in zip(whole_report.exits, resumed_report.exits, strict=True):
        assert second.loss == pytest.approx(first.loss, abs=1e-4)


def test_a_finished_run_is_written_again_without_training(
    config_file: Path, texts: Path, recipe_file: Path
) -> None:
    chosen = options(config_file, texts, recipe_file, max_steps=4)
    report = tune(chosen, quiet())
    before = newest(chosen.work).stat().st_mtime_ns
    again = tune(dataclasses.replace(chosen, resume=True, overwrite=True), quiet())
    assert newest(chosen.work).stat().st_mtime_ns == before
    assert again == report


def test_a_checkpoint_is_continued_with_its_own_tokenizer(
    config_file: Path, texts: Path, recipe_file: Path
) -> None:
    first = options(config_file, texts, recipe_file, max_steps=30)
    started = tune(first, quiet())
    more = dataclasses.replace(
        first,
        output=config_file.parent / "more",
        from_config=None,
        checkpoint=str(first.output),
        max_steps=30,
    )
    continued = tune(more, quiet())
    assert continued.exits[-1].loss < started.exits[-1].loss
    assert (more.output / "tokenizer.json").read_bytes() == (first.output / "tokenizer.json").read_bytes()
    assert f"continued from `{first.output}`" in " ".join((more.output / "README.md").read_text().split())


def test_a_run_in_float32_keeps_float32_weights(config_file: Path, texts: Path, recipe_file: Path) -> None:
    chosen = options(config_file, texts, recipe_file, max_steps=2, dtype="float32")
    tune(chosen, quiet())
    assert AutoModelForCausalLM.from_pretrained(chosen.output).dtype == torch.float32


def test_the_run_never_trains_on_held_out_tokens(config_file: Path, texts: Path, recipe_file: Path) -> None:
    chosen = options(config_file, texts, recipe_file, max_steps=1)
    tune(chosen, quiet())
    train, held_out = (np.load(chosen.work / "corpus" / f"{part}.npy") for part in ("train", "held_out"))
    tokenizer = AutoTokenizer.from_pretrained(chosen.output)
    trained = tokenizer.decode(train.tolist()).split("<|endoftext|>")
    held = tokenizer.decode(held_out.tolist()).split("<|endoftext|>")
    assert {*trained, *held} - {""} == {path.read_text() for path in texts.iterdir()}
    assert set(trained) & set(held) <= {""}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"from_config": None}, "either a checkpoint"),
        ({"checkpoint": "somewhere"}, "either a checkpoint"),
        ({"max_steps": None}, "no end"),
        ({"max_steps": 0}, "--max-steps 0"),
        ({"max_minutes": -1.0}, "--max-minutes -1"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"recipe": "nothing.toml"}, "nothing.toml"),
        ({"data": (Path("/no/such/data"),)}, "/no/such/data"),
        ({"from_config": Path("/no/such/config.json")}, "/no/such/config.json"),
        ({"from_config": None, "checkpoint": "/no/such/model"}, "/no/such/model"),
    ],
)
def test_options_that_cannot_work_are_refused_and_leave_no_output(
    config_file: Path, texts: Path, recipe_file: Path, changes: dict[str, object], named: str
) -> None:
    chosen = options(config_file, texts, recipe_file, **changes)
    with pytest.raises(SkipstoneError) as caught:
        tune(chosen, quiet())
    assert named in caught.value.message
    assert caught.value.hint
    assert not chosen.output.exists()
    assert not chosen.work.exists()


def test_a_config_that_is_not_a_decoders_is_refused(
    config_file: Path, texts: Path, recipe_file: Path
) -> None:
    config_file.write_text('{"model_type": "no-such-model"}')
    with pytest.raises(SkipstoneError, match=r"config\.json"):
        tune(options(config_file, texts, recipe_file), quiet())


def test_an_output_that_exists_is_not_replaced_unasked(
    config_file: Path, texts: Path, recipe_file: Path
) -> None:
    chosen = options(config_file, texts, recipe_file)
    chosen.output.mkdir()
    (chosen.output / "precious").write_text("kept")
    with pytest.raises(SkipstoneError, match="exists already"):
        tune(chosen, quiet())
    assert (chosen.output / "precious").read_text() == "kept"


def test_an_unfinished_run_is_neither_overwritten_nor_resumed_with_another_recipe(
    config_file: Path, texts: Path, recipe_file: Path
) -> None:
    chosen = options(config_file, texts, recipe_file, max_steps=2)
    tune(chosen, quiet())
    other = dataclasses.replace(chosen, overwrite=True)
    with pytest.raises(SkipstoneError, match="unfinished run"):
        tune(other, quiet())
    recipe_file.write_text(recipe_file.read_text().replace("seed = 0", "") + "seed = 5\n")
    with pytest.raises(SkipstoneError, match="another recipe"):
        tune(dataclasses.replace(other, resume=True), quiet())


@pytest.mark.slow
def test_two_processes_under_accelerate_train_one_model(
    config_file: Path, texts: Path, recipe_file: Path
) -> None:
    chosen = options(config_file, texts, recipe_file, max_steps=20)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--module",
        "skipstone",
    ]
    launch += [*chosen.command().split()[1:], "--no-compile", "--cpu"]
    finished = subprocess.run(
        launch, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    card = (chosen.output / "README.md").read_text()
    assert "20 steps" in card
    assert json.loads((newest(chosen.work) / "trainer_state.json").read_text())["global_step"] == 20
    # Twice the sequences a step: 20 steps x 2 processes x 8 sequences x 32 tokens.
    assert f"{20 * 2 * 8 * 32 / 1e6:.1f} M tokens" in card
    assert ExitReport.read(chosen.output / "exit_report.json").exits[-1].loss < 4.0
