"""`skipstone tune` from its options to the finished checkpoint folder.

    >>> tune(TuneOptions(checkpoint="coder", data=(Path("src"),), output=Path("tuned"), max_steps=200))

A run keeps its corpus and checkpoints in `<output>.tune/`, which `resume` takes up again. The output folder
appears only when the run is complete: weights, tokenizer, exit_report.json, exit_report.png and README.md.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from skipstone.errors import SkipstoneError, UsageError
from skipstone.exporters.checkpoint import quiet_loading
from skipstone.exporters.draft_table import write_draft_material
from skipstone.exporters.tune import attention, data
from skipstone.exporters.tune.card import RunFacts, model_card
from skipstone.exporters.tune.evaluate import ExitReport, evaluate_exits, plot_exits
from skipstone.exporters.tune.models import fresh_model, load_model
from skipstone.exporters.tune.objective import LayerSkipNet
from skipstone.exporters.tune.progress import ShowProgress, tokens_per_step
from skipstone.exporters.tune.recipe import BUILT_IN, Recipe, exits_of, load_recipe, rotation_for
from skipstone.exporters.tune.schedule import Clock, dropout_rates
from skipstone.exporters.tune.trainer import (
    LayerSkipTrainer,
    RunControl,
    Windows,
    last_checkpoint,
    save_checkpoint,
    training_arguments,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

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
        compile: compile layers and heads with torch.compile.
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
    tokenizer: PreTrainedTokenizerFast
    corpus: data.TokenisedCorpus
    net: LayerSkipNet


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
    report = evaluate_exits(
        ready.net,
        ready.corpus.held_out,
        length=recipe.training.sequence_length,
        max_windows=options.evaluate_windows,
        trained=exits_of(ready.rotation),
    )
    if arguments.process_index == 0:
        _finish(options, ready, trainer, report)
        console.print(
            f"wrote {options.output} (checkpoints are in {options.work}; delete it when you are done)"
        )
    return report


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
    if options.from_config is not None:
        model = fresh_model(options.from_config, dtype)
        tokenizer = None
    else:
        model, tokenizer = load_model(str(options.checkpoint), dtype)
    rotation = rotation_for(recipe.layerskip, model.config.num_hidden_layers)
    tokenizer, corpus = _corpus(options, recipe, model, tokenizer, console)
    if options.cpu or not torch.accelerator.is_available():
        attention.use_for_training(model)
    rates = dropout_rates(recipe.layerskip.max_dropout, model.config.num_hidden_layers)
    net = LayerSkipNet(model, rates, compile_parts=options.compile)
    return _Ready(recipe, rotation, tokenizer, corpus, net)


def _corpus(
    options: TuneOptions,
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast | None,
    console: Console,
) -> tuple[PreTrainedTokenizerFast, data.TokenisedCorpus]:
    """The run's tokenizer and token arrays, from its folder where they are there already."""
    from transformers import PreTrainedTokenizerFast

    folder = options.work / "corpus"
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder), data.load(folder)
    console.print("reading and tokenising the corpus")
    if options.data:
        sources = data.read_texts(options.data, recipe.corpus.held_out_modulus)
    else:
        sources = data.collect(recipe.corpus)
    if tokenizer is None:
        texts = (source.text for source in sources if not source.held_out)
        tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=data.train_tokenizer(texts, model.config.vocab_size),
            bos_token=data.END_OF_TEXT,
            eos_token=data.END_OF_TEXT,
            pad_token=data.PAD,
            model_max_length=model.config.max_position_embeddings,
        )
    corpus = data.tokenise(sources, tokenizer.backend_tokenizer, _document_start(tokenizer))
    data.save(corpus, folder)
    tokenizer.save_pretrained(folder)
    return tokenizer, data.load(folder)


def _document_start(tokenizer: PreTrainedTokenizerFast) -> int:
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise SkipstoneError(
            "the tokenizer has neither a bos nor an eos token", hint="add one to its configuration"
        )
    return int(start)


def _train(
    options: TuneOptions, ready: _Ready, arguments: TrainingArguments, console: Console
) -> LayerSkipTrainer:
    """Run the trainer from the start or from the last checkpoint, to the end of the clock."""
    from transformers import PrinterCallback

    clock = Clock(max_minutes=options.max_minutes, max_steps=options.max_steps)
    last = last_checkpoint(options.work)
    if last is not None:
        clock.resume(last)
    trainer = LayerSkipTrainer(
        ready.net,
        ready.recipe,
        ready.rotation,
        clock,
        Windows(ready.corpus.train, ready.recipe.training.sequence_length),
        arguments,
        ready.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RunControl(trainer, options.save_minutes))
    trainer.add_callback(ShowProgress(trainer, console))
    trainer.run(last)
    return trainer


def _finish(options: TuneOptions, ready: _Ready, trainer: LayerSkipTrainer, report: ExitReport) -> None:
    """Write the finished folder beside its place and move it there."""
    decoder: Any = ready.net.decoder
    steps = trainer.state.global_step
    facts = RunFacts(
        name=options.output.name,
        origin=options.checkpoint or "",
        command=options.command(),
        parameters=sum(parameter.numel() for parameter in decoder.parameters()),
        layers=decoder.config.num_hidden_layers,
        steps=steps,
        tokens=steps * tokens_per_step(trainer),
        corpus_tokens=len(ready.corpus.train),
        minutes=trainer.clock.minutes,
        rotation=ready.rotation,
    )
    new = options.output.with_name(options.output.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        with quiet_loading():
            save_checkpoint(decoder, ready.tokenizer, new)
        write_draft_material(ready.corpus.train, decoder.config.vocab_size, decoder.config.eos_token_id, new)
        report.save(new / "exit_report.json")
        plot_exits(report, new / "exit_report.png")
        card = model_card(facts, ready.recipe, ready.corpus.shares, report)
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
