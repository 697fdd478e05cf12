"""Hold compression's search against rules of thumb at equal size, on the shipped decoder, and one process against two.

    python -m tests.peers.compression_search [--ray local]

Layers are dropped, made sparse, and stored in GGUF's layouts, each at three budgets. What a search and a rule come to is
measured by the divergence from the dense model on text that neither saw: samples/prompts/held_out.jsonl. What they
learn from is samples/calibration/code.jsonl. The middle search of each kind is made once more in two
processes, that over dropped layers with `--ray` also on that Ray cluster. The table goes to
docs/benchmarks/compression-search.json.
"""

import argparse
import math
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from skipstone.benchmark.report import this_machine, write_json
from skipstone.exporters.checkpoint import load_eager, open_checkpoint
from skipstone.exporters.compress.depth import DropLayers
from skipstone.exporters.compress.fidelity import measure_fidelity
from skipstone.exporters.compress.folder import measure_size
from skipstone.exporters.compress.quantize.rank import changes, outliers
from skipstone.exporters.compress.quantize.step import Quantize
from skipstone.exporters.compress.recipe import options_of
from skipstone.exporters.compress.search.step import Search
from skipstone.exporters.compress.sparsify.step import Sparsify
from skipstone.exporters.compress.steps import Step, Target
from skipstone.exporters.compress.texts import read_windows
from skipstone.exporters.compress.work import Windows, Work
from skipstone.exporters.facts import checkpoint_facts, load_tokenizer, num_weights
from tests.peers.common import ROOT, command_line

_RULES = ("top", "bottom", "alternate", "symmetric", "cosine", "contribution")
_DROPPED = (2, 4, 6)
_SPARSITIES = (0.3, 0.5, 0.7)
_SPREAD = 0.1  # by which a rule's layers differ from the sparsity of all together
_TABLES = "q6_k"  # of the embedding, and the layout of layers that a ranking does not lower
_EVEN = {
    "q3_k": ("q3_k",),
    "q4_k": ("q4_k", "q4_0"),
    "q5_k": ("q5_k", "q5_0"),
}  # by the budget's name, the layouts that take no more in all layers alike
_LOWER = {"q3_k": "q2_k", "q4_k": "q3_k", "q5_k": "q4_k"}  # what rankings lower to
_RANKINGS = ("cosine", "outliers", "sensitivity")


@dataclass(frozen=True)
class Settings:
    """The command line."""

    checkpoint: Path
    calibration: Path
    held_out: Path
    generations: int
    tokens: int
    held_out_tokens: int
    seed: int
    over: list[str]
    ray: str | None
    output: Path


@dataclass(frozen=True)
class Outcome:
    """What one way came to.

    Attributes:
        over: `drop`, `sparsity` or `bits`.
        budget: that all ways of a group keep to, say `4 layers fewer`.
        way: `search`, or a rule's name.
        step: as a recipe has it; of a search, what it chose.
        num_bytes: of the weights afterwards; zeros are stored as any weight is.
        calibration_kl: divergence on the calibration text, nats per token.
        kl: on held-out text, likewise.
        perplexity: on held-out text.
        seconds: of the step in one process, by the clock.
        cpu_seconds: that it computed; what another program does on the same machine counts less.
        seconds_two: of the same search in two processes, by the clock; None: not asked.
        cpu_seconds_two: likewise, of all processes.
        two_find_the_same: whether that found the same to the last bit; likewise.
        ray_finds_the_same: whether the Ray cluster did; None: not asked.
    """

    over: str
    budget: str
    way: str
    step: Any
    num_bytes: int
    calibration_kl: float
    kl: float
    perplexity: float
    seconds: float
    cpu_seconds: float
    seconds_two: float | None = None
    cpu_seconds_two: float | None = None
    two_find_the_same: bool | None = None
    ray_finds_the_same: bool | None = None


@dataclass(frozen=True)
class Times:
    """Seconds.

    Attributes:
        clock: that passed.
        cpu: that this process and those it started and waited for computed.
    """

    clock: float
    cpu: float

    @classmethod
    def now(cls) -> "Times":
        """Since some moment."""
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return cls(time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used))

    def since(self, start: "Times") -> "Times":
        """Between two moments."""
        return Times(self.clock - start.clock, self.cpu - start.cpu)


