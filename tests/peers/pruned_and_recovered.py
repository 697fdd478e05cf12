"""Prune 30 % of `coder`'s parameters, recover, and hold the result against the dense model.

    python -m tests.peers.pruned_and_recovered --compile            an hour and a half on a core
    python -m tests.peers.pruned_and_recovered --steps 20 --tokens 50000 --output few.json

Layers go by `skipstone compress`, and the model that is left learns from the dense one on the training files of the
recipe that `coder` was made with, none of which it is measured on. Both models are then exported in one scheme and
decode the prompts in turns, each in a process of its own. The training goes on where it was cut off.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from skipstone.benchmark.measure import Runner, Series
from skipstone.benchmark.prompts import Texts, read_prompts
from skipstone.benchmark.report import this_machine, write_json
from skipstone.bundle import Compression, Fidelity, ModelSize
from skipstone.cli._progress import progress_bar
from skipstone.exporters.compress.recipe import parse_steps
from skipstone.exporters.compress.run import compress
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.exporters.tune.data import collect
from skipstone.exporters.tune.recipe import load_recipe
from tests.peers.common import ROOT, Settings, command_line, inputs_of, our_worker, runner_of, take_turns

SAMPLES = ROOT / "samples"
BOUND = 1.05  # of the dense model's perplexity
_CHARACTERS = 4  # per token, more than there are
STRATEGIES = ("plain", "auto")


@dataclass(frozen=True)
class Plan:
    """The command line.

    Attributes:
        prune: the step that prunes.
        steps, batch, learning_rate, matrix_learning_rate, hidden, exit_weight: of the recovery.
        tokens: of training text to read.
        compile: whether layers are compiled.
        work: folder for the training text and the recovered checkpoint.
        settings: of the speed measurement.
    """

    prune: str
    steps: int
    batch: int
    learning_rate: float
    matrix_learning_rate: float
    hidden: float
    exit_weight: float
    tokens: int
    compile: bool
    work: Path
    settings: Settings


def parse_plan() -> Plan:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Prune 30 % and recover.")
    parser.add_argument("--prune", default="drop_layers:count=4,by=contribution")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--matrix-learning-rate", type=float, default=5e-4)
    parser.add_argument("--hidden", type=float, default=0.1)
    parser.add_argument("--exit-weight", type=float, default=0.3)
    parser.add_argument("--tokens", type=int, default=9_200_000)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "pruned-and-recovered")
    parser.add_argument("--quantize", default="q8_0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=int, default=8, help="prompts to use")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "benchmarks" / "pruned-and-recovered.json"
    )
    given = parser.parse_args()
    texts = read_prompts(SAMPLES / "prompts" / "code.jsonl")
    settings = Settings(
        checkpoint=SAMPLES / "models" / "coder",
        texts=Texts(texts.prompts[: given.limit], ()),
        max_new_tokens=96,
        repeats=given.repeats,
        threads=given.threads,
        quantize=given.quantize,
        output=given.output,
    )
    names = tuple(field.name for field in fields(Plan) if field.name != "settings")
    return Plan(**{name: getattr(given, name) for name in names}, settings=settings)


def training_texts(characters: int) -> Iterator[str]:
    """Files of the recipe's training part, mixed by their hash, until there are so many characters."""
    sources = collect(load_recipe(SAMPLES / "recipes" / "coder.toml").corpus)
    for source in sorted((s for s in sources if not s.held_out), key=lambda s: s.digest):
        yield source.text
        characters -= len(source.text)
        if characters <= 0:
            return


def write_training_text(plan: Plan) -> Path:
    """The training text as lines of JSON."""
    plan.work.mkdir(parents=True, exist_ok=True)
    file = plan.work / "train.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        for text in training_texts(_CHARACTERS * plan.tokens):
            stream.write(json.dumps({"text": text}) + "\n")
    return file


def recover(plan: Plan) -> Compression:
    """Prune, and train what is left."""
    apart = ("prune", "work", "settings")
    knobs = {field.name: getattr(plan, field.name) for field in fields(Plan) if field.name not in apart}
    knobs["text"] = write_training_text(plan)
    steps = parse_steps([plan.prune, "recover:" + ",".join(f"{key}={value}" for key, value in knobs.items())])
    with progress_bar("pruning") as told:
        return compress(
            plan.settings.checkpoint,
            plan.work / "recovered",
            steps,
            calibration=SAMPLES / "calibration" / "code.jsonl",
            held_out=SAMPLES / "prompts" / "held_out.jsonl",
            overwrite=True,
            progress=told,
        )


