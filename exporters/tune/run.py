"""`skipstone tune` from its options to the finished checkpoint folder.

    >>> tune(TuneOptions(checkpoint="coder", data=(Path("src"),), output=Path("tuned"), max_steps=200))

A run keeps its corpus and checkpoints in `<output>.tune/`, which `resume` takes up again. The output folder
appears only when the run is complete: weights, tokenizer, exit_report.json, exit_report.png and README.md.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from skipstone.runtimes.quiet import quiet_libraries

with quiet_libraries():  # transformers loads what quantisers it finds, and those write what they lack
    importlib.import_module("transformers.modeling_utils")

from skipstone.errors import SkipstoneError, UsageError
from skipstone.exporters.checkpoint import quiet_loading
from skipstone.exporters.tune import data, decoder_task, seq2seq_task
from skipstone.exporters.tune.card import RunFacts, model_card
from skipstone.exporters.tune.evaluate import ExitReport, plot_exits
from skipstone.exporters.tune.models import decoder_layers, fresh_model, load_model
from skipstone.exporters.tune.progress import ShowProgress, tokens_per_step
from skipstone.exporters.tune.recipe import BUILT_IN, Recipe, exits_of, load_recipe, rotation_for
from skipstone.exporters.tune.schedule import Clock
from skipstone.exporters.tune.task import Ingredients
from skipstone.exporters.tune.ternary import settle, ternarise
from skipstone.exporters.tune.trainer import (
    LayerSkipTrainer,
    RunControl,
    last_checkpoint,
    save_checkpoint,
    training_arguments,
)

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from skipstone.exporters.tune.task import Evaluation, Task

RECIPE_FILE = "recipe.json"


@dataclass(frozen=True)
class TuneOptions:
    """What to tune, on what, for how long, and where to.

    Attributes:
        output: folder of the finished checkpoint.
        checkpoint: folder or hub name of the model to continue; or
        from_config: a config.json (or its folder) to train from scratch, with a tokenizer of its vocabulary
            size.
        recipe: "layerskip" or the path of a recipe file.
        data: text files and folders; empty for the recipe's own corpus.
        max_minutes: minutes of training; at least one of this and
        max_steps: optimizer steps.
        save_minutes: minutes between checkpoints.
        dtype: "bfloat16" (over a float32 master copy) or "float32".
        resume: go on from the last checkpoint of the same run.
        overwrite: replace an output folder that exists.
        compile: compile layers and heads with torch.compile, of an encoder-decoder the losses.
        cpu: stay on the CPU where there is an accelerator.
        evaluate_windows: sequences of held-out text in the final evaluation.
    """

    output: Path
    checkpoint: str | None = None
    from_config: Path | None = None
    recipe: str = BUILT_IN
    data: tuple[Path, ...] = ()
    max_minutes: float | None = None
    max_steps: int | None = None
    save_minutes: float = 10.0
    dtype: str = "bfloat16"
    resume: bool = False
    overwrite: bool = False
    compile: bool = True
    cpu: bool = False
    evaluate_windows: int = 256

    @property
    def work(self) -> Path:
        """Folder of the run's corpus and checkpoints."""
        return self.output.with_name(self.output.name + ".tune")

    def command(self) -> str:
        """The command line that starts this run."""
        flags: list[tuple[str, object]] = [
            ("--from-config", self.from_config),
            ("--recipe", self.recipe),
            *(("--data", path) for path in self.data),
            ("--max-minutes", None if self.max_minutes is None else f"{self.max_minutes:g}"),
            ("--max-steps", self.max_steps),
            ("--dtype", None if self.dtype == "bfloat16" else self.dtype),
            ("--output", self.output),
        ]
        parts = [f"{flag} {value}" for flag, value in flags if value is not None]
        return " ".join(["skipstone tune", *([self.checkpoint] if self.checkpoint else []), *parts])


@dataclass(frozen=True)
class _Ready:
    """Everything a run trains with."""

    recipe: Recipe
    rotation: tuple[tuple[int, ...], ...]
    task: Task


def tune(options: TuneOptions, console: Console | None = None) -> ExitReport:
    """Train, evaluate every exit on held-out text and write the checkpoint to `options.output`.

    Returns the evaluation. Raises SkipstoneError for options, files, recipes and models that cannot work,
    before any training.
    """
    console = console or Console(stderr=True)
    check_options(options)
    recipe = load_recipe(options.recipe)
    arguments = training_arguments(recipe, options.work, max_steps=options.max_steps, cpu=options.cpu)
    with (
        arguments.main_process_first(local=False, desc="preparing the corpus"),
        _work_folder(options, recipe, claim=arguments.process_index == 0),
    ):
        ready = _prepare(options, recipe, console)
    with quiet_loading():
        trainer = _train(options, ready, arguments, console)
    if arguments.process_index == 0:
        console.print(
            f"evaluating on up to {options.evaluate_windows} held-out sequences; this takes minutes"
        )
    settle(ready.task.net.model)
    evaluation = ready.task.evaluate(exits_of(ready.rotation), options.evaluate_windows)
    if arguments.process_index == 0:
        _finish(options, ready, trainer, evaluation)
        console.print(
            f"wrote {options.output} (checkpoints are in {options.work}; delete it when you are done)"
        )
    return evaluation.exits