class Comparison:
    """Steps taken on the same model, with the same texts."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        checkpoint = open_checkpoint(settings.checkpoint)
        self._tokenizer = load_tokenizer(checkpoint)
        length, parameters = checkpoint.config.max_position_embeddings, num_weights(checkpoint)
        facts = checkpoint_facts(checkpoint, self._tokenizer, length, parameters)
        self.calibration, self._held_out = (
            read_windows(file, flag, self._tokenizer, facts, tokens)
            for file, flag, tokens in (
                (settings.calibration, "--calibration", settings.tokens),
                (settings.held_out, "--held-out", settings.held_out_tokens),
            )
        )

    def load(self) -> Any:
        """The dense model."""
        return load_eager(self.settings.checkpoint)

    def dense(self) -> float:
        """The dense model's perplexity on held-out text."""
        work = Work(self.settings.checkpoint, Target(), self._tokenizer, self.calibration)
        return measure_fidelity(self.load(), work, self._held_out).perplexity

    def take(self, step: Step) -> tuple[Any, Work, dict[str, Any], Times]:
        """A model after a step, the run, what the step says of itself, and the time that it took."""
        work = Work(self.settings.checkpoint, Target(), self._tokenizer, self.calibration)
        model, _ = self.load(), work.dense
        start = Times.now()
        details = dict(step.apply(model, work))
        return model, work, details, Times.now().since(start)

    def rule(self, over: str, budget: str, way: str, step: Step) -> Outcome:
        """What a step of a rule comes to."""
        model, work, details, took = self.take(step)
        chosen = options_of(step) | {key: details[key] for key in ("dropped", "mix") if key in details}
        return self._outcome((over, budget, way), chosen, model, work, took)

    def search(self, budget: str, options: dict[str, Any], *, elsewhere: bool) -> Outcome:
        """What a search comes to, here and, if asked, elsewhere."""
        settings = self.settings
        shared = options | {key: getattr(settings, key) for key in ("generations", "tokens", "seed")}
        model, work, details, took = self.take(Search(**shared))
        chosen = [{key: part[key] for key in part if key != "details"} for part in details["chosen"]]
        outcome = self._outcome((options["over"], budget, "search"), chosen, model, work, took)
        if elsewhere:
            _, _, found, two = self.take(Search(**shared, processes=2))
            same = found == details
            outcome = replace(outcome, seconds_two=two.clock, cpu_seconds_two=two.cpu, two_find_the_same=same)
        if elsewhere and settings.ray is not None and options["over"] == "drop":
            _, _, found, _ = self.take(Search(**shared, processes=2, ray=settings.ray))
            outcome = replace(outcome, ray_finds_the_same=found == details)
        return outcome

    def size(self, step: Step) -> int:
        """Bytes of the weights after a step."""
        model, work, *_ = self.take(step)
        return measure_size(model, work).num_bytes

    def _outcome(
        self, place: tuple[str, str, str], chosen: Any, model: Any, work: Work, took: Times
    ) -> Outcome:
        texts: tuple[Windows, ...] = (self.calibration, self._held_out)
        calibration, held_out = (measure_fidelity(model, work, text) for text in texts)
        size = measure_size(model, work).num_bytes
        figures = (calibration.kl_divergence, held_out.kl_divergence, held_out.perplexity)
        return Outcome(*place, chosen, size, *figures, took.clock, took.cpu)


def over_drop(comparison: Comparison) -> Iterator[Outcome]:
    """Layers that go, by every rule and by the search."""
    for count in _DROPPED:
        budget = f"{count} layers fewer"
        rules = [
            comparison.rule("drop", budget, way, DropLayers(count=count, by=way))  # type: ignore[arg-type]
            for way in _RULES
        ]
        yield from rules
        options = {"over": "drop", "target_size": f"{rules[0].num_bytes / 1e3:.3f}kB"}
        yield comparison.search(budget, options, elsewhere=count == _DROPPED[1])