def measure_speed(plan: Plan) -> tuple[list[Series], dict[str, int]]:
    """Both models in turns, and the bytes of their bundles."""
    folders = {name: plan.work / f"{name}-{plan.settings.quantize}" for name in ("dense", "recovered")}
    sizes = {}
    for name, checkpoint in (("dense", plan.settings.checkpoint), ("recovered", plan.work / "recovered")):
        bundle = export_checkpoint(checkpoint, folders[name], quantize=plan.settings.quantize, overwrite=True)
        sizes[name] = sum(entry.size for entry in bundle.manifest.files)
    inputs = inputs_of(folders["dense"], plan.settings)
    with (
        our_worker(folders["dense"], plan.settings) as dense,
        our_worker(folders["recovered"], plan.settings) as recovered,
    ):
        workers = {"dense": dense, "recovered": recovered}

        def make(name: str) -> Runner:
            model, strategy = name.split(", ")
            return runner_of(workers[model], strategy, plan.settings.max_new_tokens)

        rows = [f"{model}, {strategy}" for strategy in STRATEGIES for model in workers]
        return take_turns(make, rows, inputs, plan.settings.repeats), sizes


def tokens_per_second(series: Series) -> float:
    """Over all passes and prompts, the first token of each apart."""
    samples = [sample for passed in series.samples for sample in passed]
    return sum(len(sample.tokens) - 1 for sample in samples) / sum(s.decode_seconds for s in samples)


def show(found: Compression, ratio: float, removed: float, speeds: dict[str, float]) -> None:
    """The stages as a table, and whether the bound holds."""
    table = Table("", "parameters, M", "perplexity", "KL, nats", "same token", box=SIMPLE_HEAD)
    for name, (size, fidelity) in stages_of(found).items():
        if fidelity is not None:
            figures = (fidelity.perplexity, fidelity.kl_divergence, fidelity.agreement)
            table.add_row(name, f"{size.parameters / 1e6:.2f}", *(f"{figure:.4f}" for figure in figures))
    console = Console(width=100)
    console.print(table)
    console.print(
        f"{removed:.1%} of the parameters gone, perplexity {ratio:.3f}× the dense model's "
        f"({'within' if ratio <= BOUND else 'not within'} {BOUND}×); "
        + ", ".join(f"{name} {speed:.0f} tokens/s" for name, speed in speeds.items())
    )


def stages_of(found: Compression) -> dict[str, tuple[ModelSize, Fidelity | None]]:
    """The dense model, and what every step left."""
    steps = {step.kind: (step.size, step.fidelity) for step in found.steps}
    return {"dense": (found.before, found.before_fidelity), **steps}


def main() -> None:
    """Entry point."""
    plan, began = parse_plan(), time.perf_counter()
    found = recover(plan)
    seconds = time.perf_counter() - began
    stages = stages_of(found)
    perplexities = {name: fidelity.perplexity for name, (_, fidelity) in stages.items() if fidelity}
    ratio = perplexities["recover"] / perplexities["dense"]
    removed = 1 - found.steps[-1].size.parameters / found.before.parameters
    series, sizes = measure_speed(plan)
    speeds = {one.strategy: tokens_per_second(one) for one in series}
    show(found, ratio, removed, speeds)
    record = {
        "command": command_line(),
        "machine": asdict(this_machine()),
        "threads": plan.settings.threads,
        "quantization": plan.settings.quantize,
        "options": {step.kind: dict(step.options) for step in found.steps},
        "details": {step.kind: dict(step.details) for step in found.steps},
        "seconds": {step.kind: step.seconds for step in found.steps} | {"this run": seconds},
        "removed_share": removed,
        "perplexity_ratio": ratio,
        "within_bound": ratio <= BOUND,
        "bound": BOUND,
        "stages": {
            name: {"size": size.model_dump(), "fidelity": None if fidelity is None else fidelity.model_dump()}
            for name, (size, fidelity) in stages.items()
        },
        "bundle_bytes": sizes,
        "tokens_per_second": speeds,
    }
    write_json(plan.settings.output, record)


if __name__ == "__main__":
    main()