def check_options(options: TuneOptions) -> None:
    """Raise SkipstoneError for options that contradict each other or the disk."""
    if (options.checkpoint is None) == (options.from_config is None):
        raise UsageError(
            "give either a checkpoint to continue or --from-config, and not both",
            hint="skipstone tune CHECKPOINT … or skipstone tune --from-config CONFIG …",
        )
    if options.max_minutes is None and options.max_steps is None:
        raise UsageError("the run has no end", hint="give --max-minutes, --max-steps or both")
    for flag, limit in (("--max-minutes", options.max_minutes), ("--max-steps", options.max_steps)):
        if limit is not None and limit <= 0:
            raise UsageError(f"{flag} {limit}: expected more than 0", hint="give a positive number")
    if options.dtype not in ("bfloat16", "float32"):
        raise UsageError(
            f"--dtype {options.dtype}: expected bfloat16 or float32", hint="leave it out for bfloat16"
        )
    if options.output.exists() and not options.overwrite:
        raise UsageError(
            f"--output {options.output}: exists already", hint="give another folder, or --overwrite"
        )


@contextmanager
def _work_folder(options: TuneOptions, recipe: Recipe, *, claim: bool) -> Iterator[None]:
    """The run's folder, made or taken up again by the process that claims it; gone if preparing fails."""
    if not claim:
        yield
        return
    made = not options.work.exists()
    _claim_work_folder(options, recipe)
    try:
        yield
    except BaseException:
        if made:
            shutil.rmtree(options.work, ignore_errors=True)
        raise


def _claim_work_folder(options: TuneOptions, recipe: Recipe) -> None:
    """Make the run's folder, or check that the one found may be resumed with this recipe."""
    told = json.loads(json.dumps({"recipe": asdict(recipe), "data": [str(path) for path in options.data]}))
    stated = options.work / RECIPE_FILE
    if last_checkpoint(options.work) is not None:
        if not options.resume:
            raise UsageError(
                f"{options.work}: holds the checkpoints of an unfinished run",
                hint="give --resume to go on with it, or delete that folder",
            )
        if json.loads(stated.read_text(encoding="utf-8")) != told:
            raise UsageError(
                f"{stated}: the run to resume has another recipe or other data",
                hint="resume with the recipe and the data it was started with",
            )
        return
    options.work.mkdir(parents=True, exist_ok=True)
    stated.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _prepare(options: TuneOptions, recipe: Recipe, console: Console) -> _Ready:
    from transformers import set_seed

    set_seed(recipe.training.seed)
    dtype = getattr(torch, options.dtype)
    tokenizer = None
    if options.from_config is not None:
        model = fresh_model(options.from_config, dtype, recipe.task)
    else:
        model, tokenizer = load_model(str(options.checkpoint), dtype, recipe.task)
    ternarise(model, recipe.ternary)
    rotation = rotation_for(recipe.layerskip, decoder_layers(model))
    ingredients = Ingredients(
        recipe=recipe,
        model=model,
        tokenizer=tokenizer,
        folder=options.work / "corpus",
        sources=lambda: _sources(options, recipe, console),
        compile_parts=options.compile and recipe.training.compile,
        cpu=options.cpu or not torch.accelerator.is_available(),
    )
    prepare = seq2seq_task.prepare if recipe.task == "seq2seq" else decoder_task.prepare
    return _Ready(recipe, rotation, prepare(ingredients))


def _sources(options: TuneOptions, recipe: Recipe, console: Console) -> list[data.Source]:
    console.print("reading the corpus")
    if options.data:
        return data.read_texts(options.data, recipe.corpus.held_out_modulus)
    return data.collect(recipe.corpus)


def _train(
    options: TuneOptions, ready: _Ready, arguments: TrainingArguments, console: Console
) -> LayerSkipTrainer:
    """Run the trainer from the start or from the last checkpoint, to the end of the clock."""
    from transformers import PrinterCallback

    clock = Clock(max_minutes=options.max_minutes, max_steps=options.max_steps)
    last = last_checkpoint(options.work)
    if last is not None:
        clock.resume(last)
    trainer = LayerSkipTrainer(ready.task, ready.recipe, ready.rotation, clock, arguments)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RunControl(trainer, options.save_minutes))
    trainer.add_callback(ShowProgress(trainer, console))
    trainer.run(last)
    return trainer


def _finish(options: TuneOptions, ready: _Ready, trainer: LayerSkipTrainer, evaluation: Evaluation) -> None:
    """Write the finished folder beside its place and move it there."""
    task = ready.task
    model: Any = task.net.model
    steps = trainer.state.global_step
    facts = RunFacts(
        name=options.output.name,
        origin=options.checkpoint or "",
        command=options.command(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=task.num_layers,
        steps=steps,
        tokens=round(steps * tokens_per_step(task, trainer.args.world_size)),
        corpus_tokens=task.corpus_tokens,
        minutes=trainer.clock.minutes,
        rotation=ready.rotation,
    )
    new = options.output.with_name(options.output.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        with quiet_loading():
            save_checkpoint(model, task.tokenizer, new)
        task.write_beside(evaluation, new)
        report = evaluation.exits
        report.save(new / "exit_report.json")
        plot_exits(report, new / "exit_report.png")
        card = model_card(facts, ready.recipe, task.shares, report, task.describe(evaluation))
        (new / "README.md").write_text(card, encoding="utf-8")
        if options.output.exists():
            shutil.rmtree(options.output)
        new.rename(options.output)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise SkipstoneError(
            f"--output {options.output}: cannot be written ({error})",
            hint="make room, then run again with --resume",
        ) from error