def over_sparsity(comparison: Comparison) -> Iterator[Outcome]:
    """Weights that become zero: as many in every layer, more in half of the layers by two rules, and by the search."""
    model = comparison.load()
    counts = {"cosine": changes(model, comparison.calibration), "outliers": outliers(model)}
    for share in _SPARSITIES:
        budget = f"{share:.0%} zeros"
        yield comparison.rule("sparsity", budget, "all alike", Sparsify(sparsity=share))
        for way, scores in counts.items():
            middle = median(scores)
            shares = {
                str(layer): f"{share + (_SPREAD if score < middle else -_SPREAD):.2f}"
                for layer, score in enumerate(scores)
            }
            yield comparison.rule("sparsity", budget, way, Sparsify(layers=shares))
        options = {"over": "sparsity", "sparsity": share}
        yield comparison.search(budget, options, elsewhere=share == _SPARSITIES[1])


def over_bits(comparison: Comparison) -> Iterator[Outcome]:
    """Layouts of layers: all alike, two kinds by every ranking, and by the search."""
    every = f"0-{len(comparison.load().model.layers) - 1}"
    whole = comparison.size(Quantize(scheme=_TABLES))
    for name, evens in _EVEN.items():
        budget = f"as all in {name}"
        alike = [
            comparison.rule("bits", budget, f"all in {even}", Quantize(scheme=_TABLES, mix={every: even}))
            for even in evens
        ]
        yield from alike
        size = alike[0].num_bytes
        saved = whole - comparison.size(_lowered(_LOWER[name], 1, "outliers"))  # all layers are of one shape
        lowered = math.ceil((whole - size) / saved)
        for way in _RANKINGS:
            yield comparison.rule("bits", budget, way, _lowered(_LOWER[name], lowered, way))
        options = {"over": "bits", "scheme": _TABLES, "target_size": f"{size / 1e3:.3f}kB"}
        yield comparison.search(budget, options, elsewhere=name == "q4_k")


def _lowered(lower: str, count: int, way: str) -> Quantize:
    return Quantize(scheme=_TABLES, lower=lower, lowered=count, by=way)  # type: ignore[arg-type]


_KINDS = {"bits": over_bits, "drop": over_drop, "sparsity": over_sparsity}


def parse_settings() -> Settings:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    samples = ROOT / "samples"
    parser.add_argument("--checkpoint", type=Path, default=samples / "models" / "coder")
    parser.add_argument("--calibration", type=Path, default=samples / "calibration" / "code.jsonl")
    parser.add_argument("--held-out", type=Path, default=samples / "prompts" / "held_out.jsonl")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--held-out-tokens", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--over", nargs="+", choices=list(_KINDS), default=list(_KINDS))
    parser.add_argument("--ray", help="address of a Ray cluster, or local")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "benchmarks" / "compression-search.json"
    )
    return Settings(**vars(parser.parse_args()))


def show(outcomes: list[Outcome]) -> None:
    """A table."""
    table = Table(box=SIMPLE_HEAD)
    for column in (
        "budget",
        "way",
        "MB",
        "KL, calibration",
        "KL, held out",
        "CPU s",
        "two",
        "same",
        "on Ray",
    ):
        table.add_column(column)
    for one in outcomes:
        two = "" if one.cpu_seconds_two is None else f"{one.cpu_seconds_two:.0f}"
        elsewhere = (two, one.two_find_the_same, one.ray_finds_the_same)
        figures = (one.calibration_kl, one.kl)
        table.add_row(
            one.budget, one.way, f"{one.num_bytes / 1e6:.2f}", *(f"{kl:.4f}" for kl in figures),
            f"{one.cpu_seconds:.0f}", *("" if part is None else str(part) for part in elsewhere),
        )  # fmt: skip
    Console(width=120).print(table)


def main() -> None:
    """Compare, show and keep."""
    settings = parse_settings()
    outcomes: list[Outcome] = []
    comparison = Comparison(settings)
    for name in settings.over:
        for outcome in _KINDS[name](comparison):
            print(outcome.over, outcome.budget, outcome.way, f"{outcome.kl:.4f}", flush=True)
            outcomes.append(outcome)
            keep(settings, outcomes)
    show(outcomes)


def keep(settings: Settings, outcomes: list[Outcome]) -> None:
    """Write what there is so far."""
    kept = {
        "command": command_line(),
        "machine": asdict(this_machine()),
        "settings": {key: value for key, value in vars(settings).items() if not isinstance(value, Path)},
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    write_json(settings.output, kept)


if __name__ == "__main__":
    main()
